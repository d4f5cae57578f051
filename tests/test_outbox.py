"""Section 11, the transactional outbox: an event that is queued over the caller's own connection to its database.

It is sent if and only if the caller's transaction commits, with what else that transaction does.
"""

import json
import sqlite3
import sys
import uuid
from collections import defaultdict
from contextlib import ExitStack, closing, contextmanager, suppress
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg.rows import dict_row

from clients import PATIENCE, Follower, serving
from helpers import TIME_UNIT, eventually
from test_queue_directory import assert_clear, messages, named, payloads, python, run_python, waiting
from test_queues import (
    _producers_give_back_their_connections,  # noqa: F401 - a fixture
    drain,
    take_all,
    up_to_mark,
)
from wsqueue import QueueError, open_queue, queue_event, queue_events

# ---- Databases of an application ---------------------------------------------------------------------------


class SqliteDatabase:
    """A file."""

    errors = sqlite3.Error

    def __init__(self, path):
        self.path, self.url = str(path), f"sqlite:///{path}"

    def connect(self, **options):
        return sqlite3.connect(self.path, timeout=PATIENCE, **options)

    def connect_autocommit(self):
        return self.connect(isolation_level=None)

    def is_in_transaction(self, connection):
        return connection.in_transaction


class PostgresDatabase:
    """One of a cluster, that belongs to the cluster's user."""

    errors = psycopg.Error

    def __init__(self, broker, name):
        self.name = name
        self.url = urlsplit(broker.url)._replace(path=f"/{name}").geturl()
        self.admin_url = urlsplit(broker.admin_url)._replace(path=f"/{name}").geturl()

    def connect(self, **options):
        return psycopg.connect(self.url, **options)

    def connect_autocommit(self):
        return self.connect(autocommit=True)

    def is_in_transaction(self, connection):
        return connection.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS


@contextmanager
def new_postgres_database(broker, options=""):
    """Empty; it is gone when the block ends."""
    name = f"app_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(broker.admin_url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} OWNER {urlsplit(broker.url).username} {options}")
        try:
            yield PostgresDatabase(broker, name)
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database(request, tmp_path):
    """Of an application that has orders, and has not heard of events."""
    with ExitStack() as stack:
        if request.param == "sqlite":
            database = SqliteDatabase(tmp_path / "app.db")
        else:
            broker = request.getfixturevalue("postgres_broker")
            database = stack.enter_context(new_postgres_database(broker))
        with closing(database.connect()) as connection:
            connection.execute("CREATE TABLE orders (id integer PRIMARY KEY)")
            connection.commit()
        yield database


@contextmanager
def consuming(database, node="one"):
    """A consumer of the database's events."""
    with closing(open_queue(database.url, node=node, poll_interval=0.02)) as queue:
        queue.open()
        yield queue


@pytest.fixture
def database(empty_database):
    """A database in which the tables of the queue are, too."""
    with consuming(empty_database) as queue:
        assert queue.take() == []
    return empty_database


@pytest.fixture
def queue(database):
    with consuming(database) as queue:
        assert queue.take() == []
        yield queue


@pytest.fixture
def connection(database):
    """The application's own."""
    with closing(database.connect()) as connection:
        yield connection


postgres_only = pytest.mark.parametrize("empty_database", ["postgresql"], indirect=True)
sqlite_only = pytest.mark.parametrize("empty_database", ["sqlite"], indirect=True)


def place_order(connection, number):
    """What an application does: its own row and the event about it."""
    connection.cursor().execute(f"INSERT INTO orders (id) VALUES ({number:d})")
    return queue_event(connection, "order", number)


def orders_in(database):
    with closing(database.connect()) as connection:
        return [number for (number,) in connection.execute("SELECT id FROM orders ORDER BY id").fetchall()]


def arrived(queue, database):
    """The payloads of all that was queued up to now, which are numbers of orders."""
    return payloads(up_to_mark(queue, database.url))


# ---- If and only if it commits -----------------------------------------------------------------------------


def test_an_event_is_sent_when_its_transaction_commits(database, queue, connection):
    """Not a moment earlier."""
    assert place_order(connection, 1) is True
    for _ in range(3):
        assert queue.take() == []
        queue.wait(0.02)
    connection.commit()
    assert payloads(drain(queue, 1)) == [1]
    assert orders_in(database) == [1]


