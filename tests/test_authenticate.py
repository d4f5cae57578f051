"""Section 10, authenticate(): who a check of the user's own lets in, as whom, and what others notice of it."""

import asyncio
import logging
import os
import signal
import socket
import struct
import threading
from collections import Counter
from contextlib import ExitStack, suppress
from urllib.parse import quote

import pytest

import wsqueue
from clients import (
    PATIENCE,
    TEXT,
    RawClient,
    client_frame,
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
from helpers import eventually, spelled
from test_tls import TRUSTING, SecureClient, write_certificate
from wsqueue import CALLBACK_THREADS, WebSocketServer, sign_ticket

MIB = 1024 * 1024
SECRET = "a secret of a test, which is long enough for PyJWT"
FOR_EVER = 3600.0


def guarded(check, handlers=None, callbacks=None, **settings):
    """A started server that asks check(request) whom to let in."""
    return serving(handlers, callbacks, check, **settings)


class Gate:
    """A check that takes as long as the test wants it to, for paths that start with /slow."""

    def __init__(self, verdict=True):
        self.verdict = verdict
        self.asked = []
        self._open = threading.Event()

    def __call__(self, request):
        self.asked.append(request.path)
        if request.path.startswith("/slow"):
            assert self._open.wait(PATIENCE)
        return self.verdict

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open()

    def open(self):
        self._open.set()

    def wait_for(self, count):
        eventually(lambda: len(self.asked) >= count, what=f"{count} checks; {len(self.asked)} have begun")


def knock(server, target="/", behind=b"", **headers):
    """A socket whose handshake request is sent, and whose answer is not read."""
    sock = open_socket(server.url)
    sock.sendall(handshake(target, **headers) + behind)
    return sock


def answer_to(sock):
    """The status of what comes."""
    return parse_answer(read_head(sock)).status


def read_head(sock):
    """Up to the empty line, and no further."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        assert byte, f"the stream ended after {data!r}"
        data += byte
    return data


def asked_with(target="/", **headers):
    """The request as a check sees it."""
    requests = []
    with guarded(lambda request: requests.append(request) or True) as server:
        with RawClient(server.url, target, **headers) as client:
            ours = client.socket.getsockname()
            everybody_is_in(server, 1)
    assert len(requests) == 1
    assert tuple(requests[0].address) == ours
    return requests[0]


def everybody_is_in(server, count):
    eventually(lambda: server.get_connection_count() == count, what=f"{count} clients")


# ---- What a check sees -----------------------------------------------------------------------------------------


def test_a_check_sees_what_was_asked_for():
    """The method, the path and the query, unquoted; names and values as they were meant."""
    request = asked_with("/a%20room/%C3%A4?token=x%26y&empty=&b=%E2%98%95+1")
    assert (request.method, request.path) == ("GET", "/a room/ä")
    assert request.query == {"token": "x&y", "empty": "", "b": "☕ 1"}


def test_a_check_sees_the_headers():
    """Names in lower case; several of a name as one, with commas."""
    headers = asked_with(X_Api_Key="Secret", Host="push.example.com\r\nX-Two: 1\r\nx-two: 2").headers
    assert (headers["x-api-key"], headers["host"], headers["x-two"]) == ("Secret", "push.example.com", "1, 2")
    assert "upgrade" in headers and all(name == name.lower() for name in headers)


@pytest.mark.parametrize("cookie, cookies", [
    (None, {}),
    ("", {}),
    ("a=1", {"a": "1"}),
    ("a=1; b=2;c=3;  d=4 ", {"a": "1", "b": "2", "c": "3", "d": "4"}),
    ('a="quoted"; b="two words"', {"a": "quoted", "b": "two words"}),
    ("a=; b=", {"a": "", "b": ""}),
    ("a=b=c==", {"a": "b=c=="}),
    ("A=1; a=2", {"A": "1", "a": "2"}),
    ("a=first; a=second", {"a": "first"}),
    ("a=1; nonsense; ; =; b=2", {"a": "1", "b": "2", "": ""}),
    ("session=eyJ1c2VyIjoiYWRhIn0.aWJx_A.Z3-x; path=/", {"session": "eyJ1c2VyIjoiYWRhIn0.aWJx_A.Z3-x", "path": "/"}),
    ("a=1,2; b=x:y/z", {"a": "1,2", "b": "x:y/z"}),
    ("a=1\r\nCookie: b=2", {"a": "1", "b": "2"}),
], ids=spelled)
def test_a_check_sees_the_cookies(cookie, cookies):
    """By name, without quotes; what is no pair is passed over, and never an error."""
    seen = asked_with(Cookie=cookie).cookies
    seen.setdefault("", "") if "" in cookies else seen.pop("", None)
    assert seen == cookies


def test_a_check_sees_the_address():
    """Host and port of the client's end, which asked_with() compares with it."""
    address = asked_with().address
    assert address[0] == "127.0.0.1" and isinstance(address[1], int) and len(address) == 2


def test_without_tickets_the_user_is_not_known_yet():
    """request.user is None: nobody has said who it is."""
    assert asked_with("/?ticket=x").user is None


@pytest.mark.parametrize("junk", ["a=%FF%FE", "a=%00", "=&&=&a", "%", "a=1&a=2"])
def test_a_strange_query_is_no_error(junk):
    """A check can look at it like at any other."""
    assert isinstance(asked_with(f"/?{junk}").query, dict)


# ---- What it may say -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["ada", 42, -1, "0", "José ☕", 1], ids=spelled)
def test_a_user_id_lets_the_client_in_as_that_user(user):
    """It is conn.user, as it was returned, and the client is on the topic user:ID besides that of its path."""
    with guarded(lambda request: user) as server:
        client, conn = enter(server, "/chat")
        with client:
            assert conn.user == user and type(conn.user) is type(user)
            for number, topic in enumerate(["user:", f"user:{user}", f"user:{user}0", "user:True", "/chat"]):
                server.broadcast("hello", number, to=topic)
            assert client.payloads(2) == [1, 4]
            assert still_reaches(server, client)


def test_true_lets_the_client_in_as_nobody():
    """conn.user is None, and no topic is joined but that of the path."""
    with guarded(lambda request: True) as server:
        client, conn = enter(server, "/chat")
        with client:
            assert conn.user is None
            server.broadcast("hello", 1, to=["user:True", "user:1", "user:None"])
            server.broadcast("hello", 2, to="/chat")
            assert client.payloads(1) == [2]


@pytest.mark.parametrize("verdict", [False, None, 0, "", [], {}, ()], ids=spelled)
def test_what_is_false_is_refused(verdict):
    """401 with a sentence, no client, no handler; and what came behind the request is not read."""
    met = []
    with guarded(lambda request: verdict, {"/": met.append}, {"/x": lambda *met_: met.append(met_)}) as server:
        for target in ("/", "/x"):
            answer = exchange(server.url, handshake(target) + client_frame(TEXT, b"hi"))
            assert answer.status == 401 and answer.body.endswith(".\n") and len(answer.body.split()) > 3
        everybody_has_left(server)
    assert met == []


@pytest.mark.parametrize("verdict", [1.5, b"ada", ["ada"], {"id": 42}, object(), ("ada", 1), print, {1}], ids=spelled)
def test_what_is_no_user_id_is_the_programs_fault(verdict, caplog):
    """500 without a detail, and a log record that says what to return."""
    with caplog.at_level(logging.INFO), guarded(lambda request: verdict) as server:
        answer = exchange(server.url, handshake())
        everybody_has_left(server)
    assert answer.status == 500 and type(verdict).__name__ not in answer.body
    assert "user id (str or int), True, False or None" in caplog.text and type(verdict).__name__ in caplog.text


class SecretError(Exception):
    """What must not be told to a client."""


@pytest.mark.parametrize("error", [
    SecretError("db.example.com refused admin:hunter2"), SystemExit("hunter2"), SystemExit(0), KeyError("hunter2"),
    wsqueue.ConnectionClosed("hunter2"), wsqueue.SettingError("hunter2"), UnicodeDecodeError("utf-8", b"", 0, 1, "x"),
    StopIteration("hunter2"), asyncio.CancelledError("hunter2"), KeyboardInterrupt("hunter2"),
], ids=lambda error: type(error).__name__)
def test_a_check_that_fails_lets_nobody_in(error, caplog):
    """500, without a detail; the log has the traceback; and the server goes on, however often it fails."""
    def check(request):
        if request.path == "/fails":
            raise error
        return True

    with caplog.at_level(logging.ERROR), guarded(check) as server:
        for _ in range(CALLBACK_THREADS + 4):
            answer = exchange(server.url, handshake("/fails"))
            assert answer.status == 500
            assert not any(word in answer.body for word in ("hunter2", "Error", "Traceback", "check", "example"))
        with RawClient(server.url) as client:
            everybody_is_in(server, 1)
            assert still_reaches(server, client)
    assert {type(record.exc_info[1]) for record in caplog.records if record.exc_info} == {type(error)}
    assert "in check" in caplog.text


def test_a_check_can_be_a_decorator():
    """As handlers can."""
    server = WebSocketServer(port=0, close_timeout=1.0)

    @server.authenticate
    def check(request):
        return request.query.get("user")

    with server:
        assert exchange(server.url, handshake()).status == 401
        client, conn = enter(server, "/?user=ada")
        with client:
            assert conn.user == "ada"


def test_the_last_check_counts():
    """There is one, and another call replaces it; also while the server runs."""
    with guarded(lambda request: "first") as server:
        server.authenticate(lambda request: "second")
        client, conn = enter(server)
        with client:
            assert conn.user == "second"


def test_a_handler_knows_the_user():
    """When it starts, conn.user is what the check said, and conn.headers what it saw."""
    def greet(conn):
        conn.send({"user": conn.user, "cookie": conn.headers["cookie"]})

    with guarded(lambda request: request.cookies["who"], {"/": greet}) as server:
        with RawClient(server.url, Cookie="who=ada") as client:
            assert client.events(1) == [{"user": "ada", "cookie": "who=ada"}]


def test_a_check_may_join_topics():
    """Any number; a handler may leave them again."""
    def check(request):
        for room in request.query["rooms"].split(","):
            request.join(f"room:{room}")
        return "ada"

    with guarded(check) as server:
        client, conn = enter(server, "/?rooms=1,2,3")
        with client:
            conn.leave("room:2")
            for number in range(5):
                server.broadcast("hello", number, to=f"room:{number}")
            assert client.payloads(2) == [1, 3]
            assert still_reaches(server, client)


def test_what_a_refused_client_had_joined_is_forgotten():
    """Also where the check fails after it joined, or is too late."""
    def check(request):
        request.join("room")
        if request.path == "/fails":
            raise ValueError
        return request.path == "/good"

    with guarded(check) as server:
        assert [exchange(server.url, handshake(path)).status for path in ("/bad", "/fails")] == [401, 500]
        with RawClient(server.url, "/good") as client:
            everybody_is_in(server, 1)
            assert server.registry.sizes(10) == {"/good": 1, "room": 1}
            assert still_reaches(server, client)


def test_a_check_may_join_a_topic_whose_events_were_missed(tmp_path):
    """Before they are replayed: a client that comes back misses nothing of what it is put on."""
    def check(request):
        request.join("room")
        return True

    with guarded(check, queue=str(tmp_path / "queue")) as server:
        with RawClient(server.url, "/?last_event_id=") as client:
            [hello] = client.events(1)
        everybody_has_left(server)
        for number in range(3):
            server.broadcast("hello", number, to=["room", "other"][number % 2])
        with RawClient(server.url, f"/?last_event_id={hello['id']}") as client:
            assert [event["payload"] for event in client.events(3)] == [None, 0, 2]


# ---- Together with the other ways to refuse --------------------------------------------------------------------


def test_a_check_sees_the_tickets_user():
    """And may let it in as that, or as another, whose topic it is then on instead."""
    def check(request):
        assert request.user == "7"
        return True if request.path == "/" else f"{request.user}-{request.path[1:]}"

    with guarded(check, secret=SECRET) as server:
        for path, user in (("/", "7"), ("/admin", "7-admin")):
            client, conn = enter(server, f"{path}?ticket={sign_ticket(SECRET, user=7, topics=['room'])}")
            with client:
                assert conn.user == user
                for number, topic in enumerate(["user:7", "user:7-admin", "room"]):
                    server.broadcast("hello", number, to=topic)
                assert client.payloads(2) == [0 if path == "/" else 1, 2]
                assert still_reaches(server, client)
            everybody_has_left(server)


def test_a_check_may_refuse_a_good_ticket():
    """A user that was barred since it was made."""
    with guarded(lambda request: request.user != "7", secret=SECRET) as server:
        assert exchange(server.url, handshake(f"/?ticket={sign_ticket(SECRET, user=7)}")).status == 401
        with RawClient(server.url, f"/?ticket={sign_ticket(SECRET, user=8)}"):
            pass


def test_a_bad_ticket_is_not_shown_to_the_check():
    """Nor is a request without one: it is refused before anything is asked."""
    gate = Gate()
    with guarded(gate, secret=SECRET) as server:
        for target in ("/", "/?ticket=x", f"/?ticket={sign_ticket('another secret', user=7)}"):
            assert exchange(server.url, handshake(target)).status == 401
    assert gate.asked == []


@pytest.mark.parametrize("request_, status", [
    (handshake(Origin="https://evil.example"), 403),
    (handshake(Origin="null"), 403),
    (handshake(Sec_WebSocket_Key="x"), 400),
    (handshake(Sec_WebSocket_Version="8"), 426),
    (handshake(Upgrade=None), 426),
    (b"POST / HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    (b"GET / HTTP/1.1\r\nHost: x\r\nOrigin: https://evil.example\r\nAccept: text/event-stream\r\n\r\n", 403),
], ids=["foreign", "null", "key", "version", "plain", "POST", "foreign stream"])
def test_a_check_is_asked_last(request_, status):
    """What would be refused anyway costs it nothing, and a page of another site cannot use a visitor's cookie."""
    gate = Gate()
    with guarded(gate, monitoring="off") as server:
        assert exchange(server.url, request_).status == status
    assert gate.asked == []


def test_what_is_for_everyone_or_for_monitoring_is_not_asked_about():
    """The script that listens, and the health that a machine looks at, are no clients."""
    gate = Gate(verdict=False)
    with guarded(gate, secret=SECRET) as server:
        for path in ("/wsqueue.js", "/wsqueue.mjs", "/healthz", "/metrics"):
            assert exchange(server.url, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()).status == 200
    assert gate.asked == []


def test_who_waits_for_a_check_does_not_count_as_a_client():
    """max_clients is about clients: of two that are let in at once where one may, the other gets 503."""
    with Gate() as gate, guarded(gate, max_clients=1) as server, ExitStack() as stack:
        waiting = [stack.enter_context(knock(server, "/slow")) for _ in range(2)]
        gate.wait_for(2)
        assert server.get_connection_count() == 0
        gate.open()
        assert sorted(answer_to(sock) for sock in waiting) == [101, 503]


# ---- A check that takes its time -------------------------------------------------------------------------------


def test_a_slow_check_holds_up_nobody_else():
    """While it runs others come, are served and leave; then its client is let in, and gets what comes from then on."""
    with Gate() as gate, guarded(gate, {"/echo": lambda conn: conn.send(conn.recv())}) as server:
        with knock(server, "/slow") as waiting:
            gate.wait_for(1)
            with RawClient(server.url) as client:
                everybody_is_in(server, 1)
                assert still_reaches(server, client)
                with RawClient(server.url, "/echo") as other:
                    other.send("hello")
                    assert other.recv() == "hello"
                    other.close()
                everybody_is_in(server, 1)
                assert waiting_for_an_answer(waiting)
                gate.open()
                assert answer_to(waiting) == 101
                everybody_is_in(server, 2)
                assert still_reaches(server, client)
                assert read_frame_of(waiting).startswith(b'{"event":"still"')


def waiting_for_an_answer(sock):
    """Whether nothing has come, neither an answer nor the end."""
    sock.setblocking(False)
    try:
        sock.recv(1, socket.MSG_PEEK)
        return False
    except BlockingIOError:
        return True
    finally:
        sock.settimeout(PATIENCE)


def read_frame_of(sock):
    """The payload of a small frame."""
    first, size = sock.recv(1), sock.recv(1)[0]
    assert first == b"\x81" and size < 126
    data = b""
    while len(data) < size:
        data += sock.recv(size - len(data))
    return data


def test_many_slow_checks_run_at_once():
    """As many as there are threads for them; the rest wait their turn, and none is lost."""
    count = CALLBACK_THREADS * 3
    with Gate("ada") as gate, guarded(gate, handshake_timeout=FOR_EVER) as server, ExitStack() as stack:
        waiting = [stack.enter_context(knock(server, f"/slow/{number}")) for number in range(count)]
        gate.wait_for(CALLBACK_THREADS)
        assert server.get_connection_count() == 0
        gate.open()
        assert [answer_to(sock) for sock in waiting] == [101] * count
        everybody_is_in(server, count)
    assert Counter(gate.asked) == Counter(f"/slow/{number}" for number in range(count))


def test_not_all_the_world_may_wait_for_a_check(monkeypatch):
    """Beyond a bound 503 comes at once, which says when to come back; who waits already is not driven out by it."""
    monkeypatch.setattr(wsqueue, "CHECKS_WAITING", 3)
    with Gate() as gate, guarded(gate, handshake_timeout=FOR_EVER) as server, ExitStack() as stack:
        waiting = [stack.enter_context(knock(server, "/slow")) for _ in range(CALLBACK_THREADS + 4)]
        eventually(lambda: server._io.checks.waiting() == 4, what="four that wait behind the running checks")
        for _ in range(3):
            answer = exchange(server.url, handshake("/slow"))
            assert answer.status == 503 and answer.headers["retry-after"]
        gate.open()
        assert [answer_to(sock) for sock in waiting] == [101] * len(waiting)
    assert len(gate.asked) == len(waiting)


def test_checks_do_not_cost_a_thread_each():
    """A thousand clients later there are no more threads than at most checks at a time."""
    with guarded(lambda request: True) as server:
        for _ in range(100):
            with RawClient(server.url) as client:
                client.close()
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("wsqueue")]
        assert len(names) <= CALLBACK_THREADS + 4, names


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
def test_a_client_that_leaves_while_its_check_runs_is_forgotten(caplog, reset):
    """Nothing is left of it, and nobody is told of an error."""
    handlers = {"/slow": lambda conn: conn.send("hi")}
    with caplog.at_level(logging.INFO), Gate() as gate, guarded(gate, handlers) as server:
        waiting = knock(server, "/slow")
        gate.wait_for(1)
        if reset:
            waiting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        waiting.close()
        with RawClient(server.url) as witness:
            everybody_is_in(server, 1)
            gate.open()
            assert still_reaches(server, witness)
        everybody_has_left(server)
        eventually(lambda: not server._io._parked, what="the end of the connection")
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


def test_a_check_that_takes_too_long_is_answered_for():
    """503 after handshake_timeout; when it says yes at last, nobody is let in, and no handler is run."""
    met = []
    with Gate() as gate, guarded(gate, {"/slow": met.append}, handshake_timeout=0.1) as server:
        answer = exchange(server.url, handshake("/slow"))
        assert answer.status == 503 and "handshake_timeout" in answer.body
        assert gate.asked == ["/slow"]
        gate.open()
        with RawClient(server.url) as client:
            everybody_is_in(server, 1)
            assert still_reaches(server, client)
    assert met == []


def test_the_time_of_a_check_begins_with_the_check():
    """A client that took long to send its request has not used it up: what is timed is waiting for one answer."""
    with Gate() as gate, guarded(gate, handshake_timeout=FOR_EVER) as server:
        request = handshake("/slow")
        with open_socket(server.url) as sock:
            for at in range(0, len(request), 40):
                sock.sendall(request[at:at + 40])
            gate.wait_for(1)
            gate.open()
            assert answer_to(sock) == 101


def test_checks_that_hang_do_not_keep_others_out_for_ever():
    """When they end, those whose turn it never was have got 503, and whoever comes then is let in."""
    with Gate() as gate, guarded(gate, handshake_timeout=0.1) as server, ExitStack() as stack:
        waiting = [stack.enter_context(knock(server, "/slow")) for _ in range(CALLBACK_THREADS + 5)]
        assert {parse_answer(read_to_end(sock)).status for sock in waiting} == {503}
        asked = len(gate.asked)
        assert asked <= CALLBACK_THREADS
        gate.open()
        with RawClient(server.url) as client:
            everybody_is_in(server, 1)
            assert still_reaches(server, client)
        assert len(gate.asked) == asked + 1  # who has got its 503 is not asked about any more


def test_stop_does_not_wait_for_checks_without_end():
    """The client sees the end of its connection, and start() works again."""
    with Gate() as gate:
        server = WebSocketServer(port=0, close_timeout=0.1, handshake_timeout=FOR_EVER)
        server.authenticate(gate)
        with server:
            waiting = knock(server, "/slow")
            gate.wait_for(1)
        assert not server.is_running()
        with waiting, suppress(ConnectionResetError):
            assert b" 101 " not in read_to_end(waiting)
        with server, RawClient(server.url) as client:
            everybody_is_in(server, 1)
            gate.open()  # the one of the first life must not meet this one
            assert still_reaches(server, client)
            everybody_is_in(server, 1)


def test_a_check_may_stop_the_server():
    """From its thread, as a handler may."""
    def check(request):
        server.stop()
        return True

    server = WebSocketServer(port=0, close_timeout=1.0)
    server.authenticate(check)
    with server:
        with knock(server) as sock, suppress(ConnectionResetError):
            read_to_end(sock)
        eventually(lambda: not server.is_running(), what="the end of the server")


# ---- What comes behind the request -----------------------------------------------------------------------------


def test_frames_that_came_behind_the_request_are_read_after_the_check():
    """All of them, in order, the ones sent along and the ones sent while it ran; none before it says yes."""
    got = []
    frames = [client_frame(TEXT, str(number).encode()) for number in range(300)]
    with Gate() as gate, guarded(gate, callbacks={"/slow": lambda conn, message: got.append(int(message))}) as server:
        with knock(server, "/slow", behind=b"".join(frames[:150])) as sock:
            gate.wait_for(1)
            sock.sendall(b"".join(frames[150:]))
            with RawClient(server.url) as witness:
                everybody_is_in(server, 1)
                assert still_reaches(server, witness) and got == []
            gate.open()
            assert answer_to(sock) == 101
            eventually(lambda: len(got) == 300, what="300 messages")
    assert got == list(range(300))


def test_half_a_frame_behind_the_request_is_completed_later():
    """Wherever the pieces were cut."""
    got = []
    frame = client_frame(TEXT, b"hello")
    with Gate() as gate, guarded(gate, callbacks={"/slow": lambda conn, message: got.append(message)}) as server:
        with knock(server, "/slow", behind=frame[:3]) as sock:
            gate.wait_for(1)
            gate.open()
            assert answer_to(sock) == 101
            sock.sendall(frame[3:])
            eventually(lambda: got == ["hello"], what="the message")


def test_a_client_cannot_fill_the_memory_while_its_check_runs():
    """What it says meanwhile stays with the kernels, which take only so much."""
    with Gate() as gate, guarded(gate, handshake_timeout=FOR_EVER) as server:
        with knock(server, "/slow") as sock:
            gate.wait_for(1)
            sock.settimeout(1.0)
            with pytest.raises(socket.timeout):
                sock.sendall(bytes(256 * MIB))


def test_a_closing_handshake_behind_the_request_is_answered():
    """A client that has its say and leaves before it is known is let in, heard, and closed as it asked."""
    got = []
    behind = client_frame(TEXT, b"hello") + client_frame(0x8, struct.pack("!H", 1000))
    with Gate() as gate, guarded(gate, callbacks={"/slow": lambda conn, message: got.append(message)}) as server:
        with knock(server, "/slow", behind=behind) as sock:
            gate.wait_for(1)
            gate.open()
            assert read_to_end(sock).endswith(b"\x88\x02\x03\xe8")
        everybody_has_left(server)
    assert got == ["hello"]


# ---- TLS, forks, sharing with others ---------------------------------------------------------------------------


def test_a_check_works_over_tls(tmp_path):
    """With what came behind the request, too, which is decrypted already and not to be lost."""
    got = []
    with Gate("ada") as gate, guarded(gate, callbacks={"/slow": lambda *met: got.append(met)},
                                      **write_certificate(tmp_path)) as server:
        with TRUSTING.wrap_socket(open_socket(server.url), server_hostname="127.0.0.1") as sock:
            sock.sendall(handshake("/slow") + client_frame(TEXT, b"hello") * 3)
            gate.wait_for(1)
            with SecureClient(server.url) as witness:
                everybody_is_in(server, 1)
                assert still_reaches(server, witness)
            gate.open()
            assert answer_to(sock) == 101
            eventually(lambda: len(got) == 3, what="three messages")
        assert [(conn.user, message) for conn, message in got] == [("ada", "hello")] * 3


def test_a_refusal_works_over_tls(tmp_path):
    """401, and a clean end."""
    with guarded(lambda request: False, **write_certificate(tmp_path)) as server:
        with TRUSTING.wrap_socket(open_socket(server.url), server_hostname="127.0.0.1",
                                             suppress_ragged_eofs=False) as sock:
            sock.sendall(handshake())
            assert parse_answer(read_to_end(sock)).status == 401


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_a_check_runs_changes_nothing():
    """The check's verdict is the parent's affair: its client is let in there, once."""
    with Gate("ada") as gate, guarded(gate) as server, knock(server, "/slow") as waiting:
        gate.wait_for(1)
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(writing)
            os.read(reading, 1)  # until the parent has seen what it has to
            os._exit(0)
        try:
            gate.open()
            assert answer_to(waiting) == 101
            everybody_is_in(server, 1)
            server.broadcast("hello", 1, to="user:ada")
            assert read_frame_of(waiting).startswith(b'{"event":"hello"')
        finally:
            os.close(writing)
            os.close(reading)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_check_works_for_event_streams():
    """The same answers: 401, 500, or the stream of the user."""
    def check(request):
        return {"/ada": "ada", "/no": False}[request.path]

    def get(path):
        return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n".encode()

    with guarded(check) as server:
        assert [exchange(server.url, get(path)).status for path in ("/no", "/unknown")] == [401, 500]
        with open_socket(server.url) as sock:
            sock.sendall(get("/ada"))
            assert answer_to(sock) == 200
            everybody_is_in(server, 1)
            assert server.get_connections()[0].user == "ada"
            server.broadcast("hello", 1, to="user:ada")
            data = b""
            while b'"event":"hello"' not in data:
                data += sock.recv(65536)


def test_a_flood_of_refused_clients_leaves_nothing():
    """Threads, connections and topics are as before."""
    with guarded(lambda request: request.query.get("user")) as server:
        with RawClient(server.url, "/?user=ada") as client:
            everybody_is_in(server, 1)
            for number in range(300):
                assert exchange(server.url, handshake(f"/{number}?x={quote('☕')}")).status == 401
            assert still_reaches(server, client)
            eventually(lambda: len(server._io._parked) == 1, what="the end of the others")
            assert server.registry.sizes(10) == {"/": 1, "user:ada": 1}
