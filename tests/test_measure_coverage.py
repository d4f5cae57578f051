"""The measurement of what the tests reach, in its short form: it must see the processes that a test starts."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from helpers import TIME_UNIT, WSQUEUE

# Collected only where the script runs: the coverage of older Pythons does not follow a process that is told to end.
__test__ = sys.version_info >= (3, 9)

SCRIPT = Path(__file__).with_name("measure_coverage.py")
FUNCTIONS = {node.name: {statement.lineno for statement in node.body[1:]}  # the first may be a docstring
             for node in ast.walk(ast.parse(Path(WSQUEUE).read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}

# Each way in which a process can come to the file, and one function that nothing else here calls.
SUITE = f"""
import os, shutil, signal, subprocess, sys
import wsqueue

def test_in_this_process():
    assert wsqueue.accept_key("") != ""

def test_a_child_of_a_fork():
    pid = os.fork()
    if not pid:
        wsqueue.notice("in the child")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

def test_a_copy_in_a_process_of_its_own(tmp_path):
    shutil.copy({WSQUEUE!r}, tmp_path)
    code = "import wsqueue; wsqueue.encode_response('200 OK', b'')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)

def test_a_process_that_is_told_to_end(tmp_path):
    code = "import wsqueue; wsqueue.sign_ticket('a secret'); print(flush=True); __import__('signal').pause()"
    with subprocess.Popen([sys.executable, "-c", code], cwd={str(Path(WSQUEUE).parent)!r}, stdout=-1) as process:
        process.stdout.readline()
        process.terminate()
    assert process.returncode == -signal.SIGTERM
"""
REACHED = ("accept_key", "notice", "encode_response", "sign_ticket")


def measure(directory, program, *options):
    """Run the script over tests; returns its exit status, and what it says."""
    suite = directory / "test_suite.py"
    suite.write_text(f"import sys; sys.path.insert(0, {str(Path(WSQUEUE).parent)!r})\n{program}", "utf-8")
    done = subprocess.run([sys.executable, str(SCRIPT), *options, str(suite)], cwd=str(directory), check=False,
                          capture_output=True, encoding="utf-8", timeout=50 * TIME_UNIT)
    assert " passed" in done.stdout and " failed" not in done.stdout, done.stdout + done.stderr
    return done.returncode, done.stdout


def test_every_process_is_measured(tmp_path):
    """What runs here, in a forked child, in a copy elsewhere, or until SIGTERM, counts; the rest does not."""
    status, said = measure(tmp_path, SUITE)
    assert status == 1  # so little is an error
    percent, missing = re.search(r"^\S*wsqueue\.py .* ([\d.]+)% +(.+)$", said, re.MULTILINE).groups()
    assert 0 < float(percent) < 97
    spans = [span.split("-") for span in missing.split(", ") if "->" not in span]
    lines = {line for first, *last in spans for line in range(int(first), int(last[0] if last else first) + 1)}
    assert [name for name in REACHED if FUNCTIONS[name] & lines] == []
    assert FUNCTIONS["queue_event"] & lines and FUNCTIONS["verify_ticket"] & lines


def test_enough_is_what_one_asks_for(tmp_path):
    """Status 0."""
    assert measure(tmp_path, "import wsqueue\ndef test(): pass", "--fail-under", "10")[0] == 0