def test_an_event_of_a_transaction_that_is_rolled_back_is_never_sent(database, queue, connection):
    """Nor does it keep others from being sent, that come before and after it on the same connection."""
    for number in range(9):
        assert place_order(connection, number) is True
        if number % 3 == 1:
            connection.rollback()
        else:
            connection.commit()
    assert arrived(queue, database) == orders_in(database) == [0, 2, 3, 5, 6, 8]


def test_an_event_of_a_connection_that_is_closed_without_a_commit_is_never_sent(database, queue):
    """As when the process ends in the middle."""
    connection = database.connect()
    assert place_order(connection, 1) is True
    connection.close()
    assert arrived(queue, database) == orders_in(database) == []


@postgres_only
def test_a_commit_wakes_the_server(database, queue, connection):
    """It does not have to wait for the time to be over."""
    assert place_order(connection, 1)
    with waiting(queue) as ended:
        connection.commit()
        eventually(ended.is_set, what="the end of wait()")


def test_events_of_a_transaction_keep_their_order(database, queue, connection):
    """Single ones and several at once, with topics, and what is said twice comes twice."""
    assert queue_event(connection, "e", 0)
    assert queue_events(connection, [("e", 1), ("e", 2)], to=["/a", "/b"])
    assert queue_event(connection, "e", 3, to="/a", durable=True)
    assert queue_event(connection, "e", 3)
    connection.commit()
    events = drain(queue, 5)
    assert payloads(events) == [0, 1, 2, 3, 3]
    assert [event.to for event in events] == [(), ("/a", "/b"), ("/a", "/b"), ("/a",), ()]
    assert len({event.id for event in events}) == 5


@pytest.mark.parametrize(
    "payload", ["ü \u20ac \U0001f600", "\ud800", "NUL \0", "100 % of '%s' and ?", {"$1": ":x"}], ids=ascii)
def test_a_payload_comes_as_it_was_queued(queue, connection, payload):
    """Whatever means something to the database's own language."""
    assert queue_event(connection, f"name {payload}", payload)
    connection.commit()
    (event,) = drain(queue, 1)
    assert (named([event]), payloads([event])) == ([f"name {payload}"], [payload])


def test_queue_event_never_commits(database, queue, connection):
    """Neither what is its own nor what the caller did before it."""
    for number in range(3):
        assert place_order(connection, number)
        assert database.is_in_transaction(connection)
    assert queue_event(connection, "e", object()) is False
    assert queue_events(connection, []) is True
    assert database.is_in_transaction(connection)
    assert orders_in(database) == []
    connection.rollback()
    assert arrived(queue, database) == orders_in(database) == []


# ---- The ways to begin and to end a transaction ------------------------------------------------------------


def test_within_a_with_block(database, queue):
    """`with connection:` commits at its end, and rolls back if it is left by an exception."""
    with closing(database.connect()) as connection, connection:
        assert place_order(connection, 1)
    with closing(database.connect()) as connection:
        with suppress(ZeroDivisionError), connection:
            assert place_order(connection, 2)
            raise ZeroDivisionError
    assert arrived(queue, database) == orders_in(database) == [1]


def test_savepoints(database, queue, connection):
    """What is rolled back to one takes its events along; what came before and comes behind it is sent."""
    connection.execute("BEGIN")
    assert place_order(connection, 1)
    connection.execute("SAVEPOINT here")
    assert place_order(connection, 2)
    connection.execute("SAVEPOINT there")
    assert place_order(connection, 3)
    connection.execute("RELEASE SAVEPOINT there")
    connection.execute("ROLLBACK TO SAVEPOINT here")
    assert place_order(connection, 4)
    connection.execute("RELEASE SAVEPOINT here")
    connection.commit()
    assert arrived(queue, database) == orders_in(database) == [1, 4]


def test_a_connection_that_commits_each_statement_sends_each_event(database, queue):
    """And within a transaction that it begins itself, it does not."""
    with closing(database.connect_autocommit()) as connection:
        assert place_order(connection, 1)
        assert payloads(drain(queue, 1)) == [1]
        connection.execute("BEGIN")
        assert place_order(connection, 2)
        connection.execute("ROLLBACK")
        connection.execute("BEGIN")
        assert place_order(connection, 3)
        connection.execute("COMMIT")
    assert arrived(queue, database) == [3]
    assert orders_in(database) == [1, 3]


