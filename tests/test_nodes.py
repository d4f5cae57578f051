"""Section 11, many nodes: servers that share a broker. Each sends everything, and a client may go on at any of them."""

import glob
import itertools
import json
import os
import random
import re
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from urllib.parse import urlencode

import psycopg
import pytest
import redis

import wsqueue
from brokers import Cutter, free_port, rabbitmqctl
from clients import PATIENCE, Follower, RawClient, exchange, request_head, serving
from helpers import eventually, settled, spawn_server
from soak import asleep
from test_history import (
    both_kinds,
    coming_back,
    complete_or_told,
    is_told_to_start_anew,
    kill,
    numbers_of,
    position,
    put,
    what_comes,
)
from wsqueue import QueueError, open_queue, queue_event, queue_events

NETWORKED = ("postgresql", "redis")  # whose nodes are reached over a network, which may fail
SHARED = ("sqlite", *NETWORKED)  # whose events have the same ids on every node
EVERY = (*SHARED, "amqp")
NEVER_REACHED = "999999999999999999-1"  # an id of any of them


# ---- A queue on a broker, and what its administrator does with other tools than ours -----------------------


class Bus:
    """name: of the table, or of the stream. url: what every node of it is given that has no link of its own."""

    name = url = ""


class BrokerBus(Bus):
    """A queue on one of the servers that all tests share."""

    fixture = ""

    def __init__(self, request, directory):
        self.broker = request.getfixturevalue(self.fixture)
        self.url = self.broker.queue_url()
        self.name = re.search(r"[?&]queue=(\w+)", self.url)[1]
        self.server_url = self.url.partition("?")[0]

    def queue_url(self, **query):
        """port: of a Cutter in front of the broker."""
        return self.broker.queue_url(self.name, **query)


class SqlBus(Bus):
    def execute(self, statement):
        raise NotImplementedError

    def insert(self, data):
        """An entry as a producer in any language would make it."""
        self.execute(f"INSERT INTO {self.name} (data) VALUES ('{data}')")

    def destroy(self):
        for table in ("", "_nodes", "_failed"):
            self.execute(f"DROP TABLE {self.name}{table}")

    def trim(self, keep):
        """A node for which more entries are too many removes them, whoever has seen them or not."""
        with node(self.queue_url(keep_events=keep), "trimmer"):
            eventually(lambda: self.execute(f"SELECT count(*) FROM {self.name}")[0][0] == keep, what="fewer entries")


class SqliteBus(SqlBus):

    def __init__(self, request, directory):
        self.name, self._path = "nodes", str(directory / "queue.db")
        self.url = self.queue_url()

    def queue_url(self, **query):
        return f"sqlite:///{self._path}?" + urlencode({"queue": self.name, **query})

    def destroy(self):
        for path in glob.glob(f"{self._path}*"):
            os.unlink(path)

    def back_up(self):
        with closing(sqlite3.connect(self._path)) as source, closing(sqlite3.connect(f"{self._path}~")) as backup:
            source.backup(backup)

    def restore(self, _, entries):
        with closing(sqlite3.connect(f"{self._path}~")) as backup, backup:
            for (xid, number), data in entries:
                backup.execute(f"INSERT INTO {self.name} (xid, id, data) VALUES (?, ?, ?)", (xid, number, data))
        for path in glob.glob(f"{self._path}-*"):
            os.unlink(path)
        os.replace(f"{self._path}~", self._path)

    def execute(self, statement):
        with closing(sqlite3.connect(self._path, timeout=PATIENCE)) as connection, connection:
            return connection.execute(statement).fetchall()


class PostgresBus(BrokerBus, SqlBus):
    fixture = "postgres_broker"

    def back_up(self):
        return [self.execute(f"SELECT * FROM {self.name}{table}") for table in ("", "_nodes")]

    def restore(self, backup, entries):
        with psycopg.connect(self.server_url) as connection:
            connection.execute(f"TRUNCATE {self.name}, {self.name}_nodes")
            for table, rows in zip(("", "_nodes"), backup):
                for row in rows:
                    connection.execute(f"INSERT INTO {self.name}{table} VALUES (%s, %s, %s, %s)", row)
            for (xid, number), data in entries:
                connection.execute(f"INSERT INTO {self.name} (xid, id, data) VALUES (%s, %s, %s)", (xid, number, data))
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = current_user"
                               " AND pid <> pg_backend_pid()")

    def execute(self, statement):
        with psycopg.connect(self.server_url) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


class RedisBus(BrokerBus):
    fixture = "redis_broker"

    def _client(self):
        return closing(redis.Redis.from_url(self.server_url))

    def insert(self, data):
        with self._client() as client:
            client.xadd(self.name, {"data": data})

    def destroy(self):
        with self._client() as client:
            client.delete(self.name, f"{self.name}:nodes", f"{self.name}:failed")

    def back_up(self):
        with self._client() as client:
            return {name: client.dump(name) for name in (self.name, f"{self.name}:nodes")}

    def restore(self, backup, entries):
        with self._client() as client:
            for name, data in backup.items():
                client.restore(name, 0, data, replace=True)
            for place, data in entries:
                client.xadd(self.name, {"data": data}, id="{}-{}".format(*place))
            client.client_kill_filter(_type="normal")

    def trim(self, keep):
        """Redis's own command: it removes exactly what it is told to, where the product only asks it to be quick."""
        with self._client() as client:
            client.xtrim(self.name, maxlen=keep, approximate=False)


class AmqpBus(BrokerBus):
    fixture = "rabbitmq_broker"


BUSES = {"sqlite": SqliteBus, "postgresql": PostgresBus, "redis": RedisBus, "amqp": AmqpBus}


