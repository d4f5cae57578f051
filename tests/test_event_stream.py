"""Section 10, server-sent events: the same port, topics and limits for who cannot or need not speak WebSocket."""

import http.client
import json
import logging
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import pytest

import wsqueue
from clients import (
    PATIENCE,
    RawClient,
    everybody_has_left,
    exchange,
    in_threads,
    open_socket,
    parse_answer,
    serving,
    still_reaches,
    stream_request,
)
from helpers import TIME_UNIT, eventually, spawn_server, spelled
from test_tls import AUTHORITY, TRUSTING, write_certificate
from wsqueue import queue_event, queue_events, sign_ticket

KIB, MIB = 1024, 1024 * 1024
SECRET = "a secret of a test, which is long enough for PyJWT"
ID = re.compile(r"[A-Za-z0-9._~%:-]+")
FOR_EVER = 3600.0

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


# ---- A client that believes nothing ----------------------------------------------------------------------------


class Message(NamedTuple):
    """What a browser would hand to onmessage."""

    data: str
    id: str  # lastEventId


class StreamParser:
    """The event stream of the HTML standard, section 9.2.6, and stricter: what a browser would ignore is an error."""

    def __init__(self):
        self.retry = None
        self.last_event_id = ""
        self.comments = 0
        self._bytes, self._data, self._id = b"", [], ""

    def feed(self, data):
        """The messages that are complete now."""
        self._bytes += data
        *lines, self._bytes = re.split(rb"\r\n|\n|\r(?!\Z)", self._bytes)  # a CR at the end may be half a CRLF
        return [message for message in map(self._take, lines) if message]

    @property
    def at_rest(self):
        """Whether nothing is half received."""
        return not self._bytes and not self._data

    def _take(self, line):
        text = line.decode("utf-8")
        if not text:
            return self._dispatch()
        if text.startswith(":"):
            self.comments += 1
            return None
        field, colon, value = text.partition(":")
        assert colon, f"a line without a colon: {text!r}"
        getattr(self, f"_on_{field}", self._on_unknown)(value[1:] if value.startswith(" ") else value)
        return None

    def _dispatch(self):
        self.last_event_id = self._id
        data, self._data = "\n".join(self._data), []
        return Message(data, self.last_event_id) if data else None

    def _on_data(self, value):
        self._data.append(value)

    def _on_id(self, value):
        assert ID.fullmatch(value), f"id {value!r}"
        self._id = value

    def _on_retry(self, value):
        assert re.fullmatch("[0-9]+", value), f"retry {value!r}"
        self.retry = int(value)

    def _on_unknown(self, value):
        raise AssertionError(f"a field that no page listens for: {value!r}")


class Stream:
    """An event stream over a raw socket."""

    def __init__(self, url, target="/", *, receive_buffer=None, wrap=lambda sock: sock, request=None, **headers):
        self.socket = wrap(open_socket(url, receive_buffer))
        self.parser, self._messages, self.bytes = StreamParser(), [], b""
        try:
            self.socket.sendall(request or stream_request(target, **headers))
            head = self._read_head()
            self.status, self.headers = parse_answer(head)[:2]
            assert self.status == 200, head
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def _read_head(self):
        data = b""
        while b"\r\n\r\n" not in data:
            more = self.socket.recv(65536)
            assert more, data
            data += more
        head, _, rest = data.partition(b"\r\n\r\n")
        self._take(rest)
        return head + b"\r\n\r\n"

    def _take(self, data):
        self.bytes += data
        self._messages += self.parser.feed(data)

    def read_more(self):
        data = self.socket.recv(65536)
        if not data:
            raise EOFError(f"the stream ended behind {self.bytes[-80:]!r}")
        self._take(data)

    def messages(self, count):
        """The next messages."""
        while len(self._messages) < count:
            self.read_more()
        taken, self._messages = self._messages[:count], self._messages[count:]
        return taken

    def events(self, count):
        return [json.loads(message.data) for message in self.messages(count)]

    def payloads(self, count):
        return [event["payload"] for event in self.events(count)]

    def hello(self):
        """The first message, which is this and no other; returns its id."""
        [message] = self.messages(1)
        event = json.loads(message.data)
        assert event == {"event": "wsqueue.hello", "payload": None, "timestamp": event["timestamp"]}
        assert type(event["timestamp"]) is int
        return message.id

    def reset(self):
        """A message that says that something was missed; returns its id."""
        [message] = self.messages(1)
        assert json.loads(message.data)["event"] == "wsqueue.reset"
        return message.id

    def read_to_end(self):
        """Whatever is left, until the server ends the stream; a reset raises ConnectionResetError."""
        with suppress(EOFError):
            while True:
                self.read_more()
        return self._messages


