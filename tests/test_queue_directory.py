"""Section 5: the queue directory, with real files and real processes. Clocks are injected: no test waits for time."""

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
import websocket_server

import wsqueue
from helpers import ROOT, TIME_UNIT, consumers, eventually
from wsqueue import DirectoryQueue, EventError, QueueError, name_stamp, open_queue, queue_event, queue_events

TICK = 0.125  # poll_interval where clocks are injected; a sum of such ticks is exact in binary
NOBODY = 65534
IS_ROOT = os.getuid() == 0
# Imported where they are needed, from where nobody may not be able to read them.
PRELOADED = (ctypes, fcntl, websocket_server)


# ---- Helpers -----------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when a test says so: wall() is the time of day, monotonic() cannot be set."""

    def __init__(self):
        self.day = 1763890123.0
        self.steady = 1000.0

    def wall(self):
        return self.day

    def monotonic(self):
        return self.steady

    def advance(self, seconds):
        self.day += seconds
        self.steady += seconds

    def tick(self):
        self.advance(TICK)


class Folder:
    """A queue directory as producers in other languages see it; times are the injected clock's."""

    def __init__(self, path, clock):
        self.path = path
        self.clock = clock

    def name(self, ago=1.0):
        """A name as PHP makes it, stamped so many seconds ago."""
        return php_name(round((self.clock.day - ago) * 1e6))

    def drop(self, event="e", ago=1.0, name=None, payload=None):
        """A whole event file; returns its path."""
        return self.write(name or self.name(ago), json.dumps({"event": event, "payload": payload}).encode())

    def write(self, name, data):
        path = os.path.join(os.fsencode(self.path), os.fsencode(name))
        with open(path, "wb") as file:
            file.write(data)
        return self.touch(path)

    def touch(self, path):
        """Change its modification time to the injected clock's."""
        os.utime(path, (self.clock.day, self.clock.day), follow_symlinks=False)
        return Path(os.fsdecode(path))

    def ready(self):
        """The names of what waits, in the directory's own order."""
        return [name for name in os.listdir(self.path) if name.endswith(".json") and not name.startswith(".")]

    def temporary(self):
        return [name for name in os.listdir(self.path) if name.endswith(".tmp")]

    def failed(self):
        """Name -> reason of what was set aside; the reason is None where it has no file."""
        directory = self.path / "failed"
        names = [name for name in os.listdir(directory) if not name.endswith(".reason")] if directory.is_dir() else []
        reasons = {name: directory / f"{name}.reason" for name in names}
        return {name: path.read_text() if os.path.exists(path) else None for name, path in reasons.items()}


def php_name(micros):
    """microtime(true) . '_' . uniqid() . '.json', with the float's trailing zeros gone as PHP prints it."""
    seconds, rest = divmod(micros, 1_000_000)
    number = f"{seconds}.{rest // 100:04d}".rstrip("0").rstrip(".")
    return f"{number}_{seconds:08x}{rest:05x}.json"


def named(events):
    return [json.loads(event.text.decode())["event"] for event in events]


def payloads(events):
    return [json.loads(event.text.decode())["payload"] for event in events]


def serve(queue):
    """One turn of a server: take what there is, and be done with it; returns the events' names."""
    events = queue.take()
    queue.done(events)
    return named(events)


def serve_ticks(queue, clock, seconds):
    """As many turns as there are ticks in so much time; returns what they sent."""
    sent = []
    for _ in range(round(seconds / TICK)):
        sent += serve(queue)
        clock.tick()
    return sent


def ticks_until(queue, clock, event):
    """How many ticks pass before the event is sent."""
    for ticks in range(100):
        if event in serve(queue):
            return ticks
        clock.tick()
    raise AssertionError(f"{event} was not sent in 100 ticks")


def drain(queue, count, seconds=30.0):
    """The next `count` events, with the real clock."""
    events = []

    def enough():
        more = queue.take()
        queue.done(more)
        events.extend(more)
        if not more and len(events) < count:
            queue.wait(0.01)
        return len(events) >= count

    eventually(enough, seconds, f"{count} events")
    return events


@contextmanager
def python(code, *args):
    """Code that imports wsqueue, in a process of its own that is gone when the block ends."""
    command = [sys.executable, "-c", code, *map(str, args)]
    settings = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **settings)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run_python(code, *args):
    """The same, to its end, which must be a good one."""
    with python(code, *args) as process:
        _output, errors = process.communicate(timeout=50 * TIME_UNIT)
        assert (process.returncode, errors) == (0, "")


@contextmanager
def unprivileged():
    """As root, be nobody for the length of the block: root can read and remove everything."""
    if not IS_ROOT:
        yield
        return
    os.setresgid(NOBODY, NOBODY, 0)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


@contextmanager
def as_root():
    """Within unprivileged(): be root again, where root is who runs the tests."""
    user = os.getuid()
    if IS_ROOT:
        os.setresuid(0, 0, 0)
    try:
        yield
    finally:
        if IS_ROOT:
            os.setresuid(user, user, 0)


def forbid_removal(folder):
    """From a directory that may not be written nothing is removed; root does it with another owner's sticky bit."""
    with as_root():
        folder.path.chmod(0o1777 if IS_ROOT else 0o555)


def allow_removal(folder):
    with as_root():
        folder.path.chmod(0o777)


def make_unreadable(folder, name):
    """Root's own, or at least closed to the one who runs the tests."""
    path = folder.drop("closed", name=name)
    path.chmod(0o000)
    return path


@contextmanager
def waiting(queue, timeout=600.0):
    """A thread that waits far longer than the test may take; yields its end as an event."""
    ended = threading.Event()

    def wait():
        queue.wait(timeout)
        ended.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        queue.wake()
        thread.join(10 * TIME_UNIT)


def assert_clear(text, *words):
    """A message for people: one line, no traceback, and it names what it is about."""
    assert "Traceback" not in text and "\n" not in text.strip()
    for word in words:
        assert word in text


def messages(caplog, level="ERROR"):
    """What was logged at that level, each message fit for people."""
    records = [record for record in caplog.records if record.levelname == level]
    for record in records:
        assert record.name == "wsqueue" and record.exc_info is None
        assert_clear(record.getMessage())
    return [record.getMessage() for record in records]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def base():
    """A directory that nobody may use, too; pytest's own is for the user who runs the tests."""
    path = Path(tempfile.mkdtemp(prefix="wsqueue-test-"))
    path.chmod(0o777)
    yield path
    for closed in (path, path / "queue"):
        if closed.is_dir():
            closed.chmod(0o777)
    shutil.rmtree(path)


@pytest.fixture
def folder(base, clock):
    path = base / "queue"
    path.mkdir()
    path.chmod(0o777)
    return Folder(path, clock)


@pytest.fixture
def make_queue(folder, clock):
    """Opens queues on the folder, with the injected clocks unless told otherwise, and closes them."""

    def make(**options):
        settings = {"clock": clock.wall, "monotonic": clock.monotonic, "poll_interval": TICK, **options}
        return DirectoryQueue(str(folder.path), **settings)

    with consumers(make) as opener:
        yield opener


@pytest.fixture
def queue(make_queue):
    return make_queue()


@pytest.fixture
def live(make_queue):
    """A queue with the real clocks, for events that queue_event stamps."""
    return make_queue(clock=time.time, monotonic=time.monotonic)


@pytest.fixture
def small_disk(base):
    """A file system of 64 KiB."""
    if not IS_ROOT:
        pytest.skip("only root can mount a small disk")
    path = base / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


needs_root = pytest.mark.skipif(not IS_ROOT, reason="needs files of another user, which only root can make")


