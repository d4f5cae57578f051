"""Section 7, Connection: what handlers and clients see of each other, over real sockets."""

import gc
import json
import logging
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager

import pytest

from clients import (
    BINARY,
    CLOSE,
    PATIENCE,
    PING,
    PONG,
    TEXT,
    RawClient,
    Reader,
    client_frame,
    close_payload,
    enter,
    everybody_has_left,
    exchange,
    frame_head,
    serving,
    still_reaches,
)
from helpers import TIME_UNIT, eventually
from wsqueue import ConnectionClosed, queue_events

KIB = 1024


# ---- Pings and the closing handshake -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """One server for all that need no settings and no routes."""
    with serving() as server:
        yield server


@pytest.fixture
def client(server):
    with RawClient(server.url) as client:
        yield client
    everybody_has_left(server)


@pytest.mark.parametrize("payload", [b"", b"are you there?", bytes(range(125))])
def test_a_ping_is_answered_with_a_pong_of_the_same_bytes(client, payload):
    """RFC 6455, section 5.5.3; also between the fragments of a message."""
    client.send_frame(TEXT, b"begun", fin=False)
    client.send_frame(PING, payload)
    assert client.read_frame() == (PONG, payload)


def test_a_pong_that_nobody_asked_for_is_no_matter(client):
    """Section 5.5.3: a heartbeat in one direction; the next ping is answered as ever."""
    client.send_frame(PONG, b"unsolicited")
    client.send_frame(PING, b"1")
    assert client.read_frame() == (PONG, b"1")


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
def test_a_client_that_closes_is_answered_with_its_code(client, code):
    """The code is echoed (section 5.5.1), and then the server closes the stream (section 7.1.1)."""
    assert client.close(code) == code


def test_a_close_frame_without_a_code_is_answered_without_one(client):
    """An empty close frame is legal, and its echo is empty."""
    client.send_frame(CLOSE)
    assert client.read_frame() == (CLOSE, b"")
    assert client.ended()


def test_what_follows_a_close_frame_is_ignored(client):
    """After its close frame a client has nothing to say: neither is a ping answered nor a violation punished."""
    client.socket.sendall(client_frame(CLOSE, close_payload(1000)) + client_frame(PING) + b"\xff" * 10)
    assert client.close_code() == 1000
    assert client.ended()


def test_a_server_that_closes_says_why_after_what_it_sent_before(server):
    """conn.close(): messages first, then code and reason; with the client's answer the stream ends."""
    client, conn = enter(server)
    with client:
        conn.send("before")
        conn.close(4001, "out of tea")
        assert not conn.is_connected()
        assert conn.send("after") is False
        assert client.recv() == "before"
        assert client.read_close() == (4001, "out of tea")
        client.send_frame(CLOSE, close_payload(4001))
        assert client.ended()
    everybody_has_left(server)


def test_the_first_of_two_closes_counts(server):
    """A connection is closed once; a second close() changes nothing and raises nothing."""
    client, conn = enter(server)
    with client:
        conn.close(4001)
        conn.close(4002)
        assert client.close_code() == 4001
        client.send_frame(CLOSE, close_payload(4001))
        assert client.ended()


def test_a_client_that_does_not_answer_a_close_is_cut_off():
    """close_timeout after the server's close frame the stream ends, answered or not."""
    with serving(close_timeout=0.2) as server:
        client, conn = enter(server)
        with client:
            conn.close()
            assert client.close_code() == 1000
            assert client.ended()


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2999, 5000])
def test_a_close_code_that_must_not_be_sent_is_refused(server, client, code):
    """close() raises ValueError for it, and the connection stays."""
    conn = eventually(server.get_connections)[0]
    with pytest.raises(ValueError, match=str(code)):
        conn.close(code)
    assert still_reaches(server, client)


def vanish(client):
    client.socket.close()


def reset(client):
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.socket.close()