@contextmanager
def listening(server, target="/", **kw):
    """A stream that the server knows and that has got its hello."""
    count = server.get_connection_count()
    with Stream(server.url, target, **kw) as stream:
        stream.hello()
        eventually(lambda: server.get_connection_count() > count, what="the stream")
        yield stream


def enter(server, target="/", **kw):
    """A stream that has got its hello, and the server's side of it."""
    known = server.get_connections()
    stream = Stream(server.url, target, **kw)
    fresh = eventually(lambda: [conn for conn in server.get_connections() if conn not in known], what="the stream")
    stream.hello()
    return stream, fresh[0]


@pytest.fixture(scope="module")
def server():
    """One server for all that need no settings of their own."""
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def _server_is_left(request):
    """The next test finds the shared server without clients."""
    yield
    if "server" in request.fixturenames:
        everybody_has_left(request.getfixturevalue("server"))


@pytest.fixture
def directory(tmp_path):
    """A queue directory that does not exist yet."""
    return str(tmp_path / "queue")


def closed_totals(server):
    """Why the server has closed connections."""
    metrics = exchange(server.url, b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").body
    return dict(re.findall(r'wsqueue_closed_total\{reason="(.*)"\} (.*)', metrics))


def louder_than_info(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]


# ---- What comes over the wire ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text, messages", [
    (b"data: a\n\n", ["a"]), (b"data:a\r\ndata: b\r\rdata:  c\n\n", ["a\nb", " c"]), (b"\n\n: x\n\ndata: a\n", []),
    ("data: ä\u2028☕\n\n".encode(), ["ä\u2028☕"]), (b"id: 1\n\ndata: a\nretry: 5\n\n", ["a"])])
def test_the_parser_of_this_suite_reads_streams_in_any_pieces(text, messages):
    """Byte by byte as all at once, with each way to end a line."""
    whole, pieces = StreamParser(), StreamParser()
    assert [message.data for message in whole.feed(text)] == messages
    assert [message.data for at in range(len(text)) for message in pieces.feed(text[at:at + 1])] == messages


def test_the_head_says_that_it_is_a_stream(server):
    """200, its type, and nothing that lets anyone keep, buffer or measure it."""
    with listening(server) as stream:
        assert stream.headers["content-type"].split(";")[0] == "text/event-stream"
        assert "no-store" in stream.headers["cache-control"] or "no-cache" in stream.headers["cache-control"]
        assert stream.headers["x-accel-buffering"] == "no"
        assert not {"content-length", "content-encoding", "transfer-encoding"} & set(stream.headers)


def test_a_stream_begins_with_retry_and_hello(server):
    """When to come back, and from where."""
    with listening(server) as stream:
        assert re.match(rb"retry: [0-9]+\n", stream.bytes)
        assert 500 <= stream.parser.retry <= 60_000


def test_an_event_is_an_id_and_a_line_of_data(server):
    """Byte by byte: the three keys as JSON, without the id within, and an empty line."""
    with listening(server) as stream:
        before = len(stream.bytes)
        server.broadcast("order_paid", {"text": "a\nb\r\u2028 ☕"})
        [message] = stream.messages(1)
        event = json.loads(message.data)
        assert list(event) == ["event", "payload", "timestamp"]
        assert event["payload"] == {"text": "a\nb\r\u2028 ☕"}
        assert stream.bytes[before:] == f"id: {message.id}\ndata: {message.data}\n\n".encode()


def test_ids_are_new_each_time(server):
    """So that the last one that a client has seen says where it was."""
    with listening(server) as stream:
        for number in range(20):
            server.broadcast("hello", number)
        ids = [message.id for message in stream.messages(20)]
        assert len(set(ids)) == 20 and all(ID.fullmatch(identity) for identity in ids)


def test_an_event_has_the_same_id_for_every_client(directory):
    """Whether a stream carries it or a WebSocket."""
    with serving(queue=directory) as server, listening(server) as stream:
        with RawClient(server.url, "/?last_event_id=") as client:
            client.events(1)
            queue_events(directory, [("hello", number) for number in range(5)])
            assert [event["id"] for event in client.events(5)] == [message.id for message in stream.messages(5)]


@pytest.mark.parametrize("payload", [None, "", "x" * 500 * KIB, {"a": ["b" * 100] * 1000}, "\0", "data: x\n\nid: y"],
                         ids=lambda payload: repr(payload)[:12])
def test_any_payload_arrives_whole(server, payload):
    """Of any size, and whatever it looks like."""
    with listening(server) as stream:
        server.broadcast("hello", payload)
        assert stream.payloads(1) == [payload]


@pytest.mark.parametrize("accept", [
    "text/event-stream", "TEXT/Event-Stream", "text/event-stream;charset=utf-8", "*/*, text/event-stream;q=0.9"])
def test_who_accepts_a_stream_gets_one(server, accept):
    """Among other types, in any case."""
    with listening(server, Accept=accept):
        pass


