"""Section 9, the server: from a queue to every client, over real sockets and in real processes."""

import json
import logging
import os
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from brokers import free_port
from clients import (
    CLOSE,
    LIBRARIES,
    PATIENCE,
    TEXT,
    RawClient,
    Reader,
    client_frame,
    close_payload,
    enter,
    everybody_has_left,
    exchange,
    handshake,
    open_socket,
    parse_answer,
    read_to_end,
    serving,
    still_reaches,
)
from helpers import ROOT, TIME_UNIT, Server, eventually, put_in_the_way_of, spawn_server
from wsqueue import (
    EventError,
    QueueError,
    QueueInUseError,
    ServerError,
    SettingError,
    WebSocketServer,
    WorkerPool,
    queue_event,
    queue_events,
)

KIB = 1024


@pytest.fixture
def directory(tmp_path):
    """A queue directory that does not exist yet."""
    return str(tmp_path / "queue")


def ready_files(directory):
    return sorted(name for name in os.listdir(directory) if name.endswith(".json"))


def clients_arrived(server, count):
    eventually(lambda: server.get_connection_count() == count, what=f"{count} clients")


def errors_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


# ---- The main job ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
def test_clients_of_other_libraries_get_the_events_in_order(directory, library):
    """Each message is exactly {"event", "payload", "timestamp"}, as queued, and none is missing or out of place."""
    with serving(queue=directory) as server, LIBRARIES[library](server.url + "/any/path") as client:
        clients_arrived(server, 1)
        before = int(time.time())
        for number in range(50):
            assert queue_event(directory, f"event {number}", {"n": number, "text": "ü"}) is True
        received = [json.loads(client.recv()) for _ in range(50)]
    for number, message in enumerate(received):
        timestamp = message.pop("timestamp")
        assert type(timestamp) is int and before <= timestamp <= time.time()
        assert message == {"event": f"event {number}", "payload": {"n": number, "text": "ü"}}


