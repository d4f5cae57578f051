"""Section 9 between processes: standing by, preforking servers, forks, signals, and what stop() leaves behind."""

import http.client
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest

import wsqueue
from brokers import free_port
from clients import (
    CLOSE,
    PATIENCE,
    RawClient,
    Reader,
    close_payload,
    enter,
    handshake,
    in_threads,
    open_socket,
    serving,
)
from helpers import ROOT, Server, eventually, spawn_server
from test_server import (
    answer_goodbye,
    clients_arrived,
    errors_of,
    is_free,
    move_events,
    nothing_is_left,  # noqa: F401 - a fixture
    port_of,
    ready_files,
    start_burst,
    stopping,
)
from wsqueue import ServerError, WebSocketServer, open_queue, queue_event, serving_process


@pytest.fixture
def directory(tmp_path):
    """A queue directory that does not exist yet."""
    return str(tmp_path / "queue")


def payloads_of(directory):
    """What waits in the queue."""
    for name in ready_files(directory):
        with open(f"{directory}/{name}", "rb") as file:
            yield json.loads(file.read())["payload"]


@contextmanager
def running(command, output, **popen):
    """A program that prints where it listens, once it does; it and what it has started are gone when the block ends."""
    output.mkdir()
    with open(str(output / "stdout"), "wb") as out, open(str(output / "stderr"), "wb") as err:
        popen.update(stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True)
        process = subprocess.Popen(command, **popen)
    try:
        yield Server(process, output)
    finally:
        process.stdin.close()  # some of its children end with it
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group is the session that it leads, and no other
        process.wait()


@contextmanager
def program(source, tmp_path, *args):
    """A Python program that imports wsqueue and prints where it listens."""
    with running([sys.executable, "-c", source, *map(str, args)], tmp_path / "output", cwd=str(ROOT)) as process:
        yield process


@contextmanager
def reading(url, target="/"):
    """A client that reads, and answers pings, until the block ends: a Reader."""
    with RawClient(url, target) as client:
        reader = Reader(client)
        try:
            yield reader
        finally:
            with suppress(OSError):  # it has gone
                client.socket.shutdown(socket.SHUT_RDWR)  # wakes the reader, as close() would not
            reader.join(PATIENCE)


def all_is_sent(directory):
    """Once an event is off the queue, not even a crash repeats it."""
    eventually(lambda: not ready_files(directory), what="an empty queue")


def kill(process):
    process.kill()
    process.wait()


# ---- Standing by -------------------------------------------------------------------------------------------


@contextmanager
def second(directory, port=0):
    """A server that is started in the background, whoever serves the queue; stopped when the block ends."""
    server = WebSocketServer(port=port, queue=directory, close_timeout=1.0)
    server.start(background=True)
    try:
        yield server
    finally:
        server.stop()


def takes_over(server):
    eventually(server.is_running, what="the server that stood by to serve")


@pytest.mark.usefixtures("nothing_is_left")
def test_who_comes_second_stands_by(directory, caplog):
    """start() returns, the server does not run, `url` says why, the log says who serves, and that one goes on."""
    caplog.set_level(logging.INFO)
    with spawn_server("--queue", directory) as first, RawClient(first.url) as client:
        with second(directory) as server:
            assert not server.is_running()
            with pytest.raises(ServerError, match=f"stands by: process {first.pid} serves the queue"):
                server.url  # noqa: B018 - it is a property
            assert re.search(rf"standing by: .*\bprocess {first.pid}\b", caplog.text)
            assert queue_event(directory, "e", 1)
            assert client.payloads(1) == [1]
    assert errors_of(caplog) == []


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_second_takes_over_on_the_same_port(directory, tmp_path, number):
    """When the first one stops or is killed; what is queued until clients are back reaches them, in order."""
    aside = str(tmp_path / "aside")
    with spawn_server("--queue", directory) as first, second(directory, first.port) as server:
        with RawClient(first.url) as client:
            assert queue_event(directory, "e", 0)
            assert client.payloads(1) == [0]
            all_is_sent(directory)
        first.process.send_signal(number)
        first.process.wait(PATIENCE)
        for event in range(1, 4):
            assert queue_event(aside, "e", event)
        takes_over(server)
        assert server.url == first.url
        with RawClient(server.url) as client:
            clients_arrived(server, 1)
            move_events(aside, directory)  # a server sends to who is connected
            assert client.payloads(3) == [1, 2, 3]


