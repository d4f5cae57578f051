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
    ("burst", (2 + 5) * 200 * 10),
    ("memory", 50 + 50 + 10),
    ("connect", 2 * 50),
    ("publish", 0),
    ("idle", 2 * 20),
    ("stall", 3 * 2 * 200 * 10),
])
def test_quick_form_runs_and_delivers_everything(command, messages):
    """Each subcommand prints a table and has delivered exactly what its --quick size makes."""
    done = run_bench(BENCH, command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\| -+ \|", done.stdout, re.M), done.stdout
    delivered = int(re.search(r"^(\d+) messages delivered, none lost", done.stdout, re.M).group(1))
    assert delivered in ({24, 32} if messages is None else {messages})


def test_lost_message_is_an_error_not_a_figure(tmp_path):
    """A side that skips a client ends the run: no table can come from it."""
    broken = tmp_path / "tests" / "bench.py"
    broken.parent.mkdir()
    (tmp_path / "wsqueue.py").symlink_to(BENCH.parent.parent / "wsqueue.py")
    (broken.parent / "bench_load.c").symlink_to(BENCH.with_name("bench_load.c"))
    loop, broken_loop = "for client in self.clients:", "for client in self.clients[1:]:"
    source = BENCH.read_text(encoding="utf-8")
    assert loop in source
    source = source.replace(loop, broken_loop).replace("def finish(self, timeout: float = 60)",
                                                       "def finish(self, timeout: float = 3)")
    broken.write_text(source, encoding="utf-8")
    done = run_bench(broken, "fanout")
    assert done.returncode == 1
    assert "19 of 20 clients got all 1 messages, 20 are still connected" in done.stderr
    assert "| bare" not in done.stdout
