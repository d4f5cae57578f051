"""Section 11 when the broker is in trouble: nothing is lost, nothing comes twice, nobody waits, all are told."""

import contextlib
import ctypes
import gc
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
import redis

import brokers
import wsqueue
from brokers import PASSWORD, Cutter, rabbitmqctl
from clients import with_last_id
from helpers import TIME_UNIT, eventually, run_cli, spawn_server
from test_monitoring import health
from test_processes import reading
from wsqueue import queue_event

PATIENCE = 30.0  # a server that is kept waiting finds out after seconds, and then tries again every five
SOME = 20  # events, enough that several are on their way at any moment


class Records(logging.Handler):
    """What one thread logs, and the libraries in it."""

    def __init__(self, thread):
        super().__init__(logging.INFO)
        self.texts, self.failures = [], []
        self._thread = thread

    def emit(self, record):
        if record.threadName == self._thread:
            self.texts.append(logging.Formatter().format(record))
            if record.name == "wsqueue" and record.levelno >= logging.ERROR:
                self.failures.append(record.getMessage())


def disconnect(url):
    """What queue_event() has kept; not close_queues(), because others may be at it."""
    kept = wsqueue._PRODUCERS.pop(url, None)
    if kept:
        kept.close()


class Producer(threading.Thread):
    """Queues the numbers from 1 on, as fast as a busy application, until it is told to stop."""

    def __init__(self, url):
        super().__init__(name=f"producer for {url}", daemon=True)
        self.accepted, self.refused = [], []
        self.records = Records(self.name)
        self.longest = 0.0
        self._url, self._over, self._may_run = url, threading.Event(), threading.Event()

    def __enter__(self):
        logging.getLogger().addHandler(self.records)
        self.resume()
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()
        logging.getLogger().removeHandler(self.records)
        disconnect(self._url)

    def stop(self):
        self._over.set()
        self.resume()
        self.join()

    def pause(self):
        self._may_run.clear()

    def resume(self):
        self._may_run.set()

    def run(self):
        number = 0
        while not self._over.wait(0.005):
            self._may_run.wait()
            number += 1
            since = time.monotonic()
            taken = queue_event(self._url, "e", number)
            self.longest = max(self.longest, time.monotonic() - since)
            (self.accepted if taken else self.refused).append(number)

    def goes_on(self):
        """Wait until more is accepted."""
        number = len(self.accepted) + SOME
        eventually(lambda: len(self.accepted) >= number, PATIENCE, "the events to be taken")

    def is_refused(self):
        number = len(self.refused) + 2
        eventually(lambda: len(self.refused) >= number, PATIENCE, "the events to be refused")


def events_of(reader):
    """What a client got so far, without what the server says of itself."""
    events = map(json.loads, list(reader.messages))
    return [event["payload"] for event in events if not event["event"].startswith("wsqueue.")]


def has_come(reader, payload):
    return any(json.loads(message)["payload"] == payload for message in reader.messages[-100:])


def receives(reader, payloads):
    """Wait until a client has these, and no others."""
    eventually(lambda: has_come(reader, payloads[-1]), what=f"the event {payloads[-1]}")
    assert events_of(reader) == payloads


def within_patience(condition):
    """Its result; None if there was none in time, which is for a test to judge."""
    try:
        return eventually(condition, PATIENCE)
    except AssertionError:
        return None


def in_trouble(server):
    facts = health(server)
    return facts if facts["status"] == "trouble" else None


def is_well(server):
    return health(server)["status"] == "ok"


def serving(url, **popen):
    """A server of the queue; it pings its clients, who would take it for dead in a long trouble."""
    settings = ("--node", "one", "--monitoring", "on", "--ping-interval", 2)
    return spawn_server(*settings, env={**os.environ, "WS_QUEUE_PATH": url}, **popen)


def assert_complete(received, accepted):
    """All that was accepted, once and in its order; what was refused may be there, too: its answer was lost."""
    assert len(received) == len(set(received))
    known = set(accepted)
    assert [number for number in received if number in known] == accepted