def test_who_stands_by_cannot_be_started_again(directory):
    """It says that it stands by already, and goes on with that."""
    with spawn_server("--queue", directory) as first, second(directory) as server:
        with pytest.raises(ServerError, match="stands by"):
            server.start(background=True)
        kill(first.process)
        takes_over(server)


def test_who_cannot_take_over_says_so_once_and_tries_on(directory, monkeypatch, caplog):
    """Somebody else has taken the port: one line, however often it tries; and when that is free, it serves."""
    attempts = []
    monkeypatch.setattr(wsqueue, "STANDBY_SECONDS", 0.02)
    monkeypatch.setattr(wsqueue, "_listen", lambda *at, real=wsqueue._listen: attempts.append(at) or real(*at))
    with closing(socket.create_server(("127.0.0.1", 0))) as taken, ExitStack() as stack:
        port = taken.getsockname()[1]
        with spawn_server("--queue", directory):
            server = stack.enter_context(second(directory, port))
        eventually(lambda: len(attempts) > 3, what="more attempts")
        taken.close()
        takes_over(server)
    (error,) = errors_of(caplog)
    assert f"port {port}" in error and "trying again" in error


@pytest.mark.usefixtures("nothing_is_left")
def test_what_is_queued_while_nobody_serves_is_taken_by_the_second(directory):
    """Nothing has to be queued again after a change of servers."""
    with spawn_server("--queue", directory) as first, second(directory) as server:
        kill(first.process)
        assert queue_event(directory, "e")
        takes_over(server)
        all_is_sent(directory)


@pytest.mark.usefixtures("nothing_is_left")
def test_two_servers_in_one_process_behave_the_same(directory, caplog):
    """One stands by for the other, and then the other for it."""
    caplog.set_level(logging.INFO)
    with serving(queue=directory) as one, second(directory) as other:
        assert not other.is_running()
        assert f"process {os.getpid()}" in caplog.text
        one.stop()
        takes_over(other)
        with pytest.raises(ServerError, match="stands by"):
            one.start(background=True) or one.url
        with RawClient(other.url) as client:
            clients_arrived(other, 1)
            assert queue_event(directory, "e", 1)
            assert client.payloads(1) == [1]
        other.stop()
        takes_over(one)


@pytest.mark.usefixtures("nothing_is_left")
def test_stop_ends_the_standing_by(directory):
    """No thread and no descriptor is left, however often and from wherever; the one that serves goes on."""
    with serving(queue=directory) as first:
        for _ in range(5):
            with second(directory) as server:
                with ThreadPoolExecutor(3) as pool:
                    for call in [pool.submit(server.stop) for _ in range(3)]:
                        call.result(PATIENCE)
            assert not server.is_running()
        assert serving_process(directory) == str(os.getpid()) and first.is_running()


@pytest.mark.usefixtures("nothing_is_left")
def test_stop_at_the_moment_of_taking_over(directory):
    """Whether its turn has come or not, a server that was stopped does not serve later on."""
    for _ in range(5):
        with second(directory) as first, second(directory) as server:
            with stopping(first):
                server.stop()
        assert not server.is_running() and serving_process(directory) is None


@pytest.mark.usefixtures("nothing_is_left")
def test_a_port_that_is_taken_is_waited_for(directory, caplog):
    """When its turn comes and the port is not free: one line in the log, another may serve, and else it does later."""
    with socket.socket() as other, serving(queue=directory) as first:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        with second(directory, port) as server:
            first.stop()
            eventually(lambda: errors_of(caplog), what="a line in the log")
            with serving(queue=directory) as third:
                assert third.is_running() and not server.is_running()
            other.close()
            takes_over(server)
            assert port_of(server) == port
    assert len(errors_of(caplog)) == 1 and str(port) in errors_of(caplog)[0]


