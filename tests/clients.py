"""Clients that say and see exactly what goes over the wire, and a server for them.

Nothing here uses the module's own frames: a mistake that it made twice would cancel itself out.
"""

import asyncio
import json
import os
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import websocket
from websockets.asyncio.client import connect as websockets_connect

from helpers import TIME_UNIT, eventually
from wsqueue import WebSocketServer

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
MASK = b"\x37\xfa\x21\x3d"  # the one in the examples of RFC 6455, section 5.7
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # the one of section 1.3
PATIENCE = 20.0 * TIME_UNIT  # what comes at all comes sooner, but for a disk that stalls

# A developer's proxy is not for clients that talk to their own machine.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost,::1"


@contextmanager
def serving(handlers=None, callbacks=None, check=None, **settings):
    """A started server on a free port; stopped when the block ends. check: given to authenticate()."""
    server = WebSocketServer(port=0, **{"close_timeout": 1.0, **settings})
    if check:
        server.authenticate(check)
    for path, handler in (handlers or {}).items():
        server.on(path, handler)
    for path, callback in (callbacks or {}).items():
        server.on_message(path, callback)
    server.start(background=True)
    try:
        yield server
    finally:
        server.stop()


# ---- Frames ------------------------------------------------------------------------------------------------


def frame_head(first, size, masked=True, form=None):
    """The bytes before mask and payload; `form` 7, 16 or 64 forces how the length is written."""
    form = form or (7 if size < 126 else 16 if size < 65536 else 64)
    marker = {7: size, 16: 126, 64: 127}[form]
    length = {7: b"", 16: struct.pack("!H", size & 0xFFFF), 64: struct.pack("!Q", size)}[form]
    return bytes((first, marker | (0x80 if masked else 0))) + length


def client_frame(opcode, payload=b"", *, fin=True, mask=MASK):
    """One frame as a client sends it."""
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return frame_head(opcode | (0x80 if fin else 0), len(payload)) + mask + masked


def close_payload(code, reason=""):
    return struct.pack("!H", code) + reason.encode()


# ---- HTTP --------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a server said instead of 101."""

    status: int
    headers: dict
    body: str


def handshake(target="/", **changes):
    """A handshake request; `Some_Name="value"` sets a header, None leaves it out."""
    headers = {
        "Host": "127.0.0.1",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": KEY,
        "Sec-WebSocket-Version": "13",
    }
    return request_head(target, {**headers, **changes}).encode()


def stream_request(target="/", version="1.1", **changes):
    """A request for an event stream, likewise."""
    fields = {"Host": "127.0.0.1", "Accept": "text/event-stream", **changes}
    return request_head(target, fields, version).encode("latin-1")


def request_head(target, fields, version="1.1"):
    """A "_" in a field's name stands for a "-"; a field that is None is left out."""
    fields = {name.replace("_", "-"): value for name, value in fields.items()}
    lines = [f"{name}: {value}\r\n" for name, value in fields.items() if value is not None]
    return f"GET {target} HTTP/{version}\r\n{''.join(lines)}\r\n"


def open_socket(url, receive_buffer=None):
    """A connected socket with a deadline; a small receive buffer makes a client that takes little."""
    target = urlsplit(url)
    sock = socket.socket(socket.AF_INET6 if ":" in target.hostname else socket.AF_INET)
    try:
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(PATIENCE)
        sock.connect((target.hostname, target.port))
    except BaseException:
        sock.close()
        raise
    return sock