@pytest.mark.parametrize("accept", [None, "*/*", "text/html", "application/json", "text/event"])
def test_who_does_not_accept_a_stream_gets_an_answer_that_ends(server, accept):
    """426, which says what this port speaks."""
    assert exchange(server.url, stream_request("/chat", Accept=accept)).status == 426


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
def test_only_get_opens_a_stream(server, method):
    """405 for the others, which says what is allowed."""
    answer = exchange(server.url, stream_request("/chat").replace(b"GET", method.encode(), 1))
    assert (answer.status, answer.headers["allow"]) == (405, "GET")


def test_a_websocket_stays_one(server):
    """A client that upgrades gets frames, whatever else it accepts."""
    with RawClient(server.url, Accept="text/event-stream") as client:
        assert still_reaches(server, client)


def test_an_old_proxy_may_ask_too(server):
    """HTTP/1.0 is what nginx speaks to its upstreams unless told otherwise."""
    with Stream(server.url, request=stream_request("/", version="1.0")) as stream:
        stream.hello()
        server.broadcast("hello", 1)
        assert stream.payloads(1) == [1]


def test_nothing_is_compressed(server):
    """A compressor would keep events until it has enough of them."""
    with listening(server, Accept_Encoding="gzip, br, deflate") as stream:
        server.broadcast("hello", "x" * 10_000)
        assert stream.payloads(1) == ["x" * 10_000]


# ---- Clients that others wrote ---------------------------------------------------------------------------------


def test_the_standard_library_can_listen(server):
    """http.client reads line by line, each as soon as it is there."""
    target = urlsplit(server.url)
    with closing(http.client.HTTPConnection(target.hostname, target.port, timeout=PATIENCE)) as client:
        client.request("GET", "/", headers={"Accept": "text/event-stream"})
        with client.getresponse() as answer:
            assert answer.status == 200
            lines = iter(answer.readline, b"")
            assert b"wsqueue.hello" in next(line for line in lines if line.startswith(b"data: "))
            for number in range(3):
                server.broadcast("hello", number)
                line = next(line for line in lines if line.startswith(b"data: "))
                assert json.loads(line[6:])["payload"] == number