@sqlite_only
@pytest.mark.parametrize("options", [
    {"isolation_level": "IMMEDIATE"}, {"isolation_level": "EXCLUSIVE"}, {"isolation_level": "DEFERRED"},
    *([{"autocommit": False}] if sys.version_info >= (3, 12) else []),
], ids=str)
def test_kinds_of_sqlite_transactions(database, queue, options):
    """However the connection begins them: only what it commits is sent."""
    with closing(database.connect(**options)) as connection:
        assert place_order(connection, 1)
        connection.rollback()
        assert place_order(connection, 2)
        connection.commit()
    assert arrived(queue, database) == orders_in(database) == [2]


@postgres_only
def test_transaction_blocks_of_psycopg(database, queue, connection):
    """`with connection.transaction():`, one in another, and one that is given up."""
    with connection.transaction():
        assert place_order(connection, 1)
        with connection.transaction():
            assert place_order(connection, 2)
        with connection.transaction() as inner:
            assert place_order(connection, 3)
            raise psycopg.Rollback(inner)
    with suppress(ZeroDivisionError), connection.transaction():
        assert place_order(connection, 4)
        raise ZeroDivisionError
    assert arrived(queue, database) == orders_in(database) == [1, 2]


@postgres_only
@pytest.mark.parametrize("level", psycopg.IsolationLevel)
def test_isolation_levels_of_postgresql(database, queue, connection, level):
    """Each of them."""
    connection.isolation_level = level
    assert place_order(connection, 1)
    connection.commit()
    assert place_order(connection, 2)
    connection.rollback()
    assert arrived(queue, database) == orders_in(database) == [1]


class Proxy:
    """What pools and frameworks hand out in place of a connection."""

    def __init__(self, connection):
        self._connection = connection

    def __getattr__(self, name):
        return getattr(self._connection, name)


class CursorOnly:
    """The least that a DB-API connection is."""

    def __init__(self, connection):
        self.cursor, self.commit, self.rollback, self.close = (
            connection.cursor, connection.commit, connection.rollback, connection.close)


@pytest.mark.parametrize("wrapper", [Proxy, CursorOnly])
def test_a_connection_in_a_wrapper(database, queue, connection, wrapper):
    """Nothing is asked of a connection but what the DB-API promises."""
    wrapped = wrapper(connection)
    assert place_order(wrapped, 1)
    wrapped.rollback()
    assert place_order(wrapped, 2)
    wrapped.commit()
    assert arrived(queue, database) == orders_in(database) == [2]


@pytest.mark.parametrize("kind", ["rows as dictionaries", "other texts"])
def test_a_connection_that_is_set_up_in_its_own_way(database, queue, connection, kind):
    """Rows and texts may come in any form, and the connection keeps it."""
    if isinstance(connection, psycopg.Connection):
        if kind == "other texts":
            connection.execute("SET client_encoding TO LATIN1")
        else:
            connection.row_factory = dict_row
    elif kind == "other texts":
        connection.text_factory = bytes
    else:
        connection.row_factory = sqlite3.Row
    connection.commit()
    assert queue_event(connection, "e", "ü \u20ac")
    connection.commit()
    assert arrived(queue, database) == ["ü \u20ac"]


@pytest.mark.parametrize("name", ["", "a-b", 'a"; DROP TABLE orders; --', "x" * 41])
def test_a_queue_of_no_proper_name(name):
    """It would be a part of statements."""
    with closing(sqlite3.connect(":memory:")) as connection, pytest.raises(QueueError, match="letters, digits"):
        open_queue(connection, name=name)


def test_a_connection_that_is_asyncio_is_refused():
    """Its execute() would return something to be awaited, and nothing would be sent."""
    class AsyncConnection:
        cursor = None

    with pytest.raises(QueueError, match="AsyncConnection is not a synchronous connection"):
        open_queue(AsyncConnection())


DJANGO = """
import sys
import django.conf
import wsqueue
django.conf.settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]}})
django.setup()
from django.db import connection, transaction
try:
    for number in (1, 2):
        with transaction.atomic():
            assert wsqueue.queue_event(connection, "e", number)
            if number == 2:
                raise ZeroDivisionError
except ZeroDivisionError:
    pass
"""


@sqlite_only
def test_a_connection_of_django(database, queue):
    """Its cursors take %s with SQLite, too; what transaction.atomic() takes back is not sent."""
    run_python(DJANGO, database.path)
    assert arrived(queue, database) == [1]