@pytest.mark.usefixtures("nothing_is_left")
def test_where_several_may_serve_a_queue_the_port_says_who_does(tmp_path, caplog):
    """A queue at a URL has no lock: the workers of a preforking server stand by for the port, and take over."""
    caplog.set_level(logging.INFO)
    queue = f"sqlite:///{tmp_path}/queue.db"
    with serving(queue=queue) as first:
        with second(queue, port_of(first)) as server:
            assert not server.is_running()
            assert "standing by: cannot listen on" in caplog.text
            first.stop()
            takes_over(server)
            with RawClient(server.url) as client, closing(open_queue(queue)) as producer:
                producer.put([("e", 1)])
                assert client.payloads(1) == [1]
    assert errors_of(caplog) == []


@pytest.mark.parametrize("queue", [{}, {"queue": "directory"}], ids=["no queue", "a directory"])
def test_else_a_port_that_is_taken_is_an_error(tmp_path, queue):
    """Also in the background: nobody would ever make room."""
    queue = {name: str(tmp_path / value) for name, value in queue.items()}
    with serving() as first, pytest.raises(ServerError, match=r"port \d+"):
        WebSocketServer(port=port_of(first), **queue).start(background=True)


EMBEDDED = """
import logging, sys, time
from wsqueue import WebSocketServer

logging.basicConfig(level=logging.INFO)
server = WebSocketServer(port=int(sys.argv[2]), queue=sys.argv[1])
server.start(background=True)
print("started", flush=True)
while not server.is_running():
    time.sleep(0.01)
print(f"listening on {server.url}", flush=True)
sys.stdin.read()
"""


def limit_descriptors(pid, soft):
    hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def test_want_of_descriptors_is_waited_for(directory, tmp_path):
    """A server whose turn comes when it cannot open anything says so, and serves once it can."""
    with spawn_server("--queue", directory) as first, program(EMBEDDED, tmp_path, directory, 0) as server:
        eventually(lambda: "started" in server.stdout_text())
        limit_descriptors(server.pid, 4)
        kill(first.process)
        eventually(lambda: "trying again" in server.stderr_text(), what="a line in the log")
        limit_descriptors(server.pid, 256)
        server.wait_until_it_listens()
        with RawClient(server.url) as client:
            assert queue_event(directory, "e", 1)
            assert client.payloads(1) == [1]


# ---- A preforking server: Gunicorn -------------------------------------------------------------------------

WORKERS = 3

APP = """
import logging, os, pathlib, time
from wsqueue import WebSocketServer, queue_event

logging.basicConfig(level=logging.INFO)
server = WebSocketServer(port=int(os.environ["SOCKET_PORT"]), queue=os.environ["QUEUE"])
server.start(background=True)

def app(environ, start_response):
    target = environ["PATH_INFO"][1:]
    if target:  # a meeting: who is here waits until the others are
        meeting = pathlib.Path(target)
        meeting.mkdir(exist_ok=True)
        (meeting / str(os.getpid())).touch()
        while len(os.listdir(str(meeting))) < int(os.environ["WORKERS"]):
            time.sleep(0.01)
    assert queue_event(os.environ["QUEUE"], "request", environ["QUERY_STRING"])
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"%d" % os.getpid()]
"""


