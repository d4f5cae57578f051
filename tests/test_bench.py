"""The benchmark runs and counts right. No test here looks at a time: machines differ, and their moods too."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).with_name("bench.py")

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="the load client is written in C: install a compiler (Debian: gcc libc6-dev)")


def run_bench(script, command):
    """Run one subcommand in its quick form."""
    return subprocess.run([sys.executable, str(script), command, "--quick"], capture_output=True,
                          encoding="utf-8", timeout=120, check=False)


@pytest.mark.parametrize("command, messages", [
    ("latency", None),  # four producers with PHP, three without
    ("fanout", 4 * 4 * 20),
    ("target", 2 * 4 + 50),
    ("burst", (2 + 5) * 200 * 10),
    ("memory", 50 + 50 + 10),
    ("connect", 2 * 50),
    ("publish", 0),
    ("idle", 2 * 20),
    ("deflate", 3 * 2 * 3 * 20),
    ("threshold", 0),
    ("stall", 3 * 2 * 100 * (10 - 2)),
    ("flood", 4 * 100 * 10),
    ("resume", 51 + 20 * (50 + 51 + 51 + 1)),
    ("queues", 5 * (4 + 4 + 200)),
])
def test_quick_form_runs_and_delivers_everything(command, messages):
    """Each subcommand prints a table and has delivered exactly what its --quick size makes."""
    done = run_bench(BENCH, command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\| -+ \|", done.stdout, re.M), done.stdout
    delivered = int(re.search(r"^(\d+) messages delivered, none lost", done.stdout, re.M).group(1))
    assert delivered in ({24, 32} if messages is None else {messages})


BROKEN = {
    "a client is left out": (
        "fanout", "for client in self.clients:", "for client in self.clients[1:]:",
        "19 of 20 clients got all 1 messages, 20 are still connected"),
    "a compressed frame that nobody agreed on": (
        "fanout", '"!BBH", 0x81, 126', '"!BBH", 0xC1, 126',
        "0 of 20 clients got all 1 messages, 0 are still connected"),
    "no compression where it was agreed on": (
        "deflate", '{"deflate": True}', '{"deflate": False}', "agreed on the extensions []"),
    "an event of another payload": (
        "deflate", "self.send(event, payload)", "self.send(event, [])", "what came is not what was sent"),
}


@pytest.mark.parametrize("command, good, bad, message", BROKEN.values(), ids=BROKEN)
def test_side_that_fails_is_an_error_not_a_figure(tmp_path, command, good, bad, message):
    """A side that does not do its job ends the run: no table can come from it."""
    broken = tmp_path / "tests" / "bench.py"
    broken.parent.mkdir()
    (tmp_path / "wsqueue.py").symlink_to(BENCH.parent.parent / "wsqueue.py")
    (broken.parent / "bench_load.c").symlink_to(BENCH.with_name("bench_load.c"))
    source = BENCH.read_text(encoding="utf-8")
    assert source.count(good) == 1
    source = source.replace(good, bad).replace("def finish(self, timeout: float = 60)",
                                               "def finish(self, timeout: float = 3)")
    broken.write_text(source, encoding="utf-8")
    done = run_bench(broken, command)
    assert done.returncode == 1
    assert message in done.stderr
    assert "| side" not in done.stdout