@postgres_only
def test_a_pipeline_of_psycopg(database, queue, connection):
    """In which answers come later."""
    with connection.pipeline():
        for number in range(5):
            assert place_order(connection, number)
    connection.commit()
    assert arrived(queue, database) == orders_in(database) == list(range(5))


# ---- What cannot be queued ---------------------------------------------------------------------------------


def assert_not_queued(connection, caplog, *words):
    """False, and one line that says why; and the caller's transaction goes on with what it has."""
    caplog.clear()
    connection.execute("INSERT INTO orders (id) VALUES (1)")
    assert queue_event(connection, "e", 1) is False
    assert queue_events(connection, [("e", 1), ("e", 2)]) is False
    said = messages(caplog)
    assert len(said) == 2
    for line in said:
        assert_clear(line, *words)
    connection.execute("INSERT INTO orders (id) VALUES (2)")


def test_without_the_table_the_line_says_how_to_make_it(empty_database, caplog):
    """The caller's order is placed all the same."""
    with closing(empty_database.connect()) as connection:
        assert_not_queued(connection, caplog, "wsqueue", "table")
        connection.commit()
    assert orders_in(empty_database) == [1, 2]


def test_once_the_table_is_there_the_same_connection_can_be_used(empty_database, caplog):
    """A server, or `wsqueue status`, makes it, while the application runs."""
    with closing(empty_database.connect()) as connection:
        assert queue_event(connection, "e", 1) is False
        connection.rollback()
        with consuming(empty_database) as queue:
            assert queue.take() == []
            assert place_order(connection, 2) is True
            connection.commit()
            assert arrived(queue, empty_database) == [2]
    assert len(messages(caplog)) == 1