@contextmanager
def curl(*options):
    """A real curl; what it prints can be read as soon as it prints it."""
    command = ["curl", "--silent", "--show-error", "--no-buffer", "--noproxy", "*", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def http_url(server, path="/"):
    return server.url.replace("ws", "http", 1) + path


def curl_messages(process):
    """What curl prints, as messages."""
    parser = StreamParser()
    for line in process.stdout:
        yield from parser.feed(line)


@needs_curl
def test_curl_shows_each_event_at_once(tmp_path):
    """The next one is not sent before the last one was seen: nothing on the way waits for more."""
    directory = str(tmp_path / "queue")
    with spawn_server("--queue", directory) as server:
        with curl("-H", "Accept: text/event-stream", http_url(server, "/chat")) as process:
            messages = curl_messages(process)
            assert json.loads(next(messages).data)["event"] == "wsqueue.hello"
            for number in range(5):
                assert queue_event(directory, "hello", number, to="/chat")
                assert json.loads(next(messages).data)["payload"] == number


@needs_curl
def test_curl_resumes_with_a_ticket(directory):
    """As the README says it: the header of the standard, and a bearer token."""
    with serving(queue=directory, secret=SECRET) as server:
        options = ["-H", "Accept: text/event-stream", "-H", f"Authorization: Bearer {sign_ticket(SECRET, user=7)}"]
        with curl(*options, http_url(server)) as process:
            seen = next(curl_messages(process)).id
        everybody_has_left(server)
        for number in range(3):
            queue_event(directory, "hello", number, to=["user:7", "user:8"][number % 2])
        with curl(*options, "-H", f"Last-Event-ID: {seen}", http_url(server)) as process:
            messages = curl_messages(process)
            assert [json.loads(next(messages).data)["payload"] for _ in range(3)] == [None, 0, 2]


@needs_curl
def test_curl_sees_a_clean_end(directory):
    """When the server stops, curl's status is that of a complete answer."""
    with spawn_server("--queue", directory) as server:
        with curl("-H", "Accept: text/event-stream", http_url(server)) as process:
            next(curl_messages(process))
            server.end()
            errors = process.communicate(timeout=10 * TIME_UNIT)[1]
            assert (process.returncode, errors) == (0, b"")


# ---- Coming back -----------------------------------------------------------------------------------------------


@pytest.fixture
def past(directory):
    """A server, and the ids of the hello and of five events that were sent while a stream listened."""
    with serving(queue=directory) as server:
        with Stream(server.url) as stream:
            ids = [stream.hello()]
            for number in range(5):
                server.broadcast("hello", number)
            ids += [message.id for message in stream.messages(5)]
        everybody_has_left(server)
        yield server, ids


WAYS = {
    "header": lambda server, identity: Stream(server.url, Last_Event_ID=identity),
    "query": lambda server, identity: Stream(server.url, f"/?last_event_id={quote(identity)}"),
    "header over query": lambda server, identity: Stream(server.url, "/?last_event_id=x", Last_Event_ID=identity),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seen", [0, 2, 5])
def test_a_client_that_comes_back_gets_what_it_missed(past, way, seen):
    """Behind the hello, whose id is the one it came with; in order, then what is new, and nothing twice."""
    server, ids = past
    with WAYS[way](server, ids[seen]) as stream:
        assert stream.hello() == ids[seen]
        server.broadcast("hello", 5)
        messages = stream.messages(6 - seen)
        assert [json.loads(message.data)["payload"] for message in messages] == list(range(seen, 6))
        assert [message.id for message in messages[:-1]] == ids[seen + 1:]


@pytest.mark.parametrize("way", WAYS)
def test_a_client_that_was_away_for_too_long_is_told_to_start_anew(past, way):
    """A reset, with an id from which it goes on; then what is new."""
    server, _ = past
    with WAYS[way](server, "never-heard-of-it") as stream:
        stream.hello()
        now = stream.reset()
        server.broadcast("hello", 5)
        assert stream.payloads(1) == [5]
    assert missed_since(server, now) == [5]


def missed_since(server, identity):
    """The payloads that a client gets which comes back with this id, and no reset."""
    with Stream(server.url, Last_Event_ID=identity) as stream:
        assert stream.hello() == identity
        caught_up(server, stream)
        server.broadcast("end", "end")
        return list(iter(lambda: stream.payloads(1)[0], "end"))


def caught_up(server, stream):
    """The client has got what it missed, and is among those to whom events are sent."""
    ours = stream.socket.getsockname()
    eventually(lambda: [conn for conn in server.registry.audience() if tuple(conn.address) == ours],
               what="a client that has caught up")


@pytest.mark.parametrize("target", ["/", "/?last_event_id="])
def test_a_new_client_begins_now(past, target):
    """Its hello has an id from which nothing has been missed, and nothing old follows."""
    server, _ = past
    with Stream(server.url, target) as stream:
        now = stream.hello()
        server.broadcast("hello", 5)
        assert stream.payloads(1) == [5]
    assert missed_since(server, now) == [5]


def test_an_id_is_good_for_either_kind_of_client(past):
    """A page may go on by WebSocket where its stream ended, and the other way round."""
    server, ids = past
    with RawClient(server.url, f"/?last_event_id={quote(ids[3])}") as client:
        assert client.payloads(3) == [None, 3, 4]
    with Stream(server.url, Last_Event_ID=ids[3]) as stream:
        assert stream.payloads(3) == [None, 3, 4]


HOSTILE = ["\n\ndata: x", "\r\ndata: x\r\n\r\n", "\rdata: x\r\r", "a\nid: b", "\0", "a\0b", "x" * 10 * KIB, "\u2028",
           "é", "☕", "%0A", "a b", " ", "\t", "id: 1", "'\"<script>", "\x1b[2J", "../../etc/passwd", "\ud800"]


@pytest.mark.parametrize("identity", HOSTILE, ids=lambda identity: repr(identity)[:16])
def test_an_id_cannot_smuggle_anything_into_the_stream(past, identity):
    """Whatever a link makes a browser come with is not repeated: there is no id in the hello, and then a reset."""
    server, _ = past
    with Stream(server.url, f"/?last_event_id={quote(identity, errors='surrogatepass')}") as stream:
        assert stream.hello() == (identity if ID.fullmatch(identity) and len(identity) <= 2000 else "")
        assert stream.reset()
        server.broadcast("hello", 5)
        assert stream.payloads(1) == [5]


@pytest.mark.parametrize("identity", ["a\tb", "é", "x" * 10 * KIB, ": x", "a, b", "\x1b[2J", "\x7f"],
                         ids=lambda identity: repr(identity)[:16])
def test_an_id_in_the_header_cannot_either(past, identity):
    """It is as unknown as any other."""
    with Stream(past[0].url, Last_Event_ID=identity) as stream:
        assert stream.hello() == ""
        assert stream.reset()


@pytest.mark.parametrize("identity", ["a\rb", "a\nb", "a\0b", "\r"])
def test_a_header_that_is_none_is_refused(past, identity):
    """The ends of lines within a line make the request malformed."""
    assert exchange(past[0].url, stream_request(Last_Event_ID=identity)).status == 400


# ---- Who gets what ---------------------------------------------------------------------------------------------


def test_a_stream_is_on_the_topic_of_its_path(server):
    """And gets what is for everyone, but nothing else."""
    with listening(server, "/chat") as chat, listening(server, "/news") as news:
        for number, topic in enumerate(["/chat", "/news", None, ["/chat", "/news"], "/", "/other"]):
            server.broadcast("hello", number, to=topic)
        server.broadcast("end")
        assert chat.payloads(4) == [0, 2, 3, None] and news.payloads(4) == [1, 2, 3, None]


def test_a_handler_may_join_and_leave(server):
    """As it may for a WebSocket."""
    stream, conn = enter(server, "/chat")
    with stream:
        conn.join("room")
        conn.leave("/chat")
        for number, topic in enumerate(["/chat", "room", "/chat"]):
            server.broadcast("hello", number, to=topic)
        server.broadcast("end")
        assert stream.payloads(2) == [1, None]


def test_a_broadcast_can_leave_a_stream_out(server):
    """exclude is for it, too."""
    stream, conn = enter(server)
    with stream, listening(server) as other:
        server.broadcast("hello", 1, exclude=conn)
        server.broadcast("hello", 2)
        assert stream.payloads(1) == [2] and other.payloads(2) == [1, 2]


def test_streams_and_websockets_get_the_same_in_the_same_order(directory):
    """What two producers queued, whole and once, for each kind of client."""
    count = 300
    with serving(queue=directory) as server, ExitStack() as stack:
        streams = [stack.enter_context(listening(server)) for _ in range(3)]
        clients = [stack.enter_context(RawClient(server.url)) for _ in range(3)]
        eventually(lambda: server.get_connection_count() == 6, what="six clients")
        producers = [threading.Thread(target=produce, args=(directory, name, count)) for name in "ab"]
        for producer in producers:
            producer.start()
        got = [everyone.payloads(2 * count) for everyone in (*streams, *clients)]
        for producer in producers:
            producer.join()
    assert all(payloads == got[0] for payloads in got)
    for name in "ab":
        assert [payload for payload in got[0] if payload[0] == name] == [[name, number] for number in range(count)]


def produce(directory, name, count):
    for number in range(count):
        queue_event(directory, "hello", [name, number])


def test_hello_comes_first_whatever_goes_on():
    """While broadcasts rain down and a handler talks at once."""
    with serving({"/": lambda conn: conn.send({"event": "greeting"})}, history_events=1_000_000) as server:
        with in_threads(rain, server):
            for _ in range(50):
                with Stream(server.url) as stream:
                    stream.hello()
                    assert {event["event"] for event in stream.events(3)} <= {"greeting", "rain"}


def rain(server, over):
    while not over.wait(0.001):
        server.broadcast("rain")


# ---- Tickets and origins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kw", [
    {"target": "/chat?ticket={}"}, {"target": "/chat", "Authorization": "Bearer {}"}], ids=["query", "bearer"])
