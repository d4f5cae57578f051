"""The benchmark runs and counts right. No test here looks at a time: machines differ, and their moods too."""

import csv
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import NCHAN, NGINX
from brokers import REDIS
from helpers import TIME_UNIT

BENCH = Path(__file__).with_name("bench.py")
NEEDED = (
    ("Debian's libnginx-mod-nchan", NGINX and NCHAN, ("fanout", "burst", "memory", "connect", "plot")),
    ("Debian's redis-server", REDIS, ("publish", "queues")),
    ("matplotlib", find_spec("matplotlib"), ("plot",)),
)

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="the load client is written in C: install a compiler (Debian: gcc libc6-dev)")


def run_bench(script, command, *options):
    """Run one subcommand in its quick form."""
    for package, program, commands in NEEDED:
        if command in commands and not program:
            pytest.skip(f"needs {package}")
    # Its own deadlines are 60 s and less, and say what did not come.
    return subprocess.run([sys.executable, str(script), command, "--quick", *map(str, options)], capture_output=True,
                          encoding="utf-8", timeout=100 * TIME_UNIT, check=False)


@pytest.mark.parametrize("command, messages", [
    ("latency", None),  # four producers with PHP, three without
    ("fanout", 7 * (2 + 2) * (10 + 20)),
    ("target", 2 * 4 + 50),
    ("burst", (2 * (20 + 200 + 200) + 4 * (20 + 20)) * (10 + 20)),
    ("sustained", 2 * 200 * 20),
    ("drain", 1 + 500),
    ("growth", (2 + 10) * (1 + 5 + 20) + (1_000 + 1 + 200) + (1 + 100) + 2 * 500 + 501),
    ("stages", 3 * (1 + 20)),
    ("memory", 4 * 50),
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


def test_plot_is_drawn_from_its_numbers(tmp_path):
    """bench.csv has a row for each server and size, and --from-csv draws the same again without measuring."""
    picture, numbers = tmp_path / "bench.png", tmp_path / "bench.csv"
    done = run_bench(BENCH, "plot", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"\n{3 * (2 + 2 + 1) * (1 + 10)} messages delivered, none lost" in done.stdout
    with open(numbers, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({(row["side"], row["clients"]) for row in rows}) == len(rows) == 3 * 2
    assert all(0 < float(row["median_ms"]) <= float(row["last_ms"]) for row in rows)
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")
    picture.unlink()
    done = run_bench(BENCH, "plot", "--output", tmp_path, "--from-csv")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert picture.read_bytes() == first


def test_too_few_descriptors_are_an_error_at_once():
    """Who wants more clients than the system allows is told so, and not by a connection that fails."""
    done = run_bench(BENCH, "target", "--clients", 10**9)
    assert done.returncode == 1
    assert "1000000000 clients need 1000000100 descriptors in each process; `ulimit -Hn` allows" in done.stderr


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
    "memory of a process that holds no client": (
        "memory", "bench.py", "side.url, *side.pids()", "side.url, os.getpid()",
        "nginx with nchan: its clients take no memory"),
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