@contextlib.contextmanager
def flow(url):
    """Events that are queued and arrive, before and after what the block does: all that are accepted, once."""
    with serving(url) as server, reading(server.url) as plain, reading(server.url, with_last_id("/", "")) as resuming:
        eventually(lambda: is_well(server), PATIENCE)
        with Producer(url) as producer:
            producer.goes_on()
            yield SimpleNamespace(server=server, producer=producer)
            producer.goes_on()
            producer.stop()
        for reader in (plain, resuming):
            eventually(lambda: has_come(reader, producer.accepted[-1]), PATIENCE, "the last event")  # noqa: B023
            assert_complete(events_of(reader), producer.accepted)
        eventually(lambda: is_well(server), PATIENCE, "the end of the trouble")
        assert PASSWORD not in f"{producer.records.texts}{server.stderr_text()}"


def refusal(producer):
    """Why events are refused now."""
    producer.is_refused()
    return producer.records.failures[-1]


# ---- Brokers to be ill-treated -----------------------------------------------------------------------------

SERVERS = {
    "redis": brokers.redis_server,
    "postgres": brokers.postgres_server,
    "rabbitmq": brokers.rabbitmq_server,
}
PROGRAMS = {"redis": brokers.REDIS, "postgres": brokers.POSTGRES, "rabbitmq": brokers.RABBITMQ}


def needs(kind):
    if not PROGRAMS[kind]:
        pytest.skip(f"needs Debian's {kind}")


@contextlib.contextmanager
def make_site(kind, directory):
    """A broker to be ill-treated, behind a cable to be cut."""
    with SERVERS[kind](directory) as broker, Cutter(broker.port) as cutter:
        yield SimpleNamespace(broker=broker, cutter=cutter)


class Stage:
    """Where the stories of one kind of broker are told, one after the other, in a thread of its own."""

    def __init__(self, kind, directory):
        self._pool = ThreadPoolExecutor(1)
        self._open, self._site = contextlib.ExitStack(), None
        self._kind, self._directory, self._stories = kind, directory, {}

    @property
    def site(self):
        """A future."""
        if self._site is None:
            self._site = self._pool.submit(self._open.enter_context, make_site(self._kind, self._directory))
        return self._site

    def begin(self, name):
        self._stories[name] = self._pool.submit(tell, self.site, name)

    def story(self, name):
        return self._stories[name].result(60.0 * TIME_UNIT)

    def close(self):
        for story in self._stories.values():
            story.cancel()
        self._pool.submit(self._open.close).result()
        self._pool.shutdown()


@pytest.fixture(scope="module", autouse=True)
def stages(request, tmp_path_factory):
    """All stories that are asked for begin at once, a stage for each kind: what they do most of the time is wait."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    made = {kind: Stage(kind, tmp_path_factory.mktemp(kind)) for kind in SERVERS}
    for name in dict.fromkeys(given["story"] for given in params if "story" in given):
        if PROGRAMS[name.split()[0]]:
            made[name.split()[0]].begin(name)
    yield made
    for stage in made.values():
        stage.close()


@pytest.fixture
def redis_site(tmp_path):
    """A Redis of the test's own, behind a cable, and a client that may change it."""
    needs("redis")
    with make_site("redis", tmp_path) as site, redis.Redis(port=site.broker.port, password=PASSWORD) as site.admin:
        yield site


@pytest.fixture
def postgres_site(tmp_path):
    """A PostgreSQL of the test's own, behind a cable; and its superuser, who may write even where nobody else does."""
    needs("postgres")
    writing = "-c default_transaction_read_only=off"
    with make_site("postgres", tmp_path) as site:
        with psycopg.connect(site.broker.admin_url, autocommit=True, options=writing) as site.admin:
            yield site


@pytest.fixture
def rabbitmq_site(stages):
    """The one of the stories, when they are told: starting one takes long."""
    needs("rabbitmq")
    return stages["rabbitmq"].site.result(60.0 * TIME_UNIT)


def through(site):
    """A queue at the other end of the cable."""
    return site.broker.queue_url(port=site.cutter.port)


# ---- What only some brokers do -----------------------------------------------------------------------------


def test_redis_without_memory(redis_site):
    """Where Redis may not take more, and may remove nothing, events are refused with its words, until it may."""
    with flow(redis_site.broker.queue_url()) as it:
        redis_site.admin.config_set("maxmemory", 1)
        assert "maxmemory" in refusal(it.producer)
        redis_site.admin.config_set("maxmemory", 0)