class Gunicorn:
    """Gunicorn with its workers, and where the server that one of them runs listens."""

    def __init__(self, arbiter, url):
        self.arbiter, self.url = arbiter, url
        log = eventually(lambda: re.search(r"Listening at: http://\S+:(\d+) ", self.log()), what="the HTTP port")
        self.port = int(log[1])
        self._meetings = 0

    def log(self):
        assert self.arbiter.process.poll() is None, self.arbiter.stderr_text()
        return self.arbiter.stderr_text()

    def workers(self):
        """All that were ever started."""
        return [int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", self.log())]

    def get(self, target):
        """The pid of the worker that answered."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3 * PATIENCE)
        try:
            connection.request("GET", target)
            answer = connection.getresponse()
            assert answer.status == 200
            return int(answer.read())
        finally:
            connection.close()

    def ask_all(self):
        """One request to each worker, at the same time; returns what they queue."""
        self._meetings += 1
        targets = [f"/meeting{self._meetings}?{self._meetings}.{number}" for number in range(WORKERS)]
        with ThreadPoolExecutor(WORKERS) as pool:
            assert len(set(pool.map(self.get, targets))) == WORKERS
        return sorted(target.partition("?")[2] for target in targets)


@contextmanager
def gunicorn(tmp_path, directory, *options):
    """Gunicorn with the application; its home is where the test's files are."""
    port = free_port()
    (tmp_path / "app.py").write_text(APP)
    command = [sys.executable, "-m", "gunicorn", f"--workers={WORKERS}", "--bind=127.0.0.1:0", *options, "app:app"]
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "QUEUE": directory,
        "SOCKET_PORT": str(port),
        "WORKERS": str(WORKERS),
    }
    with running(command, tmp_path / "output", cwd=str(tmp_path), env=env) as arbiter:
        yield Gunicorn(arbiter, f"ws://127.0.0.1:{port}")


def connected(url):
    """A client, as soon as somebody serves; a page in a browser tries again, too."""

    def attempt():
        try:
            return RawClient(url)
        except (OSError, EOFError):
            return None

    return eventually(attempt, what=f"a server at {url}")


def serves(directory, others_than=None):
    """The pid of the process that serves the queue, as soon as it is another one."""

    def pid():
        text = serving_process(directory) or ""
        return text.isdigit() and text != str(others_than) and int(text)

    return eventually(pid, what="a process that serves the queue")


@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["import in each worker", "preload"])
def test_one_process_of_gunicorn_serves_and_each_can_reach_the_clients(directory, tmp_path, preload):
    """One worker, or the arbiter that has loaded the application for all; an event of any worker arrives once."""
    with gunicorn(tmp_path, directory, *preload) as server, connected(server.url) as client:
        for _ in range(3):
            assert sorted(server.ask_all()) == sorted(client.payloads(WORKERS))
        pid = serves(directory)
        assert pid in ([server.arbiter.pid] if preload else server.workers())
        waiting = re.findall(r"standing by: process (\d+)", server.log())
        assert waiting == ([] if preload else [str(pid)] * (WORKERS - 1))
        assert status_when_told_to_end(server, client) == 0
    assert serving_process(directory) is None


def status_when_told_to_end(server, client):
    """Gunicorn's own status, which must be what it is without a server in it."""
    server.arbiter.process.terminate()
    with pytest.raises((EOFError, ConnectionError)):
        client.recv()
    return server.arbiter.process.wait(PATIENCE)


def test_another_worker_takes_over_when_the_serving_one_is_killed(directory, tmp_path):
    """On the same port; clients that come back get what any worker queues, the new one's included, each event once."""
    with gunicorn(tmp_path, directory) as server:
        killed = None
        for _ in range(2):
            with connected(server.url) as client:
                pid = serves(directory, killed)
                assert sorted(server.ask_all()) == sorted(client.payloads(WORKERS))
                all_is_sent(directory)
                os.kill(pid, signal.SIGKILL)
                with pytest.raises((EOFError, ConnectionError)):
                    client.recv()
            killed = pid
        assert serves(directory, killed) in server.workers()


@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["import in each worker", "preload"])
def test_a_worker_that_is_killed_does_not_disturb_the_one_that_serves(directory, tmp_path, preload):
    """A client of the survivor sees no close; what was queued before, meanwhile and after arrives exactly once."""
    with gunicorn(tmp_path, directory, *preload) as server, connected(server.url) as client:
        assert sorted(server.ask_all()) == sorted(client.payloads(WORKERS))
        for _ in range(3):
            before = server.workers()
            os.kill([pid for pid in before if pid != serves(directory)][-1], signal.SIGKILL)
            meanwhile = [f"meanwhile {number}" for number in range(20)]
            assert all(queue_event(directory, "e", text) for text in meanwhile)
            eventually(lambda: len(server.workers()) > len(before), what="a new worker")  # noqa: B023
            assert sorted(server.ask_all() + meanwhile) == sorted(client.payloads(WORKERS + 20))