def half_close(client):
    client.socket.shutdown(socket.SHUT_WR)
    assert client.ended()
    client.socket.close()


@pytest.mark.parametrize("leave", [vanish, reset, half_close])
def test_a_client_that_leaves_without_a_word_is_gone(server, leave):
    """The end of the stream is noticed, in whatever form it comes: the client is forgotten, and send() says False."""
    client, conn = enter(server)
    leave(client)
    everybody_has_left(server)
    assert not conn.is_connected()
    assert conn.send("?") is False


# ---- What a handler has ------------------------------------------------------------------------------------


def test_path_query_headers_and_address_are_the_clients():
    """A handler sees the request: path and query decoded, header names in lower case, repeated headers joined."""
    seen = queue.Queue()
    with serving({"/a room": lambda conn: seen.put((conn.path, conn.query, conn.headers, conn.address))}) as server:
        with RawClient(server.url, "/a%20room?user=7&name=J%C3%B6rg&empty=", X_Tag="one\r\nX-TAG: two") as client:
            path, query, headers, address = seen.get(timeout=PATIENCE)
            assert address == client.socket.getsockname()
    assert path == "/a room"
    assert query == {"user": "7", "name": "Jörg", "empty": ""}
    assert headers["x-tag"] == "one, two" and headers["host"] == "127.0.0.1"


@pytest.mark.parametrize(
    "message, frame",
    [
        ("text: \N{EURO SIGN}", (TEXT, "text: \N{EURO SIGN}".encode())),
        ("", (TEXT, b"")),
        (b"\x00\xff", (BINARY, b"\x00\xff")),
        (bytearray(b"\x00\xff"), (BINARY, b"\x00\xff")),
    ],
)
def test_text_and_bytes_are_sent_as_they_are(server, client, message, frame):
    """str is a text message, bytes a binary one."""
    assert eventually(server.get_connections)[0].send(message) is True
    assert client.read_frame() == frame


@pytest.mark.parametrize("value", [{"event": "x", "payload": ["ü", None, 1.5]}, [1, {"a": []}], {}, []])
def test_dicts_and_lists_are_sent_as_json(server, client, value):
    """A browser gets text that JSON.parse takes."""
    assert eventually(server.get_connections)[0].send(value) is True
    opcode, payload = client.read_frame()
    assert opcode == TEXT
    assert json.loads(payload) == value


@pytest.mark.parametrize("value", [None, 1, 1.5, object(), {1, 2}, ("a",)])
def test_what_is_neither_is_refused(server, client, value):
    """Anything else is a mistake of the caller's, and nothing is sent."""
    with pytest.raises(TypeError, match=type(value).__name__):
        eventually(server.get_connections)[0].send(value)
    assert still_reaches(server, client)


def test_recv_returns_messages_in_order_and_raises_on_timeout():
    """recv() gives text as str and binary as bytes; TimeoutError leaves the connection as it was."""
    seen = queue.Queue()

    def handler(conn):
        try:
            conn.recv(timeout=0.01)
        except TimeoutError:
            conn.send("too late")
        for _ in range(3):
            seen.put(conn.recv(timeout=PATIENCE))

    with serving({"/": handler}) as server, RawClient(server.url) as client:
        assert client.recv() == "too late"
        client.send("text")
        client.send(b"\x00bytes")
        client.send_frame(TEXT, b"frag", fin=False)
        client.send_frame(0, b"ments")
        assert [seen.get(timeout=PATIENCE) for _ in range(3)] == ["text", b"\x00bytes", "fragments"]


def test_what_comes_right_behind_the_handshake_is_not_lost():
    """A client may send with its request; those bytes are the first message."""
    with serving({"/": lambda conn: conn.send(conn.recv(PATIENCE))}) as server:
        with RawClient(server.url, behind=client_frame(TEXT, b"eager")) as client:
            assert client.recv() == "eager"