def test_redis_that_is_somebodys_replica_for_a_while(redis_site):
    """A Redis that may only be read refuses events; once it may be written again, all goes on."""
    with flow(redis_site.broker.queue_url()) as it:
        redis_site.admin.replicaof(brokers.HOST, brokers.free_port())  # whom it does not find
        assert "replica" in refusal(it.producer)
        redis_site.admin.replicaof("NO", "ONE")


def test_redis_that_fails_over(redis_site, tmp_path):
    """A replica takes the place, and the address, of the one that died: what it had confirmed goes on from there."""
    directory = tmp_path / "replica"
    directory.mkdir()
    options = ("--replicaof", brokers.HOST, str(redis_site.broker.port))
    with brokers.redis_server(directory, *options) as replica, flow(through(redis_site)) as it:
        with redis.Redis(port=replica.port, password=PASSWORD) as admin:
            redis_site.cutter.refuse()
            it.producer.is_refused()
            eventually(lambda: is_up_to_date(admin, redis_site.admin), what="a replica that has everything")
            redis_site.broker.kill()
            admin.replicaof("NO", "ONE")
            redis_site.cutter.target = replica.port
            redis_site.cutter.heal()
            it.producer.goes_on()


def is_up_to_date(replica, master):
    there, here = replica.info("replication"), master.info("replication")
    return there["master_link_status"] == "up" and there["slave_repl_offset"] >= here["master_repl_offset"]


def test_postgres_that_may_only_be_read(postgres_site):
    """As after a fail-over to one that follows: events are refused with its words, until it may be written."""
    with flow(postgres_site.broker.queue_url()) as it:
        postgres_site.admin.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        postgres_site.admin.execute("SELECT pg_reload_conf()")
        assert "read-only" in refusal(it.producer)
        postgres_site.admin.execute("ALTER SYSTEM RESET default_transaction_read_only")
        postgres_site.admin.execute("SELECT pg_reload_conf()")


def test_postgres_whose_table_is_locked(postgres_site):
    """Whoever rebuilds the table keeps producers and servers waiting: neither waits for ever."""
    url = postgres_site.broker.queue_url()
    with flow(url) as it:
        table = url.partition("queue=")[2]
        with psycopg.connect(postgres_site.broker.url) as somebody:
            somebody.execute(f'LOCK TABLE "{table}" IN ACCESS EXCLUSIVE MODE')
            it.producer.is_refused()
            assert eventually(lambda: in_trouble(it.server), PATIENCE)


@pytest.mark.parametrize("kind, data", [("redis", "appendonlydir"), ("postgres", "data")])
def test_broker_that_is_restored_from_an_older_backup(kind, data, request, tmp_path):
    """What is queued before the server is back is sent, and so is what follows; whoever has ids is told."""
    site = request.getfixturevalue(f"{kind}_site")
    directory, backup, direct = site.broker.log.parent, tmp_path / "backup", site.broker.queue_url("restored")
    url = site.broker.queue_url("restored", port=site.cutter.port)
    with serving(url) as server, reading(server.url) as plain, reading(server.url, with_last_id("/", "")) as resuming:
        queue(direct, plain, 1, 2)
        site.broker.stop()
        subprocess.run(["cp", "-a", str(directory / data), str(backup)], check=True)
        site.broker.start()
        queue(direct, plain, *range(3, 9))
        site.cutter.refuse()
        site.broker.stop()
        shutil.rmtree(str(directory / data))
        subprocess.run(["cp", "-a", str(backup), str(directory / data)], check=True)
        site.broker.start()
        queue(direct, None, *range(10, 25))
        site.cutter.heal()
        queue(direct, plain, 25)
        eventually(lambda: has_come(resuming, 25), PATIENCE)
        assert [payload for payload in events_of(plain) if payload >= 10] == list(range(10, 26))
        told = [json.loads(message)["event"] for message in resuming.messages].index("wsqueue.reset")
        after = [json.loads(message)["payload"] for message in list(resuming.messages)[told + 1:]]
        assert [payload for payload in after if payload >= 10] == list(range(10, 26))