def encoded(*records):
    """What an entry holds; several records are a batch."""
    return json.dumps(records[0] if len(records) == 1 else records)


def record(number, to=None):
    return {"event": "e", "payload": [number], **({"to": to} if to else {})}


@pytest.fixture
def bus(request, tmp_path):
    """A queue that nobody has used; which kind of broker has it is the test's parameter."""
    return BUSES[request.param](request, tmp_path)


def on(*kinds):
    return pytest.mark.parametrize("bus", kinds, indirect=True)


@pytest.fixture(autouse=True)
def _no_producer_keeps_its_connection():
    yield
    wsqueue.close_queues()


# ---- Nodes -------------------------------------------------------------------------------------------------


def node_without_broker(url, name, *arguments):
    """A server in a process of its own, that listens; it may not have found its broker."""
    return spawn_server("--queue", url, "--node", name, "--poll-interval", 0.02, *arguments)


@contextmanager
def node(url, name, *arguments):
    """A server in a process of its own, once it has its place in the queue."""
    started = time.monotonic()
    with node_without_broker(url, name, *arguments) as server:
        has_its_place(url, name, started)
        yield server


@contextmanager
def embedded(url, name):
    """The same in this process."""
    started = time.monotonic()
    with serving(queue=url, node=name) as server:
        has_its_place(url, name, started)
        yield server


def has_its_place(url, name, started):
    """It has said that it is there since it was started."""

    def found():
        try:
            return dict(queue.nodes()).get(name, 1e9) < time.monotonic() - started
        except QueueError:  # RabbitMQ has no queue of this node yet
            return False

    with closing(open_queue(url, node=name)) as queue:
        eventually(found, what=f"the node {name}")


@contextmanager
def in_a_row(*managers):
    """All of them."""
    with ExitStack() as stack:
        yield [stack.enter_context(manager) for manager in managers]


def waiting(url, name):
    """How many events this node has not sent, or not noted as sent."""
    with closing(open_queue(url, node=name)) as queue:
        return queue.backlog().waiting


def all_sent(url, *names):
    """Once a node's cursor is at the end, not even its death makes it send anything again; RabbitMQ: see all_done()."""
    for name in names:
        with closing(open_queue(url, node=name)) as queue:
            eventually(lambda queue=queue: queue.backlog().waiting == 0, what=f"{name} to have sent all")


def all_done(bus, name):
    """All sent, and the broker told of it: RabbitMQ does not count as waiting what it sends again after a death."""
    all_sent(bus.url, name)
    if bus.url.startswith("amqp"):
        unmarked = ("--no-table-headers", "list_queues", "messages_unacknowledged")
        eventually(lambda: set(rabbitmqctl(bus.broker, *unmarked).split()) == {"0"}, what=f"{name} to have marked all")


def events_sent_by(server):
    """Since it was started."""
    page = exchange(server.url, request_head("/metrics", {"Host": "127.0.0.1", "Connection": "close"}).encode()).body
    return int(re.search(r"^wsqueue_events_total (\d+)", page, re.MULTILINE)[1])


def has_sent(server, count):
    eventually(lambda: events_sent_by(server) >= count, what=f"{count} events, not {events_sent_by(server)}")
    assert events_sent_by(server) == count


@pytest.fixture(scope="module", params=SHARED)
def running_cluster(request, tmp_path_factory):
    bus = BUSES[request.param](request, tmp_path_factory.mktemp("cluster"))
    with in_a_row(*(node(bus.url, name) for name in "abc")) as servers:
        bus.servers = servers
        yield bus


@pytest.fixture
def cluster(running_cluster):
    """Three nodes for tests that neither kill nor cut them; each has sent what came of the tests before."""
    all_sent(running_cluster.url, *"abc")
    return running_cluster


# ---- Every node sends everything ---------------------------------------------------------------------------


def test_every_node_sends_every_event_to_its_own_clients(cluster):
    """What is queued once comes once to each client, wherever it is connected; also what other tools have queued."""
    with in_a_row(*(RawClient(server.url) for server in cluster.servers)) as clients:
        put(cluster.url, 0)
        assert queue_events(cluster.url, [("e", [1]), ("e", [2])])
        cluster.insert(encoded(record(3)))
        cluster.insert(encoded(record(4), record(5)))
        for client in clients:
            assert [payload[0] for payload in client.payloads(6)] == list(range(6))


@both_kinds
def test_all_nodes_agree_about_ids_and_order(cluster, stream):
    """Four producers at once, with single events and batches: one sequence, in which each producer's are in order."""

    def produce(producer):
        for number in range(0, 60, 3):
            put(cluster.url, (producer, number))
            assert queue_events(cluster.url, [("e", [(producer, number + 1)]), ("e", [(producer, number + 2)])])

    with in_a_row(*(Follower(server.url, stream=stream) for server in cluster.servers)) as clients:
        for client in clients:
            client.hello()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(produce, range(4)))
        first, *others = [[client.recv() for _ in range(240)] for client in clients]
    assert others == [first, first]
    assert len({received.id for received in first}) == 240
    for producer in range(4):
        assert [number for which, number in numbers_of(first) if which == producer] == list(range(60))


def test_topics_are_those_of_each_nodes_own_clients(cluster):
    """An event for some goes to those among the clients of each node, and to no other."""
    a, b, c = (server.url for server in cluster.servers)
    with in_a_row(RawClient(a, "/x"), RawClient(b, "/x"), RawClient(b, "/y"), RawClient(c, "/z")) as clients:
        for number, to in enumerate(["/x", "/y", ["/x", "/y"], None]):
            put(cluster.url, number, to=to)
        for client, due in zip(clients, [[0, 2, 3], [0, 2, 3], [1, 2, 3], [3]]):
            assert [payload[0] for payload in client.payloads(len(due))] == due