# ---- Forks -------------------------------------------------------------------------------------------------

# What the programs of this section share: a server, and what a child of its process tries.
FORKING = """
import json, multiprocessing, os, signal, subprocess, sys, threading, time, traceback
from wsqueue import ConnectionClosed, WebSocketServer, queue_event

directory = sys.argv[1]
server = WebSocketServer(port=0, queue=directory)

def inherited():
    "What this process holds of a server: sockets, the lock of the queue, what waits for them."
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    kinds = ("socket:", "eventpoll", "inotify", ".wsqueue.lock")
    return [link for link in links if any(kind in link for kind in kinds)]

def live(conns=(), start=False):
    "Everything that a child may do; SIGALRM ends it if that hangs."
    signal.alarm(int(sys.argv[2]))
    assert inherited() == [], inherited()
    assert not server.is_running() and server.get_connections() == [] and server.get_connection_count() == 0
    for conn in conns:
        assert not conn.is_connected() and conn.send("from a child") is False
        conn.join("topic"), conn.leave("topic"), conn.close()
    server.broadcast("from a child", "broadcast")
    assert queue_event(directory, "e", "from a child")
    server.stop()
    if start:
        server.start(background=True)
        assert not server.is_running(), "it serves, and so does its parent"
        server.stop()
    assert WebSocketServer.get_instance() is not server
    assert [t for t in threading.enumerate() if t.name.startswith("wsqueue") and t.is_alive()
            and t is not threading.current_thread()] == []

def fork(child, *args):
    "The pid of a child, which ends with status 0 if child() returned."
    pid = os.fork()
    if pid:
        return pid
    try:
        child(*args)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)

def listen():
    server.start(background=True)
    print(f"listening on {server.url}", flush=True)

def report(value):
    print("report", json.dumps(value), flush=True)
"""

DEADLINE = int(2 * PATIENCE)  # of a child, in seconds


@contextmanager
def forking(source, tmp_path, directory):
    """A program with a server in it, which does the rest of `source`."""
    with program(FORKING + source, tmp_path, directory, DEADLINE) as process:
        process.wait_until_it_listens()
        yield process


def tell(process, line="go"):
    process.process.stdin.write(f"{line}\n".encode())
    process.process.stdin.flush()


def reported(process, timeout=30.0):
    """What the program has reported, as soon as it has."""

    def report():
        match = re.search(r"^report (.*)\n", process.stdout_text(), re.MULTILINE)
        if match is None and process.process.poll() is not None:
            raise AssertionError(process.stderr_text())
        return match

    return json.loads(eventually(report, timeout, what="a report")[1])


LIVES_ON = """
def child():
    report(os.getpid())
    sys.stdin.read()  # until the test is over, longer than its parent lives

listen()
sys.stdin.readline()
os.waitpid(fork(child), 0)
"""