def queue(url, reader, *payloads):
    """By a process that has no connection yet; and wait until the reader has them."""
    for payload in payloads:
        assert queue_event(url, "e", payload)
    disconnect(url)
    if reader:
        eventually(lambda: has_come(reader, payloads[-1]), PATIENCE, f"the event {payloads[-1]}")


def test_postgres_that_ends_connections(postgres_site):
    """Those that an administrator, or a proxy, ends are made anew, and no event is repeated."""
    with flow(postgres_site.broker.queue_url()) as it:
        for _ in range(3):
            end_connections(postgres_site.admin)
            it.producer.goes_on()


def end_connections(admin):
    admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'events'")


# ---- SQLite, whose trouble is that of files ----------------------------------------------------------------


@pytest.fixture
def database(tmp_path):
    """Where a queue's file will be, in a directory of its own."""
    return tmp_path / "data" / "queue.db"


def url_of(database):
    return f"sqlite:///{database}"


def test_sqlite_that_somebody_else_writes(database):
    """Whoever keeps the file locked keeps events out, but nobody waiting for ever."""
    with flow(url_of(database)) as it:
        with contextlib.closing(sqlite3.connect(str(database), isolation_level=None)) as somebody:
            somebody.execute("BEGIN IMMEDIATE")
            assert "locked" in refusal(it.producer)
            somebody.execute("COMMIT")


def test_sqlite_server_on_a_full_disk(database):
    """It goes on sending what it can read, and says that it cannot note how far it is."""
    with flow(url_of(database)) as it:
        with no_larger_file(it.server.pid, size_of_log(database)):
            it.producer.goes_on()
            it.producer.pause()
            assert eventually(lambda: in_trouble(it.server), PATIENCE)
        it.producer.resume()


