"""A large audience: two threads send to it, and it is looked at in parts. Real sockets; who sends what is arranged."""

import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest

import wsqueue
from clients import PATIENCE, RawClient, everybody_has_left, serving
from helpers import ROOT
from wsqueue import SENDER_PART, SENDERS_FROM, TICK_PART, IOThread

CLIENTS = SENDERS_FROM + SENDER_PART // 2  # the last part is a short one


@pytest.fixture(scope="module", autouse=True)
def _two_cores():
    """On a machine with one, too: what two threads do is the same there, just not sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 2)
        yield


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def clients(server):
    """A large audience, that has been sent to."""
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.url)) for _ in range(CLIENTS)]
        server.broadcast("tick", 0)
        assert [client.payloads(1) for client in clients] == [[0]] * CLIENTS
        yield clients
    everybody_has_left(server)


class Spy:
    """Stands in for send_to_all(): notes which thread sent to whom, and keeps the first sender until both are there."""

    def __init__(self, monkeypatch):
        self.sent = []
        self._send, self._both = wsqueue.send_to_all, threading.Barrier(2)
        monkeypatch.setattr(wsqueue, "send_to_all", self)

    def __call__(self, audience, data):
        me = threading.current_thread()
        if me not in [thread for thread, _ in self.sent]:
            self._both.wait(PATIENCE)
        late = self._send(audience, data)
        self.sent.append((me, list(audience)))
        return late


def test_two_threads_send_to_each_client_once_and_in_order(server, clients, monkeypatch):
    """Each event goes to everyone before the next one does, whoever sends it."""
    spies = []
    for number in range(20):
        spies.append(Spy(monkeypatch))
        server.broadcast("tick", number)
        monkeypatch.undo()
    for client in clients:
        assert client.payloads(20) == list(range(20))
    for spy in spies:
        threads = {thread.name for thread, _ in spy.sent}
        assert threads == {threading.current_thread().name, "wsqueue-sender_0"}
        assert sorted(map(id, server.registry.audience())) == sorted(id(conn) for _, part in spy.sent for conn in part)


def test_a_small_audience_is_sent_to_by_one_thread(monkeypatch):
    """To wake a second one would take longer than to send."""
    def refuse(*_args):
        raise AssertionError("a second sender was asked for")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    with serving() as server, RawClient(server.url) as client:
        server.broadcast("tick", 1)
        assert client.payloads(1) == [1]


def test_one_thread_sends_everything_where_there_can_be_no_second(server, clients, monkeypatch):
    """A process may have no more threads."""
    def no_more(*_args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", no_more)
    server.broadcast("tick", 1)
    assert [client.payloads(1) for client in clients] == [[1]] * CLIENTS


def test_a_second_sender_that_comes_late_is_not_waited_for(server, clients, monkeypatch):
    """On a busy machine it may wake when all is sent."""
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *_args: Future())
    server.broadcast("tick", 2)
    assert [client.payloads(1) for client in clients] == [[2]] * CLIENTS


def test_what_goes_wrong_in_the_second_sender_is_known_to_the_first(server, clients, monkeypatch):
    """Else events would be lost in silence."""
    send, both = wsqueue.send_to_all, threading.Barrier(2)
    met, broken = set(), []

    def send_or_fail(audience, data):
        me = threading.current_thread()
        if me not in met:  # each has a part in hand before either goes on, whichever comes first
            met.add(me)
            both.wait(PATIENCE)
            if me.name.startswith("wsqueue-sender"):
                broken.extend(audience)
                raise MemoryError("not enough")
        return send(audience, data)

    monkeypatch.setattr(wsqueue, "send_to_all", send_or_fail)
    with pytest.raises(MemoryError):
        server.broadcast("tick", 3)
    monkeypatch.undo()
    left_out = {conn.address for conn in broken}
    reached = [client for client in clients if client.socket.getsockname() not in left_out]
    assert len(reached) == CLIENTS - SENDER_PART
    assert [client.payloads(1) for client in reached] == [[3]] * len(reached)


def test_the_second_sender_ends_with_the_server():
    """stop() leaves no thread behind."""
    with ExitStack() as stack:
        server = stack.enter_context(serving())
        for _ in range(SENDERS_FROM):
            stack.enter_context(RawClient(server.url))
        others = set(threading.enumerate())
        server.broadcast("tick")
        (second,) = set(threading.enumerate()) - others
        server.stop()
        assert not second.is_alive()


FORKED = """
import os, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from contextlib import ExitStack
from clients import RawClient, serving
from wsqueue import SENDERS_FROM

def audience(server):
    clients = [stack.enter_context(RawClient(server.url)) for _ in range(SENDERS_FROM)]
    server.broadcast("tick", os.getpid())
    assert [client.payloads(1) for client in clients] == [[os.getpid()]] * len(clients)

with ExitStack() as stack:
    server = stack.enter_context(serving())
    audience(server)
    child = os.fork()
    if child == 0:
        server.start(background=True)
        audience(server)
        print("the child has sent", flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    audience(server)
print("the parent has sent")
"""


def test_a_forked_child_has_a_second_sender_of_its_own():
    """The parent's is not in it, and nothing must wait for that."""
    done = subprocess.run([sys.executable, "-c", FORKED, str(ROOT), str(ROOT / "tests")], capture_output=True,
                          text=True, timeout=6 * PATIENCE, check=False)
    assert (done.stdout.split("\n")[:2], done.returncode) == (["the child has sent", "the parent has sent"], 0), done


# ---- Once a second -----------------------------------------------------------------------------------------


class Parked:
    """Stands for a connection; notes when it is looked at."""

    address = ("127.0.0.1", 1)

    def __init__(self, looks):
        self.looks = looks


@pytest.fixture
def io(monkeypatch):
    """An I/O thread that is not started."""
    def look(conn, _now):
        if isinstance(conn, Parked):
            conn.looks.append(conn)

    monkeypatch.setattr(wsqueue.Connection, "tick", look)
    io = IOThread(wsqueue.ClientRegistry(), None, None, wsqueue.Totals(), {}, None)
    yield io
    io._selector.close()
    io._waker.close()


@pytest.mark.parametrize("count", [1, TICK_PART - 1, TICK_PART, TICK_PART + 1, 10 * TICK_PART + 7])
def test_each_connection_is_looked_at_once_a_second_and_never_all_at_once(io, count):
    """An event must not wait until ten thousand of them have been looked at."""
    looks = []
    io._parked = {Parked(looks): 0 for _ in range(count)}
    for millisecond in range(3000):
        before = len(looks)
        io._tick(1.0 + millisecond / 1000)
        assert len(looks) - before <= TICK_PART
    assert set(Counter(looks).values()) <= {2, 3, 4}
    assert len(set(looks)) == count


def test_a_byte_that_never_came_stops_the_wake_ups_for_a_second_at_most(io):
    """A signal handler may raise in a thread that was about to write it."""
    io._waker._is_set = True
    io._tick(1.0)
    io._waker.set()
    assert io._selector.select(0)