@on("amqp")
def test_every_node_of_a_message_broker_sends_every_event(bus):
    """In the order in which they were published."""
    with in_a_row(*(node(bus.url, name) for name in "abc")) as servers:
        with in_a_row(*(RawClient(server.url) for server in servers)) as clients:
            put(bus.url, *range(30))
            assert queue_events(bus.url, [("e", [30]), ("e", [31])])
            for client in clients:
                assert [payload[0] for payload in client.payloads(32)] == list(range(32))


# ---- Coming back to another node ---------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("seen", range(3))
def test_who_loses_a_node_goes_on_at_another(cluster, stream, seen):
    """After so many events, also after none, by the id of the hello: the rest in order, each once."""
    a, b, c = cluster.servers
    with Follower(a.url, stream=stream) as client:
        client.hello()
        put(cluster.url, *range(seen))
        assert [payload[0] for payload in client.payloads(seen)] == list(range(seen))
    put(cluster.url, *range(seen, 5))
    for other in (b, c):
        with Follower(other.url, "/", client.last, stream=stream) as again:
            assert again.hello() == client.last
            assert numbers_of(what_comes(again, cluster.url)) == list(range(seen, 5))


@both_kinds
def test_a_batch_can_be_gone_on_from_in_its_middle(cluster, stream):
    """A connection may break within it; the other node sends what is left of it."""
    a, b, _ = cluster.servers
    with Follower(a.url, stream=stream) as client:
        client.hello()
        assert queue_events(cluster.url, [("e", [number]) for number in range(4)])
        put(cluster.url, 4)
        ids = [client.recv().id for _ in range(5)]
    for index, last in enumerate(ids):
        assert numbers_of(coming_back(b, cluster.url, last, stream=stream)) == list(range(index + 1, 5))


@both_kinds
def test_only_what_is_for_its_topics_is_repeated_elsewhere(cluster, stream):
    """Of single events and of a batch of which each is for others."""
    a, b, _ = cluster.servers
    last = position(a, "/x", stream=stream)
    for number, to in enumerate(["/x", "/y", None, ["/y", "/x"]]):
        put(cluster.url, number, to=to)
    cluster.insert(encoded(record(4, "/y"), record(5, "/x"), record(6), record(7, ["/y"])))
    assert numbers_of(coming_back(b, cluster.url, last, "/x", stream=stream)) == [0, 2, 3, 5, 6]


def test_a_place_is_none_of_a_topics_client_alone(cluster):
    """Who gets little still has an id to go on from: that of the hello, or of an event that is long past."""
    a, b, _ = cluster.servers
    with Follower(a.url, "/x") as client:
        client.hello()
        put(cluster.url, 0, to="/x")
        assert client.payloads(1)[0][0] == 0
    put(cluster.url, *range(1, 40), to="/y")
    put(cluster.url, 40, to="/x")
    assert numbers_of(coming_back(b, cluster.url, client.last, "/x")) == [40]


def test_the_kind_of_connection_may_change_with_the_node(cluster):
    """The ids are the same."""
    a, b, c = cluster.servers
    last = position(a)
    put(cluster.url, 0)
    with Follower(b.url, "/", last, stream=True) as client:
        client.hello()
        assert client.payloads(1)[0][0] == 0
    put(cluster.url, 1)
    assert numbers_of(coming_back(c, cluster.url, client.last)) == [1]


@both_kinds
def test_who_moves_all_the_time_misses_nothing(cluster, stream):
    """From node to node in the middle of a flow, after none, some or many events: all come once, in order."""
    dice, count = random.Random(1), 300
    received, last = [], position(cluster.servers[0], stream=stream)

    def produce():
        for number in range(0, count, 3):
            put(cluster.url, number)
            assert queue_events(cluster.url, [("e", [number + 1]), ("e", [number + 2])])

    with ThreadPoolExecutor(1) as pool:
        produced = pool.submit(produce)
        while len(received) < count:
            with Follower(dice.choice(cluster.servers).url, "/", last, stream=stream) as client:
                assert client.hello() == last
                most = min(dice.choice([0, 1, 2, 5, 40]), count - len(received))
                received += numbers_of([client.recv() for _ in range(most)])
                last = client.last
        produced.result(PATIENCE)
    assert received == list(range(count))


@both_kinds
def test_what_one_server_broadcasts_is_its_own(cluster, stream):
    """It is no entry of the queue: others do not send it. Who has seen it can go on elsewhere all the same."""
    with embedded(cluster.url, "embedded") as server:
        with Follower(server.url, stream=stream) as client:
            ids = [client.hello()]
            for number in range(4):
                server.broadcast("e", [number]) if number % 2 else put(cluster.url, number)
                assert client.recv().payload[0] == number
                ids.append(client.last)
        for other in (cluster.servers[1], server):
            for index, last in enumerate(ids):
                due = [number for number in range(index, 4) if other is server or number % 2 == 0]
                assert numbers_of(coming_back(other, cluster.url, last, stream=stream)) == due


@pytest.mark.parametrize("moment", range(2))
def test_a_kill_in_the_middle_of_a_burst_is_no_gap_elsewhere(cluster, moment):
    """Whatever a client has from the killed node, what it gets from another goes on from there."""
    count = 300
    with node(cluster.url, f"killed-{moment}") as server, Follower(server.url) as client:
        client.hello()
        with asleep(server.process):
            put(cluster.url, *range(count), size=1024)
        before = numbers_of([client.recv() for _ in range(1 + moment * 150)])
        kill(server)
        before += what_the_kernel_has(client)
    assert before + numbers_of(coming_back(cluster.servers[0], cluster.url, client.last)) == list(range(count))