def test_sqlite_producer_on_a_full_disk(database):
    """It is told why; the event is not there afterwards, and the next one is."""
    url = url_of(database)
    with serving(url) as server, reading(server.url) as reader:
        assert send(url, 1)[0]
        limit = size_of_log(database)
        taken, said = send(url, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        assert not taken and str(database) in said and "Traceback" not in said
        assert send(url, 3)[0]
        receives(reader, [1, 3])


def size_of_log(database):
    """The part of the database that grows with each event."""
    return database.with_name(f"{database.name}-wal").stat().st_size


@contextlib.contextmanager
def no_larger_file(pid, size):
    """The process can make no file larger than that, as on a full disk."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def give_up_privileges():
    """Root, too, may then write only what a file's mode lets its owner write. Nobody else has any to give up."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@contextlib.contextmanager
def read_only(database):
    paths = [database.parent, *database.parent.iterdir()]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path in paths:
            path.chmod(0o755)


def send(url, payload, preexec_fn=give_up_privileges):
    """From another process; whether it was queued, and what it printed."""
    done = run_cli("send", "e", payload, env={**os.environ, "WS_QUEUE_PATH": url}, preexec_fn=preexec_fn)
    return done.returncode == 0, done.stderr


@pytest.mark.parametrize("made_before", [True, False], ids=["with a file", "without a file"])
def test_sqlite_that_may_only_be_read(database, made_before):
    """Whoever may not write is told; a server starts all the same, and serves once it may."""
    url = url_of(database)
    database.parent.mkdir()
    if made_before:
        assert send(url, 1)[0]
    with contextlib.ExitStack() as stack:
        with read_only(database):
            taken, said = send(url, 2)
            assert not taken and str(database) in said and "Traceback" not in said
            server = stack.enter_context(serving(url, preexec_fn=give_up_privileges))
            reader = stack.enter_context(reading(server.url))
            assert eventually(lambda: in_trouble(server), PATIENCE)
        eventually(lambda: is_well(server), PATIENCE)
        assert send(url, 3)[0]
        receives(reader, [1, 3] if made_before else [3])


def put_a_file_in_the_way(database):
    database.parent.write_text("in the way")


def write_something_else(database):
    database.parent.mkdir()
    database.write_bytes(b"This is a letter. " * 1000)


@pytest.mark.parametrize("spoil", [put_a_file_in_the_way, write_something_else])
def test_sqlite_that_cannot_be_opened(database, spoil):
    """A server whose file is none, or cannot be made, starts, and serves once it can."""
    url = url_of(database)
    spoil(database)
    with serving(url) as server, reading(server.url) as reader:
        assert str(database) in eventually(lambda: in_trouble(server), PATIENCE)["trouble"]
        assert not send(url, 1)[0]
        (database if database.exists() else database.parent).unlink()
        eventually(lambda: is_well(server), PATIENCE)
        assert send(url, 2)[0]
        receives(reader, [2])


@pytest.mark.parametrize("by", ["another", "nothing"])
def test_sqlite_whose_file_is_replaced(database, by, tmp_path):
    """Whoever has the file open goes on with the one that took its name: nothing is written where nobody reads."""
    url = url_of(database)
    with serving(url) as server, reading(server.url) as reader:
        assert queue_event(url, "e", 1)
        eventually(lambda: has_come(reader, 1))
        replacement = tmp_path / "other.db"
        assert send(url_of(replacement), 2)[0]
        for path in database.parent.iterdir():
            path.unlink()
        if by == "another":
            replacement.rename(database)
        assert queue_event(url, "e", 3)
        assert send(url, 4)[0]
        eventually(lambda: events_of(reader)[-2:] == [3, 4], what="what was queued since")
    disconnect(url)


# ---- Signals -----------------------------------------------------------------------------------------------


class GivingUpError(Exception):
    """What a web server's worker raises in a signal handler, when a request takes too long."""


@pytest.fixture
def _alarms_raise():
    """In whatever line the main thread is in at the time."""

    def give_up(*_):
        raise GivingUpError

    before = signal.signal(signal.SIGALRM, give_up)
    yield
    signal.signal(signal.SIGALRM, before)


class Nowhere(wsqueue.Link):
    """A broker that takes no time, so that most signals come between two steps of ours."""

    @classmethod
    def load(cls, location):
        """There is no library."""

    def append(self, data, durable):
        """It forgets everything."""

    def close(self):
        """There is nothing to close."""


MAKERS = {  # of a producer
    "directory": lambda path: wsqueue.open_queue(path / "queue"),
    "sqlite": lambda path: wsqueue.open_queue(f"sqlite:///{path}/db"),
    "broker": lambda path: wsqueue.BrokerQueue(Nowhere, "nowhere://"),
}


@pytest.mark.timeout(method="thread")  # the other method has use for alarms, too
@pytest.mark.usefixtures("_alarms_raise")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # a connection that was just made closes as it goes
@pytest.mark.parametrize("kind", MAKERS)
def test_a_signal_handler_that_raises_leaves_the_queue_free(kind, tmp_path):
    """At whatever moment of put() it comes: other threads do not wait for a lock that nobody holds."""
    queue = MAKERS[kind](tmp_path)
    for number in range(1000 if kind == "sqlite" else 5000):
        with pytest.raises(GivingUpError):  # noqa: PT012 - it may be anywhere
            signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + number % 50))
            while True:
                queue.put([("e", number)])
        assert is_free(queue), f"after {number} signals"
    queue.close()


def is_free(queue):
    """Whether another thread, which ends with us, can put an event."""
    done = threading.Event()

    def put():
        queue.put([("e", None)])
        done.set()

    threading.Thread(target=put, daemon=True).start()
    return done.wait(PATIENCE * TIME_UNIT)


# ---- Commands ----------------------------------------------------------------------------------------------


AWAY = {
    "redis": "redis://:{password}@{host}:{port}/0",
    "postgres": "postgresql://events:{password}@{host}:{port}/events",
    "rabbitmq": "amqp://events:{password}@{host}:{port}/%2f",
}


@pytest.mark.parametrize("command", [["send", "e"], ["status"]], ids=["send", "status"])
@pytest.mark.parametrize("kind", sorted(AWAY))
def test_commands_say_that_the_broker_is_away(kind, command):
    """They end with 1 and a sentence, which names the queue and not its password."""
    url = AWAY[kind].format(password=PASSWORD, host=brokers.HOST, port=brokers.free_port())
    done = run_cli(*command, env={**os.environ, "WS_QUEUE_PATH": url})
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert url.replace(PASSWORD, "***") in said
    assert PASSWORD not in said and "Traceback" not in said


# ---- A broker that goes away and comes back ----------------------------------------------------------------

