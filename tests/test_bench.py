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
    ("fanout", 7 * (2 + 2) * (10 + 20)),
    ("target", 2 * 4 + 50),
    ("burst", (2 * (200 + 20) + 4 * (20 + 20)) * (10 + 20)),
    ("sustained", 2 * 200 * 20),
    ("drain", 1 + 500),
    ("growth", (2 + 10) * (1 + 5 + 20) + (1_000 + 1 + 200) + 2 * 100 + 2 * 500 + 501),
    ("memory", 5 * 50),
    ("connect", 3 * 50),
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
        "fanout", "bench_floor.c", "int c = 0;", "int c = 1;",
        "9 of 10 clients got all 2 messages, 10 are still connected"),
    "a compressed frame that nobody agreed on": (
        "fanout", "bench_floor.c", "{0x81, 126", "{0xC1, 126",
        "0 of 10 clients got all 2 messages, 0 are still connected"),
    "an event that is not the one that was asked for": (
        "fanout", "bench_floor.c", "first + i", "first", "the messages are not those that were queued"),
    "a peer that loses what it has taken": (
        "fanout", "bench.py", "nchan_channel_id bench;\n            nchan_subscriber_first",
        "nchan_channel_id other;\n            nchan_subscriber_first",
        "0 of 10 clients got all 2 messages, 10 are still connected"),
    "no compression where it was agreed on": (
        "deflate", "bench.py", '{"deflate": True}', '{"deflate": False}', "agreed on the extensions []"),
    "an event of another payload": (
        "deflate", "bench.py", "self.send(event, payload)", "self.send(event, [])", "what came is not what was sent"),
}


def change(file, good, bad):
    source = file.read_text(encoding="utf-8")
    assert source.count(good) == 1
    file.unlink()
    file.write_text(source.replace(good, bad), encoding="utf-8")


@pytest.mark.parametrize("command, name, good, bad, message", BROKEN.values(), ids=BROKEN)
def test_side_that_fails_is_an_error_not_a_figure(tmp_path, command, name, good, bad, message):
    """A side that does not do its job ends the run: no table can come from it."""
    (tmp_path / "tests").mkdir()
    for source in (BENCH.parent.parent / "wsqueue.py", *BENCH.parent.glob("bench*")):
        shutil.copy(source, tmp_path / source.relative_to(BENCH.parent.parent))
    broken = tmp_path / "tests" / "bench.py"
    change(broken, "def finish(self, timeout: float = 60)", "def finish(self, timeout: float = 3)")
    change(broken.with_name(name), good, bad)
    done = run_bench(broken, command)
    assert done.returncode == 1
    assert message in done.stderr
    assert "| side" not in done.stdout