def what_the_kernel_has(client):
    """The numbers of what was sent by a server that is dead."""
    found = []
    try:
        while True:
            found += numbers_of([client.recv()])
    except (EOFError, OSError):
        return found


@on("amqp")
def test_a_message_broker_keeps_no_history_for_others(bus):
    """On the same node a client goes on as long as that runs; elsewhere it is told to start anew, and then served."""
    with node(bus.url, "a") as a, node(bus.url, "b") as b:
        with Follower(a.url) as client:
            hello = client.hello()
            put(bus.url, 0, 1)
            assert [payload[0] for payload in client.payloads(2)] == [0, 1]
        put(bus.url, 2)
        for stream in (False, True):
            assert numbers_of(coming_back(a, bus.url, hello, stream=stream)) == [0, 1, 2]
            assert numbers_of(coming_back(a, bus.url, client.last, stream=stream)) == [2]
            for last in (hello, client.last):
                assert complete_or_told(coming_back(b, bus.url, last, stream=stream), ()) == "told"
        with Follower(b.url, "/", client.last) as again:
            again.hello()
            assert again.recv().event == "wsqueue.reset"
            put(bus.url, 3)
            assert numbers_of(what_comes(again, bus.url)) == [3]


# ---- Coming back to a node that is behind ------------------------------------------------------------------


@contextmanager
def followers(url, last=""):
    """One of either kind, once they are greeted."""
    with in_a_row(*(Follower(url, "/", last, stream=stream) for stream in (False, True))) as clients:
        for client in clients:
            assert client.hello() == last or not last
        yield clients


def nothing_is_on_its_way(bus, server, *names):
    """The server and the other nodes, of these names, have sent all that was queued so far."""
    with Follower(server.url) as witness:
        witness.hello()
        assert what_comes(witness, bus.url) == []
    all_sent(bus.url, *names)


@contextmanager
def lagging(bus, *arguments):
    """A node whose link to the broker is cut: it has sent what was queued before, as "ahead", and nothing since."""
    with Cutter(bus.broker.port) as link, node(bus.queue_url(port=link.port), "behind", *arguments) as server:
        nothing_is_on_its_way(bus, server, "ahead")
        link.cut()
        yield server, link
        link.heal()


def seen_in_the_middle_of_a_batch(bus, server):
    """Events 0 to 5 are sent, of which 1 to 4 are a batch; the id of event 2."""
    with Follower(server.url) as client:
        client.hello()
        put(bus.url, 0)
        assert queue_events(bus.url, [("e", [number]) for number in range(1, 5)])
        put(bus.url, 5)
        received = [client.recv() for _ in range(6)]
        assert numbers_of(received) == list(range(6))
    return received[2].id


def seen_nothing_but_the_hello(bus, server):
    """Events 0 to 2 were sent before its hello, 3 to 5 after it."""
    with Follower(server.url) as witness:
        witness.hello()
        put(bus.url, 0, 1, 2)
        witness.payloads(3)
        last = position(server)
        put(bus.url, 3, 4, 5)
        witness.payloads(3)
    return last


@pytest.mark.parametrize("seen", [seen_in_the_middle_of_a_batch, seen_nothing_but_the_hello])
@on(*NETWORKED)
def test_a_node_that_is_behind_sends_what_comes_after_the_id_and_nothing_else(bus, seen):
    """The client has seen what this node has not: it waits until the node is there. Others get everything."""
    with embedded(bus.url, "ahead") as ahead, lagging(bus) as (server, link):
        last = seen(bus, ahead)
        with followers(server.url, last) as clients, Follower(server.url) as other:
            other.hello()
            put(bus.url, 6)
            link.heal()
            for client in clients:
                assert numbers_of(what_comes(client, bus.url)) == [3, 4, 5, 6]
            assert numbers_of(what_comes(other, bus.url)) == [0, 1, 2, 3, 4, 5, 6]
            put(bus.url, 7)
            for client in clients:
                assert numbers_of(what_comes(client, bus.url)) == [7]


@on(*NETWORKED)
def test_who_waits_for_a_node_that_is_behind_may_leave(bus):
    """And come to the one that is not, with the id that it still has; those who wait on are not concerned."""
    with embedded(bus.url, "ahead") as ahead, lagging(bus) as (server, link):
        last = seen_in_the_middle_of_a_batch(bus, ahead)
        with Follower(server.url, "/", last) as patient:
            patient.hello()
            for _ in range(3):
                with Follower(server.url, "/", last) as client:
                    assert client.hello() == last
            assert numbers_of(coming_back(ahead, bus.url, client.last)) == [3, 4, 5]
            link.heal()
            assert numbers_of(what_comes(patient, bus.url)) == [3, 4, 5]


@on(*NETWORKED)
def test_topics_count_at_a_node_that_is_behind(bus):
    """For who waits there as for all others: what is for others is neither sent before its id nor after."""
    with embedded(bus.url, "ahead") as ahead, lagging(bus) as (server, link):
        with Follower(ahead.url, "/x") as client:
            client.hello()
            for number, to in enumerate(["/x", "/y", "/x", None, "/y", ["/y", "/x"]]):
                put(bus.url, number, to=to)
            assert [payload[0] for payload in client.payloads(2)] == [0, 2]
        with Follower(server.url, "/x", client.last) as again:
            again.hello()
            link.heal()
            assert numbers_of(what_comes(again, bus.url)) == [3, 5]