@pytest.mark.parametrize("leave", [RawClient.close, vanish])
def test_a_loop_over_a_connection_ends_with_it(leave):
    """`for message in conn` gives every message, and ends without an exception however the client leaves."""
    seen, ended = [], threading.Event()

    def handler(conn):
        for message in conn:
            seen.append(message)
        ended.set()

    with serving({"/": handler}) as server, RawClient(server.url) as client:
        for text in "abc":
            client.send(text)
        leave(client)
        assert ended.wait(PATIENCE)
    assert seen == ["a", "b", "c"]


def test_recv_is_for_a_handler_while_it_runs():
    """Where a callback has the messages, and afterwards, it says so instead of waiting for ever."""
    with serving({"/": lambda conn: None}, callbacks={"/chat": lambda conn, message: None}) as server:
        for target in ("/", "/chat"):
            client, conn = enter(server, target)
            with client:
                eventually(lambda conn=conn: conn._inbox is None, what="the end of the handler")
                with pytest.raises(RuntimeError, match="on_message"):
                    conn.recv(0.0)


def test_a_handler_in_recv_ends_silently_when_its_client_leaves(caplog):
    """`while conn.is_connected(): conn.recv()` needs no try: ConnectionClosed ends it, and nothing is logged."""
    caplog.set_level(logging.WARNING)
    raised = queue.Queue()

    def handler(conn):
        try:
            while conn.is_connected():
                conn.recv()
        except ConnectionClosed as error:
            raised.put(error)
            raise

    with serving({"/": handler}) as server:
        with RawClient(server.url) as client:
            client.send("hello")
            assert client.close() == 1000
        assert raised.get(timeout=PATIENCE)
        everybody_has_left(server)
    assert caplog.records == []


def test_a_handler_that_fails_closes_its_connection_only(caplog):
    """The client is told 1011, the log has the traceback, and the others are served."""

    def handler(conn):
        raise LookupError("no such table")

    with serving({"/bad": handler}) as server, RawClient(server.url) as other:
        with RawClient(server.url, "/bad") as client:
            assert client.close_code() == 1011
        assert still_reaches(server, other)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1 and errors[0].name == "wsqueue"
    assert "no such table" in caplog.text


def test_a_handler_joins_and_leaves_topics():
    """A client is on its path's topic and on what its handler joined, until it leaves."""
    with serving() as server:
        client, conn = enter(server, "/room")
        with client:
            conn.join("vip")
            for topic, payload in (("/room", 1), ("vip", 2), ("/other", 3), (["/room", "vip"], 4)):
                server.broadcast("e", payload, to=topic)
            conn.leave("vip")
            conn.leave("/room")
            server.broadcast("e", 5, to=["vip", "/room"])
            server.broadcast("e", 6)
            assert client.payloads(4) == [1, 2, 4, 6]


# ---- on_message --------------------------------------------------------------------------------------------


def test_callbacks_run_in_order_for_each_client():
    """A message is not handed over before the one in front of it is done, whatever the other clients do."""
    clients, count = 20, 50

    def echo(conn, message):
        if int(message) % 10 == 0:
            time.sleep(0.001)  # let the next one overtake, if anything does
        conn.send(message)

    with serving(callbacks={"/": echo}) as server:
        talkers = [RawClient(server.url) for _ in range(clients)]
        for number in range(count):
            for talker in talkers:
                talker.send(str(number))
        for talker in talkers:
            assert [int(talker.recv()) for _ in range(count)] == list(range(count))
            talker.socket.close()


def test_a_callback_that_blocks_stops_nobody_else():
    """Callbacks do not run on the I/O thread: others' callbacks, pings and broadcasts go on, its own client's too."""
    release = threading.Event()

    def callback(conn, message):
        if message == "block":
            release.wait(3 * PATIENCE)
        conn.send(message)

    with serving(callbacks={"/": callback}) as server, RawClient(server.url) as slow, RawClient(server.url) as other:
        try:
            slow.send("block")
            slow.send_frame(PING)
            assert slow.read_frame() == (PONG, b"")
            other.send("go")
            assert other.recv() == "go"
            assert still_reaches(server, slow)
        finally:
            release.set()
        assert slow.recv() == "block"


