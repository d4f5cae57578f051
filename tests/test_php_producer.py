"""The directory as a contract: producers that know nothing of Python, and write without any care."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest

from helpers import TIME_UNIT, eventually
from wsqueue import DirectoryQueue

needs_php = pytest.mark.skipif(shutil.which("php") is None, reason="needs PHP's command line (Debian: php-cli)")

# The name of the reference, and its way of writing: the file is there before its content is.
PHP = r"""
[, $directory, $count, $padding] = $argv;
for ($number = 0; $number < $count; $number++) {
    $name = $directory . '/' . microtime(true) . '_' . uniqid() . '.json';
    $event = ['event' => 'appointment_created', 'timestamp' => time(), 'queued_at' => microtime(true),
              'payload' => ['number' => $number, 'patient' => 'José', 'padding' => str_repeat('x', (int) $padding)]];
    if (file_put_contents($name, json_encode($event)) === false) {
        exit(1);
    }
}
"""

# A temporary name, and then the real one: whole or not at all.
SHELL_MV = r"""
number=0
while [ "$number" -lt "$2" ]; do
    printf '{"event":"appointment_created","payload":{"number":%d}}\n' "$number" >"$1/.new"
    mv "$1/.new" "$1/$(date +%s%N).json" || exit 1
    number=$((number + 1))
done
"""

# The file is there, and empty, before printf has even started.
SHELL_REDIRECTION = r"""
number=0
while [ "$number" -lt "$2" ]; do
    { printf '{"event":"appointment_created",'; printf '"payload":{"number":%d}}' "$number"; } >"$1/$(date +%s%N).json"
    number=$((number + 1))
done
"""

# A name without any time, each in its turn: the next is written when the last one is gone.
SHELL_ONE_NAME = r"""
number=0
while [ "$number" -lt "$2" ]; do
    printf '{"event":"appointment_created","payload":{"number":%d}}' "$number" >"$1/x.json"
    while [ -e "$1/x.json" ]; do :; done
    number=$((number + 1))
done
"""

# PHP's own way to be atomic.
PHP_RENAME = r"""
[, $directory, $count] = $argv;
for ($number = 0; $number < $count; $number++) {
    $name = microtime(true) . '_' . uniqid() . '.json';
    $event = ['event' => 'appointment_created', 'payload' => ['number' => $number]];
    file_put_contents("$directory/.$name.tmp", json_encode($event), LOCK_EX);
    rename("$directory/.$name.tmp", "$directory/$name") || exit(1);
}
"""

# One event in pieces, with a pause for which the test decides how long it lasts.
PHP_SLOW = r"""
[, $directory] = $argv;
$file = fopen($directory . '/' . microtime(true) . '_' . uniqid() . '.json', 'w');
fwrite($file, '{"event":"appointment_created","payload":');
fflush($file);
echo "half\n";
fgets(STDIN);
fwrite($file, '{"number":0}}');
fclose($file);
"""


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "ws_queue"
    path.mkdir()
    return path


@pytest.fixture
def queue(directory):
    queue = DirectoryQueue(str(directory))
    queue.open()
    yield queue
    queue.close()


@contextmanager
def producer(*command, **popen):
    """A program that is gone when the block ends."""
    settings = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    process = subprocess.Popen(list(map(str, command)), **settings, **popen)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def php(code, *args):
    return producer("php", "-r", code, "--", *args)


def shell(code, *args):
    return producer("sh", "-c", code, "sh", *args)


def receive(queue):
    """One turn of a server."""
    events = queue.take()
    queue.done(events)
    if not events:
        queue.wait(0.01)
    return [json.loads(event.text.decode()) for event in events]


def served(queue, process, count):
    """What a server sends while the producer runs, until it has sent so many events and the producer has ended."""
    events = []

    def complete():
        events.extend(receive(queue))
        return process.poll() is not None and len(events) >= count

    eventually(complete, 45, f"{count} events")
    assert process.returncode == 0, process.stdout.read()
    return events


def assert_all_in_order(events, count, directory):
    """Each event once, in the order in which they were written, and nothing left or set aside."""
    assert [event["payload"]["number"] for event in events] == list(range(count))
    assert {event["event"] for event in events} == {"appointment_created"}
    assert [name for name in os.listdir(directory) if not name.startswith(".")] == []


@needs_php
@pytest.mark.parametrize("padding, count", [(10, 2000), (30_000, 300)])
def test_php_may_write_as_it_always_did(directory, queue, padding, count):
    """file_put_contents with a microtime_uniqid name while a server runs: all events, whole, once and in order."""
    with php(PHP, directory, count, padding) as process:
        events = served(queue, process, count)
    assert_all_in_order(events, count, directory)
    assert all(event["payload"]["patient"] == "José" for event in events)
    assert {len(event["payload"]["padding"]) for event in events} == {padding}


@needs_php
def test_what_php_wrote_before_the_server_came_is_in_order(directory):
    """The float in PHP's names has lost its trailing zeros: sorted as text, a tenth of them would be out of place."""
    with php(PHP, directory, 2000, 10) as process:
        assert process.wait(30 * TIME_UNIT) == 0
    queue = DirectoryQueue(str(directory))
    queue.open()
    try:
        assert_all_in_order(served(queue, process, 2000), 2000, directory)
    finally:
        queue.close()


@needs_php
def test_php_may_rename(directory, queue):
    """Temporary file and rename(): the atomic way that the documentation recommends."""
    with php(PHP_RENAME, directory, 500) as process:
        assert_all_in_order(served(queue, process, 500), 500, directory)


@needs_php
def test_php_that_stops_in_mid_write_is_waited_for(directory, queue):
    """Half an event is no event, and no failure either; its other half makes it one."""
    with php(PHP_SLOW, directory) as process:
        assert process.stdout.readline() == "half\n"
        for _ in range(50):
            assert queue.take() == []
        assert not (directory / "failed").exists()
        process.stdin.write("\n")
        process.stdin.flush()
        assert_all_in_order(served(queue, process, 1), 1, directory)


@pytest.mark.parametrize(
    "code, count", [(SHELL_MV, 200), (SHELL_REDIRECTION, 200), (SHELL_ONE_NAME, 50)],
    ids=["mv", "redirection", "one name"])
def test_a_shell_script_is_a_producer(directory, queue, code, count):
    """printf with mv, and printf with a plain redirection: all events, whole, once and in order."""
    with shell(code, directory, count) as process:
        assert_all_in_order(served(queue, process, count), count, directory)
