"""Sections 5 and 11: what holds for every event queue, with real brokers and real processes.

One suite for the queue directory, SQLite, PostgreSQL, Redis and RabbitMQ: whoever changes from one to another finds
the same behaviour. What one of them cannot do by its nature says only(...) above the tests that ask for it.
"""

import gc
import glob
import itertools
import json
import logging
import os
import random
import re
import socket
import sqlite3
import struct
import threading
import time
import tracemalloc
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pika
import psycopg
import pytest
import redis

import wsqueue
from clients import PATIENCE, Follower, RawClient, serving
from helpers import TIME_UNIT, consumers, eventually, run_cli, settled, spawn_server
from test_cli import complaint, environment
from test_queue_directory import (
    assert_clear,
    drain,
    messages,
    named,
    payloads,
    php_name,
    python,
    run_python,
    wait_duration,
    waiting,
)
from test_server import clients_arrived
from wsqueue import EventError, QueueError, open_queue, queue_event, queue_events

KIB, MIB = 1024, 1024 * 1024
ID = re.compile(r"[A-Za-z0-9._~%:-]+")
SHARED = ("sqlite", "postgresql", "redis")  # nodes read one log, in which an event has one id
SERVERS = ("postgresql", "redis", "amqp")


def only(*kinds):
    """For what other kinds of queue cannot do by their nature."""
    return pytest.mark.parametrize("queue_url", kinds, indirect=True)


# ---- The queues as programs in other languages see them ----------------------------------------------------


def kind_of(url):
    return urlsplit(url).scheme or "directory"


def name_of(url):
    """Of the table, the stream or the exchange."""
    return parse_qs(urlsplit(url).query).get("queue", ["wsqueue"])[0]


def without_parameters(url):
    """As the kind's own library takes it."""
    return url.partition("?")[0]


def with_parameters(url, **parameters):
    return url + "".join(f"{'&' if '?' in url or i else '?'}{k}={v}" for i, (k, v) in enumerate(parameters.items()))