def held_by(pid):
    """The descriptors of a process, without the standard three."""
    return {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd") if int(fd) > 2}


def test_a_child_holds_nothing_of_its_parents_server(directory, tmp_path):
    """When the parent is killed, its clients see the end and another process serves at once, while the child lives."""
    with forking(LIVES_ON, tmp_path, directory) as parent, RawClient(parent.url) as client:
        assert queue_event(directory, "e", 1)
        assert client.payloads(1) == [1]
        tell(parent)
        child = reported(parent)
        # The queue thread lists the directory ten times a second, which a fork does not wait for (it may be a file
        # server's that is gone): a descriptor for reading it keeps nobody from anything.
        assert set(held_by(child).values()) <= {directory}
        kill(parent.process)
        with pytest.raises((EOFError, ConnectionError)):
            client.recv()
        with spawn_server("--queue", directory, "--port", parent.port) as successor:
            assert successor.url == parent.url
            os.kill(child, 0)  # raises if it has ended


FORKS_ONCE = """
def here():
    report(os.waitpid(fork(live, server.get_connections(), True), 0)[1])

def receive(conn):
    try:
        conn.recv()
    except ConnectionClosed:
        return

def handler(conn):
    report(os.waitpid(fork(live, [conn], True), 0)[1] or os.waitpid(fork(receive, conn), 0)[1])
    for message in conn:
        conn.send(message)

server.on("/handler", handler)
server.on_message("/callback", lambda conn, message: here())
listen()
if sys.stdin.readline() == "fork\\n":
    here()
sys.stdin.read()
"""


@pytest.mark.parametrize("path", ["/main thread", "/handler", "/callback"])
def test_a_child_can_do_what_any_process_can(directory, tmp_path, path):
    """Forked in whatever thread: nothing hangs, its own server stands by, and its parent's client sees no close."""
    with forking(FORKS_ONCE, tmp_path, directory) as parent, RawClient(parent.url, path.replace(" ", "%20")) as client:
        if path == "/callback":
            client.send("fork")
        tell(parent, "fork" if path == "/main thread" else "no")
        assert client.payloads(1) == ["from a child"]  # what it has queued, and not what it has broadcast
        assert reported(parent) == 0, parent.stderr_text()
        assert queue_event(directory, "e", "after")
        assert client.payloads(1) == ["after"]
        assert "Error" not in parent.stderr_text()


FORKS_OFTEN = """
listen()
sys.stdin.readline()
children = []
for number in range(50):
    children.append(fork(live, server.get_connections(), number % 10 == 0))
    time.sleep(0.002)
report([os.waitpid(child, 0)[1] for child in children])
sys.stdin.read()
"""


@contextmanager
def load(url, directory):
    """Clients that come and go, and events, for as long as the block runs; their numbers are in the list."""
    over, numbers = threading.Event(), []

    def come_and_go():
        while not over.is_set():
            with RawClient(url):
                pass

    def produce():
        while not over.wait(0.001):
            assert queue_event(directory, "load", len(numbers))
            numbers.append(len(numbers))

    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(work) for work in (come_and_go, come_and_go, produce)]
        try:
            yield numbers
        finally:
            over.set()
        for call in calls:
            call.result(PATIENCE)


def test_forks_while_clients_come_and_events_flow(directory, tmp_path):
    """Fifty of them: no child finds a lock that is held or holds anything, and a client gets all, each event once."""
    with forking(FORKS_OFTEN, tmp_path, directory) as parent, reading(parent.url) as reader:
        with load(parent.url, directory) as numbers:
            eventually(lambda: len(reader.messages) > 100, what="events")
            tell(parent)
            assert reported(parent) == [0] * 50, parent.stderr_text()
        assert queue_event(directory, "e", "the end")
        eventually(lambda: "the end" in reader.messages[-1] or reader.error, what="the last event")
        received = [json.loads(message)["payload"] for message in reader.messages]
    assert received.count("from a child") == 50
    assert [payload for payload in received if payload != "from a child"] == [*numbers, "the end"]


FORKS_AMID_CHANGES = """
def take_turns():
    servers = [server, WebSocketServer(port=0, queue=directory)]
    servers[1].start(background=True)  # it stands by
    while not over.is_set():
        for each in servers:
            if each.is_running():
                each.stop()
                each.start(background=True)
        over.wait(0.01)
    for each in servers:
        each.stop()

def hold_no_lock():
    assert not [link for link in inherited() if "lock" in link], inherited()

listen()
over, statuses = threading.Event(), []
thread = threading.Thread(target=take_turns)
thread.start()
for _ in range(300):
    statuses.append(os.waitpid(fork(hold_no_lock), 0)[1])
over.set()
thread.join()
report(sorted(set(statuses)))
sys.stdin.read()
"""