@pytest.mark.parametrize("library", LIBRARIES)
def test_clients_of_other_libraries_can_talk(library):
    """Text and binary, from nothing to the largest length class, both ways; a clean end."""
    with serving(callbacks={"/": lambda conn, message: conn.send(message)}, max_message_bytes=KIB * KIB) as server:
        with LIBRARIES[library](server.url) as client:
            for size in (0, 1, 125, 126, 65535, 65536, 200_000):
                client.send("ä" * (size // 2))
                assert client.recv() == "ä" * (size // 2)
                client.send(bytes(size))
                assert client.recv() == bytes(size)
        everybody_has_left(server)


def test_every_client_gets_every_event(directory):
    """Clients of both libraries, on whatever path, get the same messages."""
    with serving(queue=directory) as server, ExitStack() as stack:
        paths = ("", "/a", "/b?x=1")
        clients = [stack.enter_context(use(server.url + path)) for use in LIBRARIES.values() for path in paths]
        clients_arrived(server, len(clients))
        assert queue_events(directory, [("e", number) for number in range(10)])
        received = [[client.recv() for _ in range(10)] for client in clients]
    assert [json.loads(message)["payload"] for message in received[0]] == list(range(10))
    assert received == received[:1] * len(clients)


def test_events_queued_before_the_start_are_sent_at_the_start(directory):
    """Who is connected by then gets them, which is nobody: they are gone, and what is queued later arrives."""
    for number in range(20):
        assert queue_event(directory, "early", number)
    with serving(queue=directory) as server:
        eventually(lambda: not ready_files(directory), what="an empty queue")
        with RawClient(server.url) as client:
            clients_arrived(server, 1)
            assert queue_event(directory, "late", 20)
            assert client.payloads(1) == [20]


def test_topics_reach_their_clients_only_and_keep_the_order(directory):
    """Between events for everyone and events for a topic, each client sees the order in which they were queued."""
    topics = (None, "/a", "/b", ["/a", "/b"], "/nobody", None)
    with serving(queue=directory) as server:
        with RawClient(server.url, "/a") as a, RawClient(server.url, "/b") as b, RawClient(server.url) as c:
            clients_arrived(server, 3)
            for number in range(120):
                assert queue_event(directory, "e", number, to=topics[number % 6])
            assert queue_event(directory, "e", "end")
            for client, kinds in ((a, {0, 1, 3, 5}), (b, {0, 2, 3, 5}), (c, {0, 5})):
                expected = [number for number in range(120) if number % 6 in kinds]
                assert client.payloads(len(expected) + 1) == [*expected, "end"]


def test_a_server_without_a_queue_broadcasts():
    """broadcast() needs no queue; what is not an event is the caller's error, and nothing is sent."""
    with serving() as server, RawClient(server.url) as client:
        for name, payload in (("", 1), (None, 1), ("e", {1: object()}), ("e", float("nan"))):
            with pytest.raises(EventError):
                server.broadcast(name, payload)
        assert still_reaches(server, client)


def test_the_server_knows_its_clients():
    """get_connections() and get_connection_count() say who is there; `url` where; is_running() whether."""
    with serving() as server:
        assert server.is_running() and server.get_connections() == []
        client, conn = enter(server, "/here")
        with client:
            assert conn.path == "/here" and server.get_connection_count() == 1
        everybody_has_left(server)
    assert not server.is_running()


def test_an_idle_client_costs_no_thread():
    """Once its handler has returned, a client has no thread of its own."""
    with serving({"/": lambda conn: conn.send("welcome")}) as server, ExitStack() as stack:
        before = threading.active_count()
        for client in [stack.enter_context(RawClient(server.url)) for _ in range(50)]:
            assert client.recv() == "welcome"
        eventually(lambda: threading.active_count() <= before, what="the handshake threads to end")
        assert server.get_connection_count() == 50


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


HOSTS = {"127.0.0.1": "ws://127.0.0.1:", "localhost": "ws://127.0.0.1:", "0.0.0.0": "ws://127.0.0.1:"}
if has_ipv6():
    HOSTS.update({"::1": "ws://[::1]:", "::": "ws://[::1]:"})


@pytest.mark.parametrize("host", HOSTS)
def test_the_url_is_one_that_a_client_on_this_machine_can_use(host):
    """Whatever address the server is bound to, `url` names one that can be connected to."""
    with serving(host=host) as server:
        assert server.url.startswith(HOSTS[host])
        with RawClient(server.url) as client:
            assert still_reaches(server, client)


# ---- The fluent interface ----------------------------------------------------------------------------------


def test_decorators_register_and_return_the_function():
    """@server.on and @server.on_message leave the function as it was."""
    server = WebSocketServer(port=0)

    @server.on("/chat")
    def greet(conn):
        conn.send("welcome")

    @server.on_message("/chat")
    def echo(conn, message):
        conn.send(message)

    assert callable(greet) and callable(echo)
    with server, RawClient(server.url, "/chat") as client:
        assert client.recv() == "welcome"
        client.send("hi")
        assert client.recv() == "hi"
        assert client.close() == 1000


@pytest.mark.parametrize("path", ["chat", "", None, 5])
def test_a_route_that_is_no_path_is_refused(path):
    """A handler that could never run is a mistake, and it is said which."""
    with pytest.raises(SettingError, match=repr(path)):
        WebSocketServer().on(path, print)


def test_the_application_is_kept_for_handlers():
    """What is passed as app is server.app."""
    app = object()
    assert WebSocketServer(app).app is app
    assert WebSocketServer().app is None


def test_the_static_queue_event_is_the_function():
    """WebSocketServer.queue_event is there for code that has the class in hand."""
    assert WebSocketServer.queue_event is queue_event


BAD_SETTINGS = {
    "colour": "blue",  # there is none
    "port": "8081",
    "host": 5,
    "wakeup": 1,
    "poll_interval": 0,
    "outbox_bytes": 1.5,
    "ping_timeout": float("nan"),
    "send_timeout": float("inf"),
    "max_event_bytes": -1,
    "handshake_timeout": None,
    "allowed_origins": "https://example.com",  # a str would be taken for a list of letters
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_setting_that_makes_no_sense_is_refused_by_name(name):
    """Unknown, of the wrong type, or out of range: SettingError says which setting it is."""
    with pytest.raises(SettingError, match=name):
        WebSocketServer(**{name: BAD_SETTINGS[name]})


@pytest.mark.parametrize("port", [-1, 65536, True, None])
def test_a_port_that_does_not_exist_is_refused(port):
    """port() refuses it, and a server that refused a value goes on with the one it had."""
    server = WebSocketServer(port=0)
    with pytest.raises(SettingError, match="port"):
        server.port(port)
    with server.host("127.0.0.1"), RawClient(server.url) as client:
        assert still_reaches(server, client)
        assert client.close() == 1000


def test_settings_cannot_be_changed_while_the_server_runs():
    """What would have no effect is refused."""
    with serving() as server:
        with pytest.raises(ServerError):
            server.port(0)
    server.port(0)


# ---- The reference's shape, as a program of its own --------------------------------------------------------

PROGRAM = """
import signal, sys, threading, time
from wsqueue import WebSocketServer

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it

class App:
    name = "shop"

def chat(conn):
    conn.send({"event": "welcome", "payload": WebSocketServer.get_instance().app.name})
    while conn.is_connected():
        conn.send(f"echo: {conn.recv()}")

def announce():
    while not server.is_running():
        time.sleep(0.01)
    print(f"listening on {server.url}", flush=True)

app = App()
server = (WebSocketServer.get_instance(app)
    .host("127.0.0.1")
    .port(0)
    .event_queue(sys.argv[1])
    .on("/chat", chat)
    .on("/broadcast", lambda conn: None))
assert server is WebSocketServer.get_instance() and server.app is app
threading.Thread(target=announce, daemon=True).start()
server.start()
print("start() has returned", flush=True)
"""


@contextmanager
def program(source, output, *args):
    """A Python program that prints where it listens; killed when the block ends."""
    output.mkdir()
    with open(str(output / "stdout"), "wb") as out, open(str(output / "stderr"), "wb") as err:
        process = subprocess.Popen([sys.executable, "-c", source, *args], cwd=str(ROOT), stdout=out, stderr=err)
    server = Server(process, output)
    try:
        server.wait_until_it_listens()
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_references_program_serves_until_a_signal(directory, tmp_path, number):
    """The chain, a handler that stays, the static queue_event; SIGTERM or SIGINT: 1001 for the clients, status 0."""
    with program(PROGRAM, tmp_path / "output", directory) as server:
        with RawClient(server.url, "/chat") as chat, RawClient(server.url, "/broadcast") as other:
            assert chat.events(1)[0]["payload"] == "shop"
            chat.send("hi")
            assert chat.recv() == "echo: hi"
            assert WebSocketServer.queue_event(directory, "order_paid", {"id": 42})
            for client in (chat, other):
                assert client.payloads(1) == [{"id": 42}]
            server.process.send_signal(number)
            answer_goodbye(chat)
            answer_goodbye(other)
        assert server.process.wait(PATIENCE) == 0
        assert "start() has returned" in server.stdout_text()
        assert server.stderr_text() == ""


def test_a_signal_does_not_wait_for_clients_that_do_not_answer(directory):
    """close_timeout is all that a client gets; the program ends with status 0 all the same."""
    with spawn_server("--queue", directory, "--close-timeout", "0.2") as server, RawClient(server.url):
        server.process.terminate()
        assert server.process.wait(PATIENCE / 3) == 0


@contextmanager
def asleep(process):
    """The process sees what happens in the block all at once, afterwards."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    yield
    process.send_signal(signal.SIGCONT)


def test_a_signal_that_another_thread_receives_stops_the_server(directory):
    """Right after it was stopped and continued, the kernel gives a signal to any thread; it must end all the same."""
    with spawn_server("--queue", directory) as server:
        with asleep(server.process):
            pass
        server.process.terminate()
        assert server.process.wait(PATIENCE / 3) == 0


# ---- Start and stop ----------------------------------------------------------------------------------------


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def nothing_is_left():
    """No thread of the server and no descriptor; for tests that start and stop one."""
    before = descriptors()
    yield
    eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("wsqueue")], what="no thread")
    eventually(lambda: descriptors() <= before, what=f"{before} descriptors instead of {descriptors()}")


def port_of(server):
    return int(server.url.rpartition(":")[2])


def is_free(port):
    """Whether the port can be listened on, as a server would."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
            sock.listen(1)
        except OSError:
            return False
    return True


def refuses(port):
    """Whether nobody listens on the port."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


@contextmanager
def stopping(server):
    """stop() in a thread, so that its clients can be seen meanwhile; it returns before the block is left."""
    thread = threading.Thread(target=server.stop)
    thread.start()
    yield
    thread.join(PATIENCE)
    assert not thread.is_alive() and not server.is_running()


def answer_goodbye(client):
    """The client's side of a server that stops."""
    assert client.close_code() == 1001
    client.send_frame(CLOSE, close_payload(1001))
    assert client.ended()


@pytest.mark.usefixtures("nothing_is_left")
def test_stop_says_goodbye_and_frees_everything(directory):
    """After stop() the clients have 1001, the port and the queue are free, and no client is left."""
    with serving(queue=directory) as server, RawClient(server.url) as client:
        clients_arrived(server, 1)
        with stopping(server):
            answer_goodbye(client)
        assert server.get_connections() == [] and is_free(port_of(server))
        with serving(queue=directory) as successor:
            assert successor.is_running()


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("path", ["/idle", "/stays"])
def test_stop_waits_for_the_clients_answer(path):
    """Between its close frame and the client's, the server keeps the stream open, whether a handler runs or not."""
    with serving({"/stays": lambda conn: conn.recv()}, close_timeout=5.0) as server:
        with RawClient(server.url, path) as client:
            clients_arrived(server, 1)
            with stopping(server):
                assert client.close_code() == 1001
                client.socket.settimeout(0.3)
                with pytest.raises(socket.timeout):
                    client.socket.recv(1)
                client.socket.settimeout(PATIENCE)
                client.send_frame(CLOSE, close_payload(1001))
                assert client.ended()


@pytest.mark.usefixtures("nothing_is_left")
def test_stop_may_be_called_at_any_time_and_any_number_of_times():
    """Before start, from many threads at once, and again: each call returns once the server has stopped."""
    server = WebSocketServer(port=0)
    server.stop()
    server.start(background=True)
    port, done = port_of(server), []

    def stop():
        server.stop()
        done.append(refuses(port))

    with RawClient(server.url) as client:
        threads = [threading.Thread(target=stop) for _ in range(5)]
        for thread in threads:
            thread.start()
        assert client.close_code() == 1001
        assert done == []  # the client has not answered yet
        client.send_frame(CLOSE, close_payload(1001))
    for thread in threads:
        thread.join(PATIENCE)
    server.stop()
    assert done == [True] * 5


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("where", ["handlers", "callbacks"])
def test_stop_may_be_called_by_user_code(directory, where):
    """From a handler or a callback it stops the server all the same, and a blocking start() returns."""
    server = WebSocketServer(port=0, queue=directory, close_timeout=1.0)
    server.on("/", lambda conn: server.stop() if where == "handlers" else None)
    server.on_message("/", lambda conn, message: server.stop())
    blocked = threading.Thread(target=server.start)
    blocked.start()
    try:
        eventually(server.is_running)
        with RawClient(server.url) as client:
            client.send("stop")
            answer_goodbye(client)
        blocked.join(PATIENCE)
        assert not blocked.is_alive() and not server.is_running()
    finally:
        server.stop()


STOPPED_BY_A_HANDLER = """
import signal, time
from wsqueue import WebSocketServer

server = WebSocketServer(port=0, close_timeout=1.0)
signal.signal(signal.SIGTERM, lambda *_: server.stop())
server.start(background=True)
print(f"listening on {server.url}", flush=True)
while server.is_running():
    time.sleep(0.01)
print("stopped", flush=True)
"""


def test_stop_may_interrupt_itself(tmp_path):
    """A host's signal handler calls it, and the signal comes again: the second call has nothing to wait for."""
    with program(STOPPED_BY_A_HANDLER, tmp_path / "output") as server, RawClient(server.url) as client:
        server.process.send_signal(signal.SIGTERM)
        assert client.close_code() == 1001
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: "stopped" in server.stdout_text(), what="the end of stop()")


def test_stop_that_is_broken_off_does_not_stay_half_way(monkeypatch):
    """Ctrl-C while it waits: the server counts as stopped, and can be started again."""
    def interrupt(_):
        raise KeyboardInterrupt

    with serving() as server:
        with monkeypatch.context() as patch:
            patch.setattr(server, "_join", interrupt)
            with pytest.raises(KeyboardInterrupt):
                server.stop()
        server._io.stop(0.0)  # what was broken off
        server.stop()
        server.start(background=True)
        assert server.is_running()


@pytest.mark.usefixtures("nothing_is_left")
def test_stop_ends_handlers_that_wait():
    """A handler in recv() ends, whether its client answers the close or not."""
    ended = []

    def handler(conn):
        ended.extend(conn)
        ended.append("end")

    with serving({"/": handler}, close_timeout=0.3) as server, RawClient(server.url), RawClient(server.url) as talker:
        talker.send("hi")
        eventually(lambda: ended == ["hi"])
        server.stop()
        assert ended == ["hi", "end", "end"]


@pytest.mark.usefixtures("nothing_is_left")
def test_stop_does_not_wait_for_a_connection_that_says_nothing():
    """A handshake that has not begun is broken off, long before handshake_timeout."""
    with serving(handshake_timeout=3600.0) as server:
        with open_socket(server.url) as silent:
            with RawClient(server.url) as client:  # accepted after it, so that it has been accepted
                assert still_reaches(server, client)
                assert client.close() == 1000
            server.stop()
            assert silent.recv(1000)[:5] in (b"", b"HTTP/")


@pytest.mark.usefixtures("nothing_is_left")
def test_stop_sends_what_waits_first():
    """Who reads gets everything that was broadcast before stop(), and then the close frame."""
    count = 40
    with serving(outbox_bytes=64 * KIB * KIB, close_timeout=5.0) as server:
        with RawClient(server.url, receive_buffer=4 * KIB) as client:
            clients_arrived(server, 1)
            for number in range(count):
                server.broadcast("big", [number, "x" * 100 * KIB])
            with stopping(server):
                assert [number for number, _ in client.payloads(count)] == list(range(count))
                answer_goodbye(client)


@pytest.mark.usefixtures("nothing_is_left")
def test_a_server_can_be_started_again(directory):
    """After stop(), start() serves again, the same routes and the same queue."""
    server = WebSocketServer(port=0, queue=directory, close_timeout=1.0)
    server.on("/", lambda conn: conn.send("welcome"))
    for number in range(3):
        with server, RawClient(server.url) as client:
            assert client.recv() == "welcome"
            assert queue_event(directory, "e", number)
            assert client.payloads(1) == [number]
            assert client.close() == 1000


@pytest.mark.usefixtures("nothing_is_left")
def test_a_second_start_is_refused():
    """A server that runs cannot be started, and goes on running."""
    with serving() as server, RawClient(server.url) as client:
        with pytest.raises(ServerError):
            server.start(background=True)
        assert still_reaches(server, client)


@pytest.mark.usefixtures("nothing_is_left")
def test_a_port_that_is_taken_is_named():
    """ServerError says which port; once it is free, the same server starts."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        server = WebSocketServer(host="127.0.0.1", port=port)
        with pytest.raises(ServerError, match=f"127.0.0.1 port {port}"):
            server.start(background=True)
        assert not server.is_running()
    with server:
        assert port_of(server) == port


@pytest.mark.usefixtures("nothing_is_left")
def test_a_host_that_is_not_ours_is_named():
    """An address that cannot be listened on is a ServerError as well."""
    with pytest.raises(ServerError, match=r"192\.0\.2\.1"):
        WebSocketServer(host="192.0.2.1", port=0).start(background=True)


@pytest.mark.usefixtures("nothing_is_left")
def test_a_queue_that_another_process_serves_is_refused(directory):
    """start() raises QueueInUseError, which names the other process; the port is free again, and the other goes on."""
    port = free_port()
    with spawn_server("--queue", directory) as other:
        with pytest.raises(QueueInUseError, match=rf"\b{other.pid}\b"):
            WebSocketServer(port=port, queue=directory).start()
        assert is_free(port)
        with RawClient(other.url) as client:
            assert queue_event(directory, "e", 1)
            assert client.payloads(1) == [1]
            assert client.close() == 1000


@pytest.mark.usefixtures("nothing_is_left")
def test_a_queue_that_cannot_be_is_refused(tmp_path):
    """A file where the directory should be: QueueError names it, and the port is free again."""
    port, path = free_port(), tmp_path / "file"
    path.write_text("")
    with pytest.raises(QueueError, match=str(path)):
        WebSocketServer(port=port, queue=str(path)).start(background=True)
    assert is_free(port)


# ---- The package underneath --------------------------------------------------------------------------------


def run_python(source, *args):
    command = [sys.executable, "-W", "error", "-c", source, *args]
    return subprocess.run(command, cwd=str(ROOT), capture_output=True, encoding="utf-8", timeout=30 * TIME_UNIT)


MISSING = """
import sys
sys.modules["websocket_server"] = None  # an import of it fails
import wsqueue
assert wsqueue.queue_event(sys.argv[1], "e")  # a producer needs nothing
sys.exit(wsqueue.main(["serve", "--port", "0", "--queue", sys.argv[1]]))
"""


def test_without_the_package_a_server_says_how_to_install_it(directory):
    """The last line has the command, and there is no traceback; the queued event stays."""
    done = run_python(MISSING, directory)
    assert done.returncode == 1 and done.stdout == ""
    assert "pip install websocket-server" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert len(ready_files(directory)) == 1


LOGGING = """
import logging, sys
root = logging.getLogger()
if sys.argv[1:]:
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
before = (root.level, list(root.handlers))
import wsqueue
with wsqueue.WebSocketServer(port=0):
    assert "websocket_server" in sys.modules
    assert (root.level, list(root.handlers)) == before, root.handlers
assert (root.level, list(root.handlers)) == before, root.handlers
"""


@pytest.mark.parametrize("arguments", [(), ("configured",)])
def test_the_hosts_logging_is_left_alone(arguments):
    """The package configures logging when it is imported; the host's root logger comes out as it was."""
    done = run_python(LOGGING, *arguments)
    assert (done.returncode, done.stderr) == (0, "")


# ---- Requests that are no handshake ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """One server for all whose request is refused."""
    with serving() as server:
        yield server


@pytest.fixture
def witness(server):
    """A client that is there while somebody else misbehaves, and is served afterwards, like everyone who comes."""
    with RawClient(server.url) as client:
        yield client
        assert still_reaches(server, client)
        with RawClient(server.url) as newcomer:
            assert still_reaches(server, newcomer)


REFUSED = {
    "no upgrade": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 426),
    "upgrade to something else": (handshake(Upgrade="h2c"), 426),
    "upgrade without Connection": (handshake(Connection="keep-alive"), 426),
    "POST": (b"POST /e HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 405),
    "HEAD": (b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    "no version": (handshake(Sec_WebSocket_Version=None), 426),
    "version 8": (handshake(Sec_WebSocket_Version="8"), 426),
    "no key": (handshake(Sec_WebSocket_Key=None), 400),
    "short key": (handshake(Sec_WebSocket_Key="c2hvcnQ="), 400),
    "key that is not base64": (handshake(Sec_WebSocket_Key="!" * 22 + "=="), 400),
    "foreign origin": (handshake(Origin="http://evil.example"), 403),
    "origin, and a Host that is none": (handshake(Origin="http://x", Host="[::1"), 403),
    "an image's source": (handshake(Sec_Fetch_Mode="no-cors"), 403),
    "words": (b"hello there, server\r\n\r\n", 400),
    "binary": (bytes(range(1, 200)), 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400),
    "header without colon": (b"GET / HTTP/1.1\r\nnonsense\r\n\r\n", 400),
    "folded header": (b"GET / HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n", 400),
    "target that is none": (b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "1 MB of headers": (handshake()[:-2] + b"X-Filler: " + b"x" * KIB * KIB + b"\r\n\r\n", 431),
    "1 MB in many headers": (handshake()[:-2] + b"X-Filler: xxxxxxxxxxxxxxxxxxxxx\r\n" * 32 * KIB + b"\r\n", 431),
    "1 MB of target": (b"GET /" + b"x" * KIB * KIB + b" HTTP/1.1\r\n\r\n", 431),
}


@pytest.mark.usefixtures("witness")
@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_is_no_handshake_is_answered(server, name, caplog):
    """An HTTP error that the client can read, with a sentence; nothing in the log above INFO; others are served."""
    request, status = REFUSED[name]
    answer = exchange(server.url, request)
    assert answer.status == status
    assert answer.headers["content-type"].startswith("text/plain")
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert answer.body.strip()[-1] in ".?" and len(answer.body.split()) > 4
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


@pytest.mark.parametrize(
    "name, header, value",
    [
        ("POST", "allow", "GET"),
        ("no upgrade", "upgrade", "websocket"),
        ("version 8", "sec-websocket-version", "13"),
        ("no version", "sec-websocket-version", "13"),
    ],
)
def test_an_answer_has_the_header_that_says_what_to_do(server, name, header, value):
    """405 has Allow, 426 has Upgrade, and a wrong version learns the right one (RFC 6455, section 4.4)."""
    assert exchange(server.url, REFUSED[name][0]).headers[header] == value


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost:"])
def test_a_connection_that_sends_no_request_is_ended(begun, caplog):
    """After handshake_timeout it is told 408, however much of a request came; others connect meanwhile."""
    with serving(handshake_timeout=0.3) as server, open_socket(server.url) as silent:
        silent.sendall(begun)
        with RawClient(server.url) as client:
            assert still_reaches(server, client)
            assert parse_answer(read_to_end(silent)).status == 408
            assert still_reaches(server, client)
    assert errors_of(caplog) == []


def test_a_request_that_trickles_in_is_ended():
    """The deadline is for the whole request: bytes now and then do not extend it."""
    with serving(handshake_timeout=0.5) as server, open_socket(server.url) as slow:
        slow.settimeout(0.05)
        deadline = time.monotonic() + PATIENCE
        answer = b""
        while not answer and time.monotonic() < deadline:
            slow.sendall(b"G")
            try:
                answer = slow.recv(1000)
            except socket.timeout:
                continue
        assert parse_answer(answer).status == 408


def test_connections_that_vanish_during_the_handshake_are_no_matter(server, witness, caplog):
    """A port scan leaves no trace above INFO."""
    for _ in range(20):
        with open_socket(server.url) as sock:
            sock.sendall(b"GET / HT")
    for _ in range(20):
        with open_socket(server.url) as sock:
            sock.sendall(handshake())
    clients_arrived(server, 1)
    assert still_reaches(server, witness)
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


# ---- Origins -----------------------------------------------------------------------------------------------

PAGE = "https://shop.example"
OWN_PAGES = [
    ("127.0.0.1:8081", "http://127.0.0.1:3000"),
    ("shop.example", "https://shop.example"),
    ("shop.example:8081", "https://shop.example:8443"),
    ("Shop.Example:8081", "https://shop.example"),
    ("[::1]:8081", "http://[::1]:3000"),
]
FOREIGN_PAGES = ["http://evil.example", "null", "file://", "http://127.0.0.1.evil.example", "http://[", "nonsense", ""]


@pytest.mark.parametrize("host, origin", OWN_PAGES)
def test_pages_of_the_servers_own_host_may_connect(server, host, origin):
    """The same host name on any port is the same operator's; no Origin at all is not a browser."""
    with RawClient(server.url, Host=host, Origin=origin) as client:
        assert still_reaches(server, client)


@pytest.mark.parametrize("origin", FOREIGN_PAGES)
def test_pages_of_other_hosts_may_not(server, origin):
    """403, and the sentence says which page it was and which setting would let it in."""
    answer = exchange(server.url, handshake(Origin=origin))
    assert answer.status == 403
    assert origin in answer.body and "allowed_origins" in answer.body


def test_allowed_origins_lets_these_pages_in_and_no_others():
    """The setting adds pages, exactly as a browser names them; the server's own host stays allowed."""
    with serving(allowed_origins=[PAGE]) as server:
        for origin in (PAGE, "http://127.0.0.1:3000", None):
            with RawClient(server.url, Origin=origin) as client:
                assert still_reaches(server, client)
        for origin in ("http://shop.example", PAGE + ":8443", PAGE + ".evil.example", "https://sub.shop.example"):
            assert exchange(server.url, handshake(Origin=origin)).status == 403


def test_a_star_lets_every_page_in():
    """allowed_origins=("*",) turns the check off."""
    with serving(allowed_origins=("*",)) as server:
        for origin in ("http://evil.example", "null"):
            with RawClient(server.url, Origin=origin) as client:
                assert still_reaches(server, client)


# ---- Storms and bursts -------------------------------------------------------------------------------------


def test_an_event_that_meets_a_handshake_comes_behind_the_101(monkeypatch):
    """Who is known to the server has its 101 in front of all that is broadcast from that moment on."""
    with serving() as server:
        add = server.registry.add

        def add_and_broadcast(conn, topics, **how):
            add(conn, topics, **how)
            server.broadcast("at once", 1)

        monkeypatch.setattr(server.registry, "add", add_and_broadcast)
        with RawClient(server.url) as client:
            assert client.payloads(1) == [1]


@pytest.fixture
def frequent_switches():
    """Threads take turns so often that what can come between two steps does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("frequent_switches")
def test_a_client_that_comes_in_a_storm_gets_the_101_first():
    """First the answer to the handshake, then whole frames only, and from the first one on none is missing."""
    stop = threading.Event()

    def storm(server):
        number = 0
        while not stop.is_set():
            server.broadcast("storm", number)
            number += 1

    with serving() as server:
        storming = threading.Thread(target=storm, args=(server,))
        storming.start()
        try:
            for _ in range(100):
                with RawClient(server.url) as client:
                    payloads = client.payloads(10)
                    assert payloads == list(range(payloads[0], payloads[0] + 10))
        finally:
            stop.set()
            storming.join()


def read_until(clients, end, pause=0.0):
    """Let all clients receive, side by side, until the last thing that each has got is `end`."""
    tails = dict.fromkeys(clients, b"")
    deadline = time.monotonic() + 3 * PATIENCE
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
        while selector.get_map():
            assert time.monotonic() < deadline, f"{len(selector.get_map())} clients lack the end"
            for key, _ in selector.select(1.0):
                client = key.data
                tails[client] = (tails[client] + client.read_more())[-200:]
                if end in tails[client]:
                    selector.unregister(client.socket)
                time.sleep(pause)


def start_burst(directory, count, size):
    """Queue a burst of numbered events, and one that says it is over, while the caller does something else."""

    def produce():
        for number in range(count):
            assert queue_event(directory, "burst", [number, "x" * size])
        assert queue_event(directory, "burst", ["the end"])

    producer = threading.Thread(target=produce)
    producer.start()
    return producer


def test_a_burst_reaches_every_client_that_reads(directory, caplog):
    """3,000 events, more than any buffer holds, to 30 clients: complete, in order, and nobody is disconnected."""
    count, readers = 3000, 30
    with serving(queue=directory, outbox_bytes=256 * KIB) as server, ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.url, receive_buffer=32 * KIB)) for _ in range(readers)]
        clients_arrived(server, readers)
        producer = start_burst(directory, count, 3 * KIB)  # of 9 MB the kernel may take 4, for each client
        read_until(clients, b'"the end"', pause=0.0002)  # slower than the server sends
        producer.join()
        assert server.get_connection_count() == readers
        for client in clients:
            assert [payload[0] for payload in client.payloads(count)] == list(range(count))
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


def test_a_burst_reaches_a_client_that_reads_slower_than_the_others(directory):
    """Who reads all the time, 2 MB a second, is not disconnected, though the others are done long before."""
    count, size = 6000, 2 * KIB
    with spawn_server("--queue", directory) as server, ExitStack() as stack:
        fast = [stack.enter_context(RawClient(server.url)) for _ in range(20)]
        slow = Reader(stack.enter_context(RawClient(server.url, receive_buffer=64 * KIB)), count, pause=0.0008)
        producer = start_burst(directory, count, size)
        read_until(fast, b'"the end"')
        producer.join()
        assert [payload[0] for payload in slow.payloads()] == list(range(count))


def move_events(source, target):
    """As any producer may: a rename puts an event into a queue."""
    os.makedirs(target, exist_ok=True)
    for name in ready_files(source):
        os.rename(f"{source}/{name}", f"{target}/{name}")


def queue_numbers(directory, start, end):
    """Queue numbered events of 2 KB until end(number); returns the number that comes next."""
    number = start
    while not end(number):
        assert queue_event(directory, "burst", [number, "x" * 2 * KIB])
        number += 1
    return number


@pytest.mark.parametrize("pause, least", [(0.0, 0), (0.001, 5000)], ids=["fast", "slow"])
def test_a_kill_in_the_middle_of_a_burst_loses_nothing(directory, tmp_path, pause, least):
    """What was not sent is still queued: over two runs a client sees every event at least once, and in order."""
    aside = str(tmp_path / "aside")
    with spawn_server("--queue", directory) as first, RawClient(first.url, receive_buffer=64 * KIB) as client:
        reader = Reader(client, pause=pause)
        count = queue_numbers(directory, 0, lambda number: number >= least and len(reader.messages) > 300)
        first.process.kill()
        first.process.wait()
        before = [number for number, _ in reader.payloads()]
    count = queue_numbers(directory, count, lambda number: number == count + 50)
    move_events(directory, aside)  # until the client is back: a server sends to who is connected
    with spawn_server("--queue", directory) as second, RawClient(second.url) as client:
        with asleep(second.process):
            move_events(aside, directory)
            assert queue_event(directory, "burst", ["the end"])
        read_until([client], b'"the end"')
        after = [payload[0] for payload in iter(lambda: client.payloads(1)[0], ["the end"])]
    assert before == list(range(len(before)))
    assert after == list(range(count))[count - len(after) :]
    assert len(before) + len(after) >= count


# ---- A queue directory that does not stay ------------------------------------------------------------------


def is_served_from(directory, client, payload):
    """Whether an event that is queued there now reaches the client."""
    assert queue_event(directory, "e", payload)
    return client.payloads(1) == [payload]


def test_a_queue_directory_may_vanish_and_come_back(directory, caplog):
    """Removed or renamed while serving: the clients stay, and what is queued under the old name arrives."""
    with serving(queue=directory) as server, RawClient(server.url) as client:
        assert is_served_from(directory, client, 1)
        shutil.rmtree(directory, ignore_errors=True)  # the server removes what it has sent at the same time
        assert is_served_from(directory, client, 2)
        os.rename(directory, directory + ".old")
        assert is_served_from(directory, client, 3)
    assert errors_of(caplog) == []


def test_a_queue_directory_that_cannot_be_used_for_a_while_is_waited_for(directory, caplog):
    """The trouble is logged once and not at every poll; broadcasts go on, and once it is over the queue does."""
    with serving(queue=directory, poll_interval=0.01) as server, RawClient(server.url) as client:
        assert is_served_from(directory, client, 1)
        put_in_the_way_of(directory)
        eventually(lambda: errors_of(caplog), what="a line in the log")
        assert still_reaches(server, client)
        os.unlink(directory)
        assert is_served_from(directory, client, 2)
    assert len(errors_of(caplog)) == 1 and directory in errors_of(caplog)[0]


# ---- A process that has no more threads --------------------------------------------------------------------


def test_callbacks_go_on_once_threads_can_be_started_again(monkeypatch):
    """Whose message could not be worked on is disconnected; nobody's message is lost without a word, then or later."""
    with serving(callbacks={"/": lambda conn, message: conn.send(message)}) as server:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no more")))
            for _ in range(20):
                with RawClient(server.url) as client:
                    client.send("unlucky")
                    assert client.ended()
        with RawClient(server.url) as client:
            client.send("lucky")
            assert client.recv() == "lucky"


def test_a_client_without_a_thread_for_its_handler_is_told_so(monkeypatch, caplog):
    """1011, and a line in the log; the next one is served."""
    def scarce(thread, start=threading.Thread.start):
        if thread.name == "wsqueue-handler":
            raise RuntimeError("can't start new thread")
        start(thread)

    with serving({"/": lambda conn: conn.send("welcome")}) as server:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", scarce)
            with RawClient(server.url) as client:
                assert client.read_close() == (1011, "the server is overloaded")
        with RawClient(server.url) as client:
            assert client.recv() == "welcome"
    assert [error for error in errors_of(caplog) if "no thread" not in error] == []


def test_work_that_fails_ends_no_thread_of_a_pool(caplog):
    """Not even what asks the interpreter to end: the next piece of work is done by the same thread."""
    pool, done = WorkerPool("wsqueue-test"), threading.Event()
    pool.submit(sys.exit, 1)
    pool.submit(done.set)
    eventually(done.is_set, what="the work behind it")
    for thread in pool.stop():
        thread.join()
    (error,) = errors_of(caplog)
    assert "failed" in error


def test_a_pool_goes_on_with_the_threads_that_it_has(monkeypatch):
    """Where the process may have no more, work waits for those."""
    pool, done = WorkerPool("wsqueue-test"), threading.Event()
    pool.submit(int)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no more")))
        pool.submit(done.set)
    eventually(done.is_set, what="the work")
    (thread,) = pool.stop()
    thread.join()


def test_a_disk_that_hangs_does_not_keep_a_server_from_its_end(directory):
    """Whoever writes to the history just then is waited for as long as clients are, and no longer."""
    with serving(queue=directory, close_timeout=0.1) as server, ThreadPoolExecutor(1) as pool, server._sending:
        pool.submit(server.stop).result(PATIENCE)
        assert not server.is_running()


FORKING_HANDLER = """
import multiprocessing, sys, time
from wsqueue import WebSocketServer

def handler(conn):
    for _ in range(2):  # what the first one leaves blocked, the second one inherits
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join()
        conn.send(str(child.exitcode))

server = WebSocketServer(port=0).on("/", handler)
server.start(ready=lambda: print(f"listening on {server.url}", flush=True))
"""


def test_a_child_of_a_handler_dies_of_signals_as_any_process_does(tmp_path):
    """What start() does with SIGTERM is for the process that serves, which goes on with that."""
    with program(FORKING_HANDLER, tmp_path / "output") as server:
        with RawClient(server.url) as client:
            assert [client.recv() for _ in range(2)] == [str(-signal.SIGTERM)] * 2
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0


# ---- What strangers may try --------------------------------------------------------------------------------


@pytest.mark.parametrize("number, status", [(95, 101), (96, 431)])
def test_the_number_of_header_lines_is_limited(server, number, status):
    """A head of 16 KiB may be thousands of lines, and each costs time: a hundred are allowed."""
    request = handshake()[:-2] + b"".join(b"X-%d: 1\r\n" % index for index in range(number)) + b"\r\n"
    with open_socket(server.url) as sock:
        sock.sendall(request)
        assert int(sock.recv(1000).split()[1]) == status


@pytest.mark.parametrize("target", ["user:42", "user%3A42", "x:user:42", "admins"])
def test_a_path_cannot_name_a_topic_that_only_handlers_grant(target):
    """A target without a leading slash is refused: as a topic it would let anybody listen to any user."""
    with serving() as server, RawClient(server.url) as good:
        assert exchange(server.url, handshake(target))[0] == 400
        assert server.registry.audience((target.replace("%3A", ":"),)) == []
        assert still_reaches(server, good)


def test_a_second_blocking_start_leaves_the_first_alone():
    """What could not start has nothing to stop."""
    with serving() as server, RawClient(server.url) as client:
        with pytest.raises(ServerError):
            server.start()
        assert server.is_running() and still_reaches(server, client)


def test_a_bare_line_feed_cannot_smuggle_a_header():
    """RFC 9112, section 2.2: a proxy may have read the same bytes as another request."""
    request = handshake("/").replace(b"\r\n\r\n", b"\r\nX-A: 1\nX-B: 2\r\n\r\n")
    with serving() as server:
        assert exchange(server.url, request)[0] == 400


def test_a_request_that_drips_ends_at_its_deadline():
    """However many bytes come, and however often: handshake_timeout is for the whole head."""
    done = threading.Event()
    with serving(handshake_timeout=0.3) as server, open_socket(server.url) as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: ")

        def drip():
            while not done.wait(0.0005):
                try:
                    client.send(b"x")
                except OSError:
                    return

        threading.Thread(target=drip, daemon=True).start()
        try:
            answer = client.recv(100)
        finally:
            done.set()
    assert answer.split()[1] == b"408"


def test_a_callback_that_calls_exit_ends_nothing_but_its_connection(caplog):
    """SystemExit would end the callback's thread without a word, and there are only so many of them."""
    with serving() as server:
        server.on_message("/exit", lambda conn, message: sys.exit(message))
        server.on_message("/echo", lambda conn, message: conn.send(message))
        for _ in range(20):
            with RawClient(server.url, "/exit") as client:
                client.send("bye")
                client.read_more()  # the close frame
        with RawClient(server.url, "/echo") as client:
            client.send("still here")
            assert client.recv() == "still here"


def test_what_comes_with_the_request_is_parsed_once_while_broadcasts_run():
    """Half a frame behind the request, half later, and events in between: the message arrives whole, once."""
    received, done = [], threading.Event()
    with serving() as server:
        server.on_message("/c", lambda conn, message: received.append(message))

        def storm():
            while not done.is_set():
                server.broadcast("tick")

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            frame = client_frame(TEXT, b"0123456789")
            for count in range(1, 51):
                with RawClient(server.url, "/c", behind=frame[:5]) as client:
                    client.socket.sendall(frame[5:])
                    eventually(lambda: len(received) >= count, what="the message")  # noqa: B023
        finally:
            done.set()
            thread.join()
    assert received == ["0123456789"] * 50


def test_a_path_cannot_forge_a_line_of_the_log(caplog):
    """A line break in a path is shown, not printed."""
    with serving(outbox_bytes=KIB, send_timeout=0.1) as server:
        with RawClient(server.url, "/x%0Aforged", receive_buffer=4 * KIB):
            eventually(lambda: server.broadcast("e", "x" * 64 * KIB) or server.get_connection_count() == 0)
    assert not any("\n" in record.getMessage() for record in caplog.records)


def test_idle_clients_cannot_take_the_descriptors_that_the_queue_needs(directory):
    """Who comes when few are left is turned away; who is connected goes on receiving what is queued."""
    few = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))}
    with spawn_server("--queue", directory, **few) as server, RawClient(server.url) as first, ExitStack() as stack:
        for _ in range(64):
            sock = stack.enter_context(open_socket(server.url))
            sock.sendall(handshake("/"))
        eventually(lambda: "too many clients" in server.stderr_text(), what="somebody to be turned away")
        assert queue_event(directory, "e", 1)
        assert first.payloads(1) == [1]