def test_a_callback_that_fails_closes_its_connection_only(caplog):
    """1011 for the client, the traceback in the log, and the next client's callback runs."""

    def callback(conn, message):
        conn.send(str(1 / int(message)))

    with serving(callbacks={"/": callback}) as server:
        with RawClient(server.url) as bad, RawClient(server.url) as good:
            bad.send("0")
            assert bad.close_code() == 1011
            good.send("1")
            assert good.recv() == "1.0"
    assert "ZeroDivisionError" in caplog.text


def test_a_handler_and_a_callback_share_a_route():
    """The handler greets, the callback answers; a handler that stays does not take the callback's messages."""
    done = threading.Event()

    def handler(conn):
        conn.send("welcome")
        done.wait(PATIENCE)

    with serving({"/": handler}, {"/": lambda conn, message: conn.send(message.upper())}) as server:
        with RawClient(server.url) as client:
            assert client.recv() == "welcome"
            client.send("hi")
            assert client.recv() == "HI"
            done.set()


# ---- Last words --------------------------------------------------------------------------------------------


class Gate:
    """An echo that answers nothing before it is opened, and then all in order; opened in any case when a block ends."""

    def __init__(self):
        self._open = threading.Event()

    def __call__(self, conn, message):
        self._open.wait(6 * PATIENCE)
        conn.send(message)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open()

    def open(self):
        self._open.set()


def say_last(client, conn, last, messages=("one", "two", "three")):
    """Send messages, and the last of what the client has to say; returns once the server has read all that."""
    client.socket.sendall(b"".join(client_frame(TEXT, message.encode()) for message in messages) + last)
    eventually(lambda: conn._last_frame, what="the server to read the end")  # nothing tells a client that it has


def make_busy(client):
    """Keep a callback busy with the client, until its gate opens."""
    client.send("busy")
    client.send_frame(PING)
    assert client.read_frame() == (PONG, b"")  # so the message in front of it has been read


LAST_WORDS = {
    "a close frame": (client_frame(CLOSE, close_payload(4000)), 4000),
    "an empty close frame": (client_frame(CLOSE), None),
    "a violation": (b"\xff" * 20, 1002),
    "text that is not UTF-8": (client_frame(TEXT, b"\xff"), 1007),
    "too large a message": (frame_head(0x82, 1 << 40), 1009),
}


@pytest.mark.parametrize("name", LAST_WORDS)
def test_what_was_said_before_the_end_is_answered_before_the_end(name):
    """A callback that takes its time answers every message that came before; then, and not before, the close frame."""
    last, code = LAST_WORDS[name]
    gate = Gate()
    with serving(callbacks={"/": gate}, close_timeout=PATIENCE) as server, gate:
        client, conn = enter(server)
        with client:
            say_last(client, conn, last)
            gate.open()
            assert [client.recv() for _ in range(3)] == ["one", "two", "three"]
            assert client.read_close()[0] == code
            assert client.ended()
        everybody_has_left(server)


def test_a_callback_may_answer_the_last_message_with_a_close():
    """conn.close() while a client's close frame waits: its code goes out, once, and the stream ends."""
    gate = Gate()

    def callback(conn, message):
        gate(conn, message)
        conn.close(4004, "enough")

    with serving(callbacks={"/": callback}, close_timeout=PATIENCE) as server, gate:
        client, conn = enter(server)
        with client:
            say_last(client, conn, client_frame(CLOSE, close_payload(1000)), ["only"])
            gate.open()
            assert client.recv() == "only"
            assert client.read_close() == (4004, "enough")
            assert client.ended()