# ---- Names and stamps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, stamp",  # seconds_microseconds
    [
        ("1763890123.4567_6922d3cb6f80f.json", 1763890123_456719),  # PHP: uniqid() is finer than the float
        ("1763890123.45_6922d3cb6ddd0.json", 1763890123_450000),  # PHP drops trailing zeros
        ("1763890123_6922d3cb00000.json", 1763890123_000000),
        ("1763890123.4567_6922d3cb6f80f00010001.json", 1763890123_456719),  # with pid and counter
        ("1763890123.4567_6922d3cb6f80f.12345678.json", 1763890123_456719),  # uniqid('', true)
        ("order_6922d3cb6f80f.json", 1763890123_456719),
        ("1763890123.json", 1763890123_000000),  # date +%s
        ("1763890123.5.json", 1763890123_500000),
        ("1763890123500.json", 1763890123_500000),  # Date.now()
        ("1763890123500000.json", 1763890123_500000),
        ("1763890123500000000.json", 1763890123_500000),  # date +%s%N
        ("1763890123-order.json", 1763890123_000000),
        ("order.json", None),
        ("order-1763890123.json", None),
        ("x_6922d3cb6f8.json", None),  # not 13 digits
        ("x_6922D3CB6F80F.json", None),
        ("new\nline.json", None),
        ("\udcff.json", None),
    ],
)
def test_a_stamp_is_read_from_the_name(name, stamp):
    """The 13 digits of uniqid() count, else the leading number in whatever unit, else there is none."""
    assert name_stamp(name) == stamp


@pytest.mark.parametrize("digits", [30, 100, 250])
def test_a_number_of_any_length_is_only_a_stamp(digits):
    """A name cannot be too large a number."""
    assert isinstance(name_stamp("9" * digits + ".json"), int)


def test_names_have_the_shape_of_the_reference(folder):
    """microtime(true) _ uniqid() with pid and counter, both halves telling the same time."""
    before = time.time()
    for _ in range(50):
        assert queue_event(folder.path, "e")
    after = time.time()
    for name in folder.ready():
        match = re.fullmatch(r"(\d{10}\.\d{4})_([0-9a-f]{8})([0-9a-f]{5})[0-9a-f]{8}\.json", name)
        seconds = int(match[2], 16) + int(match[3], 16) / 1e6
        assert 0 <= seconds - float(match[1]) < 0.0002
        assert before - 0.001 <= seconds <= after + 0.001


def test_stamps_never_repeat_across_threads(folder):
    """Eight threads at once: every event has a stamp of its own, and each thread's are in its order."""
    start = threading.Barrier(8)

    def produce(thread):
        start.wait()
        for number in range(250):
            assert queue_event(folder.path, f"thread {thread}", number)

    threads = [threading.Thread(target=produce, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folder.ready()) == 2000
    assert len({name_stamp(name) for name in folder.ready()}) == 2000
    assert_in_order(folder, [f"thread {number}" for number in range(8)], 250)


def assert_in_order(folder, producers, count):
    """By stamp, each producer's events are in the order in which it numbered them."""
    seen = {producer: [] for producer in producers}
    for name in sorted(folder.ready(), key=name_stamp):
        record = json.loads((folder.path / name).read_text())
        seen[record["event"]].append(record["payload"])
    assert seen == {producer: list(range(count)) for producer in producers}


BACKWARDS = """
import os, sys, time
now = 1763890123.0
def step_back():
    global now
    now -= 0.25
    return now
time.time = step_back
time.time_ns = lambda: int(step_back() * 1e9)
import wsqueue

def produce(event, first):
    for number in range(first, first + 100):
        assert wsqueue.queue_event(sys.argv[1], event, number)

produce("parent", 0)
"""


def test_stamps_go_on_when_the_clock_steps_back(folder):
    """A clock that is set back before every event changes nothing about their order."""
    run_python(BACKWARDS, folder.path)
    assert_in_order(folder, ["parent"], 100)
    assert len({name_stamp(name) for name in folder.ready()}) == 100


def test_stamps_go_on_in_a_forked_child(folder):
    """What a child queues after a fork comes after what its parent queued before, and nobody's name is another's."""
    run_python(
        BACKWARDS + "child = os.fork()\nproduce('parent' if child else 'child', 100)\nif child: os.waitpid(child, 0)\n",
        folder.path,
    )
    records = {name: json.loads((folder.path / name).read_text()) for name in folder.ready()}
    stamps = {(record["event"], record["payload"]): name_stamp(name) for name, record in records.items()}
    for event in ("parent", "child"):
        line = [stamps["parent", n] for n in range(100)] + [stamps[event, n] for n in range(100, 200)]
        assert line == sorted(set(line))


# ---- Publishing --------------------------------------------------------------------------------------------


def test_what_is_put_is_what_is_taken(live):
    """Every part of an event survives the directory."""
    live.put([("größe", {"a": [1, None, 2.5]})], to=["/shop", "user:7"], durable=True)
    (event,) = drain(live, 1)
    message = json.loads(event.text.decode())
    assert (message["event"], message["payload"]) == ("größe", {"a": [1, None, 2.5]})
    assert event.to == ("/shop", "user:7")
    assert 0 <= time.time() - event.queued_at < 60 * TIME_UNIT
    assert message["timestamp"] == int(event.queued_at)


def test_an_event_is_put_with_the_time_of_the_injected_clock(folder, queue, clock):
    """timestamp and queued_at are from one look at the clock."""
    queue.put([("e", None)])
    record = json.loads((folder.path / folder.ready()[0]).read_text())
    assert (record["timestamp"], record["queued_at"]) == (int(clock.day), clock.day)


def test_several_events_are_one_file(folder):
    """All or nothing, in the order given: an array, published once."""
    assert queue_events(folder.path, [("a", 1), ("b", 2)], to="/x")
    (name,) = folder.ready()
    records = json.loads((folder.path / name).read_text())
    assert [(record["event"], record["payload"], record["to"]) for record in records] == [
        ("a", 1, ["/x"]), ("b", 2, ["/x"])]


def test_topics_may_come_from_a_generator(folder):
    """Each of several events is for all the topics, however they were listed."""
    assert queue_events(folder.path, [("a", 1), ("b", 2)], to=(topic for topic in ["/x", "/y"]))
    records = json.loads((folder.path / folder.ready()[0]).read_text())
    assert [record["to"] for record in records] == [["/x", "/y"], ["/x", "/y"]]


def test_no_events_are_no_file(folder):
    """An empty batch is queued by doing nothing."""
    assert queue_events(folder.path, [])
    assert folder.ready() == []


def test_the_directory_is_made_when_it_is_missing(base):
    """A producer may be there before the server, and any number of levels up."""
    assert queue_event(base / "logs" / "deep" / "ws_queue", "e")
    assert len(list((base / "logs" / "deep" / "ws_queue").glob("*.json"))) == 1


@pytest.mark.parametrize("form", [str, os.fsencode, Path], ids=["str", "bytes", "Path"])
def test_a_directory_may_be_given_in_any_form_of_a_path(folder, form):
    """Text, bytes and Path objects all name the same directory."""
    assert queue_event(form(str(folder.path)), "e")
    assert len(folder.ready()) == 1


def test_a_reader_never_sees_a_part(folder, monkeypatch):
    """The name that consumers look for appears when the file is whole, and not before."""
    seen = []
    rename = os.rename

    def look(source, target):
        seen.append((folder.ready(), json.loads(Path(source).read_text())["event"]))
        rename(source, target)

    monkeypatch.setattr(os, "rename", look)
    monkeypatch.setattr(os, "replace", look)
    assert queue_event(folder.path, "e")
    assert seen == [([], "e")]


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["error", "ctrl-C"])
def test_nothing_is_left_when_publishing_fails(folder, queue, monkeypatch, call, error):
    """Whatever goes wrong, and whenever: no event, and no temporary file."""

    def fail(*_args):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises((QueueError, KeyboardInterrupt)):
        queue.put([("e", 1)], durable=True)
    assert (folder.ready(), folder.temporary()) == ([], [])


