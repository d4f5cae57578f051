#!/usr/bin/env python3
"""A notice board with Bottle: what one visitor pins up, everybody's page shows at once.

    pip install bottle
    python examples/bottle_notice_board.py        then open http://127.0.0.1:8080/ in two windows

The push server runs inside the application, in threads of its own. An application of several processes is better off
with one beside it, as in the example with Django.

Environment: APP_HOST, APP_PORT, WS_PORT (0 picks a free one), WS_QUEUE_PATH.
"""

import logging
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, Deque, Dict
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from bottle import abort, get, post, request, run, template

# Run from a plain checkout, Python looks for modules beside this file; wsqueue.py is one directory up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wsqueue import WebSocketServer, WsqueueError, queue_event

HERE = Path(__file__).resolve().parent
QUEUE = os.environ.get("WS_QUEUE_PATH") or str(HERE / "logs" / "ws_queue")
HOST, PORT = os.environ.get("APP_HOST") or "127.0.0.1", os.environ.get("APP_PORT") or "8080"
TEXT_LIMIT = 500  # characters of a notice
log = logging.getLogger("board")

push = WebSocketServer()
notices: Deque[Dict[str, Any]] = deque(maxlen=50)  # the latest, in memory: this is no example of databases
lock = threading.Lock()  # guards notices; held while their events are queued, too: these go out in the same order

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Notice board</title>
<form>
  <label>Notice <input name="text" maxlength="500" required></label>
  <button>Pin up</button> <output id="answer"></output>
</form>
<p id="status">connecting</p>
<ul></ul>
<script type="module">
const { WSQueue } = await import(`http://${location.hostname}:{{port}}/wsqueue.mjs`);
const queue = new WSQueue("/");

const known = new Map();  // by id: one that is both fetched and pushed is shown once
function show(notices) {
  for (const { id, text } of notices) known.set(id, text);
  document.querySelector("ul").replaceChildren(...[...known].sort(([a], [b]) => b - a).map(([, text]) => {
    const item = document.createElement("li");
    item.textContent = text;  // as text, never as HTML: anyone may have written it
    return item;
  }));
}
queue.on("notice", notice => show([notice]));
queue.onstatus = async status => {
  document.getElementById("status").textContent = status;
  // What hangs there already is fetched once the events come: the other way round, one could fall in between.
  if (status === "open") show((await (await fetch("/notices")).json()).notices);
};
document.querySelector("form").onsubmit = async event => {
  event.preventDefault();
  const body = JSON.stringify({ text: event.target.text.value });
  const response = await fetch("/notices", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  document.getElementById("answer").textContent = response.ok ? "" : `not pinned up: ${response.status}`;
  if (response.ok) event.target.reset();
};
</script>
</html>
"""


@get("/")
def page() -> str:
    return template(PAGE, port=push.url.rpartition(":")[2])


@get("/notices")
def list_notices() -> Dict[str, Any]:
    with lock:
        return {"notices": list(notices)}


@post("/notices")
def pin_up() -> Dict[str, Any]:
    if request.chunked:
        abort(411, "Send the notice with a Content-Length.")  # Bottle reads chunks to their end, however far that is
    sent = request.json  # None for other content types: those a page of any site might send from a visitor's browser
    text = sent.get("text") if isinstance(sent, dict) else None
    if not isinstance(text, str) or not 1 <= len(text.strip()) <= TEXT_LIMIT:
        abort(400, f'Send JSON such as {{"text": "…"}}, with 1 to {TEXT_LIMIT} characters.')
    with lock:
        notice = {"id": time.time_ns() // 1000, "text": text.strip()}  # an id that is new after a restart, too
        notices.append(notice)
        queued = queue_event(QUEUE, "notice", notice)  # after it has been stored; if False, the log says why
    return {"notice": notice, "queued": queued}


class ThreadingServer(ThreadingMixIn, WSGIServer):
    """One thread per request: browsers also open connections that they do not use yet, for which one would wait."""

    daemon_threads = True

    def server_activate(self) -> None:
        super().server_activate()
        print(f"listening on http://{HOST}:{self.server_port}; ctrl-C ends")
        print(f"push server: {push.url}", flush=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("gave up on %s: %s", client_address[0], sys.exc_info()[1])  # it hung up, or said nothing


class RequestHandler(WSGIRequestHandler):
    timeout = 10  # seconds that a client may be silent


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        push.host(HOST).port(int(os.environ.get("WS_PORT") or 8081)).event_queue(QUEUE).start(background=True)
        if not push.is_running():  # but stands by
            sys.exit(f"another process serves the queue {QUEUE}: stop it, or set WS_QUEUE_PATH to another directory.")
        run(host=HOST, port=int(PORT), server_class=ThreadingServer, handler_class=RequestHandler, quiet=True)
    except (WsqueueError, OSError, ValueError, OverflowError) as error:
        sys.exit(f"cannot start at {HOST}:{PORT}: {error}. Check APP_HOST, APP_PORT, WS_PORT and WS_QUEUE_PATH.")
    finally:
        push.stop()
    print("stopped")


if __name__ == "__main__":
    main()