TROUBLES = {  # how it begins, and how it ends
    "gone at start": (lambda site: site.cutter.refuse(), lambda site: site.cutter.heal()),
    "killed": (lambda site: site.broker.kill(), lambda site: site.broker.start()),
    "stopped": (lambda site: site.broker.stop(), lambda site: site.broker.start()),
    "unreachable": (lambda site: site.cutter.refuse(), lambda site: site.cutter.heal()),
    "cut off": (lambda site: site.cutter.cut(), lambda site: site.cutter.heal()),
    "frozen": (lambda site: site.broker.freeze(), lambda site: site.broker.thaw()),
}
STORIES = [f"{kind} {trouble}" for kind in SERVERS for trouble in TROUBLES]


def tell(site, name):
    site, (begin, end) = site.result(), TROUBLES[name.partition(" ")[2]]
    url = site.broker.queue_url(port=site.cutter.port)
    with contextlib.ExitStack() as stack:
        if name.endswith("at start"):
            begin(site)
        server = stack.enter_context(serving(url))
        readers = [stack.enter_context(reading(server.url, target)) for target in ("/", with_last_id("/", ""))]
        producer = stack.enter_context(Producer(url))
        if not name.endswith("at start"):
            producer.goes_on()
            begin(site)
        try:
            said = within_patience(lambda: in_trouble(server))
            producer.is_refused()
        finally:
            end(site)
        recovered = within_patience(lambda: is_well(server))
        producer.goes_on()
        producer.stop()
        within_patience(lambda: all(has_come(reader, producer.accepted[-1]) for reader in readers))
        return SimpleNamespace(
            producer=producer,
            said=said,
            recovered=recovered,
            received=[events_of(reader) for reader in readers],
            ends=[reader.error for reader in readers],
            printed=server.stderr_text(),
        )


@pytest.fixture(scope="module", params=STORIES)
def story(request, stages):
    """What was seen of a trouble that began, and ended, while events were queued and clients listened."""
    kind = request.param.split()[0]
    needs(kind)
    return stages[kind].story(request.param)


def test_what_was_accepted_arrives_once_and_in_order(story):
    """Clients with and without ids get every event for which queue_event() returned True."""
    for received in story.received:
        assert_complete(received, story.producer.accepted)


def test_the_producer_is_told_and_does_not_wait(story):
    """While the broker is away queue_event() returns False, soon, and logs one line each time."""
    assert len(story.producer.records.failures) == len(story.producer.refused) > 0
    assert story.producer.longest < 5.0 * TIME_UNIT


def test_clients_stay_connected(story):
    """No client notices more than that there is nothing new."""
    assert story.ends == [None, None]


def test_health_says_what_is_wrong_and_that_it_is_over(story):
    """/healthz is 503 with a sentence, and then 200 again."""
    assert story.said is not None
    assert " queue " in story.said["trouble"]
    assert story.recovered


def test_the_server_says_each_thing_once(story):
    """It logs what is wrong when that changes, in a line that needs no programmer to read it, and that it is over."""
    lines = [line.split(" ", 2)[2] for line in story.printed.splitlines() if line[:2].isdigit()]
    troubles = [line for line in lines if not line.startswith("INFO ")]
    assert lines[-1] == "INFO the queue is served again"
    assert [line for line in troubles if not re.fullmatch("ERROR .*queue .*; trying again", line)] == []
    assert [line for line, before in zip(troubles[1:], troubles) if line == before] == []


def test_nobody_shows_the_password(story):
    """Neither the trouble's sentence, nor a line of any library's log, in the producer or the server."""
    assert PASSWORD not in f"{story.said}{story.producer.records.texts}{story.printed}"


# ---- RabbitMQ, once its stories are told -------------------------------------------------------------------


def test_rabbitmq_without_memory(rabbitmq_site):
    """RabbitMQ then takes nothing from who publishes, and does not say so: a producer is told, and does not wait."""
    with flow(rabbitmq_site.broker.queue_url()) as it:
        rabbitmqctl(rabbitmq_site.broker, "set_vm_memory_high_watermark", "absolute", "1")
        it.producer.is_refused()
        rabbitmqctl(rabbitmq_site.broker, "set_vm_memory_high_watermark", "0.4")


def set_redis_password(site, password):
    site.admin.config_set("requirepass", password)