def test_a_ticket_opens_a_stream(kw):
    """For its user, and with its topics."""
    ticket = sign_ticket(SECRET, user=7, topics=["room"], path="/chat")
    with serving(secret=SECRET) as server:
        stream, conn = enter(server, **{name: value.format(ticket) for name, value in kw.items()})
        with stream:
            assert conn.user == "7"
            for number, topic in enumerate(["user:7", "user:8", "room", "/chat"]):
                server.broadcast("hello", number, to=topic)
            assert stream.payloads(3) == [0, 2, 3]


def test_without_a_good_ticket_there_is_no_stream():
    """401 with a sentence, which ends the answer."""
    with serving(secret=SECRET) as server:
        for ticket in (None, "x", sign_ticket(SECRET, path="/other"), sign_ticket("another secret", user=7)):
            answer = exchange(server.url, stream_request("/chat" if ticket is None else f"/chat?ticket={ticket}"))
            assert answer.status == 401 and answer.headers["content-type"].startswith("text/plain")
            assert ticket is None or ticket not in answer.body
        everybody_has_left(server)


def cors(stream):
    return {name: value for name, value in stream.headers.items() if name.startswith("access-control-")}


def test_a_page_of_the_own_host_may_listen(server):
    """On any port, with its cookies."""
    with listening(server, Host="push.example.com:8081", Origin="https://push.example.com") as stream:
        assert cors(stream) == {"access-control-allow-origin": "https://push.example.com",
                                "access-control-allow-credentials": "true"}
        assert "origin" in stream.headers["vary"].lower()


def test_a_page_that_is_allowed_may_listen():
    """Its very origin is in the answer: with cookies, a browser takes no other."""
    with serving(allowed_origins=["https://a.example", "https://b.example"]) as server:
        for origin in ("https://a.example", "https://b.example"):
            with listening(server, Origin=origin) as stream:
                assert cors(stream)["access-control-allow-origin"] == origin
                assert "origin" in stream.headers["vary"].lower()
            everybody_has_left(server)