@pytest.mark.parametrize("name", LAST_WORDS)
def test_a_callback_that_never_returns_does_not_keep_its_connection(name):
    """After close_timeout the close frame goes out and the stream ends, whatever the callback does."""
    last, code = LAST_WORDS[name]
    gate = Gate()
    with serving(callbacks={"/": gate}, close_timeout=0.3) as server, gate:
        client, conn = enter(server)
        with client:
            say_last(client, conn, last)
            assert client.read_close()[0] == code
            assert client.ended()
        everybody_has_left(server)


@pytest.mark.parametrize("server_first", [False, True], ids=["open", "closing"])
def test_who_has_said_its_last_is_not_read_any_more(server_first):
    """What comes behind a client's close frame stays in its socket for as long as a callback is busy."""
    gate = Gate()
    with serving(callbacks={"/": gate}, close_timeout=6 * PATIENCE) as server, gate:
        client, conn = enter(server)
        with client:
            if server_first:
                make_busy(client)
                conn.close(4000)
            say_last(client, conn, client_frame(CLOSE, close_payload(4000)), [] if server_first else ["busy"])
            flood(client)  # fails if everything is taken


def test_who_has_said_its_last_cannot_prolong_it():
    """Both close frames are sent, a callback is busy, the client goes on and on: close_timeout is not reset by that."""
    gate = Gate()
    with serving(callbacks={"/": gate}, close_timeout=1.0) as server, gate:
        client, conn = enter(server)
        with client:
            make_busy(client)
            conn.close(4000)
            say_last(client, conn, client_frame(CLOSE, close_payload(4000)), [])
            client.socket.settimeout(0.1)
            eventually(lambda: goes_on_in_vain(client), what="the end of the connection")


def goes_on_in_vain(client):
    """Whether the server has cut off a client that says something now."""
    try:
        client.send_frame(PING)
        client.read_more()
    except socket.timeout:
        return False
    except (EOFError, OSError):
        return True
    return False


# ---- Messages that nobody wants ----------------------------------------------------------------------------


def test_a_message_without_a_callback_is_never_sent_to_others(server):
    """What clients send reaches other clients only through code that says so."""
    with RawClient(server.url) as sender, RawClient(server.url) as other:
        sender.send("to everybody?")
        sender.send(b"really everybody?")
        sender.send_frame(PING)
        assert sender.read_frame() == (PONG, b"")  # by now the messages have been read
        assert still_reaches(server, other)


def test_a_message_without_a_callback_is_not_kept():
    """On routes without handler, and after the handler has returned, messages are read and forgotten."""
    message = client_frame(BINARY, bytes(50 * KIB), mask=bytes(4))
    with serving({"/returns": lambda conn: conn.send("done")}) as server:
        with RawClient(server.url) as plain, RawClient(server.url, "/returns") as handled:
            assert handled.recv() == "done"
            eventually(lambda: not any(t.name.startswith("wsqueue-handler") for t in threading.enumerate()))
            tracemalloc.start()
            try:
                for client in (plain, handled):
                    for _ in range(200):
                        client.socket.sendall(message)
                    client.send_frame(PING)
                    assert client.read_frame() == (PONG, b"")
                gc.collect()
                assert tracemalloc.get_traced_memory()[0] < 2_000_000
            finally:
                tracemalloc.stop()


# ---- Floods and stalls -------------------------------------------------------------------------------------


def flood(client, most=4000, size=16 * KIB):
    """Send numbered messages until the socket takes no more; returns how many, the last one finished later."""
    client.socket.settimeout(0.5 * TIME_UNIT)
    for number in range(most):
        data = memoryview(client_frame(BINARY, struct.pack("!I", number) + bytes(size), mask=bytes(4)))
        while data:
            try:
                data = data[client.socket.send(data) :]
            except socket.timeout:
                client.socket.settimeout(PATIENCE)
                return number + 1, bytes(data)
    raise AssertionError(f"{most} messages of {size} bytes were taken, and nobody consumed one")