@postgres_only
def test_without_the_right_to_insert_the_line_says_so(database, queue, connection, caplog):
    """PostgreSQL ends a transaction in which something failed; not this one."""
    role = f"nobody_{database.name}"
    with psycopg.connect(database.admin_url, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {role}")
        admin.execute(f"GRANT INSERT, SELECT ON orders TO {role}")
        admin.execute(f"GRANT {role} TO {connection.info.user}")
        try:
            connection.execute(f"SET ROLE {role}")
            assert_not_queued(connection, caplog, "INSERT", "wsqueue")
            connection.commit()
            connection.execute("RESET ROLE")
            connection.commit()
            assert orders_in(database) == [1, 2]
            assert arrived(queue, database) == []
        finally:
            connection.rollback()
            admin.execute(f"DROP OWNED BY {role}")
            admin.execute(f"DROP ROLE {role}")


REFUSE = {
    "sqlite": ["CREATE TRIGGER no BEFORE INSERT ON wsqueue BEGIN SELECT RAISE(ABORT, 'not today'); END"],
    "postgresql": [
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not today'; END $$",
        "CREATE TRIGGER no BEFORE INSERT ON wsqueue FOR EACH ROW EXECUTE FUNCTION no()",
    ],
}


def test_where_the_database_refuses_the_row_the_line_says_so(database, queue, connection, caplog):
    """A trigger, a full disk: whatever it is, the caller's transaction goes on."""
    for statement in REFUSE[urlsplit(database.url).scheme]:
        connection.execute(statement)
    connection.commit()
    assert_not_queued(connection, caplog, "not today")
    connection.commit()
    assert orders_in(database) == [1, 2]
    connection.execute("DROP TRIGGER no" if isinstance(database, SqliteDatabase) else "DROP TRIGGER no ON wsqueue")
    connection.commit()
    assert arrived(queue, database) == []


def test_what_is_not_json_is_not_queued_and_breaks_nothing(database, queue, connection, caplog):
    """Nor what is too large; the caller's transaction has not noticed."""
    assert place_order(connection, 1)
    assert queue_event(connection, "e", float("nan")) is False
    assert queue_events(connection, [("e", 2), ("e", object())]) is False
    assert queue_event(connection, "e", "x" * 2**20) is False
    assert len(messages(caplog)) == 3
    assert place_order(connection, 3)
    connection.commit()
    assert arrived(queue, database) == orders_in(database) == [1, 3]


@postgres_only
def test_in_a_transaction_that_has_failed_already_nothing_is_queued(database, queue, connection, caplog):
    """False and a line; after the rollback the connection is as good as new."""
    with pytest.raises(psycopg.Error):
        connection.execute("SELECT no_such_column")
    assert queue_event(connection, "e", 1) is False
    assert len(messages(caplog)) == 1
    connection.rollback()
    assert place_order(connection, 2)
    connection.commit()
    assert arrived(queue, database) == [2]


def test_over_a_closed_connection_nothing_is_queued(connection, caplog):
    """False and a line."""
    connection.close()
    assert queue_event(connection, "e", 1) is False
    assert_clear(*messages(caplog))


def test_what_is_no_connection_is_no_queue(caplog):
    """Neither path nor URL nor connection: False and a line."""
    for thing in (object(), 7, None, {"cursor": None}):
        assert queue_event(thing, "e") is False
    assert len(messages(caplog)) == 4


# ---- Transactions side by side -----------------------------------------------------------------------------


@contextmanager
def two_connections(database):
    with closing(database.connect()) as first, closing(database.connect()) as second:
        yield first, second


def take_an_xid(connection):
    """PostgreSQL numbers transactions at their first write, whatever that is."""
    connection.execute("SELECT pg_current_xact_id()")


@postgres_only
@pytest.mark.parametrize("first_to_commit", [0, 1])
def test_a_lower_row_that_is_committed_later_is_not_missed(database, queue, first_to_commit):
    """Two transactions take their rows and their numbers in one order, and end in the other one."""
    with two_connections(database) as connections:
        assert queue_event(connections[0], "e", "first")
        assert queue_event(connections[1], "e", "second")
        connections[first_to_commit].commit()
        events = take_what_is_there(queue)
        connections[1 - first_to_commit].commit()
        events += take_all(queue, 2 - len(events))
        assert payloads(events) == ["first", "second"], "numbers decide, and not commits"
        queue.done(events)
        assert arrived(queue, database) == []


def take_what_is_there(queue):
    """What several looks find, whatever it is."""
    events = []
    for _ in range(5):
        events += queue.take()
        queue.wait(0.01)
    return events


@postgres_only
@pytest.mark.parametrize("first_to_commit", [0, 1])
def test_a_lower_transaction_with_a_higher_row_is_not_missed(database, queue, first_to_commit):
    """One takes its number early, by another write; the other one takes its row first."""
    with two_connections(database) as connections:
        take_an_xid(connections[0])
        assert queue_event(connections[1], "e", "lower row, higher transaction")
        assert queue_event(connections[0], "e", "higher row, lower transaction")
        connections[first_to_commit].commit()
        events = take_what_is_there(queue)
        queue.done(events)
        connections[1 - first_to_commit].commit()
        events += take_all(queue, 2 - len(events))
        assert payloads(events) == ["higher row, lower transaction", "lower row, higher transaction"]
        queue.done(events)
        assert arrived(queue, database) == []


@postgres_only
def test_a_transaction_that_lasts_delays_and_loses_nothing(database, queue):
    """All that is committed meanwhile waits for it, is backlog, and comes behind it; also for the next server."""
    with two_connections(database) as (lasting, quick):
        assert queue_event(lasting, "e", "lasting")
        for number in range(20):
            assert queue_event(quick, "e", number)
            quick.commit()
        assert queue_event(database.url, "e", 20)
        queue.done(take_what_is_there(queue))
        queue.close()
        with consuming(database) as again:
            events = take_what_is_there(again)
            lasting.commit()
            events += take_all(again, 22 - len(events))
            assert payloads(events) == ["lasting", *range(21)]
            again.done(events)
            assert arrived(again, database) == []


@postgres_only
def test_a_transaction_that_lasts_and_queues_nothing_loses_nothing_either(database, queue):
    """It may do anything else, and end in any way."""
    with two_connections(database) as (lasting, quick):
        take_an_xid(lasting)
        for number in range(20):
            assert queue_event(quick, "e", number)
            quick.commit()
        events = take_what_is_there(queue)
        lasting.rollback()
        events += take_all(queue, 20 - len(events))
        assert payloads(events) == list(range(20))


@sqlite_only
def test_a_sqlite_transaction_that_lasts_does_not_hold_up_what_is_committed(database, queue):
    """SQLite has one writer at a time; the server is none that gives up, nor one that keeps the others away."""
    assert queue_event(database.url, "e", 1)
    with closing(database.connect()) as lasting:
        assert place_order(lasting, 2)
        events = take_all(queue, 1)
        assert payloads(events) == [1]
        queue.done(events)
        assert queue.take() == []
        lasting.commit()
    assert payloads(drain(queue, 1)) == [2]
    queue.close()
    with consuming(database) as again:
        assert arrived(again, database) == []


TRANSACTIONS = """
import json, random, sys, time
import psycopg, wsqueue

seed = random.Random(int(sys.argv[2]))
with psycopg.connect(sys.argv[1]) as connection:
    for number in range(125):
        if seed.random() < 0.3:
            connection.execute("SELECT pg_current_xact_id()")
            time.sleep(seed.random() * 0.01)
        parts = [[number, part] for part in range(seed.randrange(1, 4))]
        for part in parts:
            assert wsqueue.queue_event(connection, sys.argv[2], part)
            time.sleep(seed.random() * 0.005)
        if seed.random() < 0.25:
            connection.rollback()
        else:
            connection.commit()
            print(json.dumps(parts), flush=True)
"""


@postgres_only
def test_of_a_thousand_transactions_those_that_were_committed_arrive_once(database):
    """Of eight processes, with pauses and rollbacks, at the client of a server; each process's in its order."""
    with serving(queue=database.url, node="one") as server, Follower(server.url) as client, ExitStack() as stack:
        client.hello()
        processes = [stack.enter_context(python(TRANSACTIONS, database.url, number)) for number in range(8)]
        committed = {str(number): committed_by(process) for number, process in enumerate(processes)}
        assert queue_event(database.url, "end")
        received, ids = defaultdict(list), []
        for event in iter(client.recv, None):
            if event.event == "end":
                break
            received[event.event].append(event.payload)
            ids.append(event.id)
    assert received == committed
    assert len(ids) == len(set(ids)) > 1000


def committed_by(process):
    """The parts that it printed."""
    output, errors = process.communicate(timeout=50 * TIME_UNIT)
    assert (process.returncode, errors) == (0, "")
    return [part for line in output.splitlines() for part in json.loads(line)]


# ---- A database that was restored --------------------------------------------------------------------------

FUTURE = 10**15  # a number that the cluster's transactions have yet to reach


def restore(database):
    """As after a dump from a cluster that has done more: its rows and its nodes have numbers from this one's future."""
    with psycopg.connect(database.url) as connection:
        for number in range(5):
            connection.execute("INSERT INTO wsqueue (xid, data) VALUES (%s, %s)",
                               (FUTURE + number // 2, json.dumps({"event": "restored", "payload": number})))
        connection.execute("UPDATE wsqueue_nodes SET xid = %s, id = 2 WHERE node = 'one'", (FUTURE,))


@postgres_only
@pytest.mark.parametrize("node", ["one", "new"])
def test_restored_into_another_cluster_what_waits_is_sent(database, connection, node):
    """Also what is queued after that, whose numbers are lower; nothing waits for the cluster to get that far."""
    restore(database)
    assert place_order(connection, 5)
    connection.commit()
    with consuming(database, node) as queue:
        numbers = arrived(queue, database)
        assert [number for number in numbers if number < 5][-3:] == [2, 3, 4], "what was not sent, in its order"
        assert len(numbers) == len(set(numbers)) and 5 in numbers
        assert place_order(connection, 6)
        connection.commit()
        assert arrived(queue, database) == [6]


# ---- A database that does not know what its bytes mean -----------------------------------------------------


def test_what_is_no_text_is_set_aside_where_the_database_takes_any_bytes(postgres_broker):
    """PostgreSQL's SQL_ASCII: what other programs wrote in UTF-8 is sent, and anything else holds nothing up."""
    with new_postgres_database(postgres_broker, "ENCODING 'SQL_ASCII' TEMPLATE template0") as database:
        with consuming(database) as queue:
            assert queue.take() == []
            with closing(database.connect()) as connection:
                for payload in ("ü", "\udcff", "ä"):
                    data = f'{{"event": "e", "payload": "{payload}"}}'.encode("utf-8", "surrogateescape")
                    connection.pgconn.exec_params(b"INSERT INTO wsqueue (data) VALUES ($1)", [data])
            assert arrived(queue, database) == ["ü", "ä"]
            assert queue.backlog().failed == 1
            assert "UTF-8" in queue.backlog().failures[0]["reason"]
            assert [name for name, _ in queue.nodes()] == ["one"]