def read_to_end(sock):
    """All that comes until the peer closes."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def exchange(url, request):
    """Send a request, read to the end of the stream, and return the Answer."""
    with open_socket(url) as sock:
        sock.sendall(request)
        return parse_answer(read_to_end(sock))


def parse_answer(data):
    head, _, body = data.decode("latin-1").partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(int(first.split(" ")[1]), headers, body)


# ---- WebSocket, byte by byte -------------------------------------------------------------------------------


class Wire:
    """A socket over which a request went and was answered, and what has come over it and is not taken yet."""

    def __init__(self, sock, request, status):
        self.socket, self._data = sock, bytearray()
        try:
            sock.sendall(request)
            self.head = self._take_until(b"\r\n\r\n").decode("latin-1")
            assert self.head.startswith(f"HTTP/1.1 {status} "), self.head
        except BaseException:
            sock.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def read_more(self):
        """Receive once, whatever there is, and return it; what takes it will find it."""
        data = self.socket.recv(65536)
        if not data:
            raise EOFError(f"the stream ended with {bytes(self._data[-80:])!r} unread")
        self._data += data
        return data

    def _take_until(self, end):
        while end not in self._data:
            self.read_more()
        taken, _, self._data = self._data.partition(end)
        return bytes(taken)


class RawClient(Wire):
    """A WebSocket client that does nothing by itself, but for recv(), which answers pings."""

    def __init__(self, url, target="/", *, receive_buffer=None, behind=b"", **headers):
        """behind: sent in one piece with the handshake request."""
        super().__init__(open_socket(url, receive_buffer), handshake(target, **headers) + behind, 101)

    def send(self, message):
        """Send a whole message, text for str and binary for bytes."""
        text = isinstance(message, str)
        self.send_frame(TEXT if text else BINARY, message.encode() if text else message)

    def send_frame(self, opcode, payload=b"", **frame):
        self.socket.sendall(client_frame(opcode, payload, **frame))

    def _take(self, size):
        while len(self._data) < size:
            self.read_more()
        taken = bytes(self._data[:size])
        del self._data[:size]
        return taken

    def read_frame(self):
        """(opcode, payload) of the next frame, which must be whole and unmasked, as every frame of a server."""
        first, size = self._take(2)
        assert first & 0xF0 == 0x80, f"first byte {first:#x}"
        assert size < 128, "a server must not mask"
        if size > 125:
            size = int.from_bytes(self._take(2 if size == 126 else 8), "big")
        return first & 0x0F, self._take(size)

    def recv(self):
        """The next message."""
        while True:
            opcode, payload = self.read_frame()
            if opcode == PING:
                self.send_frame(PONG, payload)
            elif opcode in (TEXT, BINARY):
                return payload.decode() if opcode == TEXT else payload
            else:
                assert opcode == PONG, f"opcode {opcode}, payload {payload!r}, instead of a message"

    def events(self, count):
        """The next messages, each a JSON text."""
        return [json.loads(self.recv()) for _ in range(count)]

    def payloads(self, count):
        return [event["payload"] for event in self.events(count)]

    def read_close(self):
        """The code and the reason of the close frame; what comes before it is skipped."""
        while True:
            opcode, payload = self.read_frame()
            if opcode == CLOSE:
                return (int.from_bytes(payload[:2], "big") if payload else None), payload[2:].decode()

    def close_code(self):
        return self.read_close()[0]

    def ended(self):
        """Whether nothing but the end of the stream is left; a reset raises ConnectionResetError."""
        return not self._data and not self.socket.recv(1)

    def close(self, code=1000):
        """The whole closing handshake, and the end; returns the code that the server answered with."""
        self.send_frame(CLOSE, close_payload(code))
        answer = self.close_code()
        assert self.ended()
        self.socket.close()
        return answer


def enter(server, target="/", **kw):
    """A client that the server knows, and the server's side of it."""
    known = server.get_connections()
    client = RawClient(server.url, target, **kw)
    fresh = eventually(lambda: [conn for conn in server.get_connections() if conn not in known], what="the client")
    return client, fresh[0]


def everybody_has_left(server):
    eventually(lambda: server.get_connection_count() == 0, what="every client to be gone")


def still_reaches(server, client):
    """Whether a client that was not concerned by what happened is served: the next it gets is a broadcast."""
    server.broadcast("still", 1)
    return client.events(1)[0]["payload"] == 1


class Reader(threading.Thread):
    """Keeps a client reading, for `count` messages or to the end; `pause` seconds after each make it a slow one."""

    def __init__(self, client, count=None, pause=0.0):
        super().__init__(name="test-reader", daemon=True)
        self.client, self.count, self.pause = client, count, pause
        self.messages = []
        self.error = None  # how the stream ended, if it did
        self.start()

    def run(self):
        try:
            while self.count is None or len(self.messages) < self.count:
                self.messages.append(self.client.recv())
                if self.pause:
                    time.sleep(self.pause)
        except (EOFError, OSError, AssertionError) as error:
            self.error = error

    def payloads(self):
        """All of them, once the thread has read what it was to read."""
        self.join(3 * PATIENCE)
        assert not self.is_alive(), f"only {len(self.messages)} messages came"
        assert self.count is None or self.error is None, f"after {len(self.messages)} messages: {self.error!r}"
        return [json.loads(message)["payload"] for message in self.messages]