def numbers(messages):
    return [struct.unpack("!I", message[:4])[0] for message in messages]


def flooded_route(kind, seen, release):
    """Settings of a server whose "/" consumes nothing before `release`, and `seen` collects what it got."""

    def handler(conn):
        release.wait(3 * PATIENCE)
        for message in conn:
            seen.append(message[:4])

    def callback(conn, message):
        release.wait(3 * PATIENCE)
        seen.append(message[:4])

    return {"handlers": {"/": handler}} if kind == "handler" else {"callbacks": {"/": callback}}


@pytest.mark.parametrize("kind", ["handler", "callback"])
def test_a_flood_to_a_slow_consumer_is_bounded_and_loses_nothing(kind):
    """Reading pauses until the sender's socket blocks, others are served meanwhile, and then all arrives in order."""
    seen, release = [], threading.Event()
    with serving(**flooded_route(kind, seen, release)) as server, RawClient(server.url, "/other") as other:
        with RawClient(server.url) as client:
            try:
                count, rest = flood(client)
                assert still_reaches(server, other)
            finally:
                release.set()
            client.socket.sendall(rest)
            eventually(lambda: len(seen) == count, what=f"{count} messages")
    assert numbers(seen) == list(range(count))


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


FLOODS = {
    "pings": client_frame(PING),
    "pongs": client_frame(PONG, bytes(125)),
    "messages that nobody consumes": client_frame(TEXT, b"x"),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_frames_that_nobody_asked_for_is_closed(server, client, name):
    """1008 for more than a thousand in a second; the others do not notice."""
    with RawClient(server.url) as flooder:
        flooder.socket.sendall(FLOODS[name] * 3000)
        assert closing_code(flooder) == 1008
        assert flooder.ended()
    assert still_reaches(server, client)


def closing_code(client):
    """The code of the close frame behind whatever pongs came."""
    frames = iter(client.read_frame, None)
    return next(struct.unpack("!H", payload[:2])[0] for opcode, payload in frames if opcode == CLOSE)


def test_a_ping_or_two_is_no_flood(client):
    """Hundreds a second are answered, one by one and in order."""
    for number in range(300):
        client.send_frame(PING, str(number).encode())
    assert [client.read_frame()[1] for _ in range(300)] == [str(number).encode() for number in range(300)]


def test_a_client_that_takes_nothing_is_closed_by_the_send_timeout(caplog):
    """A stalled client goes after send_timeout, with one log line, and the others got everything."""
    count = 80
    with serving(send_timeout=0.5, outbox_bytes=64 * KIB * KIB) as server:
        with RawClient(server.url, receive_buffer=4 * KIB), RawClient(server.url) as other:
            reader = Reader(other, count)
            for number in range(count):
                server.broadcast("big", [number, "x" * 64 * KIB])
            eventually(lambda: server.get_connection_count() == 1, what="the stalled client to be closed")
            assert [number for number, _ in reader.payloads()] == list(range(count))
            assert still_reaches(server, other)
    assert len(warnings_of(caplog)) == 1
    assert "send_timeout" in caplog.text


def test_a_client_that_stalls_in_a_burst_is_closed_and_the_others_get_everything(tmp_path, caplog):
    """The outbox limit closes who reads nothing, with one log line; who reads gets the whole burst in order."""
    count = 3000
    with serving(queue=str(tmp_path / "q"), outbox_bytes=256 * KIB, send_timeout=60.0) as server:
        with RawClient(server.url, receive_buffer=4 * KIB), RawClient(server.url) as other:
            eventually(lambda: server.get_connection_count() == 2)
            reader = Reader(other, count)
            for start in range(0, count, 100):
                assert queue_events(server_queue(tmp_path), burst(range(start, start + 100)))
            assert [number for number, _ in reader.payloads()] == list(range(count))
            eventually(lambda: server.get_connection_count() == 1, what="the stalled client to be closed")
            assert still_reaches(server, other)
    assert len(warnings_of(caplog)) == 1
    assert "outbox_bytes" in caplog.text


def test_many_small_messages_that_wait_are_counted_with_what_they_cost():
    """Each costs 250 bytes of memory, whatever it holds: outbox_bytes is a bound on memory."""
    with serving(outbox_bytes=256 * KIB) as server:
        client, conn = enter(server)
        with client:
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
            conn.send("x" * 8 * KIB * KIB)  # from here on, all that is sent waits
            while conn.is_connected() and conn._pending > 9 * KIB * KIB:
                pass
            sent = sum(iter(lambda: conn.send("tiny"), False))
            assert sent <= 256 * 4 + 1
    everybody_has_left(server)


def server_queue(tmp_path):
    return str(tmp_path / "q")


def burst(numbers, size=3 * KIB):
    return [("burst", [number, "x" * size]) for number in numbers]


# ---- Slow clients ------------------------------------------------------------------------------------------


def closed_by_server(server):
    """How many connections the server says, on /metrics, that it closed, by the reason."""
    page = exchange(server.url, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").body
    return dict(re.findall(r'^wsqueue_closed_total\{reason="(\w+)"\} (\d+)$', page, re.MULTILINE))


def read_out(client):
    """The messages that are still to come, and the code and the reason of the close frame behind them."""
    messages = []
    for opcode, payload in iter(client.read_frame, None):
        if opcode == CLOSE:
            return messages, int.from_bytes(payload[:2], "big"), payload[2:].decode()
        messages.append(payload)
    raise AssertionError("read_frame() returned None")


STALLS = {
    "outbox": {"outbox_bytes": 256 * KIB, "send_timeout": 60.0},
    "send_timeout": {"outbox_bytes": 64 * KIB * KIB, "send_timeout": 0.3},
}


@pytest.mark.parametrize("kind", STALLS)
def test_a_client_that_stalls_and_then_reads_on_learns_why_it_was_closed(kind, caplog):
    """Whole events without a gap, then 1013 and the reason: counted once and logged once, whatever is sent after."""
    with serving(**STALLS[kind], close_timeout=6 * PATIENCE) as server:
        client, conn = enter(server, receive_buffer=4 * KIB)
        with client:
            sent = 0
            while sent < 100 and conn.is_connected():
                server.broadcast("big", [sent, "x" * 64 * KIB])
                sent += 1
            eventually(lambda: not conn.is_connected(), what="the stalled client to be given up")
            server.broadcast("big", "too late")
            messages, code, reason = read_out(client)
            numbers = [json.loads(message)["payload"][0] for message in messages]
            assert numbers == list(range(sent))[: len(numbers)] and len(numbers) >= sent - 1
            assert (code, reason[:10]) == (1013, "too slow: ") and kind in reason
        assert closed_by_server(server) == {kind: "1"}
    assert len(warnings_of(caplog)) == 1


def test_who_was_closed_for_being_slow_is_cut_off_if_it_does_not_read_on(caplog):
    """It has close_timeout for what waits, and that is neither counted nor logged a second time."""
    with serving(**STALLS["outbox"], close_timeout=0.3) as server:
        client, conn = enter(server, receive_buffer=4 * KIB)
        with client:
            while conn.is_connected():
                server.broadcast("big", "x" * 64 * KIB)
            eventually(lambda: conn not in server._io._parked, what="the connection to be cut off")
        assert closed_by_server(server) == {"outbox": "1"}
    assert len(warnings_of(caplog)) == 1


# ---- The silent --------------------------------------------------------------------------------------------


def test_a_peer_that_answers_no_ping_is_closed_and_one_that_does_is_not(caplog):
    """After ping_interval a silent client is pinged, and closed ping_timeout later; a pong is all it takes to stay."""
    with serving(ping_interval=0.2, ping_timeout=0.5) as server:
        with RawClient(server.url) as silent, RawClient(server.url) as alive:
            eventually(lambda: server.get_connection_count() == 2)
            reader = Reader(alive, 1)  # recv() answers pings
            assert silent.read_frame() == (PING, b"")
            assert silent.ended()
            eventually(lambda: server.get_connection_count() == 1)
            server.broadcast("still", 1)
            assert reader.payloads() == [1]
    assert len(warnings_of(caplog)) == 1
    assert "ping_timeout" in caplog.text


def test_a_peer_that_talks_need_not_answer_pings():
    """Whatever comes from a client after a ping shows that it lives."""
    with serving(ping_interval=0.2, ping_timeout=0.5) as server, RawClient(server.url) as client:
        for _ in range(2):  # the second ping comes after the first one's deadline
            assert client.read_frame() == (PING, b"")
            client.send("still here")
        assert still_reaches(server, client)


LISTENER = """
import sys
from websockets.sync.client import connect
with connect(sys.argv[1], compression=None) as client:
    for message in client:
        print(message, flush=True)
"""


@contextmanager
def listening_process(url):
    """A client in a process of its own, which prints what it gets and answers pings."""
    command = [sys.executable, "-c", LISTENER, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as process:
        try:
            yield process
        finally:
            process.kill()  # also a stopped one
            process.communicate()


def test_a_process_that_stops_is_gone_and_counted_once(caplog):
    """Its machine still takes what is sent, and it answers no ping: after ping_timeout it is no client any more."""
    with serving(ping_interval=0.3, ping_timeout=1.5 * TIME_UNIT) as server:
        with listening_process(server.url) as dead, listening_process(server.url) as alive:
            eventually(lambda: server.get_connection_count() == 2, 30, what="both clients")
            dead.send_signal(signal.SIGSTOP)
            eventually(lambda: server.get_connection_count() == 1, what="the stopped client to be gone")
            server.broadcast("still", "here")
            assert json.loads(alive.stdout.readline())["payload"] == "here"
            assert server.get_connection_count() == 1
            assert closed_by_server(server) == {"ping_timeout": "1"}
    assert len(warnings_of(caplog)) == 1
    assert "ping_timeout" in caplog.text


# ---- Violations --------------------------------------------------------------------------------------------

VIOLATIONS = {
    "unmasked": (frame_head(0x81, 5, masked=False) + b"hello", 1002),
    "reserved bit": (b"\xc1\x80" + bytes(4), 1002),
    "reserved opcode": (b"\x83\x80" + bytes(4), 1002),
    "stray continuation": (client_frame(0, b"x"), 1002),
    "control frame of 126 bytes": (frame_head(0x89, 126) + bytes(130), 1002),
    "length of 2^63": (frame_head(0x82, 1 << 63, form=64), 1002),
    "close code 1005": (client_frame(CLOSE, close_payload(1005)), 1002),
    "text that is not UTF-8": (client_frame(TEXT, b"\xff"), 1007),
    "announced too big": (frame_head(0x82, 1 << 40), 1009),
    "too big, and sent": (frame_head(0x82, 1 << 20) + bytes((1 << 20) + 4), 1009),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_answered_with_its_close_code(server, client, name):
    """The close frame can be read, whatever was sent behind the violation; then the stream ends, and others stay."""
    data, code = VIOLATIONS[name]
    with RawClient(server.url) as bad:
        bad.socket.sendall(data)
        got, reason = bad.read_close()
        assert (got, bool(reason)) == (code, True)
        assert bad.ended()
    assert still_reaches(server, client)


def test_a_message_of_exactly_the_limit_is_taken():
    """max_message_bytes is the largest message and not the smallest refused; one byte more is 1009."""
    with serving(callbacks={"/": lambda conn, message: conn.send(str(len(message)))}, max_message_bytes=100) as server:
        with RawClient(server.url) as client:
            client.send(b"x" * 100)
            assert client.recv() == "100"
            client.send(b"x" * 101)
            assert client.close_code() == 1009