def set_postgres_password(site, password):
    site.admin.execute(f"ALTER USER events PASSWORD '{password}'")


def set_rabbitmq_password(site, password):
    rabbitmqctl(site.broker, "change_password", "events", password)


@pytest.mark.parametrize("kind, set_password", [
    ("redis", set_redis_password), ("postgres", set_postgres_password), ("rabbitmq", set_rabbitmq_password),
])
def test_password_that_is_wrong_for_a_while(kind, set_password, request):
    """The server keeps its clients, says that it may not come in, and does once the password is right."""
    site = request.getfixturevalue(f"{kind}_site")
    with flow(through(site)) as it:
        set_password(site, "another")
        site.cutter.refuse()
        site.cutter.heal()
        try:
            it.producer.is_refused()
            assert eventually(lambda: in_trouble(it.server), PATIENCE)
        finally:
            set_password(site, PASSWORD)


# ---- A broker that stays away ------------------------------------------------------------------------------


def connections_to(port):
    """How many connections to it this machine's clients have open."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text("utf-8").splitlines()[1:]]
    return [row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows].count(True)


@pytest.fixture
def _no_garbage_collection():
    """What is closed by that only would stay for as long as a process does little."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_garbage_collection")
@pytest.mark.parametrize("kind", ["redis", "postgres", "rabbitmq"])
def test_connection_that_hangs_is_given_up(kind, request, monkeypatch):
    """Neither one that was good, nor one that is still being made, stays open: broker and process have few to give."""
    monkeypatch.setattr(wsqueue, "FAST_FAIL_SECONDS", 0.0)
    site = request.getfixturevalue(f"{kind}_site")
    url = through(site)
    queue = wsqueue.open_queue(url, node="one")
    queue.take()  # RabbitMQ keeps events from then on
    queue.close()
    assert queue_event(url, "e", 1)
    site.cutter.cut()
    try:
        for number in (2, 3):
            assert not queue_event(url, "e", number)
        assert connections_to(site.cutter.port) == 0
    finally:
        site.cutter.heal()
        disconnect(url)


def next_of(queue):
    """The payloads of what comes next, as a server takes it: it tries again, and nothing else may go wrong."""
    with contextlib.suppress(wsqueue.QueueError):
        events = queue.take()
        queue.done(events)
        return [json.loads(event.text)["payload"] for event in events]
    queue.wait(0.01)
    return []


@pytest.mark.parametrize("kind", ["redis", "postgres", "rabbitmq"])
def test_connection_that_breaks_before_it_was_noted_what_is_done(kind, request):
    """Whichever of a server's words it is that does not reach the broker: it connects anew, and nothing is repeated."""
    site = request.getfixturevalue(f"{kind}_site")
    url = through(site)
    queue = wsqueue.open_queue(url, node="one")
    queue.take()
    for number in range(5):
        assert queue_event(url, "e", number)
        assert eventually(lambda: next_of(queue), PATIENCE) == [number]
        site.cutter.refuse()
        site.cutter.heal()
        assert next_of(queue) == []
        disconnect(url)
    queue.close()


class Visitors:
    """A broker that hangs up on whoever comes, and counts them."""

    def __init__(self):
        self.count = 0
        self._listener = socket.create_server((brokers.HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="visitors", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                visitor = self._listener.accept()[0]
                self.count += 1
                visitor.close()


@pytest.mark.parametrize("kind", sorted(AWAY))
def test_server_tries_again_for_as_long_as_it_takes(kind, monkeypatch):
    """In ten minutes it looks at first soon, and then at least every five seconds, and not much more often."""
    now = 1000.0
    monkeypatch.setattr(wsqueue, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: now}))
    with Visitors() as visitors:
        url = AWAY[kind].format(password=PASSWORD, host=brokers.HOST, port=visitors.port)
        queue, attempts = wsqueue.open_queue(url, node="one"), []
        while now < 1600.0:
            count = visitors.count
            with pytest.raises(wsqueue.QueueError):
                queue.take()
            if visitors.count > count:
                attempts.append(now)
            now += 0.1
    pauses = [after - before for before, after in zip(attempts, attempts[1:])]
    assert pauses[0] < 1.0 and max(pauses) < 5.2
    assert 120 <= len(attempts) <= 400