@on(*SHARED)
def test_a_node_that_slept_catches_up_for_who_came_meanwhile(bus):
    """A suspended machine: the client is in its kernel's queue when it wakes, with an id that it has not seen."""
    with embedded(bus.url, "ahead") as ahead, node(bus.url, "asleep") as server:
        # SQLite would wait for a node that is stopped while it writes that all is sent.
        nothing_is_on_its_way(bus, server, "ahead", "asleep")
        with ThreadPoolExecutor(2) as pool:
            with asleep(server.process):
                last = seen_in_the_middle_of_a_batch(bus, ahead)
                arriving = [pool.submit(Follower, server.url, "/", last, stream=stream) for stream in (False, True)]
            for call in arriving:  # they have waited for an answer
                with call.result(PATIENCE) as client:
                    assert client.hello() == last
                    assert numbers_of(what_comes(client, bus.url)) == [3, 4, 5]


@on(*SHARED)
def test_who_has_an_id_that_is_never_reached_is_told(bus, monkeypatch):
    """After HELD_SECONDS there is a reset, and the client gets what follows; others do not wait with it."""
    with embedded(bus.url, "a") as server, Follower(server.url) as other:
        other.hello()
        with followers(server.url, NEVER_REACHED) as clients:
            put(bus.url, 0)
            assert other.payloads(1)[0][0] == 0
            monkeypatch.setattr(wsqueue, "HELD_SECONDS", 0.2)  # not before: event 0 would come after the reset
            resets = [client.recv() for client in clients]
            put(bus.url, 1)
            for client, reset in zip(clients, resets):
                assert is_told_to_start_anew([reset])
                assert numbers_of(what_comes(client, bus.url)) == [1]
                assert numbers_of(coming_back(server, bus.url, reset.id)) == [1]


@on(*NETWORKED)
def test_who_was_told_at_a_node_that_is_behind_misses_nothing_from_then_on(bus, monkeypatch):
    """The reset says where this node is: all after that comes, and it is the same place on every node."""
    monkeypatch.setattr(wsqueue, "HELD_SECONDS", 0.2)
    with embedded(bus.url, "ahead") as ahead, Cutter(bus.broker.port) as link:
        with embedded(bus.queue_url(port=link.port), "behind") as server:
            nothing_is_on_its_way(bus, server, "ahead")
            link.cut()
            with followers(server.url, seen_in_the_middle_of_a_batch(bus, ahead)) as clients:
                resets = [client.recv() for client in clients]
                link.heal()
                for client, reset in zip(clients, resets):
                    assert is_told_to_start_anew([reset])
                    assert numbers_of(what_comes(client, bus.url)) == list(range(6))
                    assert numbers_of(coming_back(ahead, bus.url, reset.id)) == list(range(6))


# ---- Over restarts -----------------------------------------------------------------------------------------


@on(*EVERY)
def test_a_killed_node_goes_on_where_it_was(bus):
    """kill -9, and started again: it sends what was queued meanwhile, and nothing that it had sent."""
    with node(bus.url, "a") as server, RawClient(server.url) as client:
        put(bus.url, 0, 1, 2)
        client.payloads(3)
        all_done(bus, "a")
        kill(server)
    put(bus.url, 3, 4)
    assert settled(lambda: waiting(bus.url, "a")) == 2  # RabbitMQ may take a moment to see that the node is gone
    with node(bus.url, "a") as server:
        has_sent(server, 2)


@on(*SHARED)
def test_what_is_no_event_is_behind_a_node_too(bus):
    """Once it is set aside, the node does not come upon it again."""
    with node(bus.url, "a") as server, RawClient(server.url) as client:
        put(bus.url, 0)
        bus.insert("no event")
        client.payloads(1)
        all_sent(bus.url, "a")
        kill(server)
    with node(bus.url, "a") as server:
        assert "ERROR" not in server.stderr_text()


@on(*NETWORKED, "amqp")
def test_what_was_queued_meanwhile_reaches_new_clients(bus):
    """Those who are there before the restarted node has its broker again: also where nobody can come back by an id."""
    with node(bus.url, "a") as server, RawClient(server.url) as client:
        put(bus.url, 0)
        client.payloads(1)
        all_done(bus, "a")
        kill(server)
    put(bus.url, 1, 2)
    with Cutter(bus.broker.port) as link:
        link.refuse()
        with node_without_broker(bus.queue_url(port=link.port), "a") as server, RawClient(server.url) as client:
            link.heal()
            put(bus.url, 3)
            messages = (event for event in iter(lambda: client.events(1)[0], None) if event["event"] != "wsqueue.reset")
            assert [next(messages)["payload"][0] for _ in range(3)] == [1, 2, 3]


@on(*SHARED)
def test_who_comes_back_once_all_nodes_were_restarted_misses_nothing(bus):
    """What was sent before is read from the broker again, in front of what was queued while no node ran."""
    with node(bus.url, "a") as a, node(bus.url, "b") as b:
        hello = position(b)
        last = seen_in_the_middle_of_a_batch(bus, a)
        all_sent(bus.url, "a", "b")
        kill(a)
        kill(b)
    put(bus.url, 6)
    for number in (7, 8):
        with node(bus.url, "b") as b:
            put(bus.url, number)
            for stream in (False, True):
                assert numbers_of(coming_back(b, bus.url, last, stream=stream)) == list(range(3, number + 1))
                assert numbers_of(coming_back(b, bus.url, hello, stream=stream)) == list(range(number + 1))