@contextmanager
def in_threads(action, *args):
    """Run action(*args, over) in four threads until the block ends, which sets `over`; what one raises is raised."""
    over = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(action, *args, over) for _ in range(4)]
        try:
            yield
        finally:
            over.set()
        for call in calls:
            call.result(PATIENCE)


# ---- Clients that come back --------------------------------------------------------------------------------


class EventStream(Wire):
    """A client of server-sent events that does nothing by itself."""

    def __init__(self, url, target="/", *, receive_buffer=None, **headers):
        """Some_Name="value" sets a header."""
        super().__init__(open_socket(url, receive_buffer), stream_request(target, **headers), 200)
        assert "transfer-encoding" not in self.head.lower(), self.head

    def recv(self):
        """The id (None: it has none) and the data of the next message; comments and the time to retry are skipped."""
        found = {}
        while True:
            line = self._take_until(b"\n").decode()
            name, _, value = line.partition(":")
            if not line and "data" in found:
                return found.get("id"), found["data"]
            if name in ("id", "data"):
                assert name not in found, f"{name} comes twice: {found}, {line!r}"
                found[name] = value[1:] if value.startswith(" ") else value
            else:
                assert name in ("", "retry"), f"{line!r} in an event stream"


class Received(NamedTuple):
    """An event as a client gets it that may come back."""

    id: object  # None: it has none
    event: str
    payload: object


def with_last_id(target, last):
    """The target of a WebSocket client that may come back, or does."""
    return f"{target}{'&' if '?' in target else '?'}last_event_id={quote(last, safe='')}"


class Follower:
    """A client that can be followed by another one where it broke off, by the id of the last thing it received."""

    def __init__(self, url, target="/", last="", *, stream=False, **options):
        """stream: it reads server-sent events. options: those of RawClient, or of EventStream."""
        self.last, self._stream = last, stream
        if stream:
            came_with = {"Last_Event_ID": last} if last else {}
            self.client = EventStream(url, target, **came_with, **options)
        else:
            self.client = RawClient(url, with_last_id(target, last), **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.socket.close()

    def recv(self):
        received = self._receive()
        if received.id is not None:
            self.last = received.id
        return received

    def _receive(self):
        if self._stream:
            number, data = self.client.recv()
            message = json.loads(data)
            assert list(message) == ["event", "payload", "timestamp"], message
        else:
            message = json.loads(self.client.recv())
            assert list(message)[:3] == ["event", "payload", "timestamp"], message
            number = message.get("id")
            assert len(message) == (3 if number is None else 4), message
        return Received(number, message["event"], message["payload"])

    def hello(self):
        """What comes first; returns its id."""
        first = self.recv()
        assert (first.event, first.payload) == ("wsqueue.hello", None), first
        return first.id

    def join_audience(self):
        """Wait until it is sent what comes, and need not be caught up: nothing it says is read before that."""
        self.client.send_frame(PING)
        assert self.client.read_frame() == (PONG, b"")

    def payloads(self, count):
        """Of the next events."""
        return [self.recv().payload for _ in range(count)]


# ---- Clients that others wrote -----------------------------------------------------------------------------


@contextmanager
def use_websockets(url, **options):
    """The `websockets` package: its asyncio client, one step at a time.

    Its other client reads in one thread and writes in another, and OpenSSL forbids that for one connection:
    of 5,000 TLS connections ten never got beyond the handshake.
    """
    with closing(asyncio.new_event_loop()) as loop:

        def wait_for(step):
            return loop.run_until_complete(asyncio.wait_for(step, PATIENCE))

        try:
            client = wait_for(websockets_connect(url, **options))
            yield SimpleNamespace(
                send=lambda message: wait_for(client.send(message)),
                recv=lambda: wait_for(client.recv()),
                response=client.response,
            )
            wait_for(client.close())
            client.transport.abort()  # before Python 3.11 it warns of one that the server was the first to close
        finally:
            wait_for(asyncio.sleep(0))  # what is broken off is closed in the loop's next turn


@contextmanager
def use_websocket_client(url):
    """The `websocket-client` package."""
    with closing(websocket.create_connection(url, timeout=PATIENCE)) as client:

        def send(message):
            client.send(message) if isinstance(message, str) else client.send_binary(message)

        yield SimpleNamespace(send=send, recv=client.recv)


LIBRARIES = {"websockets": use_websockets, "websocket-client": use_websocket_client}