def test_every_page_may_listen_where_all_are_allowed():
    """Then without cookies: `*` does not go with them, and no origin is echoed instead."""
    with serving(allowed_origins=["*"]) as server:
        for origin in ("https://anyone.example", "null"):
            with listening(server, Origin=origin) as stream:
                assert cors(stream) == {"access-control-allow-origin": "*"}
            everybody_has_left(server)


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "https://push.example.com.evil.example", "x", "//",
                                    "https://a.example:444", "http://a.example", "https://A.example", "https://[", "*"])
def test_a_page_that_is_not_allowed_may_not_listen(origin):
    """403, and no header that lets it read even that."""
    with serving(allowed_origins=["https://a.example"]) as server:
        answer = exchange(server.url, stream_request(Host="push.example.com", Origin=origin))
        assert answer.status == 403 and not [name for name in answer.headers if name.startswith("access-control")]


def test_who_is_no_page_needs_no_origin(server):
    """And is told nothing about pages."""
    with listening(server) as stream:
        assert cors(stream) == {}


# ---- Handlers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message, data", [
    ({"event": "x", "payload": [1]}, '{"event":"x","payload":[1]}'),
    ([1, "ä"], '[1,"ä"]'),
    ("text", "text"),
    (" two  spaces", " two  spaces"),
    ("several\nlines", "several\nlines"),
    ("ends\n", "ends\n"),
    ("\n", "\n"),
    ("a\r\nb\rc", "a\nb\nc"),
    ("x\n\nid: evil\ndata: y\n\n", "x\n\nid: evil\ndata: y\n\n"),
    (": no comment", ": no comment"),
    ("\0☕\u2028\u0085\x0b\x0c", "\0☕\u2028\u0085\x0b\x0c"),
], ids=spelled)
def test_a_handler_can_send_to_a_stream(message, data):
    """Text and JSON, in as many lines of data as it takes; it has no id, so that the last event's stays the last."""
    with serving({"/": lambda conn: conn.send(message)}) as server:
        with Stream(server.url) as stream:
            identity = stream.hello()
            assert stream.messages(1) == [(data, identity)]
            server.broadcast("hello", 1)
            assert stream.payloads(1) == [1]


def test_binary_has_no_place_in_a_stream(server):
    """TypeError, which says what has; and the stream goes on."""
    stream, conn = enter(server)
    with stream:
        for message in (b"bytes", bytearray(b"x"), memoryview(b"x"), 1, None):
            with pytest.raises(TypeError, match="event stream"):
                conn.send(message)
        assert conn.send("text") is True
        assert stream.messages(1)[0].data == "text"


def test_send_says_whether_the_client_is_there(server):
    """False once it has left."""
    stream, conn = enter(server)
    stream.socket.close()
    everybody_has_left(server)
    assert conn.send("text") is False and not conn.is_connected()


def test_recv_ends_when_the_client_leaves():
    """A stream says nothing, so a handler that waits for it waits for its end."""
    waited, ended = threading.Event(), threading.Event()

    def handler(conn):
        with pytest.raises(TimeoutError):
            conn.recv(timeout=0.01)
        waited.set()
        assert list(conn) == []
        ended.set()

    with serving({"/": handler}) as server:
        with listening(server) as stream:
            stream.socket.sendall(b"nobody listens\r\n\r\n")
            assert waited.wait(PATIENCE)
            server.broadcast("hello", 1)
            assert stream.payloads(1) == [1] and not ended.is_set()
        assert ended.wait(PATIENCE)


def test_a_handler_that_has_returned_does_not_hold_events_up(monkeypatch):
    """What the client is to get comes as soon as its topics are known, and not when somebody looks at the clock."""
    monkeypatch.setattr(wsqueue, "HELD_SECONDS", FOR_EVER)
    with serving({"/": lambda conn: conn.join("room")}) as server, listening(server) as stream:
        eventually(lambda: "room" in server.registry.topics(server.get_connections()[0]), what="the handler's end")
        server.broadcast("hello", 1, to="room")
        assert stream.payloads(1) == [1]


def test_a_handler_can_end_a_stream():
    """close() is a clean end, behind what was sent before; its code is for WebSockets."""
    def handler(conn):
        conn.send("last words")
        conn.close(4000, "no more")

    with serving({"/": handler}) as server, Stream(server.url) as stream:
        stream.hello()
        assert [message.data for message in stream.read_to_end()] == ["last words"]
        assert stream.parser.at_rest
        everybody_has_left(server)


def test_a_handler_that_fails_ends_its_stream(caplog):
    """Cleanly, with a traceback in the log."""
    with serving({"/": lambda conn: 1 / 0}) as server, Stream(server.url) as stream:
        stream.hello()
        assert stream.read_to_end() == [] and stream.parser.at_rest
    assert "ZeroDivisionError" in caplog.text