def test_an_event_that_no_server_would_take_is_refused_at_once(folder, queue):
    """The producer learns that its event is too large, and not the log of a server elsewhere."""
    with pytest.raises(EventError, match="max_event_bytes"):
        queue.put([("e", "x" * 2**20)])
    assert not queue_event(folder.path, "e", "x" * 2**20)
    assert (folder.ready(), folder.temporary()) == ([], [])


class Unspeakable:
    pass


FAULTS = {
    "NaN": ({"payload": float("nan")}, "'e'"),
    "object": ({"payload": Unspeakable()}, "Unspeakable"),
    "circle": ({"payload": [lambda: None]}, "function"),
    "empty name": ({"event": ""}, "empty string"),
    "no name": ({"event": None}, "null"),
    "empty topics": ({"to": []}, '"to"'),
    "path is a file": ({"queue": "{base}/file"}, "{base}/file"),
    "path below a file": ({"queue": "{base}/file/queue"}, "{base}/file/queue"),
    "unknown scheme": ({"queue": "gopher://localhost/q"}, "gopher://"),
    "NUL in the path": ({"queue": "a\0b"}, "NUL"),
    "empty path": ({"queue": ""}, "empty"),
    "no path": ({"queue": None}, "NoneType"),
    "number as path": ({"queue": 3}, "int"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_queue_event_never_raises_and_says_why_not(base, caplog, fault):
    """False, and one line at ERROR under "wsqueue"; put() raises with the very same words."""
    (base / "file").write_text("")
    given, word = FAULTS[fault]
    call = {"queue": str(base / "queue"), "event": "e", "payload": None, "to": None, **given}
    if isinstance(call["queue"], str):
        call["queue"] = call["queue"].replace("{base}", str(base))
    assert queue_event(call["queue"], call["event"], call["payload"], to=call["to"]) is False
    assert queue_events(call["queue"], [(call["event"], call["payload"])], to=call["to"]) is False
    one, several = messages(caplog)
    assert_clear(one, word.replace("{base}", str(base)))
    with pytest.raises((QueueError, EventError)) as caught:
        open_queue(call["queue"]).put([(call["event"], call["payload"])], to=call["to"])
    assert one == several and one.endswith(str(caught.value))
    assert list(base.rglob("*.tmp")) == []


@pytest.mark.parametrize("events", [None, 7, ["ab", "cde"], [("e",)], [("e", 1, 2)], [None]], ids=repr)
def test_what_are_not_pairs_is_not_queued(base, caplog, events):
    """A call with the wrong arguments is logged, too: a request must not fail for its notification."""
    assert queue_events(base, events) is False
    assert len(messages(caplog)) == 1
    assert list(base.glob("*.json")) == []


def test_a_directory_that_may_not_be_written_is_named(folder, caplog):
    """The reason is the system's own words, with the directory."""
    folder.path.chmod(0o555)
    with unprivileged():
        assert not queue_event(folder.path, "e")
        with pytest.raises(QueueError, match="Permission denied"):
            open_queue(folder.path).put([("e", None)])
    (line,) = messages(caplog)
    assert_clear(line, str(folder.path), "Permission denied")


# ---- Order -------------------------------------------------------------------------------------------------


def test_events_go_out_in_the_order_of_their_stamps(folder, queue):
    """Never in the order of the names as text: PHP's float has no trailing zeros, and would sort wrongly."""
    first = round((folder.clock.day - 100) * 1e6)
    micros = [first + number * 1337 for number in range(2000)]
    names = [php_name(stamp) for stamp in micros]
    assert sorted(names) != names, "these names would prove nothing"
    for number in sorted(range(2000), key=lambda number: number * 7919 % 2000):
        folder.drop(str(number), name=names[number])
    assert serve(queue) == [str(number) for number in range(2000)]


def test_names_of_all_kinds_share_one_order(folder, queue, clock):
    """uniqid, seconds, milliseconds, nanoseconds and modification times are all times."""
    day = int(clock.day)
    folder.drop("mtime", name="order.json")
    os.utime(folder.path / "order.json", (day - 3, day - 3))
    for event, name in {
        "nanoseconds": f"{day - 5}000000000.json", "uniqid": f"1_{day - 4:08x}00000.json", "float": f"{day - 2}.5.json",
        "milliseconds": f"{day - 2}000.json", "seconds": f"{day - 1}.json",
    }.items():
        folder.drop(event, name=name)
    assert serve(queue) == ["nanoseconds", "uniqid", "mtime", "milliseconds", "float", "seconds"]


def test_the_events_of_an_array_stay_together(folder, queue):
    """Nothing comes between them, and what was queued before and after stays there."""
    folder.drop("before", ago=3)
    folder.write(folder.name(ago=2), b'[{"event":"a"},{"event":"b"},{"event":"c"}]')
    folder.drop("after", ago=1)
    assert serve(queue) == ["before", "a", "b", "c", "after"]
    assert folder.ready() == []


def test_an_array_is_never_divided(folder, queue):
    """However little a turn may take, an array goes out whole, and its file with its last event."""
    folder.write(folder.name(ago=2), b'[{"event":"a"},{"event":"b"},{"event":"c"}]')
    folder.drop("after", ago=1)
    assert named(queue.take(max_bytes=1)) == ["a", "b", "c"]
    assert len(folder.ready()) == 2


def test_a_wrong_event_in_an_array_sets_the_array_aside(folder, queue):
    """All or nothing: none of the others is sent."""
    path = folder.write(folder.name(ago=2), b'[{"event":"a"},{"event":""}]')
    folder.drop("after", ago=1)
    assert serve(queue) == ["after"]
    assert list(folder.failed()) == [path.name]


def test_an_empty_array_is_removed(folder, queue):
    """It is complete, and has nothing to say."""
    folder.write(folder.name(), b"[]")
    assert serve(queue) == []
    assert (folder.ready(), folder.failed()) == ([], {})


def test_a_backlog_is_listed_once_and_served_in_order(folder, queue, monkeypatch):
    """5,000 files in turns of a few: what costs is each file, and not each turn."""
    first = round((folder.clock.day - 100) * 1e6)
    for number in range(5000):
        folder.drop(str(number), name=php_name(first + number * 997))
    listed = [record_calls(monkeypatch, call) for call in ("listdir", "scandir")]
    sent, turns = [], 0
    while len(sent) < 5000:
        events = queue.take(max_bytes=4000)
        assert events and sum(len(event.text) for event in events) <= 4100
        queue.done(events)
        sent += named(events)
        turns += 1
    assert sent == [str(number) for number in range(5000)]
    assert turns > 50 and 1 <= sum(map(len, listed)) <= 3


def record_calls(monkeypatch, name):
    """The arguments of each call of os.NAME from now on."""
    calls, real = [], getattr(os, name)

    def call(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(os, name, call)
    return calls


# ---- The fence: what is stamped at or after the start of a scan waits for the next -------------------------


def test_what_is_stamped_before_the_scan_goes_out_with_it(folder, queue):
    """A millisecond of age is enough."""
    folder.drop("e", ago=0.001)
    assert serve(queue) == ["e"]


@pytest.mark.parametrize("ahead", [0.0, 0.001, 0.05])
def test_what_is_stamped_after_the_scan_waits_for_the_next(folder, queue, clock, ahead):
    """readdir may have missed an older file of the same producer, which the next scan finds."""
    folder.drop("younger", ago=-ahead)
    assert serve(queue) == []
    folder.drop("older", ago=0.01)
    clock.tick()
    assert serve(queue) == ["older", "younger"]


@pytest.mark.parametrize("ahead", [1.0, 3600.0, 1e9])
def test_a_clock_that_is_ahead_does_not_starve(folder, queue, clock, ahead):
    """A producer with a wrong clock is served after two ticks, and holds up nobody."""
    folder.drop("ahead", ago=-ahead)
    folder.drop("right", ago=0.01)
    assert serve(queue) == ["right"]
    clock.tick()
    assert ticks_until(queue, clock, "ahead") <= 1


def test_a_server_whose_clock_steps_back_goes_on(folder, queue, clock):
    """What is queued then looks like the future; it waits for two ticks at most."""
    folder.drop("before", ago=0.01)
    assert serve(queue) == ["before"]
    folder.drop("after", ago=0.01)
    clock.day -= 7200
    assert ticks_until(queue, clock, "after") <= 2


# ---- Not yet is not never ----------------------------------------------------------------------------------


def test_what_is_being_written_holds_the_batch(folder, queue, clock):
    """Events queued after it wait for it, and then all go out in order."""
    folder.drop("first", ago=3)
    name = folder.name(ago=2)
    folder.write(name, b'{"event":"sec')
    folder.drop("third", ago=1)
    assert serve(queue) == ["first"]
    clock.tick()
    folder.drop("second", name=name)
    assert serve(queue) == ["second", "third"]


def test_the_batch_waits_for_two_ticks_at_most(folder, queue, clock):
    """Then the others go, and the unfinished one whenever it is finished."""
    name = folder.name(ago=2)
    folder.write(name, b'{"event":"sl')
    folder.drop("later", ago=1)
    assert serve(queue) == []
    clock.tick()
    assert ticks_until(queue, clock, "later") <= 1
    clock.tick()
    folder.drop("slow", name=name)
    assert serve(queue) == ["slow"]
    assert (folder.ready(), folder.failed()) == ([], {})


def test_many_unfinished_files_hold_the_batch_no_longer_than_one(folder, queue, clock):
    """Two ticks are two ticks: what comes after a heap of broken files is not late by two ticks for each."""
    for number in range(20):
        folder.write(folder.name(ago=40 - number), b"")
    folder.drop("later", ago=1)
    assert ticks_until(queue, clock, "later") <= 3


def test_old_unfinished_files_hold_nothing_up(folder, make_queue, clock):
    """They have had their two ticks before: what is whole goes out at once, also where floats have to be rounded."""
    moments = (number / 7 for number in range(7000, 70000))
    clock.steady = next(now for now in moments if now - (now - 2 * 0.1) < 2 * 0.1)
    queue = make_queue(poll_interval=0.1)
    for number in range(100):
        name = folder.name(ago=100 - number)
        os.utime(str(folder.write(name, b"")), (clock.day - 60,) * 2)
    folder.drop("whole", ago=0.5)
    assert serve(queue) == ["whole"]


def test_what_does_not_change_for_two_seconds_is_set_aside(folder, queue, clock, caplog):
    """Into failed/, as it is, beside its reason; with one line in the log, and counted."""
    path = folder.write(folder.name(), b'{"event":"half')
    folder.drop("other", ago=0.5)
    serve_ticks(queue, clock, 2.0 - TICK)
    assert path.exists() and not folder.failed()
    serve_ticks(queue, clock, 1.0)
    assert not path.exists()
    assert (folder.path / "failed" / path.name).read_bytes() == b'{"event":"half'
    assert_clear(folder.failed()[path.name], "JSON")
    (line,) = messages(caplog)
    assert_clear(line, path.name, "failed")
    assert queue.backlog().failed == 1


def test_a_file_that_keeps_changing_is_not_given_up(folder, queue, clock):
    """A slow writer is waited for as long as it writes."""
    name, text = folder.name(), json.dumps({"event": "slow", "payload": "x" * 60}).encode()
    for end in range(len(text)):
        folder.write(name, text[:end])
        assert serve(queue) == []
        clock.tick()
    folder.write(name, text)
    assert serve(queue) == ["slow"]
    assert folder.failed() == {}


def test_what_was_mended_and_moved_back_is_sent(folder, queue, clock):
    """failed/ is a place to return from."""
    path = folder.write(folder.name(), b'{"event":7}')
    serve(queue)
    folder.write(f"failed/{path.name}", b'{"event":"seven"}')
    os.rename(folder.path / "failed" / path.name, path)
    assert ticks_until(queue, clock, "seven") <= 2


def test_two_links_of_one_name_are_both_kept(folder, queue, clock):
    """Also where what is in failed/ points nowhere, and so seems not to be there."""
    for target in ("nowhere", "elsewhere"):
        (folder.path / "x.json").symlink_to(target)
        folder.touch(folder.path / "x.json")
        clock.tick()
        serve(queue)
    assert sorted(os.readlink(folder.path / "failed" / name) for name in folder.failed()) == ["elsewhere", "nowhere"]


def test_two_broken_files_of_one_name_are_both_kept(folder, queue, clock):
    """The second does not replace the first, and each has its reason."""
    for data in (b"1", b"2"):
        folder.write("x.json", data)
        clock.tick()
        serve(queue)
    failed = folder.failed()
    assert sorted((folder.path / "failed" / name).read_bytes() for name in failed) == [b"1", b"2"]
    assert all(failed.values())


BROKEN = {
    "empty": b"", "blank": b" \n", "half": b'{"event":"a"', "binary": bytes(range(256)), "zeros": b"\0" * 4096,
    "latin-1": '{"event":"é"}'.encode("latin-1"), "utf-16": '{"event":"a"}'.encode("utf-16"),
    "wrong type": b'"event"', "no name": b"{}", "wrong name": b'{"event":[]}', "wrong topics": b'{"event":"a","to":[]}',
    "wrong time": b'{"event":"a","timestamp":"now"}', "constant": b'{"event":"a","payload":NaN}',
    "deep": b'{"event":"a","payload":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "deep and open": b"[" * 10_000,
    "huge number": b'{"event":"a","payload":' + b"1" * 10_000 + b"}}", "infinite": b'{"event":"a","payload":1e400}',
    "too large": b'{"event":"a","payload":"' + b"x" * 2**20 + b'"}',
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_hurts_nobody(folder, queue, clock, caplog, kind):
    """What comes after it goes out within two ticks; it ends in failed/ as it was, with a reason, and one log line."""
    path = folder.write(folder.name(ago=2), BROKEN[kind])
    folder.drop("next", ago=1)
    assert ticks_until(queue, clock, "next") <= 2
    sent = serve_ticks(queue, clock, 4.0)
    assert sent == []
    assert (folder.path / "failed" / path.name).read_bytes() == BROKEN[kind]
    assert_clear(folder.failed()[path.name])
    (line,) = messages(caplog)
    assert_clear(line, path.name)
    assert folder.ready() == []


def test_a_file_of_100_megabytes_is_not_read(folder, queue, monkeypatch):
    """Its size is reason enough, and the message names the limit."""
    path = folder.drop("large", ago=2)
    os.truncate(path, 100 * 2**20)
    reads = record_calls(monkeypatch, "read")
    folder.drop("small", ago=1)
    assert serve(queue) == ["small"]
    assert max(size for _fd, size in reads) <= 2**20
    assert_clear(folder.failed()[path.name], str(100 * 2**20), "max_event_bytes")


def test_the_largest_event_is_still_one(folder, make_queue):
    """The limit is the largest size that passes, to the byte."""
    queue = make_queue(max_event_bytes=100)
    folder.write(folder.name(ago=3), b'{"event":"fits"}'.ljust(100))
    path = folder.write(folder.name(ago=2), b'{"event":"does not"}'.ljust(101))
    assert serve(queue) == ["fits"]
    assert list(folder.failed()) == [path.name]


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_link(path):
    target = path.parent.parent / "secret"
    target.write_text('{"event":"secret"}')
    path.symlink_to(target)


SPECIAL = {
    "fifo": os.mkfifo, "directory": os.mkdir, "socket": make_socket, "link": make_link,
    "dangling link": lambda path: path.symlink_to("nowhere"), "link to itself": lambda path: path.symlink_to(path.name),
    "link to a directory": lambda path: path.symlink_to(path.parent),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_not_a_regular_file_is_set_aside(folder, queue, clock, caplog, kind):
    """Neither hung on, nor followed, nor read: it is moved to failed/ with the reason."""
    path = folder.path / "x.json"
    SPECIAL[kind](path)
    folder.touch(path)
    folder.drop("next", ago=0.01)
    assert ticks_until(queue, clock, "next") <= 2
    assert serve_ticks(queue, clock, 4.0) == []
    assert_clear(folder.failed()["x.json"], "regular file")
    assert len(messages(caplog)) == 1
    assert not os.path.lexists(path)


def test_what_a_link_points_to_is_left_alone(folder, queue, base):
    """Only the link is moved."""
    make_link(folder.path / "x.json")
    folder.touch(folder.path / "x.json")
    folder.drop("e", ago=0)
    serve(queue)
    assert (base / "secret").read_text() == '{"event":"secret"}'


@pytest.mark.parametrize(
    "name",
    [b"two words.json", b"new\nline.json", b"tab\t.json", b"\xff\xfe.json", "größe.json".encode(), b"-rf.json",
     b"'\"`$(id).json", b"%s%n.json", b"x.json.json", b"*.json", b"\x1b[2J.json", b"a" * 250 + b".json"],
)
def test_a_name_may_hold_anything(folder, queue, clock, name):
    """Spaces, line ends and bytes that are no UTF-8: the event is sent once, under its stem and time, and removed."""
    folder.write(name, b'{"event":"e"}')
    clock.advance(1)
    events = queue.take()
    assert [unquote_to_bytes(event.id.rpartition("~")[0]) for event in events] == [name[:-5]]
    assert re.fullmatch(r"[A-Za-z0-9._~%-]+", events[0].id)
    queue.done(events)
    assert serve(queue) == []
    assert folder.ready() == []


@pytest.mark.parametrize("name", [b"new\nline.json", b"\xff\xfe.json", b"a" * 250 + b".json", b"%s%n.json"])
def test_a_broken_file_may_have_any_name(folder, queue, clock, caplog, name):
    """It is moved, and the log line is still one line."""
    folder.write(name, b"7")
    clock.advance(1)
    assert serve(queue) == []
    assert list(folder.failed()) == [os.fsdecode(name)]
    assert len(messages(caplog)) == 1


@pytest.mark.parametrize(
    "name", [".hidden.json", ".json", ".1763890123.4567_6922d3cb6f80f.json.tmp", "x.JSON", "x.json~", "x.json.tmp",
             "x.jsonl", "json", "x"])
def test_other_names_are_not_events(folder, queue, clock, name):
    """A producer in any language has names in which it can write at leisure."""
    path = folder.drop("e", name=name)
    clock.advance(1)
    assert serve_ticks(queue, clock, 3.0) == []
    assert path.exists() and not folder.failed()
    assert queue.backlog().waiting == 0


# ---- Done, and what cannot be removed ----------------------------------------------------------------------


def test_an_event_is_removed_when_it_is_done_and_not_before(folder, queue):
    """Taken is not sent: the file goes when the server says so."""
    folder.drop("e")
    events = queue.take()
    assert len(folder.ready()) == 1
    queue.done(events)
    assert folder.ready() == []


def test_what_a_crashed_server_took_is_taken_again(folder, make_queue):
    """Under the same ids, by which a repeat can be recognised."""
    folder.drop("a", ago=2)
    folder.write(folder.name(ago=1), b'[{"event":"b"},{"event":"c"}]')
    crashed = make_queue()
    before = crashed.take()
    crashed.close()
    after = make_queue().take()
    assert named(after) == ["a", "b", "c"]
    assert [event.id for event in after] == [event.id for event in before]


def test_a_file_that_is_gone_was_somebody_elses_wish(folder, queue, caplog):
    """Removed by hand between scan and reading, or between sending and removing: no reason to complain."""
    for number in range(3):
        folder.drop(str(number), ago=3 - number)
    events = queue.take(max_bytes=1)
    for name in folder.ready():
        os.unlink(folder.path / name)
    queue.done(events)
    assert serve(queue) == []
    assert not messages(caplog)


def test_a_new_file_under_a_name_that_is_being_sent_is_kept(folder, queue, clock):
    """`mv tmp state.json` while the last state goes out: the new one is sent, too."""
    folder.drop("old", name="state.json")
    clock.advance(1)
    events = queue.take()
    folder.drop("new", name=".tmp")
    os.rename(folder.path / ".tmp", folder.path / "state.json")
    queue.done(events)
    clock.tick()
    assert named(events) == ["old"]
    assert ticks_until(queue, clock, "new") <= 2
    assert folder.ready() == []


def test_what_cannot_be_removed_is_sent_once(folder, make_queue, clock, caplog):
    """One line says so; a new file under the same name is sent; and what can be removed again, is."""
    path = folder.drop("old", name="x.json")
    clock.advance(1)
    with unprivileged():
        queue = make_queue()
        forbid_removal(folder)
        assert serve_ticks(queue, clock, 3.0) == ["old"]
        assert path.exists()
    (line,) = messages(caplog)
    assert_clear(line, "x.json", str(folder.path))
    allow_removal(folder)
    path.unlink()
    folder.drop("new", name="x.json")
    forbid_removal(folder)
    with unprivileged():
        assert serve_ticks(queue, clock, 3.0) == ["new"]
    allow_removal(folder)
    with unprivileged():
        assert serve_ticks(queue, clock, 1.0) == []
    assert not path.exists()


def test_what_cannot_be_removed_holds_up_nobody(folder, make_queue, clock):
    """The other events are sent, and each of them once."""
    folder.drop("stuck", ago=2)
    with unprivileged():
        queue = make_queue()
        forbid_removal(folder)
        assert serve(queue) == ["stuck"]
        with as_root():
            allow_removal(folder)
            folder.drop("other", ago=-0.5)
            forbid_removal(folder)
        assert serve_ticks(queue, clock, 2.0) == ["other"]
    allow_removal(folder)


@pytest.mark.parametrize("data", [b"", b'{"event":"half', b'{"event":7}'], ids=["empty", "unfinished", "wrong"])
def test_what_cannot_be_set_aside_is_never_deleted(folder, queue, clock, caplog, data):
    """failed/ cannot be made: the file stays where it is, said once, and the others are served."""
    (folder.path / "failed").write_text("somebody's notes")
    path = folder.write(folder.name(ago=2), data)
    folder.drop("next", ago=1)
    assert ticks_until(queue, clock, "next") <= 2
    serve_ticks(queue, clock, 5.0)
    assert path.read_bytes() == data
    (line,) = messages(caplog)
    assert_clear(line, path.name, "failed")


def test_an_unreadable_file_is_waited_for_and_then_set_aside(folder, make_queue, clock, caplog):
    """The reason names the user who may not open it; the others are served meanwhile."""
    path = make_unreadable(folder, folder.name(ago=2))
    folder.drop("next", ago=1)
    with unprivileged():
        queue = make_queue()
        assert ticks_until(queue, clock, "next") <= 2
        serve_ticks(queue, clock, 4.0)
        user = os.getuid()
    assert_clear(folder.failed()[path.name], "Permission denied", str(user))
    assert len(messages(caplog)) == 1


def test_a_file_that_becomes_readable_is_sent(folder, make_queue, clock):
    """A producer that gives the permission last is only a slow writer."""
    path = make_unreadable(folder, folder.name())
    with unprivileged():
        queue = make_queue()
        assert serve(queue) == []
        clock.tick()
        with as_root():
            path.chmod(0o644)
        assert serve(queue) == ["closed"]


@needs_root
def test_an_unreadable_file_that_cannot_be_moved_stays(folder, make_queue, clock, caplog):
    """In somebody else's sticky directory: it is named once, not deleted, and the others are served."""
    folder.path.chmod(0o1777)
    path = make_unreadable(folder, folder.name(ago=2))
    folder.drop("next", ago=1)
    with unprivileged():
        queue = make_queue()
        assert ticks_until(queue, clock, "next") <= 2
        sent = serve_ticks(queue, clock, 5.0)
    assert sent == []
    assert path.exists()
    assert any(path.name in line for line in messages(caplog))
    assert len(messages(caplog)) <= 2, "a line for each of the files, and not ten a second"


@pytest.mark.parametrize("seconds", [TICK, 5.0])
def test_trouble_of_our_own_is_no_fault_of_the_file(folder, queue, clock, monkeypatch, seconds):
    """Too many open files, however long: a QueueError or patience; nothing is set aside, and the order is kept."""
    for number in range(6):
        folder.drop(str(number), ago=6 - number)
    third = sorted(folder.ready(), key=name_stamp)[2]
    end = clock.steady + seconds

    def scarce(path, *args, real=os.open, **kwargs):
        if os.fsdecode(path).endswith(third) and clock.steady < end:
            raise OSError(24, "Too many open files")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", scarce)
    sent = []
    while clock.steady < end + 1:
        try:
            sent += serve(queue)
        except QueueError as error:
            assert_clear(str(error), "Too many open files")
        clock.tick()
    assert sent == [str(number) for number in range(6)]
    assert folder.failed() == {}


def test_a_file_that_goes_while_the_directory_is_read_is_none(folder, queue, monkeypatch):
    """Its name alone says nothing of its time, and there is nothing else to ask any more."""
    folder.drop("e", ago=1)
    monkeypatch.setattr(os, "listdir", lambda path, real=os.listdir: ["gone.json", *real(path)])
    assert serve(queue) == ["e"]


def failing(number):
    """In place of a function of os: it fails."""
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_disk_that_fails_to_read_once_loses_nothing(folder, queue, clock, monkeypatch):
    """An error of the disk may pass: the event is read again, and keeps its place."""
    folder.drop("first", ago=2)
    folder.drop("second", ago=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", failing(errno.EIO))
        assert serve(queue) == []
    clock.tick()
    assert serve(queue) == ["first", "second"]
    assert folder.failed() == {}


def test_somebody_else_may_remove_what_was_sent(folder, queue, monkeypatch, caplog):
    """At the same moment, too: it is gone, which is all that was wanted."""
    folder.drop("e", ago=1)

    def second_to_come(path, *, real=os.unlink):
        real(path)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    monkeypatch.setattr(os, "unlink", second_to_come)
    assert serve(queue) == ["e"]
    assert folder.ready() == [] and messages(caplog) == []


# ---- Bounds ------------------------------------------------------------------------------------------------


def test_failed_does_not_grow_without_end(folder, queue, clock, caplog, monkeypatch):
    """Beyond the limit the oldest go, with their reasons, and the log says so; the youngest stay."""
    monkeypatch.setattr(wsqueue, "FAILED_FILES", 20)
    for number in range(100):
        folder.write(f"{int(clock.day) - 200 + number}.json", b"7")
        serve(queue)
    names = os.listdir(folder.path / "failed")
    assert 20 <= len(names) <= 2 * 20 + 2
    assert f"{int(clock.day) - 101}.json" in names and f"{int(clock.day) - 200}.json" not in names
    assert messages(caplog, "WARNING")


def test_left_over_temporary_files_are_swept(folder, make_queue, clock):
    """Ours, and older than an hour: a producer was killed. Others are none of our business."""
    ours, young, theirs = ".1763880000.1_6922acc0186a0.json.tmp", ".1763890000.1_6922d350186a0.json.tmp", ".cache.tmp"
    for name, age in ((ours, 3700), (young, 3500), (theirs, 9999)):
        path = folder.write(name, b'{"event')
        os.utime(path, (clock.day - age, clock.day - age))
    queue = make_queue()
    serve(queue)
    assert sorted(folder.temporary()) == sorted([young, theirs])
    clock.advance(3601)
    serve(queue)
    assert folder.temporary() == [theirs]


def test_old_events_are_dropped_where_that_is_asked_for(folder, make_queue, clock, caplog):
    """max_age counts from queued_at; what is dropped is counted in the log, and removed."""
    queue = make_queue(max_age=60.0)
    folder.drop("old", ago=61)
    folder.drop("young", ago=59)
    records = [{"event": event, "queued_at": clock.day - age} for event, age in (("stale", 100), ("fresh", 1))]
    folder.write(folder.name(ago=5), json.dumps(records).encode())
    assert serve(queue) == ["young", "fresh"]
    assert folder.ready() == []
    assert_clear(" ".join(messages(caplog, "WARNING")), "2", "max_age")


def test_no_event_is_too_old_by_default(folder, queue):
    """A server that was down for a year sends what it missed."""
    folder.drop("old", ago=365 * 86400.0)
    assert serve(queue) == ["old"]


def test_the_backlog_is_what_waits_how_long_and_what_failed(folder, queue, clock):
    """Of the directory as it is, whoever asks."""
    assert queue.backlog()[:3] == (0, 0.0, 0)
    folder.write("1763800000.json", b"7")
    serve(queue)
    folder.drop("old", ago=30)
    folder.drop("young", ago=3)
    folder.drop("hidden", name=".hidden.json")
    asked = DirectoryQueue(str(folder.path), clock=clock.wall).backlog()
    assert (asked.waiting, asked.failed) == (2, 1)
    assert asked.oldest == pytest.approx(30)


def test_the_backlog_of_a_missing_directory_is_an_error_that_names_it(base):
    """Status must not look fine because nothing is there."""
    with pytest.raises(QueueError) as caught:
        DirectoryQueue(str(base / "nowhere")).backlog()
    assert_clear(str(caught.value), str(base / "nowhere"), "No such file")


# ---- A full disk -------------------------------------------------------------------------------------------


def fill(path):
    """Queue until the disk is full; returns how many events there was room for, and what was said then."""
    queue = open_queue(path)
    for count in range(1000):
        try:
            queue.put([(str(count), "x" * 3000)])
        except QueueError as error:
            return count, str(error)
    raise AssertionError("the disk did not fill up")


def test_a_full_disk_is_named_and_loses_nothing(small_disk, clock):
    """put() says which directory and why, leaves nothing partial, and what was queued is still served."""
    with consumer(small_disk) as queue:
        count, said = fill(small_disk)
        assert_clear(said, str(small_disk), "No space left")
        disk = Folder(small_disk, clock)
        assert disk.temporary() == [] and len(disk.ready()) == count > 3
        assert queue_event(small_disk, "e", "x" * 3000) is False
        assert named(drain(queue, count)) == [str(number) for number in range(count)]
        assert queue_event(small_disk, "e", "x" * 3000) is True, "there is room again"


def test_a_server_starts_on_a_full_disk(small_disk):
    """It is what makes room there: not being able to write down its pid must not stop it."""
    count, _ = fill(small_disk)
    with consumer(small_disk) as queue:
        assert named(drain(queue, count)) == [str(number) for number in range(count)]


def test_a_broken_file_on_a_full_disk_is_not_lost(small_disk, clock):
    """What a producer could write only in part is there to be seen, in the queue or in failed/."""
    disk = Folder(small_disk, clock)
    disk.write("broken.json", b'{"event":"half')
    clock.advance(10)
    with consumer(small_disk, clock=clock.wall, monotonic=clock.monotonic, poll_interval=TICK) as queue:
        fill(small_disk)
        serve_ticks(queue, clock, 5.0)
    places = [path for path in (small_disk / "broken.json", small_disk / "failed" / "broken.json") if path.exists()]
    assert [path.read_bytes() for path in places] == [b'{"event":"half']


@contextmanager
def consumer(path, **options):
    queue = DirectoryQueue(str(path), **options)
    queue.open()
    try:
        yield queue
    finally:
        queue.close()


# ---- A directory that comes and goes -----------------------------------------------------------------------


def test_a_directory_that_vanishes_is_served_when_it_is_back(folder, queue, clock, caplog):
    """Removed with all its contents: said once, and the next event in a new one is sent."""
    folder.drop("before")
    assert serve(queue) == ["before"]
    shutil.rmtree(folder.path)
    serve_ticks(queue, clock, 1.0)
    assert len(messages(caplog, "WARNING")) == 1
    folder.path.mkdir(exist_ok=True)
    folder.drop("after")
    assert ticks_until(queue, clock, "after") <= 2


def test_a_directory_that_is_renamed_away_keeps_its_events(folder, queue, clock):
    """Another in its place is served; and the first one, when it is back."""
    folder.drop("first", ago=9)
    away = folder.path.with_name("away")
    os.rename(folder.path, away)
    assert serve_ticks(queue, clock, 1.0) == []
    folder.path.mkdir(exist_ok=True)
    folder.drop("second")
    assert ticks_until(queue, clock, "second") <= 2
    shutil.rmtree(folder.path)
    os.rename(away, folder.path)
    assert ticks_until(queue, clock, "first") <= 2


def test_the_kernel_wakes_a_server_in_the_new_directory_too(folder, live):
    """The watch is on a directory, and not on a name."""
    shutil.rmtree(folder.path)
    live.take()
    live.wait(0.0)
    with waiting(live) as ended:
        assert queue_event(folder.path, "e")
        eventually(ended.is_set, what="the end of wait()")


def test_a_directory_that_cannot_be_made_again_is_an_error_until_it_can(folder, make_queue, clock, base):
    """Each turn says which directory is missing; once it is there, it is served."""
    with unprivileged():
        queue = make_queue()
    shutil.rmtree(folder.path)
    base.chmod(0o555)
    with unprivileged():
        for _ in range(3):
            with pytest.raises(QueueError) as caught:
                queue.take()
            assert_clear(str(caught.value), str(folder.path))
    base.chmod(0o777)
    folder.path.mkdir()
    folder.path.chmod(0o777)
    folder.drop("e")
    with unprivileged():
        assert ticks_until(queue, clock, "e") <= 2


@pytest.mark.parametrize("mode", [0o000, 0o555, 0o444, 0o222, 0o333])
def test_a_directory_that_cannot_be_served_is_refused_at_start(folder, make_queue, mode):
    """Sent events must be removed: a server that may not, does not start, even if it once did."""
    with unprivileged():
        make_queue().close()
    folder.path.chmod(mode)
    with unprivileged(), pytest.raises(QueueError) as caught:
        make_queue()
    assert_clear(str(caught.value), str(folder.path))


def test_a_file_in_place_of_the_directory_is_refused_at_start(base):
    """The message names it."""
    (base / "file").write_text("")
    with pytest.raises(QueueError) as caught:
        DirectoryQueue(str(base / "file")).open()
    assert_clear(str(caught.value), str(base / "file"))


# ---- One consumer ------------------------------------------------------------------------------------------

HOLD = """
import sys, wsqueue
queue = wsqueue.DirectoryQueue(sys.argv[1])
queue.open()
print("open", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(path):
    """Another process that serves the directory."""
    with python(HOLD, path) as process:
        assert process.stdout.readline() == "open\n"
        yield process


def test_a_second_server_is_told_who_is_the_first(folder, make_queue):
    """open() fails with the directory and the holder's pid, again and again: asking changes nothing."""
    with holder(folder.path) as process:
        for _ in range(2):
            with pytest.raises(QueueError) as caught:
                make_queue()
            assert_clear(str(caught.value), str(folder.path), str(process.pid))
        assert wsqueue.serving_process(str(folder.path)) == str(process.pid)


def test_a_server_that_was_killed_leaves_nothing_to_clean_up(folder, make_queue):
    """After kill -9 of the holder the next one simply starts."""
    with holder(folder.path) as process:
        process.kill()
        process.wait()
        assert wsqueue.serving_process(str(folder.path)) is None
        folder.drop("e")
        assert serve(make_queue()) == ["e"]
        assert wsqueue.serving_process(str(folder.path)) == str(os.getpid())


def test_a_closed_queue_can_be_opened_by_the_next(folder, make_queue):
    """In the same process, too."""
    make_queue().close()
    queue = make_queue()
    with pytest.raises(QueueError):
        make_queue()
    folder.drop("e")
    assert serve(queue) == ["e"]


def test_a_lock_file_that_somebody_deletes_is_held_again(folder, queue, make_queue):
    """A cleaning job must not be able to let a second server in, which would take half of the events."""
    os.unlink(folder.path / ".wsqueue.lock")
    serve(queue)
    with pytest.raises(QueueError):
        make_queue()
    folder.drop("e")
    assert serve(queue) == ["e"]


@needs_root
def test_a_lock_that_another_user_holds_the_rights_to_is_named(folder, make_queue):
    """A server that once ran as root leaves its lock file; the message says which file is in the way."""
    make_queue().close()
    with unprivileged(), pytest.raises(QueueError) as caught:
        make_queue()
    assert_clear(str(caught.value), str(folder.path), ".wsqueue.lock", "Permission denied")


def test_a_producer_needs_no_lock(folder):
    """Publishing is possible while the directory is served, and leaves no trace of its own."""
    with holder(folder.path):
        assert queue_event(folder.path, "e")
    assert len(folder.ready()) == 1


def test_a_queue_that_was_never_opened_can_be_closed(folder):
    """contextlib.closing(open_queue(...)) is how a producer may use it."""
    queue = open_queue(folder.path)
    queue.put([("e", None)])
    queue.close()
    assert len(folder.ready()) == 1


# ---- Waking up ---------------------------------------------------------------------------------------------


def test_a_renamed_file_wakes_the_server(folder, live):
    """queue_event() and mv publish by renaming."""
    with waiting(live) as ended:
        assert queue_event(folder.path, "e")
        eventually(ended.is_set, what="the end of wait()")


def test_a_file_that_was_written_wakes_the_server(folder, live):
    """PHP's file_put_contents and the shell's redirection close what they wrote."""
    with waiting(live) as ended:
        folder.drop("e")
        eventually(ended.is_set, what="the end of wait()")


def test_what_came_before_the_wait_ends_it(folder, live):
    """Between take() and wait() there is no gap in which an event could fall."""
    assert live.take() == []
    assert queue_event(folder.path, "e")
    with waiting(live) as ended:
        eventually(ended.is_set, what="the end of wait()")


def wait_duration(queue, seconds):
    started = time.monotonic()
    queue.wait(seconds)
    return time.monotonic() - started


def test_a_temporary_file_wakes_nobody(folder, live):
    """A producer in mid-write is not news; nor is what goes on beside the events."""
    folder.write(".x.json.tmp", b"{")
    folder.write("notes.txt", b"")
    os.rename(folder.path / "notes.txt", folder.path / "notes.md")
    folder.drop("e", name=".hidden.json")
    assert wait_duration(live, 0.2) >= 0.19
    os.rename(folder.path / ".x.json.tmp", folder.path / "x.json")
    with waiting(live) as ended:
        eventually(ended.is_set, what="the end of wait() after a real event")


def test_a_server_that_removes_what_it_sent_does_not_wake_itself(folder, live):
    """Serving an event is followed by silence."""
    folder.drop("e")
    live.wait(10.0)
    assert serve(live) == ["e"]
    assert wait_duration(live, 0.2) >= 0.19


@pytest.mark.parametrize("wakeup", [True, False])
def test_wake_ends_a_wait_from_another_thread(make_queue, wakeup):
    """With and without the kernel's help, while waiting and before."""
    queue = make_queue(wakeup=wakeup, monotonic=time.monotonic)
    with waiting(queue) as ended:
        queue.wake()
        eventually(ended.is_set, what="the end of wait()")
    queue.wait(0.0)
    queue.wake()
    queue.wake()
    with waiting(queue) as ended:
        eventually(ended.is_set, what="the end of wait() that was ended before it began")


def test_a_wait_ends_although_its_queue_was_closed(make_queue):
    """A server that could not wait for the end of a thread, on a hanging disk, leaves nothing behind that spins."""
    queue = make_queue(monotonic=time.monotonic)
    queue.close()
    with waiting(queue, 0.1) as ended:
        eventually(ended.is_set, what="the end of wait()")


def test_a_wake_is_used_up(make_queue):
    """Ten of them end one wait, and not the next."""
    queue = make_queue(wakeup=False, monotonic=time.monotonic)
    for _ in range(10):
        queue.wake()
    queue.wait(10.0)
    assert wait_duration(queue, 0.2) >= 0.19


def test_without_the_kernel_the_poll_alone_finds_events(folder, make_queue):
    """wakeup=False: a wait lasts as long as it was asked to, and the event is there after it."""
    queue = make_queue(wakeup=False, clock=time.time, monotonic=time.monotonic)
    assert queue_event(folder.path, "e")
    assert wait_duration(queue, 0.1) >= 0.09
    assert named(drain(queue, 1)) == ["e"]


class Libc:
    """One whose inotify answers that there are too many of them already, or is that of the system."""

    def __init__(self, path, use_errno):
        assert path is None and use_errno
        ctypes.set_errno(errno.EMFILE)

    def inotify_init1(self, flags):
        return -1


def no_ctypes(monkeypatch):
    """Debian's python3-minimal and others come without it."""
    monkeypatch.setitem(sys.modules, "ctypes", None)


def no_inotify(monkeypatch):
    """Its number is limited for each user (fs.inotify.max_user_instances)."""
    monkeypatch.setattr(ctypes, "CDLL", Libc)


@pytest.mark.parametrize("trouble, words", [(no_ctypes, "ctypes"), (no_inotify, "Too many open files")])
def test_where_the_kernel_cannot_wake_it_the_poll_finds_events(folder, make_queue, monkeypatch, caplog, trouble, words):
    """One line says so, and no more is lost than time."""
    caplog.set_level("INFO", "wsqueue")
    with monkeypatch.context() as patch:
        trouble(patch)
        queue = make_queue(clock=time.time, monotonic=time.monotonic)
    (said,) = messages(caplog, "INFO")
    assert words in said and "poll" in said
    assert queue_event(folder.path, "e")
    assert named(drain(queue, 1)) == ["e"]


def test_a_disk_that_is_full_at_close_is_named(folder, monkeypatch, caplog):
    """NFS and quotas tell so late (close(2)). The descriptor is closed once: its number is soon another thread's."""
    closed, close = [], os.close

    def fail(fd):
        close(fd)
        closed.append(fd)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "close", fail)
    assert queue_event(folder.path, "e") is False
    monkeypatch.undo()
    assert len(closed) == 1
    assert "No space left on device" in caplog.text
    assert os.listdir(folder.path) == []


def test_a_watch_that_cannot_be_had_leaves_no_descriptor(folder):
    """Nothing is kept of what has failed half-way."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        wsqueue._Inotify(str(folder.path / "missing"))
    assert os.listdir("/proc/self/fd") == before


def test_a_file_that_the_kernel_did_not_announce_is_found(folder, live):
    """A hard link is created without any of the announcements that are waited for: the poll finds it."""
    path = folder.drop("e", name="x.tmp")
    os.link(path, folder.path / "x.json")
    assert named(drain(live, 1)) == ["e"]


# ---- Many processes ----------------------------------------------------------------------------------------

PRODUCE = """
import sys, wsqueue
for number in range(500):
    assert wsqueue.queue_event(sys.argv[1], sys.argv[2], number)
"""


def test_concurrent_producers_lose_nothing_and_keep_their_order(folder, live):
    """Four processes with 500 events each while a server runs: each one's events come in its order, and once."""
    with ExitStack() as stack:
        processes = [stack.enter_context(python(PRODUCE, folder.path, f"producer {n}")) for n in range(4)]
        events = drain(live, 2000)
        assert [process.wait(30 * TIME_UNIT) for process in processes] == [0] * 4
    for number in range(4):
        mine = [event for event in events if named([event]) == [f"producer {number}"]]
        assert payloads(mine) == list(range(500))
    assert serve(live) == [] and folder.ready() == [] and folder.temporary() == []


KILL = """
import os, signal, sys, wsqueue
directory, parent = sys.argv[1], os.getpid()

def produce(event):
    number = 0
    while os.getppid() == parent:
        assert wsqueue.queue_event(directory, event, [number, "x" * 200_000], durable=True)
        number += 1

def temporary():
    return {name for name in os.listdir(directory) if name.endswith(".tmp")}

for round in range(100):
    before = temporary()
    pid = os.fork()
    if not pid:
        produce(str(round))
    while temporary() <= before:
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def test_a_producer_that_is_killed_leaves_no_part_of_an_event(folder, live, make_queue):
    """kill -9 in mid-write, a hundred times while a server runs: whole events or none, and the rest is swept."""
    events = []
    with python(KILL, folder.path) as process:

        def ended():
            over = process.poll() is not None
            more = live.take()
            live.done(more)
            events.extend(more)
            return over and not more

        eventually(ended, 50, "the end of a hundred producers")
        assert process.returncode == 0
    counts = {}
    for event in events:
        number, text = payloads([event])[0]
        assert len(text) == 200_000
        assert number == counts.setdefault(named([event])[0], 0)
        counts[named([event])[0]] += 1
    assert folder.failed() == {} and folder.ready() == []
    assert folder.temporary(), "no producer was killed in mid-write: this proves nothing"
    assert_swept(folder, live, make_queue)


def assert_swept(folder, queue, make_queue):
    """An hour later, nothing of it is left."""
    queue.close()
    later = time.time() + 3700
    make_queue(clock=lambda: later).take()
    assert folder.temporary() == []
