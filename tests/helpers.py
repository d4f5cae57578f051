"""What every suite needs: deadlines instead of sleeps, and the program as a real process."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WSQUEUE = str(ROOT / "wsqueue.py")

# Every deadline is a multiple of this: WSQUEUE_TIME_UNIT=5 gives a slow machine five times as long. Only a
# test that fails ever waits for a deadline, so a generous one costs nothing.
TIME_UNIT = float(os.environ.get("WSQUEUE_TIME_UNIT", "1"))


def spelled(value):
    """The id of a test for a value: repr(), without what differs each time: an address, a secret, the time."""
    return re.sub(r" at 0x[0-9a-f]+|[0-9a-fA-F]{63,64}|\b\d{10}(\.\d)?\b", "…", repr(value))


def eventually(condition, timeout=30.0, what=""):
    """Wait until condition() is true and return its result; fail after timeout, saying what was awaited."""
    deadline = time.monotonic() + timeout * TIME_UNIT
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout * TIME_UNIT:g} s: {what or condition}")
        time.sleep(0.005)


def settled(count):
    """What count() returns once it does not change any more: that somebody has gone is often noticed later."""
    seen = []

    def same():
        seen.append(count())
        return len(seen) > 20 and len(set(seen[-20:])) == 1

    eventually(same, what="a count that does not change")
    return seen[-1]


@contextmanager
def consumers(make):
    """What make(...) returns is opened, and closed when the block ends."""
    with ExitStack() as opened:

        def opener(*args, **options):
            queue = make(*args, **options)
            queue.open()
            opened.callback(queue.close)
            return queue

        yield opener


def put_in_the_way_of(directory):
    """A file where a queue directory was; its server may make it anew in between, so this tries again."""

    def placed():
        shutil.rmtree(str(directory), ignore_errors=True)
        try:
            with open(str(directory), "x"):
                return True
        except OSError:
            return False

    eventually(placed, what=f"a file instead of {directory}")


def run_cli(*args, **kw):
    """Run `python wsqueue.py ARGS` to its end; the result has returncode, stdout and stderr as text."""
    settings = {"capture_output": True, "encoding": "utf-8", "timeout": 30 * TIME_UNIT, **kw}
    return subprocess.run([sys.executable, WSQUEUE, *map(str, args)], check=False, **settings)


class Server:
    """A `wsqueue serve` in a process of its own."""

    def __init__(self, process, output):
        self.process = process
        self.pid = process.pid
        self.url = self.port = None  # known once it listens
        self._output = output

    def stdout_text(self):
        return (self._output / "stdout").read_text("utf-8", "replace")

    def stderr_text(self):
        return (self._output / "stderr").read_text("utf-8", "replace")

    def wait_until_it_listens(self):
        match = eventually(self._announcement, what="a line 'listening on ws://HOST:PORT'")
        self.url, self.port = match[1], int(match[2])

    def _announcement(self):
        match = re.search(r"^listening on (wss?://\S+:(\d+))\n", self.stdout_text(), re.MULTILINE)
        if match is None and self.process.poll() is not None:
            raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.stderr_text()}")
        return match

    def end(self):
        """Ask it to stop, as an init system would, and insist; not stopping when asked is a fault."""
        self.process.terminate()
        try:
            self.process.wait(10 * TIME_UNIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server did not stop on SIGTERM:\n{self.stderr_text()}") from None


@contextmanager
def spawn_server(*args, **popen):
    """Run `python wsqueue.py serve --port 0 ARGS`, usually with "--queue", DIR; gone when the block ends."""
    with run_server([sys.executable, WSQUEUE, "serve", "--port", "0", *map(str, args)], **popen) as server:
        yield server


@contextmanager
def run_server(command, **popen):
    """Run a command that serves, and says so as `wsqueue serve` does; gone when the block ends."""
    with tempfile.TemporaryDirectory(prefix="wsqueue-test-") as output:
        # Files and not pipes: no thread has to empty them, and the server never waits for us.
        with open(f"{output}/stdout", "wb") as out, open(f"{output}/stderr", "wb") as err:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, **popen)
        server = Server(process, Path(output))
        try:
            server.wait_until_it_listens()
            yield server
        finally:
            server.end()