def test_a_handler_knows_what_was_asked_for():
    """Path, query, headers and address are those of the request."""
    seen = []
    with serving({"/chat": seen.append}) as server:
        with listening(server, "/chat?room=1", X_Test="2") as stream:
            eventually(lambda: seen, what="the handler")
            conn = seen[0]
            assert (conn.path, conn.query, conn.headers["x-test"]) == ("/chat", {"room": "1"}, "2")
            assert tuple(conn.address) == stream.socket.getsockname()


def test_messages_are_for_websockets():
    """A callback for messages never hears of a stream."""
    got = []
    with serving(callbacks={"/": lambda conn, message: got.append(message)}) as server, listening(server) as stream:
        stream.socket.sendall(b"\x81\x82\0\0\0\0hi" * 10)
        assert still_reaches(server, stream)
    assert got == []


# ---- Who does not behave ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [b"x", b"\0" * 100, b"\x81\x82\0\0\0\0hi", b"\x88\x80\0\0\0\0",
                                   stream_request(), b"\r\n\r\n",
                                   b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"x" * 100 * KIB],
                         ids=lambda later: repr(later[:12]))
@pytest.mark.parametrize("at_once", [True, False])
def test_what_a_client_sends_later_is_ignored(server, later, at_once):
    """In one piece with the request or behind it: no frame, no second request, no error."""
    with Stream(server.url, request=stream_request() + (later if at_once else b"")) as stream:
        stream.hello()
        if not at_once:
            stream.socket.sendall(later)
        for number in range(3):
            server.broadcast("hello", number)
        assert stream.payloads(3) == [0, 1, 2]
        assert stream.parser.at_rest


def test_a_client_that_never_stops_talking_is_closed(caplog):
    """It has nothing to say, and reading it costs the others; the log says so once."""
    with caplog.at_level(logging.INFO), serving() as server, listening(server) as witness:
        with listening(server) as stream, pytest.raises(OSError, match=r"reset|[Pp]ipe"):
            talk(stream.socket)
        eventually(lambda: server.get_connection_count() == 1, what="the end of the flood")
        assert still_reaches(server, witness)
        assert closed_totals(server) == {"1008": "1"}
    assert len([record for record in caplog.records if "broke the protocol" in record.getMessage()]) == 1


def talk(sock):
    """For longer than a server needs to end it."""
    piece, deadline = bytes(MIB), time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        sock.sendall(piece)


def stalled(server):
    """A stream that reads its hello and then nothing more, with little room in its kernel."""
    return enter(server, receive_buffer=4 * KIB)


def flood(server, conn, size=64 * KIB):
    """Events until the connection is given up; returns how many."""
    sent = []

    def given_up():
        server.broadcast("flood", [len(sent), "x" * size])
        sent.append(None)
        return not conn.is_connected()

    eventually(given_up, what="the end of the stalled stream")
    return len(sent)


def test_a_stalled_stream_is_closed_at_the_outbox_limit(caplog):
    """As a WebSocket would be; another, which reads, misses nothing."""
    with serving(outbox_bytes=256 * KIB) as server, listening(server) as witness, ThreadPoolExecutor(1) as pool:
        stream, conn = stalled(server)
        with stream:
            got = pool.submit(witness.read_to_end)
            count = flood(server, conn)
            eventually(lambda: server.get_connection_count() == 1, what="the end of the stalled stream")
            assert closed_totals(server) == {"outbox": "1"}
            server.stop()
        assert [json.loads(message.data)["payload"][0] for message in got.result(PATIENCE)] == list(range(count))
    assert any("outbox_bytes" in message for message in louder_than_info(caplog))


def test_a_stalled_stream_is_closed_at_the_send_timeout(caplog):
    """Also if no more is sent to it."""
    with serving(outbox_bytes=64 * MIB, send_timeout=0.1) as server:
        stream, conn = stalled(server)
        with stream:
            server.broadcast("large", "x" * 8 * MIB)
            everybody_has_left(server)
        assert not conn.is_connected() and closed_totals(server) == {"send_timeout": "1"}
    assert any("send_timeout" in message for message in louder_than_info(caplog))


def test_what_a_closed_stream_had_got_is_in_order():
    """It is cut at its end: a client that reads on sees the first messages, each whole, and can come back for more."""
    with serving(outbox_bytes=256 * KIB) as server:
        stream, conn = stalled(server)
        with stream:
            flood(server, conn)
            with suppress(ConnectionResetError):
                stream.read_to_end()
            got = [json.loads(message.data)["payload"] for message in stream._messages]
            assert got == [[number, "x" * 64 * KIB] for number in range(len(got))]


def test_comments_keep_a_silent_stream_alive():
    """Proxies close what says nothing; and they disturb no message."""
    with serving(ping_interval=0.01) as server, listening(server) as stream:
        while stream.parser.comments < 2:
            stream.read_more()
        assert still_reaches(server, stream)
        assert server.get_connection_count() == 1  # it answers no ping, and need not