def test_forks_while_a_server_stops_and_another_takes_over(directory, tmp_path):
    """At no moment of that does a child get the queue's lock, which would keep the next server out while it lives."""
    with forking(FORKS_AMID_CHANGES, tmp_path, directory) as parent:
        assert reported(parent) == [0], parent.stderr_text()
        assert "Error" not in parent.stderr_text()


OTHER_FORKS = """
def in_child():
    assert inherited() == [], inherited()

if __name__ == "__main__":
    listen()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=live, args=(server.get_connections(), True))
    child.start()
    child.join()
    with context.Pool(2) as pool:
        results = [pool.apply(len, ("four",)), pool.apply(inherited)]
    subprocess.run([sys.executable, "-c", "pass"], preexec_fn=in_child, check=True)
    report([child.exitcode, *results])
    sys.stdin.read()
"""


def test_multiprocessing_and_subprocesses(directory, tmp_path):
    """Children of the fork method live and end like any, workers of a pool too, and preexec_fn sees nothing of ours."""
    with forking(OTHER_FORKS, tmp_path, directory) as parent, RawClient(parent.url) as client:
        assert reported(parent) == [0, 4, []], parent.stderr_text()
        assert queue_event(directory, "e", "after")
        while client.payloads(1) != ["after"]:  # the children's
            pass


# ---- Signals -----------------------------------------------------------------------------------------------


def default_signals():
    """Whoever runs the tests may ignore them, as nohup does, and so would the server."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def serve(directory, *options, preexec_fn=default_signals):
    """`wsqueue serve` in a process of its own, that heeds signals."""
    with spawn_server("--queue", directory, *options, preexec_fn=preexec_fn) as server:
        yield server


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_mid_burst_cuts_between_events(directory, number):
    """Each client gets the same events and then 1001, status 0; what they did not get is queued, and served again."""
    count = 4000
    with serve(directory) as server, ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.url)) for _ in range(10)]
        producer = start_burst(directory, count, 1000)
        first = [client.payloads(100) for client in clients]
        server.process.send_signal(number)
        with ThreadPoolExecutor(len(clients)) as pool:
            rest = list(pool.map(payloads_to_the_goodbye, clients))
        assert server.process.wait(PATIENCE) == 0
        producer.join()
    sent = [payload[0] for payload in first[0] + rest[0]]
    assert all(begun + end == first[0] + rest[0] for begun, end in zip(first, rest))
    queued = [payload[0] for payload in payloads_of(directory)]
    assert sent + queued == [*range(count), "the end"] and queued
    with spawn_server("--queue", directory):
        all_is_sent(directory)


def payloads_to_the_goodbye(client):
    """What comes before the close frame, which must be 1001; the client then leaves."""
    payloads = []
    while True:
        opcode, data = client.read_frame()
        if opcode == CLOSE:
            break
        payloads.append(json.loads(data)["payload"])
    assert data[:2] == close_payload(1001)
    client.send_frame(CLOSE, close_payload(1001))
    assert client.ended()
    client.socket.close()
    return payloads


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_more_signals_while_it_stops_change_nothing(directory, number):
    """Who presses Ctrl-C twice gets the same clean end: 1001 for the clients, status 0, nothing but log lines."""
    with serve(directory, "--close-timeout", 1) as server, RawClient(server.url) as client:
        server.process.send_signal(number)
        assert client.close_code() == 1001
        for again in (signal.SIGINT, signal.SIGTERM) * 5:  # it waits for the client's answer
            server.process.send_signal(again)
        assert client.ended()
        while server.process.poll() is None:  # until it is gone
            server.process.send_signal(number)
        assert server.process.returncode == 0
        assert "Traceback" not in server.stderr_text()
    assert serving_process(directory) is None


def test_sighup_ends_a_server_without_tls(directory):
    """There is no certificate to read again: a terminal that closes ends it, as it ends any program."""
    with serve(directory) as server, RawClient(server.url) as client:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(PATIENCE) == -signal.SIGHUP
        with pytest.raises((EOFError, ConnectionError)):
            client.recv()
    assert serving_process(directory) is None


def ignore_signals():
    default_signals()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_a_signal_that_was_ignored_stays_ignored(directory):
    """A shell starts a job in the background with SIGINT ignored: a Ctrl-C for another program must not end it."""
    with serve(directory, preexec_fn=ignore_signals) as server, RawClient(server.url) as client:
        for number in range(3):
            server.process.send_signal(signal.SIGINT)
            assert queue_event(directory, "e", number)
            assert client.payloads(1) == [number]
        server.process.terminate()
        answer_goodbye(client)
        assert server.process.wait(PATIENCE) == 0


def test_a_client_that_does_not_answer_delays_the_end_and_no_more(directory):
    """Who answers is let go at once; who does not is cut off after close_timeout, and then the server has ended."""
    with serve(directory, "--close-timeout", 3) as server, ExitStack() as stack:
        mute, polite = (stack.enter_context(RawClient(server.url)) for _ in range(2))
        server.process.terminate()
        assert mute.close_code() == 1001
        answer_goodbye(polite)
        assert server.process.poll() is None, "it has not waited for the other"
        assert mute.ended()
        assert server.process.wait(PATIENCE / 3) == 0


# ---- What stop() leaves behind -----------------------------------------------------------------------------


def leave(client):
    """The client's side of a server that stops, to the end."""
    with client:
        answer_goodbye(client)