@on(*SHARED)
def test_what_is_read_again_has_the_bounds_of_a_history(bus):
    """Wherever they cut, also through a batch: who is within them misses nothing, and who is not is told."""
    with node(bus.url, "a") as server, Follower(server.url) as client:
        ids = [client.hello()]
        put(bus.url, 0, 1)
        for first in (2, 6):
            assert queue_events(bus.url, [("e", [first + index]) for index in range(4)])
        put(bus.url, 10)
        ids += [client.recv().id for _ in range(11)]
        all_sent(bus.url, "a")
        kill(server)
    for bound, least in ((6, 3), (0, 0)):
        with node(bus.url, "a", "--history-events", bound) as server:
            found = [complete_or_told(coming_back(server, bus.url, ids[index]), range(index, 11))
                     for index in range(11, -1, -1)]  # the newest first: each queues a mark, which counts
        assert found == ["complete"] * found.count("complete") + ["told"] * found.count("told")
        assert least <= found.count("complete") < len(ids)


@on(*SHARED)
def test_a_new_node_begins_where_the_furthest_is(bus):
    """It sends nothing that others have sent, whoever is behind; its clients may yet have ids from before."""
    with node(bus.url, "a") as a:
        last = seen_in_the_middle_of_a_batch(bus, a)
        all_sent(bus.url, "a")
        with node(bus.url, "dead") as server:
            kill(server)
        put(bus.url, 6)
        all_sent(bus.url, "a")
        with node(bus.url, "new") as server:
            assert numbers_of(coming_back(server, bus.url, last)) == [3, 4, 5, 6]
            has_sent(server, 1)  # the mark


@on(*SHARED)
def test_the_first_node_of_all_begins_at_the_beginning(bus):
    """What was queued before there was any node is lost on nobody who is there."""
    put(bus.url, 0, 1, 2)
    with node(bus.url, "a") as server:
        has_sent(server, 3)


away = pytest.mark.parametrize("away", [Cutter.refuse, Cutter.cut], ids=["refuses", "does not answer"])


@away
@on(*NETWORKED)
def test_who_came_before_a_new_node_had_its_place_has_no_silent_hole(bus, away):
    """The node finds its broker later, and begins where the others are by then: its client gets all, or is told."""
    with node(bus.url, "a"), Cutter(bus.broker.port) as link:
        away(link)
        with node_without_broker(bus.queue_url(port=link.port), "new") as server, followers(server.url) as clients:
            put(bus.url, *range(5))
            all_sent(bus.url, "a")
            healed = time.monotonic()
            link.heal()
            has_its_place(bus.url, "new", healed)
            put(bus.url, 5)
            for client in clients:
                judge_holes(0, what_comes(client, bus.url))


@away
@on(*NETWORKED)
def test_the_id_of_a_hello_from_before_a_node_had_its_place_is_no_flood(bus, away):
    """With it, a client goes on somewhere else: what was sent before it came is nothing that it has missed."""
    with node(bus.url, "a") as a, Cutter(bus.broker.port) as link:
        put(bus.url, *range(5))
        all_sent(bus.url, "a")
        away(link)
        with node_without_broker(bus.queue_url(port=link.port), "new") as server:
            last = position(server)
            link.heal()
        received = coming_back(a, bus.url, last)
        assert {message.event for message in received} <= {"wsqueue.reset"}, received


@on("amqp")
def test_a_new_node_of_a_message_broker_begins_with_what_comes(bus):
    """Its queue is bound from then on."""
    with node(bus.url, "a"):
        put(bus.url, 0, 1)
        with node(bus.url, "b") as server, RawClient(server.url) as client:
            put(bus.url, 2)
            assert client.payloads(1)[0][0] == 2


@pytest.mark.parametrize("named", ["--node", "WS_NODE", "not at all"])
@on("sqlite")
def test_a_node_that_is_not_named_has_the_name_of_its_host(bus, named, monkeypatch):
    """The option says it, or the environment, or else the machine."""
    if named == "WS_NODE":
        monkeypatch.setenv("WS_NODE", "from-the-environment")
    name = {"--node": "given", "WS_NODE": "from-the-environment", "not at all": socket.gethostname()}[named]
    with spawn_server("--queue", bus.url, *(["--node", "given"] if named == "--node" else [])):
        eventually(lambda: names_of_nodes(bus.url) == [name], what=f"{name}, not {names_of_nodes(bus.url)}")


def names_of_nodes(url):
    with closing(open_queue(url)) as queue:
        return [name for name, _ in queue.nodes()]


@on(*SHARED)
def test_the_cursor_of_a_node_that_is_gone_goes_too(bus, monkeypatch):
    """After keep_seconds nobody waits for it, and it is not among the nodes any more."""
    monkeypatch.setattr(wsqueue, "SEEN_SECONDS", 0.1)
    with node(bus.url, "dead") as server:
        kill(server)
    with embedded(bus.queue_url(keep_seconds=1), "alive"):
        eventually(lambda: names_of_nodes(bus.url) == ["alive"], what="the end of a cursor")


@on(*SHARED)
def test_all_may_be_the_first(bus):
    """Who comes at the same moment to a broker that knows nothing of their queue makes it, or finds it made."""
    together = threading.Barrier(5)

    def come(number):
        with closing(open_queue(bus.url)) as queue:
            together.wait(PATIENCE)
            queue.put([("e", [number])])

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(come, range(5)))
    with node(bus.url, "a") as server:
        has_sent(server, 5)


# ---- What is removed ---------------------------------------------------------------------------------------