def test_a_stream_whose_client_is_gone_without_a_word_is_noticed():
    """What keeps it alive fills the kernel's room some day, or is answered with a reset."""
    with serving(ping_interval=0.01) as server:
        stream, _ = enter(server)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()
        everybody_has_left(server)


def test_a_client_that_leaves_is_noticed(server):
    """At once, without anything being sent to it; its topics go with it."""
    with listening(server, "/chat"):
        eventually(lambda: server.registry.sizes(10) == {"/chat": 1}, what="its topic")
    everybody_has_left(server)
    assert server.registry.sizes(10) == {}


def test_streams_count_as_clients():
    """max_clients is about both kinds; so are the counts."""
    with serving(max_clients=2) as server, listening(server), RawClient(server.url):
        eventually(lambda: server.get_connection_count() == 2, what="two clients")
        answer = exchange(server.url, stream_request())
        assert answer.status == 503 and answer.headers["retry-after"]
        monitor = json.loads(exchange(server.url, b"GET /monitor.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").body)
        assert (monitor["clients"], monitor["streams"]) == (2, 1)


def test_streams_cost_no_thread(server):
    """As many threads for a hundred as for none."""
    def threads():
        return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("wsqueue"))

    before = threads()
    with ExitStack() as stack:
        streams = [stack.enter_context(Stream(server.url)) for _ in range(100)]
        for stream in streams:
            stream.hello()
        server.broadcast("hello", 1)
        assert [stream.payloads(1) for stream in streams] == [[1]] * 100
        assert threads() == before


# ---- The end, and TLS ------------------------------------------------------------------------------------------


def test_stop_ends_a_stream_cleanly(directory):
    """Behind what was queued before; no reset, and nothing is cut."""
    with serving(queue=directory) as server:
        stream, _ = enter(server)
        with stream:
            for number in range(100):
                server.broadcast("hello", number)
            server.stop()
            assert [json.loads(message.data)["payload"] for message in stream.read_to_end()] == list(range(100))
            assert stream.parser.at_rest


def test_stop_waits_no_longer_than_it_says_for_a_stalled_stream():
    """A stream that takes nothing is cut off; the server is down, and its port is free."""
    with serving(close_timeout=0.1, outbox_bytes=64 * MIB) as server:
        stream, conn = stalled(server)
        with stream:
            server.broadcast("large", "x" * 8 * MIB)
            server.stop()
            assert not conn.is_connected() and not server.is_running()


def test_a_stream_over_tls(tmp_path):
    """The same; stop() ends it with a close_notify, so that nobody can cut it unnoticed."""
    def wrap(sock):
        return TRUSTING.wrap_socket(sock, server_hostname="127.0.0.1", suppress_ragged_eofs=False)

    with serving(**write_certificate(tmp_path)) as server:
        stream, conn = enter(server, wrap=wrap)
        with stream:
            server.broadcast("large", "x" * 500 * KIB)
            assert stream.payloads(1) == ["x" * 500 * KIB]
            assert conn.send("text")
            assert stream.messages(1)[0].data == "text"
            server.stop()
            assert stream.read_to_end() == []


@needs_curl
def test_curl_over_tls(tmp_path):
    """https:// is what wss:// is."""
    certificate = write_certificate(tmp_path)
    with AUTHORITY.cert_pem.tempfile(dir=str(tmp_path)) as trusted, serving(**certificate) as server:
        with curl("--cacert", trusted, "-H", "Accept: text/event-stream", http_url(server)) as process:
            messages = curl_messages(process)
            assert json.loads(next(messages).data)["event"] == "wsqueue.hello"
            server.broadcast("hello", 1)
            assert json.loads(next(messages).data)["payload"] == 1


def test_a_server_without_history_has_streams_too():
    """Who comes back with an id that is not the current one is told to start anew."""
    with serving(history_events=0) as server:
        with Stream(server.url) as stream:
            stream.hello()
            caught_up(server, stream)
            server.broadcast("hello", 1)
            [message] = stream.messages(1)
        everybody_has_left(server)
        server.broadcast("hello", 2)
        with Stream(server.url, Last_Event_ID=message.id) as stream:
            stream.hello()
            stream.reset()
            caught_up(server, stream)
            server.broadcast("hello", 3)
            assert stream.payloads(1) == [3]


def test_a_new_client_of_a_server_without_history_is_not_told_that_it_missed_something():
    """What is sent while its handler still joins topics comes to it, too."""
    at_work, go_on = threading.Event(), threading.Event()

    def handler(conn):
        at_work.set()
        assert go_on.wait(PATIENCE)

    with serving({"/": handler}, history_events=0) as server, Stream(server.url) as stream:
        assert at_work.wait(PATIENCE)
        server.broadcast("hello", 1)
        go_on.set()
        stream.hello()
        assert stream.payloads(1) == [1]