@pytest.fixture
def many_descriptors():
    """The soft limit is for programs of another age."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip(f"a hard limit of {hard} descriptors is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("nothing_is_left", "many_descriptors")
def test_stop_with_a_thousand_clients(directory):
    """Each has its 1001 and then the end of the stream, whether it answers or not."""
    with serving(queue=directory, close_timeout=2.0) as server, ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.url)) for _ in range(1000)]
        clients_arrived(server, 1000)
        with stopping(server):
            for client in clients[:500]:
                leave(client)
            for client in clients[500:]:
                assert client.close_code() == 1001 and client.ended()


def come_and_half_come(url, over):
    """Clients that connect and leave, and some that do not finish their request."""
    while not over.is_set():
        try:
            RawClient(url).socket.close()
            with open_socket(url) as half:
                half.sendall(handshake()[:50])
        except (OSError, EOFError, AssertionError):
            over.wait(0.001)


@contextmanager
def a_rush_to(server):
    """Clients come while the block runs."""
    with in_threads(come_and_half_come, server.url):
        eventually(lambda: server._totals.all()["connections_total"] > 20, what="clients")
        yield


@pytest.mark.usefixtures("nothing_is_left")
def test_stop_while_clients_come(directory):
    """Connections in whatever state of the handshake: each ends, and nothing of them stays."""
    for _ in range(10):
        with serving({"/": lambda conn: conn.send("welcome")}, queue=directory) as server:
            with a_rush_to(server):
                server.stop()
            assert server.get_connection_count() == 0 and is_free(port_of(server))


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("where", ["handlers", "callbacks"])
def test_stop_may_come_from_user_code_and_from_outside_at_once(directory, where):
    """Neither waits for the other for ever, and the server can be started again."""
    entered = threading.Event()

    def stop(conn, message=None):
        entered.set()
        server.stop()

    with serving(queue=directory, **{where: {"/": stop}}) as server:
        client, _ = enter(server)
        client.send("stop")
        assert entered.wait(PATIENCE)
        with stopping(server):
            leave(client)
        server.start(background=True)
        assert server.is_running()


@pytest.mark.usefixtures("nothing_is_left")
def test_a_start_that_fails_leaves_nothing(directory, monkeypatch):
    """Neither the port nor the lock, whatever goes wrong behind them."""

    def fail(*_):
        raise OSError("no more of anything")

    port = free_port()
    with monkeypatch.context() as patch:
        patch.setattr("wsqueue.selectors.DefaultSelector", fail)
        with pytest.raises(OSError, match="no more of anything"):
            WebSocketServer(port=port, queue=directory).start(background=True)
    assert is_free(port) and serving_process(directory) is None