@on(*SHARED)
def test_who_lacks_what_was_removed_is_told(bus):
    """Entries were too many, and the nodes that knew them are gone: a reset, and never a hole."""
    with node(bus.url, "a") as server, Follower(server.url) as client:
        ids = [client.hello()]
        put(bus.url, *range(6))
        ids += [client.recv().id for _ in range(6)]
        all_sent(bus.url, "a")
        kill(server)
    bus.trim(2)
    with node(bus.url, "a") as server:
        found = [complete_or_told(coming_back(server, bus.url, last), range(index, 6))
                 for index, last in enumerate(ids)]
    assert found[:4] == ["told"] * 4  # they lack some of 0 to 3
    assert found[5:] == ["complete"] * 2  # of 4 and 5 nothing was removed


@on(*SHARED)
def test_what_was_removed_before_a_node_had_sent_it_is_no_silent_hole(bus):
    """While it was dead: who goes on there is told, others get what is left, and the log says it."""
    last = seen_before_a_node_died(bus)
    put(bus.url, 1, 2, 3)
    bus.trim(1)
    with node_without_broker(bus.url, "a") as server:
        with followers(server.url, last) as clients:
            for again in clients:
                assert judge_holes(1, what_comes(again, bus.url))
        assert judge_holes(1, coming_back(server, bus.url, last))  # once all is sent, too
        assert "WARNING" in server.stderr_text()


def seen_before_a_node_died(bus):
    """Event 0 is sent by node a, which is killed; the id with which a client comes that got it."""
    with node(bus.url, "a") as server:
        with Follower(server.url) as client:
            client.hello()
            put(bus.url, 0)
            client.payloads(1)
        all_sent(bus.url, "a")
        kill(server)
    return client.last


def judge_holes(due, received):
    """The first number is the one that is due, and every other follows the one before it; but after a reset any may
    come. How many resets were there?
    """
    resets = 0
    for message in received:
        if message.event == "wsqueue.reset":
            resets, due = resets + 1, None
        else:
            number = message.payload[0]
            assert due in (None, number), f"{number} came where {due} was due"
            due = number + 1
    return resets


@on(*SHARED)
def test_a_hole_is_told_of_also_when_it_is_the_end_of_the_history(bus):
    """The history has room for what came after the hole, and for nothing before it."""
    last = seen_before_a_node_died(bus)
    put(bus.url, 1, 2, 3, 4, 5)
    bus.trim(3)
    with node(bus.url, "a", "--history-events", 3) as server, Follower(server.url) as witness:
        witness.hello()
        all_sent(bus.url, "a")
        assert judge_holes(1, coming_back(server, bus.url, last))


@on(*SHARED)
def test_who_has_an_id_of_a_queue_that_is_no_more_is_told(bus):
    """A file, a table or a key was deleted, and what the client lacked with it; the one made anew is another one."""
    with node(bus.url, "a") as server:
        with Follower(server.url) as client:
            client.hello()
            put(bus.url, 0)
            client.payloads(1)
        put(bus.url, 1, 2)
        all_sent(bus.url, "a")
        kill(server)
    wsqueue.close_queues()
    bus.destroy()
    put(bus.url, 3)
    with node(bus.url, "a") as server:
        assert judge_holes(1, coming_back(server, bus.url, client.last))


@on(*SHARED)
def test_who_is_connected_is_told_of_what_was_removed(bus):
    """A node that stood still too long: its clients that know ids are told where the hole is, and go on after it."""
    with node(bus.url, "a") as server, followers(server.url) as clients:
        put(bus.url, 0)
        for client in clients:
            assert client.payloads(1)[0][0] == 0
        last = client.last
        all_sent(bus.url, "a")
        with asleep(server.process):
            put(bus.url, *range(1, 10))
            bus.trim(2)
        put(bus.url, 10)
        for client in clients:
            assert judge_holes(1, what_comes(client, bus.url))
        assert judge_holes(1, coming_back(server, bus.url, last))
        assert "WARNING" in server.stderr_text()


# ---- A broker that goes back -------------------------------------------------------------------------------


def place(identity):
    return tuple(map(int, identity.split("-")))


@pytest.mark.parametrize("again", [0, 3, 5, 7], ids="{} places are used again".format)
@on(*SHARED)
def test_no_event_is_skipped_after_a_broker_went_back(bus, again):
    """As with an older backup, or a copy that lagged behind: clients with ids are told, others may get some twice."""
    with node(bus.url, "a") as server, followers(server.url) as clients, RawClient(server.url) as plain:
        put(bus.url, 0)
        plain.payloads(1)
        all_sent(bus.url, "a")
        backup = bus.back_up()
        put(bus.url, *range(1, 6))
        plain.payloads(5)
        all_sent(bus.url, "a")
        last, _ = ([client.recv().id for _ in range(6)] for client in clients)
        with asleep(server.process):
            new = [encoded(record(10 + number)) for number in range(again)]
            wsqueue.close_queues()
            bus.restore(backup, zip(map(place, last[1:]), new))
            for data in new[5:]:
                bus.insert(data)
        for client in clients:
            received = what_comes(client, bus.url)
            assert judge_holes(6, received) == 1
            assert [number for number in numbers_after_reset(received) if number >= 10] == list(range(10, 10 + again))
        assert queue_event(bus.url, "e", ["the end"])
        due = list(range(10, 10 + again))
        assert [number for number in numbers_until_end(plain) if number >= 10] == due
        assert judge_holes(1, coming_back(server, bus.url, last[3])), "its id may be another event's by now"
        all_sent(bus.url, "a")


@on("redis")
def test_a_broker_that_went_back_between_two_looks_is_noticed(bus):
    """The library would connect anew by itself, and nobody would know."""
    with closing(open_queue(bus.url, node="a")) as queue:
        assert queue.take() == []
        put(bus.url, 0)
        queue.done(queue.take())
        assert queue.take() == []
        backup = bus.back_up()
        put(bus.url, 1, 2)
        (*_, last) = queue.take()
        bus.restore(backup, [(place(last.id), encoded(record(10)))])
        ids = []
        eventually(lambda: ids.extend(next_ids(queue)) or last.id in ids, what="the new event")
        assert ids[0].endswith("~reset")


