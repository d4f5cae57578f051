"""Take the picture of the monitor page that README.md shows:  python tests/screenshot.py

A real server, clients on a few topics, events for a little while, and one file that is no event; then Chromium looks.
"""

import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from browser import emulate, run_chromium
from clients import RawClient
from helpers import ROOT, eventually, spawn_server
from wsqueue import queue_event

PICTURE = ROOT / "tests" / "monitor.png"
SECONDS = 40  # the page draws a rate, so it needs to have seen one
PATHS = ("/orders", "/orders", "/orders", "/chat", "/chat", "/reports", "/")


def some_event(number):
    """One of what a shop would send: its name, its payload and its topics."""
    order = {"id": 4200 + number, "total": f"{random.uniform(5, 250):.2f}"}
    return random.choice([
        ("order_paid", order, None), ("order_paid", order, None), ("order_paid", order, "/orders"),
        ("order_status_changed", {"id": order["id"], "status": "shipped"}, None),
        ("new_message", {"from": "Ada", "text": "Is the report there yet?"}, ["/chat", "/"]),
        ("report_ready", {"rows": 1200 + number}, "/reports"),
        ("backup_done", {"bytes": 81_204_224 + number}, None),
    ])


def traffic(queue):
    """Events for as long as the picture needs, now more and now fewer."""
    (Path(queue) / "1763890123.4567_from_an_old_script.json").write_text('{"evnt": "order_paid"}', "utf-8")
    for second in range(SECONDS):
        for number in range(random.randrange(1, 4 + second % 17)):
            event, payload, to = some_event(10 * second + number)
            queue_event(queue, event, payload, to=to)
            time.sleep(random.uniform(0.02, 0.09))
        time.sleep(0.3)


def main():
    with tempfile.TemporaryDirectory(prefix="wsqueue-screenshot-") as base, ExitStack() as stack:
        queue = f"{base}/ws_queue"
        server = stack.enter_context(spawn_server("--queue", "ws_queue", "--ping-interval", 0, cwd=base))
        for path in PATHS * 6:
            stack.enter_context(RawClient(server.url, path))
        driver = stack.enter_context(run_chromium(f"{base}/profile"))
        driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
        emulate(driver, 1280, 925)
        driver.get(server.url.replace("ws", "http", 1))
        eventually(lambda: driver.execute_script("return document.getElementById('clients').textContent") == "42",
                   what="the clients on the page")
        traffic(queue)
        driver.save_screenshot(str(PICTURE))
    print(PICTURE)


if __name__ == "__main__":
    main()