class DirectoryStore:
    """Files."""

    def __init__(self, url):
        self.path = Path(url)

    def add(self, data):
        self.path.mkdir(exist_ok=True)
        name = php_name(time.time_ns() // 1000)
        (self.path / f".{name}.tmp").write_bytes(data)
        os.rename(str(self.path / f".{name}.tmp"), str(self.path / name))

    def failed(self):
        """(reason, data) of what was set aside, in the order in which it was queued."""
        reasons = sorted((self.path / "failed").glob("*.reason"))
        return [(reason.read_text("utf-8"), reason.with_suffix("").read_bytes()) for reason in reasons]


class SqlStore:
    """Rows."""

    def __init__(self, url):
        self.url, self.table = url, name_of(url)

    def connect(self):
        raise NotImplementedError

    def execute(self, statement, *values):
        """Returns the rows, if there are any; {} stands for the table."""
        with closing(self.connect()) as connection:
            cursor = connection.cursor()
            cursor.execute(statement.format(self.table), values)
            rows = cursor.fetchall() if cursor.description else []
            connection.commit()
        return rows

    def add_old(self, data, age):
        mark = self.mark
        self.execute(f"INSERT INTO {{}} (data, queued_at) VALUES ({mark}, {mark})", data.decode(), time.time() - age)

    def count(self):
        return self.execute("SELECT count(*) FROM {}")[0][0]

    def make_older(self, node, seconds):
        """As if the node had not been seen for so much longer."""
        self.execute(f"UPDATE {{}}_nodes SET seen_at = seen_at - {self.mark} WHERE node = {self.mark}", seconds, node)

    def failed(self):
        rows = self.execute("SELECT reason, data FROM {}_failed ORDER BY failed_at, place")
        return [(as_bytes(reason).decode(), as_bytes(data)) for reason, data in rows]


def as_bytes(value):
    """Databases give bytes in many forms."""
    return value.encode() if isinstance(value, str) else bytes(value or b"")


class SqliteStore(SqlStore):
    mark = "?"

    def connect(self):
        connection = sqlite3.connect(without_parameters(self.url)[len("sqlite:///"):], timeout=PATIENCE)
        connection.text_factory = bytes  # not every text is one
        return connection

    def add(self, data):
        self.execute("INSERT INTO {} (data) VALUES (CAST(? AS TEXT))", data)


class PostgresStore(SqlStore):
    mark = "%s"

    def connect(self):
        return psycopg.connect(without_parameters(self.url))

    def add(self, data):
        self.execute("INSERT INTO {} (data) VALUES (%s)", data.decode())


class RedisStore:
    """The entries of a stream."""

    def __init__(self, url):
        self.url, self.key = without_parameters(url), name_of(url)

    def connect(self):
        return closing(redis.Redis.from_url(self.url))

    def add(self, data, field="data"):
        with self.connect() as client:
            client.xadd(self.key, {field: data})

    def add_old(self, data, age):
        """Only while nothing younger is in it."""
        with self.connect() as client:
            client.xadd(self.key, {"data": data}, id=f"{int((time.time() - age) * 1000)}-0")

    def make_older(self, node, seconds):
        with self.connect() as client:
            place, count, seen_at = client.hget(f"{self.key}:nodes", node).split()
            client.hset(f"{self.key}:nodes", node, b"%s %s %f" % (place, count, float(seen_at) - seconds))

    def failed(self):
        with self.connect() as client:
            entries = [fields for _, fields in client.xrange(f"{self.key}:failed")]
        return [(fields[b"reason"].decode(), fields.get(b"data")) for fields in entries]


class AmqpStore:
    """Messages to an exchange."""

    def __init__(self, url):
        self.url, self.name = without_parameters(url), name_of(url)

    @contextmanager
    def channel(self):
        with closing(pika.BlockingConnection(pika.URLParameters(self.url))) as connection:
            yield connection.channel()

    def add(self, data):
        properties = pika.BasicProperties(delivery_mode=2, message_id=str(uuid.uuid4()))
        with self.channel() as channel:
            channel.confirm_delivery()
            channel.basic_publish(self.name, "", data, properties, mandatory=True)

    def failed(self):
        with self.channel() as channel:  # what is not acknowledged goes back when it is closed
            found = iter(lambda: channel.basic_get(f"{self.name}:failed"), (None, None, None))
            return [(properties.headers["reason"], body) for _, properties, body in found]


STORES = {"directory": DirectoryStore, "sqlite": SqliteStore, "postgresql": PostgresStore, "redis": RedisStore,
          "amqp": AmqpStore}


@pytest.fixture
def store(queue_url):
    """The queue without wsqueue."""
    return STORES[kind_of(queue_url)](queue_url)


# ---- Helpers -----------------------------------------------------------------------------------------------


# For how long a broker is waited for is told by test_broker_trouble.py. Here a busy machine is no reason to give up.
PATIENTLY = "import wsqueue; wsqueue.PUT_SECONDS *= 10; wsqueue.READ_SECONDS *= 10\n"


@pytest.fixture(autouse=True)
def _patiently(monkeypatch):
    """What that says to another process, for this one."""
    for name in ("PUT_SECONDS", "READ_SECONDS"):
        monkeypatch.setattr(wsqueue, name, 10 * getattr(wsqueue, name))


@pytest.fixture(autouse=True)
def _producers_give_back_their_connections():
    """Those that queue_event() keeps."""
    yield
    wsqueue.close_queues()


def at_node(url, node="one"):
    """The options of a consumer; a directory has one only, and no name for it."""
    return {"poll_interval": 0.02, **({} if kind_of(url) == "directory" else {"node": node})}


@pytest.fixture
def make_queue(queue_url):
    """Opens consumers of the queue, and closes them."""

    def make(node="one", url=queue_url, **options):
        return open_queue(url, **{**at_node(url, node), **options})

    with consumers(make) as opener:
        yield opener


@pytest.fixture
def queue(make_queue):
    """A consumer that has looked once: what is queued from now on is for it."""
    queue = make_queue()
    assert queue.take() == []
    return queue


def up_to_mark(queue, url):
    """All events up to one that is queued now, each one done with."""
    mark = f"mark {next(MARKS)}"
    assert queue_event(url, mark)
    events = []

    def marked():
        more = queue.take()
        queue.done(more)
        events.extend(more)
        if not more:
            queue.wait(0.01)
        return mark in named(more)

    eventually(marked, 30, what="the mark")
    return events[:named(events).index(mark)]


MARKS = itertools.count()


def by_name(events):
    """Name -> the payloads of the events of this name, in their order."""
    found = defaultdict(list)
    for event in events:
        message = json.loads(event.text.decode())
        found[message["event"]].append(message["payload"])
    return found


def numbered(names, count):
    """What by_name() finds if each has all its events, in order."""
    return {name: list(range(count)) for name in names}


def ours(caplog, level="ERROR"):
    """What wsqueue logged, each message fit for people; pika logs much more, under its own name."""
    return messages(SimpleNamespace(records=[r for r in caplog.records if r.name == "wsqueue"]), level)


def take_all(queue, count):
    """The next events, none of them done with."""
    events = []

    def enough():
        events.extend(queue.take())
        if len(events) < count:
            queue.wait(0.01)
        return len(events) >= count

    eventually(enough, what=f"{count} events")
    return events


# ---- Order -------------------------------------------------------------------------------------------------


def test_events_come_in_the_order_in_which_they_were_queued(queue_url, queue):
    """One by one or several at once, by one producer."""
    for number in range(0, 200, 4):
        assert queue_event(queue_url, "e", number) is True
        assert queue_events(queue_url, [("e", number + 1), ("e", number + 2)]) is True
        assert queue_event(queue_url, "e", number + 3) is True
    assert payloads(up_to_mark(queue, queue_url)) == list(range(200))


PRODUCE = PATIENTLY + """
import sys, wsqueue
for number in range(int(sys.argv[3])):
    assert wsqueue.queue_event(sys.argv[1], sys.argv[2], number)
"""


def test_each_process_keeps_its_order(queue_url, queue):
    """Four of them at once, while the queue is consumed: nothing is lost, or comes twice."""
    names = [f"process {number}" for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        producers = [pool.submit(run_python, PRODUCE, queue_url, name, 100) for name in names]
        events = drain(queue, 400)
        for producer in producers:
            producer.result()
    assert by_name(events + up_to_mark(queue, queue_url)) == numbered(names, 100)


def test_each_thread_keeps_its_order(queue_url, queue):
    """Eight of them that begin in the same moment, before the process has a connection."""
    start = threading.Barrier(8)

    def produce(name):
        start.wait(PATIENCE)
        return [queue_event(queue_url, name, number) for number in range(40)]

    names = [f"thread {number}" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert all(all(done) for done in pool.map(produce, names))
    assert by_name(up_to_mark(queue, queue_url)) == numbered(names, 40)


def test_a_thousand_events_at_once(queue_url, queue):
    """They come next to each other, each with an id of its own, whatever else is queued meanwhile."""
    with in_the_background(run_python, PRODUCE, queue_url, "other", 100):
        assert queue_events(queue_url, [("e", number) for number in range(1000)])
    events = up_to_mark(queue, queue_url)
    names = named(events)
    first = names.index("e")
    assert payloads(events[first:first + 1000]) == list(range(1000))
    assert names.count("e") == 1000 and names.count("other") == 100
    assert len({event.id for event in events}) == 1100


@contextmanager
def in_the_background(action, *args):
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(action, *args)
        yield
        call.result()


def test_a_thousand_entries(queue_url, queue, make_queue):
    """What has piled up while nobody looked comes in pieces, complete and in order."""
    queue.close()
    for number in range(1000):
        assert queue_event(queue_url, "e", [number, "x" * 1000])
    assert [number for number, _ in payloads(up_to_mark(make_queue(), queue_url))] == list(range(1000))


# ---- What an event is --------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [
    None, "", 0, False, [], {}, {"": {"a": [1, 2.5, -1e300, None, True]}}, 2**70,
    "ü \u20ac \U0001f600 \u2028\u2029 \x7f", "\ud800 a lone surrogate", "NUL \0 within",
    "'; DROP TABLE wsqueue; --", "%s", {"\0": "\ud83d"}, "\r\n\t\\\"", "</script>",
], ids=ascii)
def test_a_payload_comes_as_it_was_queued(queue_url, queue, payload):
    """Everything that JSON holds, also as the event's name."""
    name = f"name {payload}"
    assert queue_event(queue_url, name, payload)
    (event,) = drain(queue, 1)
    assert (named([event]), payloads([event])) == ([name], [payload])


def test_topics_and_times_come_along(queue_url, queue):
    """For whom it is, and when it was queued."""
    before = time.time()
    assert queue_event(queue_url, "one", to="/a")
    assert queue_events(queue_url, [("two", None), ("three", None)], to=["/a", "user:ü\0"])
    assert queue_event(queue_url, "all")
    events = drain(queue, 4)
    after = time.time()
    assert [event.to for event in events] == [("/a",), ("/a", "user:ü\0"), ("/a", "user:ü\0"), ()]
    for event in events:
        assert before <= event.queued_at <= after
        assert int(before) <= json.loads(event.text.decode())["timestamp"] <= after


def test_what_others_publish_is_an_event(queue_url, queue, store):
    """Any library's INSERT, XADD or publish: an object, or an array of them, with or without what is optional."""
    store.add(b'{"event": "bare"}')
    store.add(b'\xef\xbb\xbf {"event": "whole", "payload": "\xc3\xbc", "timestamp": 17, "to": ["/a"]}\n')
    store.add(b'[{"event": "first"}, {"event": "second", "payload": 2}]')
    events = drain(queue, 4)
    assert named(events) == ["bare", "whole", "first", "second"]
    assert payloads(events) == [None, "ü", None, 2]
    assert json.loads(events[1].text.decode())["timestamp"] == 17 and events[1].to == ("/a",)
    assert abs(json.loads(events[0].text.decode())["timestamp"] - time.time()) < 60, "the time at which it was put"


@only("sqlite")
def test_sqlite_holds_bytes_as_well_as_text(queue, store):
    """A producer may hand over the JSON as it was encoded."""
    store.execute("INSERT INTO {} (data) VALUES (?)", b'{"event": "a blob"}')
    assert named(drain(queue, 1)) == ["a blob"]


def test_ids_are_unique_and_fit_everywhere(queue_url, queue):
    """Of characters that need no escape in a URL, a header or a line; those of a batch end in the place in it."""
    for _ in range(20):
        assert queue_event(queue_url, "e")
        assert queue_events(queue_url, [("e", None)] * 3)
    events = up_to_mark(queue, queue_url)
    assert len({event.id for event in events}) == 80
    assert all(ID.fullmatch(event.id) for event in events)
    for batch in (events[first:first + 3] for first in range(1, 80, 4)):
        place = batch[0].id[:-len(":0")]
        assert [event.id for event in batch] == [f"{place}:0", f"{place}:1", f"{place}:2"]


@only(*SHARED)
def test_ids_are_the_same_on_every_node(queue_url, make_queue):
    """Whoever leaves one server can go on at another one."""
    queues = [make_queue("one"), make_queue("two")]
    assert [queue.take() for queue in queues] == [[], []]
    for number in range(10):
        assert queue_event(queue_url, "e", number)
        assert queue_events(queue_url, [("e", number), ("f", number)])
    ids = [[(event.id, event.text) for event in drain(queue, 30)] for queue in queues]
    assert ids[0] == ids[1]


CONNECT = PATIENTLY + """
import sys, time, wsqueue
print("loaded", flush=True)
sys.stdin.readline()
for url in sys.argv[1:]:
    wsqueue.open_queue(url, node="one").backlog()
    assert wsqueue.queue_event(url, "e", 1), url
"""


@only(*SHARED)
def test_who_connects_first_makes_what_is_needed(queue_url, make_queue):
    """Also where several are the first at the same moment, and make the same tables."""
    urls = [with_parameters(queue_url.partition("?")[0], queue=f"q_{uuid.uuid4().hex[:12]}") for _ in range(10)]
    with ExitStack() as stack:
        processes = [stack.enter_context(python(CONNECT, *urls)) for _ in range(4)]
        for process in processes:
            assert process.stdout.readline() == "loaded\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            _, errors = process.communicate(timeout=30 * TIME_UNIT)
            assert (process.returncode, errors) == (0, "")
    for url in urls:
        assert payloads(up_to_mark(make_queue(url=url), url)) == [1] * 4


def test_durable_events_arrive(queue_url, queue):
    """durable=True costs time, and changes nothing else."""
    assert queue_event(queue_url, "e", 1, durable=True) is True
    assert queue_events(queue_url, [("e", 2), ("e", 3)], durable=True) is True
    assert payloads(drain(queue, 3)) == [1, 2, 3]


# ---- All or nothing ----------------------------------------------------------------------------------------


def failing_generator():
    yield "e", 1
    raise RuntimeError("in the caller's own code")


@pytest.mark.parametrize("make", [
    lambda: [("e", 1), ("e", object()), ("e", 3)],
    lambda: [("e", 1), ("e", float("nan"))],
    lambda: [("e", 1), ("", 2)],
    lambda: [("e", 1), (None, 2)],
    lambda: [("e", 1), "e"],
    failing_generator,
], ids=["an object", "NaN", "an empty name", "no name", "no pair", "a generator that fails"])
def test_several_events_are_queued_all_or_none(queue_url, queue, caplog, make):
    """Where one of them is none, nothing is queued: False, and one line that says why."""
    assert queue_events(queue_url, make()) is False
    assert len(ours(caplog)) == 1
    assert up_to_mark(queue, queue_url) == []


def test_no_events_at_all_are_queued_easily(queue_url, queue, caplog):
    """An empty list is no error, and no entry."""
    assert queue_events(queue_url, []) is True
    assert ours(caplog) == [] and up_to_mark(queue, queue_url) == []


def test_put_raises_what_queue_event_logs(queue_url, queue):
    """For those who want to know why."""
    producer = open_queue(queue_url)
    try:
        with pytest.raises(EventError):
            producer.put([("e", object())])
        producer.put([("e", 1)], to="/a")
    finally:
        producer.close()
    assert payloads(drain(queue, 1)) == [1]


def test_a_queue_stands_for_itself(queue_url, queue):
    """Where a path or a URL can be given, an open queue can."""
    assert open_queue(queue) is queue
    assert queue_event(queue, "e", 1)
    assert payloads(drain(queue, 1)) == [1]


# ---- Sizes -------------------------------------------------------------------------------------------------

LARGE = MIB - 200  # with its name and its times, such a text is about as large as an event may be


def test_no_take_is_larger_than_it_was_asked_to_be(queue_url, queue):
    """Fifty of the largest events at once: a take ends with the one that fills it, and holds no more in memory."""
    for number in range(50):
        assert queue_event(queue_url, f"{number}", "x" * LARGE)
    events, sizes = 0, []
    tracemalloc.start()
    try:
        while events < 50:
            taken = drain(queue, 1)
            assert named(taken) == [str(events + index) for index in range(len(taken))]
            events += len(taken)
            sizes.append(sum(event.size for event in taken))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(sizes) <= wsqueue.TICK_BYTES + MIB
    assert peak < 25 * MIB, "half of what waits was in memory at the same time"


def test_a_take_is_as_small_as_asked_for(queue_url, queue):
    """At least one entry, at most one more than asked for."""
    for number in range(100):
        assert queue_event(queue_url, "e", [number, "x" * KIB])
    taken = []
    while len(taken) < 100:
        events = queue.take(4 * KIB)
        queue.done(events)
        assert sum(event.size for event in events) <= 4 * KIB + 2 * KIB
        taken += events
        if not events:
            queue.wait(0.01)
    assert [number for number, _ in payloads(taken)] == list(range(100))


def test_what_is_too_large_is_refused_at_once(queue_url, queue, caplog):
    """The producer is told, and not the server's log."""
    assert queue_event(queue_url, "e", "x" * MIB) is False
    assert queue_events(queue_url, [("e", "x" * (MIB // 2))] * 2) is False
    for said in ours(caplog):
        assert "max_event_bytes" in said
    assert up_to_mark(queue, queue_url) == []


# ---- Taken, done, taken again ------------------------------------------------------------------------------


def test_an_event_is_taken_once(queue_url, queue):
    """Whether or not it is done with."""
    for number in range(10):
        assert queue_event(queue_url, "e", number)
    events = take_all(queue, 10)
    assert payloads(events) == list(range(10))
    assert queue.take() == []
    queue.done(events)
    assert queue.take() == [] and up_to_mark(queue, queue_url) == []


def test_what_was_not_done_comes_again_when_asked_for(queue_url, queue):
    """In its order and with its ids, and before what was queued later; what was done does not."""
    for number in range(10):
        assert queue_event(queue_url, "e", number)
    events = take_all(queue, 10)
    queue.done(events[:4])
    queue.retake()
    assert queue_event(queue_url, "e", 10)
    again = take_all(queue, 7)
    assert payloads(again) == [4, 5, 6, 7, 8, 9, 10]
    assert [event.id for event in again[:6]] == [event.id for event in events[4:]]
    queue.done(again)
    queue.retake()
    assert up_to_mark(queue, queue_url) == []


def test_a_queue_that_is_opened_again_goes_on_behind_what_was_done(queue_url, queue, make_queue):
    """As a server that was stopped in order."""
    for number in range(10):
        assert queue_event(queue_url, "e", number)
    events = take_all(queue, 10)
    queue.done(events[:6])
    queue.close()
    assert queue_event(queue_url, "e", 10)
    again = make_queue()
    assert payloads(up_to_mark(again, queue_url)) == [6, 7, 8, 9, 10]
    again.close()
    assert up_to_mark(make_queue(), queue_url) == []


def test_a_batch_that_is_done_in_part_comes_again(queue_url, queue):
    """Its events belong to one entry: those that were sent come again, rather than that the others never do."""
    assert queue_events(queue_url, [("e", number) for number in range(4)])
    queue.done(take_all(queue, 4))
    assert queue_events(queue_url, [("e", number) for number in range(4, 8)])
    take_all(queue, 4)
    queue.retake()
    assert payloads(up_to_mark(queue, queue_url)) == [4, 5, 6, 7]


@only("directory", *SHARED)
def test_events_queued_before_the_first_server_ever_started_arrive(queue_url, make_queue):
    """A publish never fails because the server is down, or new."""
    for number in range(20):
        assert queue_event(queue_url, "e", number)
    assert payloads(up_to_mark(make_queue(), queue_url)) == list(range(20))


@only("amqp")
def test_an_exchange_that_nobody_listens_to_takes_nothing(queue_url, make_queue, caplog):
    """It would drop what it is given; so the producer is told, until there has been a server once."""
    assert queue_event(queue_url, "e", 1) is False
    (said,) = ours(caplog)
    assert "no server has ever" in said
    first = make_queue()
    first.take()
    first.close()
    eventually(lambda: queue_event(queue_url, "e", 2), what="its queue, which stays whether or not it runs")
    assert payloads(up_to_mark(make_queue(), queue_url)) == [2]


def test_text_that_fits_as_it_is_arrives_as_it_is(queue_url, queue):
    """Also where it would be too long with its letters escaped: what was accepted is not refused later."""
    text = "\u00e9" * 400_000
    assert queue_event(queue_url, "e", text)
    assert payloads(up_to_mark(queue, queue_url)) == [text]
    assert queue.backlog().failed == 0


def test_the_backlog_is_what_was_not_sent(queue_url, queue):
    """How much it is, how long the oldest of it waits, and that nothing failed; any process may ask."""
    assert queue.backlog()[:3] == (0, 0.0, 0)
    for number in range(5):
        assert queue_event(queue_url, "e", number)
    eventually(lambda: queue.backlog().waiting == 5, what="five that wait")
    eventually(lambda: queue.backlog().oldest > 0, what="an age of the oldest")
    if kind_of(queue_url) != "amqp":  # which does not count what a node has fetched
        with closing(open_queue(queue_url, **at_node(queue_url))) as observer:
            assert (observer.backlog().waiting, observer.backlog().failed) == (5, 0)
    queue.done(take_all(queue, 5))
    eventually(lambda: queue.backlog()[:3] == (0, 0.0, 0), what="an empty backlog")
    assert list(queue.backlog().failures) == []


def test_old_events_are_dropped_where_that_is_asked_for(queue_url, queue, make_queue, store, caplog):
    """max_age counts from queued_at; what is dropped is logged once, and is no backlog any more."""
    queue.close()
    queue = make_queue(max_age=3600.0)
    for number in range(3):
        store.add(b'{"event": "old", "payload": %d, "queued_at": %d}' % (number, time.time() - 7200))
    assert queue_event(queue_url, "new")
    assert named(drain(queue, 1)) == ["new"]
    for _ in range(2):
        store.add(b'{"event": "old", "queued_at": %d}' % (time.time() - 7200))
    eventually(lambda: not queue.take() and queue.backlog().waiting == 0, what="an empty backlog")
    assert_clear(" ".join(ours(caplog, "WARNING")), "3", "2", "max_age")
    caplog.clear()
    queue.close()
    assert up_to_mark(make_queue(max_age=3600.0), queue_url) == []
    assert ours(caplog, "WARNING") == []


# ---- What is not an event ----------------------------------------------------------------------------------

MOST = 300_000  # bytes; max_event_bytes where these are read
BROKEN = {  # what it is -> what the reason says, and the bytes
    "text": ("JSON", b"hello"),
    "half an object": ("JSON", b'{"event": "half", "pay'),
    "nothing": ("empty|no data", b""),
    "a number": ("number", b"42"),
    "null": ("null", b"null"),
    "an object without an event": ("event", b'{"payload": 1}'),
    "an empty name": ("empty string", b'{"event": ""}'),
    "NaN": ("NaN", b'{"event": "e", "payload": NaN}'),
    "not UTF-8": ("UTF-8", b'{"event": "\xff"}'),
    "deep": ("deep", b'{"event": "e", "payload": %s%s}' % (b"[" * 120_000, b"]" * 120_000)),
    "large": ("300000|max_event_bytes", b'{"event": "e", "payload": "%s"}' % (b"x" * MOST)),
    "one of three": ("number", b'[{"event": "e"}, 7, {"event": "e"}]'),
    "no topic": ("topic", b'{"event": "e", "to": []}'),
}


def broken_for(url):
    """What the kind of queue can hold: PostgreSQL keeps out by itself what is not text."""
    keeps_out = {"not UTF-8"} if kind_of(url) == "postgresql" else set()
    return {what: content for what, content in BROKEN.items() if what not in keeps_out}


def test_what_is_not_an_event_is_set_aside(queue_url, queue, make_queue, store, caplog):
    """With a reason, a line in the log and a count, all as it was; what is around it arrives, in order."""
    queue.close()
    queue = make_queue(max_event_bytes=MOST)
    broken = broken_for(queue_url)
    for number, (_, data) in enumerate(broken.values()):
        store.add(b'{"event": "good", "payload": %d}' % number)
        store.add(data)
    assert payloads(up_to_mark(queue, queue_url)) == list(range(len(broken)))
    eventually(lambda: queue.take() == [] and queue.backlog().failed == len(broken), what="all of them set aside")
    found = {data: reason for reason, data in store.failed()}
    assert set(found) == {data for _, data in broken.values()}
    for what, (words, data) in broken.items():
        assert re.search(words, found[data]), f"{what}: {found[data]}"
    assert len(ours(caplog)) == len(broken)
    if kind_of(queue_url) != "amqp":  # to look at a message is to take it
        assert_told_to_a_monitor(queue.backlog().failures, found.values())
    assert queue.backlog().waiting == 0


def assert_told_to_a_monitor(failures, reasons):
    """The newest are named, each with its reason."""
    assert len(failures) == wsqueue.MONITOR_FAILURES == len({failure["name"] for failure in failures})
    for failure in failures:
        assert any(reason.strip().startswith(failure["reason"][:60]) for reason in reasons)


def test_what_was_set_aside_does_not_come_back(queue_url, queue, make_queue, store, caplog):
    """Also where nothing is behind it that would take the place of the queue along."""
    store.add(b'{"event": ""}')
    eventually(lambda: queue.take() == [] and queue.backlog().failed == 1, what="one that was set aside")
    queue.retake()
    assert queue.take() == [] and queue.backlog().waiting == 0
    queue.close()
    again = make_queue()
    assert up_to_mark(again, queue_url) == []
    assert (again.backlog().failed, len(ours(caplog)), len(store.failed())) == (1, 1, 1)


@only(*SHARED)
def test_several_nodes_set_the_same_aside_once(queue_url, make_queue, store):
    """At the same moment, too."""
    nodes = [make_queue(f"node {number}".replace(" ", "-")) for number in range(4)]
    assert [node.take() for node in nodes] == [[]] * 4
    for number in range(20):
        store.add(b'{"event": "", "payload": %d}' % number)
    assert queue_event(queue_url, "end")
    with ThreadPoolExecutor(4) as pool:
        assert [named(events) for events in pool.map(lambda node: drain(node, 1), nodes)] == [["end"]] * 4
    assert sorted(data for _, data in store.failed()) == sorted(b'{"event": "", "payload": %d}' % n for n in range(20))
    assert [node.backlog().failed for node in nodes] == [20] * 4


@only("redis")
def test_a_stream_entry_without_data_is_set_aside(queue, store):
    """Whose field has another name was meant for somebody else, or is a mistake."""
    store.add(b'{"event": "e"}', field="payload")
    store.add(b'{"event": "good"}')
    assert named(drain(queue, 1)) == ["good"]
    ((reason, _),) = store.failed()
    assert "data" in reason


class OddProperties(pika.BasicProperties):
    """A header that the broker passes on, and that pika itself would neither send nor read."""

    def encode(self):
        return [b"".join(super().encode()).replace(b"\1wl" + (2**40).to_bytes(8, "big"), b"\1w" + self.odd)]


@only("amqp")
@pytest.mark.parametrize("seconds", [1763890123456, 2**64 - 1], ids=["milliseconds", "the largest"])
def test_a_header_that_the_library_cannot_read_holds_nothing_up(queue, store, seconds):
    """It is of no use to us: the event is sent like any other, and so is what follows it."""
    properties = OddProperties(delivery_mode=2, headers={"w": 2**40}, message_id="one")
    properties.odd = b"T" + seconds.to_bytes(8, "big")
    with store.channel() as channel:
        channel.confirm_delivery()
        channel.basic_publish(store.name, "", b'{"event": "odd"}', properties, mandatory=True)
    store.add(b'{"event": "good"}')
    assert named(drain(queue, 2)) == ["odd", "good"]


@only("sqlite")
@pytest.mark.parametrize("value", [None, 42, 1.5])
def test_a_row_without_text_is_set_aside_or_refused(queue, store, value):
    """SQLite lets anything into any column, unless it is told not to."""
    try:
        store.execute("INSERT INTO {} (data) VALUES (?)", value)
    except sqlite3.IntegrityError:
        assert value is None
        return
    store.add(b'{"event": "good"}')
    assert named(drain(queue, 1)) == ["good"]
    assert len(store.failed()) == 1


@only("postgresql")
@pytest.mark.parametrize("count", [1, 3])
def test_rows_with_a_made_up_number_hide_nothing(queue_url, make_queue, store, monkeypatch, count):
    """What somebody has put far ahead is sent before long, in its order, and holds up nothing else until then."""
    queue = make_queue()
    with monkeypatch.context() as patch:
        patch.setattr("wsqueue._SqlLink.tidy", lambda _: None)
        patch.setattr("wsqueue._PostgresLink.tidy", lambda _: None)
        assert queue.take() == []
        for number in range(count):
            record = json.dumps({"event": str(number)})
            store.execute("INSERT INTO {} (xid, data) VALUES (%s, %s)", 10**18 + number, record)
        for name in ("one", "two"):
            assert queue_event(queue_url, name)
            assert named(up_to_mark(queue, queue_url)) == [name]
        queue.close()
    again = make_queue()
    assert named(drain(again, count)) == list(map(str, range(count)))
    assert queue_event(queue_url, "last")
    assert named(up_to_mark(again, queue_url)) == ["last"]


@only("sqlite")
@pytest.mark.usefixtures("queue")
def test_a_row_with_a_made_up_number_is_refused(store):
    """It would be ahead of all that come after it."""
    with pytest.raises(sqlite3.IntegrityError):
        store.execute("INSERT INTO {} (xid, data) VALUES (?, '')", 10**18)


# ---- Waiting -----------------------------------------------------------------------------------------------

wakes = only("directory", *SERVERS)  # SQLite tells nobody of anything: its servers look ten times a second

PUT_ONE = PATIENTLY + """
import sys, wsqueue
assert wsqueue.queue_event(sys.argv[1], "e", 1)
"""


@wakes
def test_what_another_process_queues_ends_a_wait(queue_url, queue):
    """Long before its time is over; and then it can be taken."""
    with waiting(queue) as ended:
        run_python(PUT_ONE, queue_url)
        eventually(ended.is_set, what="the end of wait()")
    assert payloads(drain(queue, 1)) == [1]


@wakes
def test_what_others_publish_ends_a_wait(queue, store):
    """Without any help of ours."""
    with waiting(queue) as ended:
        store.add(b'{"event": "e"}')
        eventually(ended.is_set, what="the end of wait()")
    assert named(drain(queue, 1)) == ["e"]


@wakes
def test_what_came_before_the_wait_ends_it(queue_url, queue):
    """Between take() and wait() there is no gap into which an event could fall."""
    assert queue.take() == []
    assert queue_event(queue_url, "e")
    with waiting(queue) as ended:
        eventually(ended.is_set, what="the end of wait()")


def test_another_thread_ends_a_wait(queue):
    """While it waits, and before it does; then the queue is what it was."""
    for _ in range(3):
        with waiting(queue) as ended:
            queue.wake()
            eventually(ended.is_set, what="the end of wait()")
    queue.wait(0.0)
    queue.wake()
    queue.wake()
    with waiting(queue) as ended:
        eventually(ended.is_set, what="the end of a wait() that was ended before it began")
    assert queue.take() == []


def test_a_wait_for_nothing_takes_its_time(queue_url, queue):
    """A server whose queue is empty must not turn in a circle."""
    assert queue_event(queue_url, "e")
    queue.done(take_all(queue, 1))
    for _ in range(3):  # what has told of the event may come behind it
        queue.wait(0.02)
        assert queue.take() == []
    assert wait_duration(queue, 0.2) >= 0.19


# ---- Processes that are killed -----------------------------------------------------------------------------

PRODUCE_UNTIL_KILLED = PATIENTLY + """
import itertools, os, signal, sys, wsqueue

def produce(name, acknowledged):
    for number in itertools.count():
        if not wsqueue.queue_events(sys.argv[1], [(name, [number, part]) for part in range(3)]):
            os._exit(1)
        os.write(acknowledged, b".")

for round, most in enumerate(map(int, sys.argv[2:])):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        produce(f"round {round}", writer)
    os.close(writer)
    told = b""
    while len(told) < most:
        told += os.read(reader, 1) or sys.exit("the producer has ended by itself")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(len(told) + len(os.read(reader, 65536)), flush=True)
    os.close(reader)
"""


def test_what_a_producer_was_told_is_queued_survives_it(queue_url, queue):
    """kill -9 at any moment: all of what was acknowledged arrives, of the rest each batch as a whole or not at all."""
    kills = [random.Random(5).randrange(1, 40) for _ in range(8)]
    with python(PRODUCE_UNTIL_KILLED, queue_url, *kills) as process:
        output, errors = process.communicate(timeout=50 * TIME_UNIT)
        assert (process.returncode, errors) == (0, "")
    arrived = by_name(up_to_mark(queue, queue_url))
    for number, acknowledged in enumerate(map(int, output.split())):
        parts = arrived[f"round {number}"]
        assert parts == [[batch, part] for batch in range(len(parts) // 3) for part in range(3)]
        assert acknowledged <= len(parts) // 3 <= acknowledged + 1


CONSUME = PATIENTLY + """
import json, sys, wsqueue

queue = wsqueue.open_queue(sys.argv[1], **json.loads(sys.argv[2]))
queue.open()
while True:
    events = queue.take(2000)
    for event in events:
        print(json.loads(event.text.decode())["payload"][0], flush=True)
    queue.done(events)
    if not events:
        queue.wait(0.1)
"""


def consumed_until_killed(url, count, last):
    """The numbers that a process prints until it is killed: when it has printed so many, or the last one."""
    with python(CONSUME, url, json.dumps(at_node(url))) as process:
        numbers = []
        while len(numbers) < count and numbers[-1:] != [last]:
            numbers.append(int(process.stdout.readline() or pytest.fail(process.stderr.read())))
        process.kill()
        rest = process.stdout.read()
        return numbers + [int(line) for line in rest.splitlines(True) if line.endswith("\n")]


def test_a_consumer_that_is_killed_loses_nothing(queue_url, queue):
    """kill -9 at any moment: the next one goes on with what was not done, at the latest behind what was printed."""
    queue.close()
    for number in range(300):
        assert queue_event(queue_url, "e", [number, "x" * 200])
    seed, position, runs = random.Random(7), 0, 0
    while position < 300:
        numbers = consumed_until_killed(queue_url, seed.randrange(30, 150), 299)
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "a hole, or another order"
        assert numbers[0] <= position, "something is missing between two processes"
        position, runs = max(position, numbers[-1] + 1), runs + 1
        assert runs < 30, "a process that is killed never gets on"


def served(url):
    """The options of a server process."""
    return ["--queue", url, *([] if kind_of(url) == "directory" else ["--node", "one"])]


@contextmanager
def killed_server(url):
    """A server in a process of its own that is killed when the block ends."""
    with spawn_server(*served(url)) as server:
        yield server
        server.process.kill()
        server.process.wait()


@only("directory", *SHARED)
def test_who_comes_back_to_a_killed_server_misses_and_repeats_nothing(queue_url):
    """kill -9 of the server while events are queued, and again: with its last id a client gets each event once."""
    seed, last, received = random.Random(3), "", []
    for end in (100, 200, 300):
        with killed_server(queue_url) as server, Follower(server.url, last=last) as client:
            client.hello()
            with in_the_background(run_python, PRODUCE, queue_url, f"until {end}", 100):
                received += [client.recv() for _ in range(seed.randrange(20, 90))]
                server.process.kill()
            last = client.last
    with killed_server(queue_url) as server, Follower(server.url, last=last) as client:
        client.hello()
        received += [client.recv() for _ in range(300 - len(received))]
        assert queue_event(queue_url, "end")
        assert client.recv().event == "end"
    names = [f"until {end}" for end in (100, 200, 300)]
    assert [event for event in received if event.event not in names] == []
    assert {name: [e.payload for e in received if e.event == name] for name in names} == numbered(names, 100)


@only("amqp")
def test_who_comes_back_to_a_killed_server_is_told_where_it_cannot_go_on(queue_url):
    """RabbitMQ keeps nothing of what was sent: a reset, and never a silent hole; what is queued comes behind it."""
    with killed_server(queue_url) as server, Follower(server.url) as client:
        client.hello()
        eventually(lambda: queue_event(queue_url, "e", 1), what="the server's queue")
        assert client.recv().payload == 1
        last = client.last
    with killed_server(queue_url) as server, Follower(server.url, last=last) as client:
        assert queue_event(queue_url, "e", 2)
        names = [client.recv().event for _ in range(3)]
        assert names == ["wsqueue.hello", "wsqueue.reset", "e"]


def test_plain_clients_of_a_server_get_everything_in_order(queue_url):
    """The whole way: from several calls to a client that knows nothing of ids."""
    with serving(queue=queue_url, **({} if kind_of(queue_url) == "directory" else {"node": "one"})) as server:
        with RawClient(server.url, "/a") as client:
            clients_arrived(server, 1)
            for number in range(50):
                eventually(lambda n=number: queue_event(queue_url, "e", n, to="/a" if n % 2 else None), what="a server")
            assert client.payloads(50) == list(range(50))
            assert server.trouble() == ""


# ---- Connections -------------------------------------------------------------------------------------------


def descriptors():
    """Number -> what it is of every descriptor of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the one that lists the directory is gone by now
            continue
    return found


def connections_at(url):
    """How many connections the broker has, by its own account; by the kernel's of one that takes seconds to answer."""
    store = STORES[kind_of(url)](url)
    if kind_of(url) == "postgresql":
        return store.execute("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")[0][0] - 1
    if kind_of(url) == "redis":
        with store.connect() as client:
            return len(client.client_list()) - 1
    entries = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()]
    return sum(state == "01" and int(local[-4:], 16) == urlsplit(url).port for local, _, state in entries[1:])


def test_a_producer_keeps_its_connection(queue_url, queue):
    """A hundred events, and neither another socket nor another file than for the first one."""
    assert queue_event(queue_url, "e")
    before = descriptors()
    for _ in range(100):
        assert queue_event(queue_url, "e")
    assert descriptors() == before
    assert len(up_to_mark(queue, queue_url)) == 101


@only(*SERVERS)
def test_the_broker_sees_one_connection_of_a_producer(queue_url, make_queue):
    """However many events and threads; and none once it is given back."""
    wsqueue.close_queues()
    first = make_queue()
    assert first.take() == []
    first.close()
    none = settled(lambda: connections_at(queue_url))
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda number: queue_event(queue_url, "e", number), range(100)))
    assert settled(lambda: connections_at(queue_url)) == none + 1
    wsqueue.close_queues()
    eventually(lambda: connections_at(queue_url) == none, what="the connection to be given back")


def test_a_producer_gives_everything_back(queue_url, queue):
    """close_queues() leaves no descriptor, and is no end: the next event is queued over a new one."""
    queue.close()
    assert queue_event(queue_url, "e")  # whatever it opens once and for all is open now
    wsqueue.close_queues()
    gc.collect()
    before = descriptors()
    for _ in range(5):
        assert queue_event(queue_url, "e")
        wsqueue.close_queues()
        wsqueue.close_queues()
        assert descriptors() == before


def test_a_consumer_gives_everything_back(queue_url, queue, make_queue):
    """Opened and closed again and again, it leaves no descriptor and no thread."""
    queue.close()
    gc.collect()
    before, threads = descriptors(), threading.active_count()
    for _ in range(10):
        again = make_queue()
        assert queue_event(queue_url, "e")
        again.done(take_all(again, 1))
        again.wait(0.0)
        again.close()
        wsqueue.close_queues()
    assert descriptors() == before
    eventually(lambda: threading.active_count() == threads, what="the end of its threads")


FORK = PATIENTLY + """
import os, sys, wsqueue

def produce(name, count=50):
    for number in range(count):
        assert wsqueue.queue_event(sys.argv[1], name, number)

def forked(action, *args):
    pid = os.fork()
    if pid:
        return pid
    action(*args)
    sys.exit()  # in order: whatever an interpreter closes at its end, it closes

produce("before", 1)
children = [forked(produce, f"child {number}") for number in range(3)] + [forked(str)]
produce("parent")
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
produce("after", 1)
"""


def test_a_fork_and_its_parent_go_on(queue_url, queue):
    """The parent has a connection already: the children do not write into it, and their end does not close it."""
    run_python(FORK, queue_url)
    going_on = ["parent", *(f"child {number}" for number in range(3))]
    expected = {**numbered(["before", "after"], 1), **numbered(going_on, 50)}
    assert by_name(up_to_mark(queue, queue_url)) == expected


FORK_AMID_THREADS = PATIENTLY + """
import concurrent.futures.thread  # redis-py does; amid a fork, CPython would complain of a hook that ran half
import os, signal, sys, threading, warnings, wsqueue
warnings.simplefilter("ignore", DeprecationWarning)  # that such a fork may hang is what we want to know

def produce(name, count):
    for number in range(count):
        assert wsqueue.queue_event(sys.argv[1], name, number)

if sys.argv[2] == "connected":
    produce("before", 1)
threads = [threading.Thread(target=produce, args=(f"thread {number}", 100)) for number in range(4)]
for thread in threads:
    thread.start()
children = []
for number in range(8):
    pid = os.fork()
    if not pid:
        signal.alarm(40)  # what hangs is not left behind
        try:
            produce(f"child {number}", 10)
        except BaseException:
            os._exit(1)
        os._exit(0)
    children.append(pid)
for thread in threads:
    thread.join()
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
"""


@pytest.mark.parametrize("state", ["connected", "new"])
def test_a_fork_amid_other_threads_calls_hangs_nowhere(queue_url, queue, state):
    """Some thread holds the connection and its lock, or is just loading the library, and is not in the child."""
    run_python(FORK_AMID_THREADS, queue_url, state)
    threads, children = ([f"{kind} {number}" for number in range(8)] for kind in ("thread", "child"))
    expected = {**numbered(threads[:4], 100), **numbered(children, 10)}
    if state == "connected":
        expected["before"] = [0]
    assert by_name(up_to_mark(queue, queue_url)) == expected


# ---- URLs, and what is wrong with them ---------------------------------------------------------------------


@pytest.mark.parametrize("url, word", [
    ("mysql://root:hidden@127.0.0.1/db", "mysql"),
    ("redis://me@home:hidden@127.0.0.1:1/0?queue=a-b", "queue"),
    ("kafka://127.0.0.1:9092", "kafka"),
    ("http://127.0.0.1/queue", "http"),
    ("sqlite://", "path"),
    ("sqlite:///", "path"),
    ("sqlite:///?queue=q", "path"),
    ("sqlite://relative.db", "sqlite:///"),
    *[(f"redis://:hidden@127.0.0.1:1/0?queue={name}", "queue") for name in (
        "", "1st", "a-b", "a.b", "a%20b", "x%22%3B", "%C3%BC", "a" * 41, "a&queue=b%2F")],
    ("amqp://127.0.0.1:1/?queue=a-b", "queue"),
    ("sqlite:///x.db?queue=a-b", "queue"),
    ("postgresql://127.0.0.1:1/db?queue=a-b", "queue"),
    *[(f"redis://:hidden@127.0.0.1:1/0?keep_{what}={value}", f"keep_{what}")
      for what in ("events", "seconds") for value in ("", "many", "-1", "0", "nan", "1e400")],
], ids=lambda value: None if "://" not in value else value)
def test_a_url_that_makes_no_sense_is_refused_with_a_sentence(url, word, caplog, tmp_path, monkeypatch):
    """open_queue() raises, queue_event() returns False; what is wrong is named, and no password."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QueueError) as caught:
        open_queue(url)
    assert_clear(str(caught.value), word)
    assert queue_event(url, "e") is False
    (said,) = ours(caplog)
    assert str(caught.value) in said
    assert "hidden" not in said
    assert os.listdir(str(tmp_path)) == []


MISSING = """
import sys
sys.modules[sys.argv[1]] = None  # as if it were not installed
import wsqueue
sys.exit(wsqueue.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("command", ["send e", "status", "serve --port 0"])
@pytest.mark.parametrize("library, extra, url", [
    ("redis", "redis", "redis://:hidden@127.0.0.1:1/0"),
    ("psycopg", "postgres", "postgresql://me:hidden@127.0.0.1:1/db"),
    ("pika", "rabbitmq", "amqp://me:hidden@127.0.0.1:1/"),
])
def test_a_missing_library_is_named_with_what_installs_it(command, library, extra, url):
    """One sentence with the line to type, from whatever needs it first."""
    with python(MISSING, library, *command.split(), "--queue", url) as process:
        output, errors = process.communicate(timeout=30 * TIME_UNIT)
    assert (process.returncode, output) == (1, ""), errors
    said = errors.splitlines()[-1]
    assert library in said and f'pip install "wsqueue[{extra}]"' in said
    assert "Traceback" not in errors and "hidden" not in errors


def test_a_library_that_does_not_load_is_no_fault_of_the_url(tmp_path):
    """As with `python -W error` and one that complains of an old Python; its own reason is told."""
    (tmp_path / "redis.py").write_text("raise DeprecationWarning('support of this Python ends')", "utf-8")
    done = run_cli("send", "e", "--queue", "redis://:hidden@127.0.0.1:1/0", env={**os.environ, "PYTHONPATH": tmp_path})
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "package redis does not load: support of this Python ends" in done.stderr
    assert "Traceback" not in done.stderr and "hidden" not in done.stderr


def test_importing_wsqueue_imports_none_of_the_libraries():
    """Who has a directory needs the standard library alone."""
    run_python("import sys, wsqueue; assert not {'redis', 'psycopg', 'pika', 'sqlite3'} & set(sys.modules)")


PASSWORD = "hid:den/@ %"  # as it is, and not as it must be written in a URL


def with_password(url, password=PASSWORD, port=None):
    """The URL of a broker, with another password, at another port."""
    parts = urlsplit(url)
    user = f"{parts.username or ''}:{quote(password, safe='')}"
    return parts._replace(netloc=f"{user}@{parts.hostname}:{port or parts.port}").geturl()


def assert_secret(text, url):
    """No form of the URL's password is in it."""
    password = urlsplit(url).password
    for form in {password, unquote(password), quote(unquote(password))}:
        assert form not in text


@only(*SERVERS)
@pytest.mark.parametrize("at_broker", [True, False], ids=["refused", "unreachable"])
def test_a_password_is_in_no_line_of_a_log(queue_url, caplog, at_broker):
    """Whatever goes wrong with the broker, on the producer's side and on the server's."""
    caplog.set_level(logging.DEBUG, "wsqueue")
    caplog.set_level(logging.INFO)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        url = with_password(queue_url, port=None if at_broker else taken.getsockname()[1])
        assert queue_event(url, "e") is False
        queue = open_queue(url, **at_node(url))
        queue.open()
        try:
            with pytest.raises(QueueError) as caught:
                queue.take()
            with pytest.raises(QueueError) as asked:
                queue.backlog()
        finally:
            queue.close()
        for text in (caplog.text, str(caught.value), str(asked.value), repr(queue)):
            assert_secret(text, url)


@pytest.mark.parametrize("url", [
    "postgresql://user:hidden%41@127.0.0.1/db?nonsense=hidden%42", "redis://:hiddenA@127.0.0.1:hiddenB/0",
    "amqp://user:hiddenA@127.0.0.1:hiddenB/%2f"])
def test_a_url_that_its_library_does_not_understand(url):
    """The reason of the library may quote the password; ours says what to look at."""
    with pytest.raises(QueueError, match="not a URL that its library understands") as caught:
        open_queue(url)
    assert "hiddenA" not in str(caught.value) and "hidden%41" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("node", ["a b", "a/b", "x" * 101])
def test_the_name_of_a_node_is_of_plain_letters(tmp_path, node):
    """It becomes part of names at the broker."""
    with pytest.raises(QueueError, match="letters, digits, dots and dashes"):
        open_queue(f"sqlite:///{tmp_path}/queue.db", node=node)


def test_a_process_keeps_some_queues_connected_and_not_any_number(tmp_path, monkeypatch):
    """A program that makes up URLs does not run out of descriptors."""
    monkeypatch.setattr(wsqueue, "MOST_PRODUCERS", 2)
    for number in range(5):
        assert queue_event(f"sqlite:///{tmp_path}/{number}.db", "e")
        assert len(wsqueue._PRODUCERS) <= 2


@only("sqlite")
def test_a_bug_is_not_taken_for_trouble_with_the_broker(queue_url, queue, monkeypatch):
    """It comes as it is, with its traceback; the next look is through a new connection."""
    before = queue._reader

    def read(*_):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(type(before), "read", read)
        with pytest.raises(ZeroDivisionError):
            queue.take()
    assert queue_event(queue_url, "e")
    assert named(queue.take()) == ["e"]
    assert queue._reader is not before


@only("sqlite")
def test_an_older_backup_that_does_not_know_the_node(queue_url, make_queue, tmp_path):
    """All that is in it may be new to this server's clients: they are told to start anew, and then get all."""
    other = make_queue("other")
    assert queue_event(queue_url, "first")
    other.done(take_all(other, 1))
    assert other.take() == []  # which saves its place
    path = without_parameters(queue_url)[len("sqlite:///"):]
    with closing(sqlite3.connect(path)) as connection, closing(sqlite3.connect(str(tmp_path / "backup"))) as backup:
        connection.backup(backup)
    queue = make_queue("new")
    assert queue_event(queue_url, "second")
    queue.done(take_all(queue, 1))
    other.close()
    wsqueue.close_queues()
    for name in glob.glob(f"{path}-*"):
        os.unlink(name)
    os.replace(str(tmp_path / "backup"), path)
    assert "replaced" in trouble_of(queue)
    events = []

    def taken():
        with suppress(QueueError):  # it looks again after a tenth of a second
            events.extend(queue.take())
        return events

    eventually(taken, what="events")
    assert named(events) == ["wsqueue.reset", "first"]


def trouble_of(queue):
    """What keeps it from being read; "" if nothing does."""
    try:
        queue.take()
    except QueueError as error:
        return str(error)
    return ""


@only("redis")
def test_trouble_with_what_is_set_aside_is_said(queue_url, queue, store):
    """Nothing is dropped that cannot be kept anywhere."""
    with store.connect() as client:
        client.set(f"{store.key}:failed", "no stream")
        store.add(b"no event")
        assert "WRONGTYPE" in trouble_of(queue)
        client.delete(f"{store.key}:failed")
    eventually(lambda: not trouble_of(queue), what="an attempt that succeeds")
    assert up_to_mark(queue, queue_url) == []
    assert [data for _, data in store.failed()] == [b"no event"]


@only("redis")
def test_what_somebody_has_made_of_the_nodes_is_passed_over(queue_url, queue, make_queue, store):
    """Whoever may write there: no number of words, and no place."""
    with store.connect() as client:
        client.hset(f"{store.key}:nodes", mapping={"a": "", "b": "1 2", "c": "x 0 0", "d": f"{1 << 64}-0 0 0"})
    assert [node for node, _ in queue.nodes()] == ["one"]
    assert up_to_mark(queue, queue_url) == []


@only("amqp")
def test_an_exchange_of_another_kind(queue_url, store):
    """Somebody else has the name: the broker's reason is told, and no connection is left."""
    with store.channel() as channel:
        channel.exchange_declare(store.name, "direct")
    with pytest.raises(QueueError, match="PRECONDITION_FAILED"):
        open_queue(queue_url).put([("e", 1)])


@only("amqp")
def test_two_servers_cannot_be_the_same_node(queue_url, queue, make_queue):
    """The second one says what to do, and the first one goes on."""
    second = make_queue()
    with pytest.raises(QueueError, match="another server is the node one"):
        second.take()
    assert up_to_mark(queue, queue_url) == []


@only("amqp")
def test_a_queue_that_an_admin_deletes(queue_url, queue, store):
    """The server says so, makes it anew, and goes on."""
    with store.channel() as channel:
        channel.queue_delete(f"{store.name}.one")
    assert "ended the consumer" in eventually(lambda: trouble_of(queue), what="an error")
    eventually(lambda: not trouble_of(queue), what="a new consumer")
    assert up_to_mark(queue, queue_url) == []


def test_what_may_come_again_is_known_for_some_time_only(tmp_path):
    """A server that runs for a year does not remember a year's messages."""
    queue = open_queue(f"sqlite:///{tmp_path}/queue.db")
    for number in range(6 * wsqueue.ENTRIES):
        queue._remember([wsqueue.Entry(number, str(number), 0.0, b"")])
    assert len(queue._location.memory.sent) <= 4 * wsqueue.ENTRIES


def test_a_frame_of_rabbitmq_that_is_broken_in_another_way_stays_an_error():
    """Only properties that cannot be decoded are done without."""
    class Impl:
        _frame_buffer = struct.pack(">BHLLQB", pika.spec.FRAME_METHOD, 1, 12, 0, 0, 0)

        def _read_frame(self):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        wsqueue._read_frame(pika, Impl())


@only("postgresql")
def test_a_role_that_may_not_make_the_tables(queue_url, postgres_broker):
    """The database's reason is told, and no connection is left."""
    role = f"guest_{uuid.uuid4().hex[:8]}"
    with closing(psycopg.connect(postgres_broker.admin_url, autocommit=True)) as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'guest'")
        parts = urlsplit(queue_url)
        url = parts._replace(netloc=f"{role}:guest@{parts.hostname}:{parts.port}").geturl()
        with pytest.raises(QueueError, match="permission denied"):
            open_queue(url).put([("e", 1)])
        here = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
        eventually(lambda: admin.execute(here, [role]).fetchone() == (0,), what="the end of its connections")
        admin.execute(f"DROP ROLE {role}")


@only("postgresql")
def test_a_transaction_that_stays_open_is_named_in_time(queue_url, queue, store, monkeypatch):
    """What is behind it waits, for it may still come before that; after ten seconds a server says where to look."""
    now = 0.0
    monkeypatch.setattr(wsqueue, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: time.monotonic() + now}))
    with closing(store.connect()) as open_one:
        open_one.execute(f"INSERT INTO {store.table} (data) VALUES ('{{\"event\": \"late\"}}')")
        assert queue_event(queue_url, "e")
        assert queue.take() == []
        now = 11.0
        with pytest.raises(QueueError, match="pg_prepared_xacts"):
            queue.take()
        open_one.commit()
    assert named(take_all(queue, 2)) == ["late", "e"]


# ---- Entries that are removed ------------------------------------------------------------------------------
# A consumer that opens the queue removes what is too much, whoever has or has not seen it: here a second node does.


def is_reset(event):
    return named([event]) == ["wsqueue.reset"] and payloads([event]) == [None] and event.to == ()


def assert_told_and_complete(events, last, most_kept):
    """First that something is missing, and then all from some number on, which is no more than was to be kept."""
    assert is_reset(events[0]), named(events[:3])
    numbers = payloads(events[1:])
    assert numbers == list(range(numbers[0], last + 1))
    assert most_kept <= len(numbers) < last


def assert_said_once(queue, url, caplog, last, least):
    """That entries were removed: by a reset, and in the log; then all goes on as if nothing had been."""
    assert_told_and_complete(up_to_mark(queue, url), last, least)
    assert_clear(*ours(caplog, "WARNING"), "keep_events", "keep_seconds")
    assert queue_event(url, "e", last + 1)
    assert payloads(up_to_mark(queue, url)) == [last + 1], "it is said once"


@pytest.fixture
def others_remove(make_queue, monkeypatch):
    """A node that begins now does, and those that run already do not."""
    monkeypatch.setattr(wsqueue, "SEEN_SECONDS", 3600.0)
    names = map("other-{}".format, itertools.count())

    def remove(url):
        other = make_queue(next(names), url=url)
        other.take()
        other.close()

    return remove


@only(*SHARED)
def test_a_node_that_was_down_for_too_long_says_so(queue_url, make_queue, others_remove, caplog):
    """What it had yet to send was removed by others: its clients are told to start anew, and the log is."""
    url = with_parameters(queue_url, keep_events=100)
    first = make_queue(url=url)
    for number in range(5):
        assert queue_event(url, "e", number)
    assert payloads(up_to_mark(first, url)) == list(range(5))
    first.close()
    for number in range(500):
        assert queue_event(url, "e", number)
    others_remove(url)
    caplog.clear()
    assert_said_once(make_queue(url=url), url, caplog, 499, 99)


@only(*SHARED)
def test_a_node_that_lags_too_far_behind_says_so(queue_url, make_queue, others_remove, caplog):
    """While it runs; what it has taken already is whole, and behind the reset the order goes on."""
    url = with_parameters(queue_url, keep_events=100)
    queue = make_queue(url=url)
    for number in range(5):
        assert queue_event(url, "e", number)
    taken = take_all(queue, 5)
    for number in range(500):
        assert queue_event(url, "e", number)
    others_remove(url)
    caplog.clear()
    queue.done(taken)
    assert_told_and_complete(up_to_mark(queue, url), 499, 99)
    assert len(ours(caplog, "WARNING")) == 1
    assert ours(caplog) == []


@only(*SHARED)
def test_entries_that_are_too_old_are_removed(queue_url, make_queue, others_remove, store, caplog):
    """By keep_seconds; also where the node that was to send them has never sent anything."""
    url = with_parameters(queue_url, keep_seconds=1800)
    first = make_queue(url=url)
    assert first.take() == []
    first.close()
    for number in range(300):
        store.add_old(b'{"event": "old"}', 3600 - number)
    for number in range(3):
        assert queue_event(url, "young", number)
    others_remove(url)
    caplog.clear()
    events = up_to_mark(make_queue(url=url), url)
    assert is_reset(events[0])
    assert by_name(events)["young"] == [0, 1, 2]
    assert named(events).count("old") <= 100, "Redis removes them a hundred at a time"
    assert len(ours(caplog, "WARNING")) == 1


@only("sqlite", "postgresql")
def test_nothing_stays_for_longer_because_nothing_follows(queue_url, make_queue, others_remove, store, caplog):
    """The last rows of a table go at keep_seconds, too; whoever has seen them goes on without a word."""
    url = with_parameters(queue_url, keep_seconds=1800)
    queue = emptied_by_age(url, make_queue, others_remove, store)
    assert queue_event(url, "young")
    assert named(up_to_mark(queue, url)) == ["young"]
    queue.close()
    assert named(up_to_mark(make_queue(url=url), url)) == []
    assert ours(caplog, "WARNING") == []


@only("sqlite", "postgresql")
def test_what_is_removed_after_all_was_removed_is_no_silent_hole(queue_url, make_queue, others_remove, store, caplog):
    """A node knows the one from the other: here it has missed something."""
    url = with_parameters(queue_url, keep_seconds=1800, keep_events=100)
    queue = emptied_by_age(url, make_queue, others_remove, store)
    for number in range(500):
        assert queue_event(url, "e", number)
    others_remove(url)
    assert_said_once(queue, url, caplog, 499, 99)


def emptied_by_age(url, make_queue, others_remove, store):
    """Returns a consumer that has seen all there was."""
    queue = make_queue(url=url)
    assert queue.take() == []
    for number in range(2):
        store.add_old(b'{"event": "old"}', 3600 - number)
    queue.done(drain(queue, 2))
    others_remove(url)
    assert store.count() == 0
    return queue


@only(*SHARED)
def test_what_all_have_seen_is_removed_without_a_word(queue_url, make_queue, others_remove, caplog):
    """The normal course: a queue does not grow for ever, and nobody misses anything."""
    url = with_parameters(queue_url, keep_events=400)
    queue = make_queue(url=url)
    for _ in range(3):
        assert up_to_mark(queue, url) == []
        for number in range(300):
            assert queue_event(url, "e", number)
        assert payloads(up_to_mark(queue, url)) == list(range(300))
        queue.close()
        others_remove(url)
        queue = make_queue(url=url)
    assert up_to_mark(queue, url) == []
    assert ours(caplog, "WARNING") == []


@only(*SHARED)
def test_a_node_that_is_gone_for_good_is_forgotten(queue_url, make_queue, others_remove, store):
    """After keep_seconds; should it come back all the same, it begins like a new one, where the others are."""
    dead, alive = make_queue("dead"), make_queue("alive")
    assert dead.take() == alive.take() == []
    dead.close()
    assert queue_event(queue_url, "e", 1)
    assert payloads(up_to_mark(alive, queue_url)) == [1]
    alive.close()
    assert [name for name, _ in alive.nodes()] == ["alive", "dead"]
    store.make_older("dead", wsqueue.KEEP_SECONDS + 60)
    others_remove(queue_url)
    assert [name for name, _ in alive.nodes()] == ["alive", "other-0"]
    assert queue_event(queue_url, "e", 2)
    assert payloads(up_to_mark(make_queue("dead"), queue_url)) == [2]


@only("amqp")
def test_a_node_of_rabbitmq_whose_queue_was_full_says_so(queue_url, make_queue, caplog):
    """The broker drops the oldest by itself, at once."""
    url = with_parameters(queue_url, keep_events=50)
    first = make_queue(url=url)
    assert first.take() == []
    first.close()
    for number in range(200):
        assert queue_event(url, "e", number)
    assert_said_once(make_queue(url=url), url, caplog, 199, 49)


@only(*SHARED)
def test_other_bounds_than_before(queue_url, make_queue):
    """Whoever changes keep_events or keep_seconds in the URL starts the server again, and that is all."""
    for number, bounds in enumerate([{}, {"keep_events": 500}, {"keep_seconds": 3600}, {"keep_events": 20}]):
        url = with_parameters(queue_url, **bounds)
        queue = make_queue(url=url)
        assert queue.take() == []
        assert queue_event(url, "e", number)
        assert payloads(up_to_mark(queue, url)) == [number]
        queue.close()


@only("amqp")
def test_other_bounds_than_those_of_a_queue_in_rabbitmq(queue_url, queue, make_queue, caplog):
    """RabbitMQ does not change them: the log says so, and names the queue; all else goes on."""
    queue.close()
    for number, bounds in enumerate([{"keep_events": 500}, {"keep_seconds": 3600}]):
        url = with_parameters(queue_url, **bounds)
        caplog.clear()
        other = make_queue(url=url)
        assert other.take() == []
        assert_clear(*ours(caplog, "WARNING"), f"{name_of(queue_url)}.one", "bounds")
        assert queue_event(url, "e", number)
        assert payloads(up_to_mark(other, url)) == [number]
        other.close()


# ---- The command line --------------------------------------------------------------------------------------


def test_send_takes_a_url(queue_url, queue):
    """From the environment, or from --queue, where everybody can see a password: that is said, and is no failure."""
    done = run_cli("send", "first", '{"id": 1}', "--to", "/a", env=environment(WS_QUEUE_PATH=queue_url))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run_cli("send", "second", "--durable", "--queue", queue_url)
    assert (done.returncode, done.stdout) == (0, "")
    if urlsplit(queue_url).password:
        assert "WS_QUEUE_PATH" in done.stderr
        assert_secret(done.stderr, queue_url)
    else:
        assert done.stderr == ""
    events = drain(queue, 2)
    assert (named(events), payloads(events)) == (["first", "second"], [{"id": 1}, None])
    assert events[0].to == ("/a",)


def test_serve_takes_a_url(queue_url):
    """From --queue, or from the environment; it says which queue it serves, and no password."""
    env = environment(WS_QUEUE_PATH=queue_url, WS_NODE="one")
    with spawn_server(env=env) as server:
        with RawClient(server.url) as client:
            eventually(lambda: run_cli("send", "e", "1", env=env).returncode == 0, what="a server that takes events")
            assert client.payloads(1) == [1]
            client.close()
        server.end()
        assert server.stdout_text() == f"listening on {server.url}\n"
        assert "Traceback" not in server.stderr_text()
        if urlsplit(queue_url).password:
            assert_secret(server.stderr_text(), queue_url)


@only(*SHARED, "amqp")
def test_status_shows_the_nodes_and_what_waits_for_them(queue_url, make_queue, store):
    """By their names, with a count each; no password."""
    first = make_queue("node-a")
    assert first.take() == []
    for number in range(3):
        assert queue_event(queue_url, "e", number)
    second = make_queue("node-b")
    second.take()
    first.done(take_all(first, 3))
    store.add(b"not an event")
    eventually(lambda: first.take() == [] and first.backlog().failed == 1, what="one that was set aside")
    first.close()
    second.close()
    done = run_cli("status", "--node", "node-a", env=environment(WS_QUEUE_PATH=queue_url))
    assert (done.returncode, done.stderr) == (0 if first.nodes() else 1, "")
    assert re.search(r"^backlog +0\b", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^failed +1\b", done.stdout, re.MULTILINE), done.stdout
    assert "failed/" not in done.stdout, "there is no such directory"
    if kind_of(queue_url) != "amqp":  # which has no list of them
        assert "node-a" in done.stdout and "node-b" in done.stdout
    if urlsplit(queue_url).password:
        assert_secret(done.stdout + done.stderr, queue_url)


@only("amqp")
def test_status_says_that_it_does_not_see_what_a_server_has_fetched(queue_url, queue):
    """RabbitMQ does not tell; it does once they are given back."""

    def backlog():
        done = run_cli("status", "--node", "one", env=environment(WS_QUEUE_PATH=queue_url))
        return re.search("^backlog  (.*)$", done.stdout, re.MULTILINE)[1]

    for number in range(3):
        assert queue_event(queue_url, "e", number)
    take_all(queue, 3)
    assert backlog() == "0 or more"
    queue.close()
    assert re.match(r"3\b(?! or)", backlog())


@pytest.mark.parametrize("command", ["send e", "status"])
def test_a_command_says_why_a_broker_cannot_be_reached(command, postgres_broker):
    """Status 1, and one sentence without the password."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = with_password(postgres_broker.queue_url(), port=taken.getsockname()[1])
        said = complaint(run_cli(*command.split(), env=environment(WS_QUEUE_PATH=url)), 1)
    assert_secret(said, url)
    assert "127.0.0.1" in said