def next_ids(queue):
    """Of what comes next; a broken connection is no failure."""
    with suppress(QueueError):
        return [event.id for event in queue.take()]
    return []


def numbers_after_reset(received):
    resets = [index for index, message in enumerate(received) if message.event == "wsqueue.reset"]
    return numbers_of(received[resets[-1] + 1:])


def numbers_until_end(client):
    found = []
    while True:
        message = json.loads(client.recv())
        if message["payload"] == ["the end"]:
            return found
        if message["event"] == "e":
            found.append(message["payload"][0])


# ---- Several things at once --------------------------------------------------------------------------------


class Traveller(threading.Thread):
    """A client that goes to the next node when it loses one, with the id it has; until it has seen the end."""

    def __init__(self, urls, end, stream):
        super().__init__(name="test-traveller", daemon=True)
        self.received, self.error, self.moves = [], None, -1
        self.last = ""
        self._urls, self._end, self._stream = urls, end, stream
        self.start()

    def run(self):
        try:
            for url in itertools.cycle(self._urls):
                if self._visit(url):
                    return
        except AssertionError as error:
            self.error = error

    def _visit(self, url):
        try:
            with Follower(url, "/", self.last, stream=self._stream) as client:
                self.moves += 1
                hello = client.hello()
                assert self.last in ("", hello)
                self.last = hello
                for received in iter(client.recv, None):
                    self.last = client.last
                    if received.event == self._end:
                        return True
                    self.received.append(received)
        except (OSError, EOFError):
            return False

    def numbers(self):
        """All that it received, once it has seen the end."""
        self.join(3 * PATIENCE)
        assert not self.is_alive(), f"no end after {len(self.received)} events"
        assert self.error is None, self.error
        return numbers_of(self.received)


@on(*NETWORKED)
def test_one_node_dies_while_the_network_of_another_is_cut(bus):
    """Its clients go on at the third, or wait at the one that is behind; everybody has everything in the end, once."""
    count, port, numbers = 600, free_port(), itertools.count()

    def produce(most):
        for number in itertools.islice(numbers, most):
            put(bus.url, number)

    with Cutter(bus.broker.port) as link, ExitStack() as stack:
        a = stack.enter_context(node(bus.url, "a", "--port", port))
        b = stack.enter_context(node(bus.queue_url(port=link.port), "b"))
        c = stack.enter_context(node(bus.url, "c"))
        routes = list(itertools.permutations([server.url for server in (a, b, c)]))
        crowd = [Traveller(route, "the end", stream) for route in routes for stream in (False, True)]
        eventually(lambda: all(traveller.last for traveller in crowd), what="everybody to have arrived")
        produce(count // 4)
        link.cut()
        produce(count // 4)
        kill(a)
        produce(count // 4)
        eventually(lambda: all(traveller.moves for traveller in crowd if traveller._urls[0] == a.url),
                   what="the clients of the dead node to be elsewhere")
        link.heal()
        stack.enter_context(node(bus.url, "a", "--port", port))
        kill(c)
        produce(count // 4)
        queue_event(bus.url, "the end")
        for traveller in crowd:
            assert traveller.numbers() == list(range(count))


@on("postgresql")
def test_a_transaction_that_takes_its_time_makes_no_gap(bus):
    """What it inserts has a place in front of what was committed meanwhile: nobody's id is beyond that place."""
    with node(bus.url, "a") as a, node(bus.url, "b") as b:
        with Follower(a.url) as witness:
            before = witness.hello()
            with psycopg.connect(bus.server_url) as slow:
                slow.execute(f"INSERT INTO {bus.name} (data) VALUES ('{encoded(record(0))}')")
                put(bus.url, 1)
                meanwhile = position(b)
                slow.commit()
            put(bus.url, 2)
            assert numbers_of([witness.recv() for _ in range(3)]) == [0, 1, 2]
        for last in (before, meanwhile):
            assert numbers_of(coming_back(b, bus.url, last)) == [0, 1, 2]
        assert numbers_of(coming_back(b, bus.url, witness.last)) == []


@on("postgresql")
def test_transactions_may_end_in_any_order(bus):
    """Some are rolled back, too: all nodes send the same sequence, in which everything has come, and one goes on."""
    with node(bus.url, "a") as a, node(bus.url, "b") as b, Follower(a.url) as one, Follower(b.url) as other:
        ids, numbers = [one.hello()], itertools.count()
        other.hello()
        for ends in itertools.permutations(range(4)):
            run_transactions(bus, numbers, ends)
        received = what_comes(one, bus.url)
        due = [number for number in range(next(numbers)) if number % 5 != 3]
        assert sorted(numbers_of(received)) == due
        assert [other.recv() for _ in due] == received
        ids += [message.id for message in received]
        for index in range(0, len(ids), 7):
            assert numbers_of(coming_back(b, bus.url, ids[index])) == numbers_of(received)[index:]


def run_transactions(bus, numbers, ends):
    """Four at the same time, which end in this order, the fourth without effect; and an event past them all."""
    with ExitStack() as stack:
        running = [stack.enter_context(psycopg.connect(bus.server_url)) for _ in range(4)]
        for connection in running:
            connection.execute(f"INSERT INTO {bus.name} (data) VALUES ('{encoded(record(next(numbers)))}')")
        put(bus.url, next(numbers))
        for index in ends:
            running[index].rollback() if index == 3 else running[index].commit()
