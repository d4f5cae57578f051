#!/usr/bin/env python3
"""wsqueue: real-time push for code that is not asyncio.

    queue_event("ws_queue", "order_paid", {"id": 42})         # any process: a web request, a cron job
    wsqueue send order_paid '{"id": 42}' --queue ws_queue     # any shell; PHP writes a file and renames it
    wsqueue serve --queue ws_queue                            # one server: every browser gets it at once
    queue_event("redis://host/0", "order_paid", {"id": 42})   # several machines; also sqlite, postgresql, amqp

    server = WebSocketServer().host("127.0.0.1").port(8081).event_queue("ws_queue")
    server.on("/chat", lambda conn: conn.send({"event": "welcome"}))
    server.start()                                            # or start(background=True) inside your process

The data's way, which is also the order of this file:

    queue_event() --> file in the queue directory --> EventQueue.take() --> Event
      any process        <name>.json                    the queue thread      |
                                                                              v
    browser <-- socket <-- Connection.send_frames() <-- ClientRegistry.audience(to)

Where to look; each section has a banner with its number, and uses what stands above it:

     2 SETTINGS, limits                        8 ClientRegistry (who gets what), History (who comes back)
     3 WsqueueError and what it may be         9 sign_ticket, verify_ticket
     4 Event, from and to JSON                10 WebSocketServer, IOThread (handshake, pings, slow clients), TLS
     5 DirectoryQueue, queue_event            11 BrokerQueue: SQL, Redis, AMQP; OutboxQueue, of a transaction
     6 FrameParser, compression               12 the monitor page, /healthz, /metrics; the JavaScript client
     7 Connection (send, recv, close)         13 main: the commands

The disk format, a contract with producers in every language:

    ws_queue/NAME.json      ready; NAME does not start with a dot. One JSON object, or an array of them (sent
                            all or nothing): {"event": str, "payload": any, "timestamp": int, "queued_at": float,
                            "to": topic or [topics]}. Only "event" is required; without "to", everyone gets it.
    ws_queue/.*.json.tmp    being written; rename it when it is whole
    ws_queue/.wsqueue.lock  held (flock) by the one server that consumes the directory
    ws_queue/failed/        what could not be understood, each beside its .reason
    ws_queue/history/       the server's own: what it sent last, for clients that come back

Where one machine is not enough, a URL stands for the directory: BrokerQueue (section 11) reads a table, a stream or an
exchange whose entries hold what such a file holds; every server gets every entry.

Events go out in the order of the first 13 hexadecimal digits that follow a "_" in the name (PHP's uniqid(): seconds
and microseconds), else of the name's leading number (Unix time), else of the file's mtime.

Threads: accept (one; it also answers a handshake whose request is here already), I/O (one: every connection is parked
with it, from the TLS handshake to the last byte), queue (one daemon), sender (one, beside whoever sends to many),
handler (one for each handler while it runs), up to 16 each for on_message callbacks and for authenticate(), only where
there are any, and standby (one, in place of all others, while another process serves the queue). Lock order: fork > the
server's lifecycle, and sending > history > registry > connection; those of an inbox, of the totals, of a pool and of
who queues at a URL are leaves, and the queue's flock is not waited for. User code runs under no lock; nothing is logged
under the history's, the registry's or a connection's, nor while events are sent, because a log handler may send some.

Guarantees: what was queued is never lost (a crash repeats an event, under the same id, it never drops one); each
client sees a producer's events in the order it queued them; who comes back with the id of its last event gets what it
missed, without a gap or a repeat, or is told that it cannot; nobody gets what is for others; a publish never waits for
the server and never fails because it is down; a client that stalls, lies or floods is closed, and the others do not
notice.
"""

# 2 ─ Imports, constants, settings ─────────────────────────────────────────────────────────────────────────────────
# Importing this module imports the standard library alone, starts no thread and configures no logging. What only a
# server or a command needs is imported where it is used.

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import json
import logging
import operator
import os
import re
import select
import selectors
import socket
import stat
import struct
import sys
import threading
import time
import typing
import weakref
from collections import deque
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import Any, Callable, ClassVar, Iterable, Iterator, Mapping, NamedTuple, Protocol, Sequence, Tuple, Union

__all__ = [
    "BrokerQueue", "ClientRegistry", "Connection", "ConnectionClosed", "DirectoryQueue", "Event", "EventError",
    "EventQueue", "OutboxQueue", "ProtocolError", "QueueError", "QueueInUseError", "ServerError", "SettingError",
    "WebSocketServer", "WsqueueError", "close_queues", "main", "open_queue", "queue_event", "queue_events",
    "sign_ticket",
]
__version__ = "0.1.0"

if __name__ == "__main__":  # run as a script: `import wsqueue` elsewhere must find this copy, not load another
    sys.modules.setdefault("wsqueue", sys.modules[__name__])

log = logging.getLogger("wsqueue")

KIB, MIB = 1024, 1024 * 1024
CATCH_UP_BYTES = 64 * KIB  # of what a client missed in one write; not shared, so each that does not read costs as much
CHECKS_WAITING = 1024     # requests that wait for authenticate(); beyond it, 503
TICK_BYTES = 256 * KIB    # events joined into one write: larger adds memory, not speed
READ_BYTES = 64 * KIB     # one recv
HEAD_BYTES = 16 * KIB     # an HTTP request head; browsers send under 1 KiB, cookies can make it 8
HEAD_LINES = 101          # the request's line and its headers; browsers send 20
HALF_OPEN = 4096          # connections still in the handshake; beyond it the oldest makes room
IDLE_FRAMES = 1000        # a second, of 16 KiB: pings, pongs, scraps, messages that nobody consumes; more is a flood
SCRAP_BYTES = 64          # a smaller fragment is a scrap: one message may be megabytes of them, and cost as much
HOLD_TICKS = 2            # polls that a batch waits for a file which is still being written, or stamped ahead
GIVE_UP_SECONDS = 2.0     # a file that does not parse and does not change for so long is broken, not unfinished
SWEEP_SECONDS = 3600.0    # how often, and from what age on, left-over temporary files are removed
FAILED_FILES = 1000       # kept in failed/; beyond it the oldest tenth goes
FAILED_SECONDS = 30 * 86400  # and they are kept no longer than that
UNSENT_BYTES = 128 * KIB   # what the kernel may hold for a client beyond what is on its way to it (tcp(7))
LAG_SECONDS = 1.0         # how long an event's file is kept for clients that take what they were sent, but slowly
LAGGING_TICKS = 64        # of at most TICK_BYTES; beyond it, the oldest is not kept for them any longer
LINGER_SECONDS = 1.0      # how long a peer has to close its side once both close frames are out
INBOX_MESSAGES = 64       # received and not yet consumed; beyond it the connection is not read
INBOX_BYTES = MIB         # or beyond this much memory; a character takes up to four bytes
CALLBACK_THREADS = 16     # on_message callbacks that run at the same time; as many checks of authenticate()
MONITOR_TOPICS = 50       # shown on the monitor page, the largest
MONITOR_FAILURES = 10     # files in failed/ that it shows, the newest
HELD_SECONDS = 10.0       # how long what a client missed waits for its handler to join topics
STALE_SECONDS = 10.0      # a queue thread that has not looked for so long hangs, on a dead file server for example
SHARED_LOCK = 32          # connections to one lock: a handler's send() waits for as many sends of a broadcast at most
SENDER_PART = 128         # connections that a sender takes at a time, so that two of them end together
SENDERS_FROM = 256        # clients from which a second sender pays: to wake it takes as long as ten sends
TICK_PART = 1000          # connections looked at in one go: to look at 10,000 would hold up an event for 8 ms
SPARE_FILES = 16          # descriptors that clients do not get: without them the queue cannot be read
ACCEPTS = 64              # connections accepted in one go
BACKLOG = 1024            # connections the kernel holds for accept(); websocket_server's default is 5
STANDBY_SECONDS = 0.5     # how often a server that stands by looks whether the one that serves has gone
DEFLATE_LEVEL = 6         # zlib's default; 9 takes twice the time for 1 % less
TICKET_BYTES = 4 * KIB    # browsers and proxies take a URL of 8 KiB
LEEWAY_SECONDS = 30.0     # by which the clocks of who signs a ticket and of the server may differ
MOST_PRODUCERS = 64       # queues at URLs that queue_event() keeps connected in a process
FINAL_BLOCKS = 64         # in a compressed message: each costs a new zlib stream, and a client needs two bytes for one


class Setting(NamedTuple):
    """One row of the settings table: keyword argument, command line option and environment variable in one."""

    name: str
    default: Any  # its type is the setting's type
    unit: str  # "a|b": one of these words
    least: float  # the smallest value that makes sense
    meaning: str
    variable: str = ""  # of the environment; read by the command line alone


SETTINGS = (
    Setting("host", "127.0.0.1", "address", 0, "Address to listen on; 0.0.0.0 or :: for every interface.", "WS_HOST"),
    Setting("port", 8081, "port", 0, "TCP port to listen on; 0 picks a free one.", "WS_PORT"),
    Setting("queue", "", "path or URL", 0, "Queue directory, which is made if it is missing; or a URL: sqlite:///,"
            " postgresql://, redis:// or amqp://.", "WS_QUEUE_PATH"),
    Setting("node", "", "name", 0, "Of this server, among those that share a queue at a URL: by it, it goes on where it"
            " was; without it, the host's.", "WS_NODE"),
    Setting("poll_interval", 0.1, "seconds", 0.001, "How often the queue is looked at when the kernel is silent."),
    Setting("wakeup", True, "", 0, "Let the kernel (inotify, kqueue) wake the server between two polls."),
    Setting("max_event_bytes", MIB, "bytes", 64, "Largest event file; a larger one is moved to failed/."),
    Setting("max_age", 0.0, "seconds", 0, "Events that waited longer are dropped, counted and logged; 0 keeps all."),
    Setting("max_message_bytes", 64 * KIB, "bytes", 0, "Largest message a client may send; then close code 1009."),
    Setting("deflate", True, "", 0, "Compress messages for clients that can (permessage-deflate, RFC 7692)."),
    Setting("deflate_min_bytes", 512, "bytes", 0, "Smaller messages are sent as they are."),
    Setting("outbox_bytes", MIB, "bytes", KIB, "What may wait for a slow client; beyond it, it is closed."),
    Setting("send_timeout", 20.0, "seconds", 0.1, "A client that takes nothing of what waits for so long is closed."),
    Setting("ping_interval", 20.0, "seconds", 0, "Silence after which a client is pinged; 0 never pings."),
    Setting("ping_timeout", 20.0, "seconds", 0.1, "A pinged client that stays silent for so long is closed."),
    Setting("handshake_timeout", 10.0, "seconds", 0.1, "Time a new connection has to send its HTTP request."),
    Setting("close_timeout", 5.0, "seconds", 0, "Time clients have to take the rest and to answer a close."),
    Setting("max_clients", 0, "clients", 0, "More are refused with 503; 0: as many as descriptors allow (ulimit -n)."),
    Setting("allowed_origins", (), "origins", 0, "Pages that may connect besides those of the server's own host name,"
            " such as https://example.com; * allows all."),
    Setting("secret", (), "secret", 0, "What signs the tickets that clients then need; of several, any.", "WS_SECRET"),
    Setting("secret_file", "", "file", 0, "A file with secrets that sign tickets, one a line.", "WS_SECRET_FILE"),
    Setting("history_events", 1000, "events", 0, "Kept for clients that come back, in history/; 0 keeps none."),
    Setting("history_bytes", 16 * MIB, "bytes", 0, "And no more than this much of them."),
    Setting("history_seconds", 86400.0, "seconds", 0, "And none that is older."),
    Setting("tls_cert", "", "file", 0, "Certificate chain (PEM): the port then speaks wss:// and nothing else. SIGHUP"
            " reads it again."),
    Setting("tls_key", "", "file", 0, "Its private key (PEM, without a passphrase), if that is in another file."),
    Setting("monitoring", "auto", "auto|on|off", 0, "Answer GET / (a page that shows all), /healthz (JSON) and /metrics"
            " (Prometheus) on the same port; auto: if host is a loopback address, and to who asks for one."),
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}


# 3 ─ Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Every message says what went wrong, with which file, setting or peer, and what to do about it.


class WsqueueError(Exception):
    """The base of every error that this module raises on purpose."""


class SettingError(WsqueueError, ValueError):
    """A setting that does not exist, or a value that makes no sense."""


class EventError(WsqueueError, ValueError):
    """Something that is not an event, or that JSON cannot hold."""


class UnfinishedError(EventError):
    """Bytes that are not an event yet: their writer may not be done."""


class QueueError(WsqueueError):
    """A queue that cannot be reached, written, or served."""


class QueueInUseError(QueueError):
    """A queue that another server consumes; `holder` is its process."""

    def __init__(self, directory: str, holder: str) -> None:
        super().__init__(f"queue directory {directory} is already served by process {holder}; stop that one, or give"
                         " this one another directory")
        self.holder = holder


class ServerError(WsqueueError):
    """A server that cannot start."""


class PortInUseError(ServerError):
    """Another process has the port."""


class ProtocolError(WsqueueError):
    """A peer broke RFC 6455; `code` is the close code it is told (section 7.4.1)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class HandshakeError(WsqueueError):
    """A request that is answered with an HTTP error and a sentence that says what to change."""

    def __init__(self, status: str, sentence: str, **headers: str) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers


class ConnectionClosed(WsqueueError):
    """recv() on a connection that is closed. A handler need not catch it: it then simply ends."""


def checked_settings(given: Mapping[str, Any]) -> SimpleNamespace:
    """The settings, defaults filled in; raises SettingError for an unknown name, a wrong type or a senseless value."""
    for name in given:
        if name not in _BY_NAME:
            raise SettingError(f"there is no setting {name!r}; there are: {', '.join(_BY_NAME)}")
    settings = SimpleNamespace(**{s.name: _checked(s, given.get(s.name, s.default)) for s in SETTINGS})
    if settings.tls_key and not settings.tls_cert:
        raise SettingError("setting tls_key is of no use without tls_cert: give the certificate, too")
    return settings


def checked_secrets(value: Any, source: str = "a secret") -> tuple[str, ...]:
    """A secret, or several: in a list, or one a line. No error shows what was given."""
    texts = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(text, str) and text.strip() for text in texts) or value == []:
        raise SettingError(f"{source} must be a non-empty text; openssl rand -hex 32 makes a good one")
    return tuple(line.strip() for text in texts for line in text.split("\n") if line.strip())


def _checked(setting: Setting, value: Any) -> Any:
    kind = type(setting.default)
    if setting.name == "queue":
        return value  # a path, a URL, or an EventQueue: open_queue() says what is wrong with it
    if setting.name == "secret":
        return checked_secrets(value)
    if kind is tuple and isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (value == "" and setting.default):
        name = "a list of texts" if kind is tuple else f"a non-empty {kind.__name__}" if kind is str else kind.__name__
        raise SettingError(f"setting {setting.name} must be {name}, not {value!r}")
    if kind in (int, float) and not setting.least <= value < float("inf"):
        unit = f" {setting.unit}" if setting.unit in ("seconds", "bytes") else ""
        raise SettingError(f"setting {setting.name} must be at least {setting.least:g}{unit}, not {value}")
    if "|" in setting.unit and value not in setting.unit.split("|"):
        raise SettingError(f"setting {setting.name} must be {setting.unit.replace('|', ' or ')}, not {value!r}")
    if setting.name == "port" and value > 65535:
        raise SettingError(f"setting port must be at most 65535, not {value}")
    return value


# 4 ─ Event ────────────────────────────────────────────────────────────────────────────────────────────────────────
# In: what a producer passes, or the bytes of an event file. Out: Event, whose text is what clients receive; or
# UnfinishedError ("not yet"), or EventError. No I/O, no state, any thread.


class Event(NamedTuple):
    """One event on its way to the clients."""

    id: str  # unique in its queue, of [A-Za-z0-9._~%:-]; a repeat after a crash carries the same one
    to: tuple[str, ...]  # topics; empty: everyone
    queued_at: float  # seconds since the epoch
    text: bytes  # JSON: {"event": ..., "payload": ..., "timestamp": ...}
    source: Any = None  # the queue's own handle, for EventQueue.done()
    exclude: Any = None  # a weak reference to the one connection that does not get it

    @property
    def size(self) -> int:
        """Bytes that it holds; a list of topics may be longer than the text."""
        return len(self.text) + (sum(map(len, self.to)) + 60 * len(self.to) if self.to else 0)


Topics = Union[str, Iterable[str], None]
Pair = Tuple[str, Any]


def _jsonable(value: Any) -> Any:
    """What producers have in hand and JSON has no type for: text for dates, Decimal and UUID, a list for a set."""
    from decimal import Decimal
    from uuid import UUID

    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, (Decimal, UUID)):
        return str(value)  # a float would lose digits of the Decimal
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)  # the same set always gives the same text
    if hasattr(type(value), "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _refuse_constant(name: str) -> Any:
    raise EventError(f"{name} is not JSON (RFC 8259); no browser would parse it")


_DECODE = json.JSONDecoder(parse_constant=_refuse_constant).decode
_ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_jsonable).encode
_ENCODE_ASCII = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=_jsonable).encode
_JSON_KINDS = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean"}


def encode_json(value: Any, what: str) -> bytes:
    """Strict JSON, UTF-8; raises EventError that names `what`."""
    try:
        return _ENCODE(value).encode()
    except UnicodeEncodeError:  # a lone surrogate: legal in JSON as an escape, impossible in UTF-8
        return _ENCODE_ASCII(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise EventError(f"{what} cannot be written as JSON: {error}") from None


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise EventError(f'"event" must be a non-empty string, not {_kind(name)}')
    return name


def _checked_topics(to: Any) -> tuple[str, ...]:
    """No topics means everyone, so what is not clearly a list of topics must never be taken for none."""
    if to is None:
        return ()
    topics = tuple(to) if isinstance(to, Iterable) and not isinstance(to, (str, bytes, Mapping)) else (to,)
    if not topics or not all(isinstance(topic, str) and topic for topic in topics):
        raise EventError('"to" must be a topic or a non-empty list of topics, each a non-empty string')
    return topics


def _kind(value: Any) -> str:
    if value == "":
        return "an empty string"
    return "null" if value is None else _JSON_KINDS.get(type(value), "something else")


def encode_batch(events: Iterable[Pair], to: Topics, now: float, most: int) -> bytes:
    """(event, payload) pairs as one event file; nothing for none. Raises EventError."""
    topics = {} if to is None else {"to": _checked_topics(to)}
    records = [{"event": _checked_name(name), "payload": payload, "timestamp": int(now), "queued_at": now, **topics}
               for name, payload in events]
    if not records:
        return b""
    try:
        data = encode_json(records if len(records) > 1 else records[0], "a batch")  # in one go: 2 µs each, else 3.5
    except EventError:
        for record in records:
            encode_json(record, f"event {record['event']!r}")  # which says what is wrong with which
        raise
    if len(data) > most:
        raise EventError(f"{len(data)} bytes in {len(records)} event(s), more than the {most} of max_event_bytes: send"
                         " less, or a reference to it")
    return data


def make_event(name: Any, payload: Any, to: Topics, now: float, event_id: str = "", source: Any = None,
               queued_at: float | None = None) -> Event:
    """An Event ready to be sent; raises EventError."""
    message = {"event": _checked_name(name), "payload": payload, "timestamp": int(now)}
    return Event(event_id, _checked_topics(to), now if queued_at is None else queued_at,
                 encode_json(message, f"event {name!r}"), source)


def parse_events(data: bytes, event_id: str, stamp: float, source: Any = None) -> list[Event]:
    """The events in a file's bytes; `stamp` (seconds) stands in for a missing timestamp.

    No strict prefix of a JSON object or array parses, so what parses is complete, and what does not may yet become
    so: UnfinishedError. EventError is final.
    """
    try:
        records = _DECODE(data.decode("utf-8-sig" if data[:1] == b"\xef" else "utf-8"))
    except EventError:
        raise
    except RecursionError:
        raise EventError("nested too deeply") from None
    except ValueError as error:
        raise UnfinishedError(f"not valid JSON in UTF-8: {error}" if data else "the file is empty") from None
    if not isinstance(records, list):
        return [_event_of(records, event_id, stamp, source)]
    return [_event_of(record, f"{event_id}:{index}", stamp, source) for index, record in enumerate(records)]


def _event_of(record: Any, event_id: str, stamp: float, source: Any) -> Event:
    if not isinstance(record, dict):
        raise EventError(f'an event must be a JSON object such as {{"event": "name"}}, not {_kind(record)}')
    timestamp = _number(record, "timestamp", stamp)
    return make_event(record.get("event"), record.get("payload"), record.get("to"), timestamp, event_id, source,
                      _number(record, "queued_at", timestamp))


def _number(record: dict[str, Any], key: str, default: float) -> float:
    value = record.get(key)
    if value is None:
        return default
    if type(value) is int or (type(value) is float and value - value == 0):  # neither bool nor infinite
        return value
    raise EventError(f'"{key}" must be a number of seconds since 1970, not {_kind(value)}')


# 5 ─ The queue directory ──────────────────────────────────────────────────────────────────────────────────────────
# In: put() from any process. Out: take(), then done() once the events are sent, from the one consumer: the queue
# thread, which holds the directory's flock. Only wake() may be called by another thread meanwhile. Promises:
# nothing lost, a producer's order kept, nothing that is not a whole regular file ever read as an event.

Clock = Callable[[], float]


class Backlog(NamedTuple):
    """What waits in a queue."""

    waiting: int  # event files (or entries) not yet sent
    oldest: float  # age in seconds of the oldest one; 0.0 if there is none
    failed: int  # set aside because they could not be understood
    failures: Sequence[Mapping[str, str]] = ()  # "name" and "reason" of the newest of them


class EventQueue(Protocol):
    """The contract of every queue: put() is for producers, the rest for the one thread that consumes.

    take() returns the next events in order, each once; those for which done() was not called come again after a crash,
    or after retake().
    wait() returns after `timeout` seconds, or earlier when there may be something to take or wake() is called, which
    any thread may do. All raise QueueError with a remedy.
    """

    shared: bool  # by other servers, that see the same events in the same order, under the same ids
    is_new: bool  # among them, and began where they were

    def put(self, events: Iterable[Pair], *, to: Topics = None, durable: bool = False) -> None: ...
    def open(self) -> None: ...
    def take(self, max_bytes: int = TICK_BYTES) -> list[Event]: ...
    def done(self, events: Iterable[Event]) -> None: ...
    def retake(self) -> None: ...
    def wait(self, timeout: float) -> None: ...
    def wake(self) -> None: ...
    def backlog(self) -> Backlog: ...
    def recall(self, count: int, size: int) -> tuple[str, list[Event]]: ...  # what was sent last; only if it is shared
    def close(self) -> None: ...


# What a producer takes and gives back. Its process may have a signal handler that raises, at whatever moment: when a
# request has taken too long, for example.


def _between(taking: Iterable[Any], give_back: Callable[[Any], Any], act: Callable[[Any], Any]) -> bool:
    """act() on what `taking` yields, if anything; give it back, once. Whether there was anything.

    Both are builtins: what they do is noted in the same step of the interpreter, and no handler runs between.
    """
    held: list[Any] = []
    try:
        try:
            held += taking
            for thing in held:
                act(thing)
            return bool(held)
        finally:
            _give_back(held, give_back)
    finally:  # before Python 3.10 a handler may run, and raise, before the first one has done anything
        _give_back(held, give_back)


def _give_back(held: list[Any], how: Callable[[Any], Any]) -> None:
    if held:
        deque(map(how, map(held.pop, [-1])), 0)  # one step; and not again where it fails, as close(2) may


_RELEASE = operator.methodcaller("release")


def _holding(lock: Any, act: Callable[[], Any], seconds: float = -1) -> bool:
    """Whether the lock was free in time, and act() was called under it."""
    return _between(itertools.compress([lock], map(lock.acquire, [True], [seconds])), _RELEASE, lambda _: act())


# Names and stamps. A stamp is an integer: microseconds since the epoch.

_UNIQID = re.compile(r"_([0-9a-f]{8})([0-9a-f]{5})")
_NUMBER = re.compile(r"\d{1,300}(?:\.\d+)?")  # a float holds no more
_IDENTITY = re.compile(r"[A-Za-z0-9._~%:-]{1,2000}")  # of an event, and of a place in the history


class _Names:
    """Stems of names, in the shape of PHP's microtime(true) . "_" . uniqid(), with pid and a counter added.

    A stamp never repeats or goes back within a process, whatever its clock does and however many threads ask. The
    counter starts anywhere, so that two containers in which everybody is pid 1 do not meet.
    """

    def __init__(self, clock: Clock = time.time) -> None:
        self._clock = clock
        self._last = 0
        self.reset()

    def reset(self) -> None:
        """Also after a fork: another thread may have held the lock."""
        self._lock = threading.Lock()  # guards _last, which goes on where the parent was
        self._pid = os.getpid() & 0xFFFF
        self._count = itertools.count(int.from_bytes(os.urandom(2), "big"))

    def next(self) -> str:
        stamps: list[int] = []
        _holding(self._lock, lambda: stamps.append(self._step()))
        seconds, micros = divmod(stamps[0], 1_000_000)
        return (f"{seconds}.{micros // 100:04d}_{seconds:08x}{micros:05x}"
                f"{self._pid:04x}{next(self._count) & 0xFFFF:04x}")

    def _step(self) -> int:
        self._last = stamp = max(int(self._clock() * 1e6), self._last + 1)
        return stamp


_NAMES = _Names()


def name_stamp(name: str) -> int | None:
    """The stamp in an event file's name, or None. Never the name as text: PHP drops trailing zeros of its float."""
    match = _UNIQID.search(name)
    if match:
        return int(match.group(1), 16) * 1_000_000 + int(match.group(2), 16)
    match = _NUMBER.match(name)
    if not match:
        return None
    seconds = float(match.group())
    while seconds > 1e11:  # `date +%s%N` and JavaScript's Date.now() count in nanoseconds and milliseconds
        seconds /= 1000
    return int(seconds * 1e6)


def event_id(name: str, signature: tuple[int, int, int]) -> str:
    """The id of what a file holds: its stem, of characters that fit into a URL, a header and a line.

    A name without uniqid() may be used again, so the file's mtime makes two events of it.
    """
    stem = name[:-len(".json")]
    if not _IDENTITY.fullmatch(stem):
        from urllib.parse import quote

        stem = quote(os.fsencode(stem), safe="")
    return stem if _UNIQID.search(name) else f"{stem}~{signature[2]:x}"


_PLACE = re.compile(r"([0-9]{1,19})-([0-9]{1,19})(?::([0-9]{1,9}))?(?:~.*)?")


def place_of(identity: str) -> tuple[float, ...] | None:
    """Where an event is in a queue that several servers share, by its id: they are in order. None: it is not of one."""
    match = _PLACE.fullmatch(identity)
    return (int(match[1]), int(match[2]), int(match[3]) if match[3] else float("inf")) if match else None


def _is_ready(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(".")


# Publishing.

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_OWN_TROUBLE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}  # ours, and passing: not the file's fault
_LOCK_NAME = ".wsqueue.lock"


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def _write(path: str, flags: int, data: bytes, durable: bool = False) -> None:
    def write(fd: int) -> None:
        _write_all(fd, data)
        if durable:
            os.fsync(fd)

    # The umask decides who may read it, as for every file of the producer.
    _between(map(os.open, [path], [flags], [0o666]), os.close, write)


def _publish(directory: str, data: bytes, durable: bool) -> None:
    """Whole or not at all: the temporary file is in the same directory, so the rename is atomic."""
    name = f"{_NAMES.next()}.json"
    temporary = f"{directory}/.{name}.tmp"
    try:
        _write(temporary, _CREATE, data, durable)
        os.rename(temporary, f"{directory}/{name}")
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:  # without it a power cut may forget the rename (fsync(2))
        _write(directory, os.O_RDONLY, b"", durable)


# One consumer.

_FORK_LOCK = threading.RLock()  # held while a descriptor is in no table yet, or no longer; outermost of all locks


def _lock_directory(directory: str) -> int:
    """Hold the directory's lock; returns its descriptor. Raises QueueError that names the holder."""
    import fcntl  # POSIX only, and so is a server; producers run everywhere

    fd = os.open(f"{directory}/{_LOCK_NAME}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        for patience in (0.1, 0.1, 0.0):  # `wsqueue status` holds it for an instant to see whether it is free
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(patience)
        else:
            raise QueueInUseError(directory, _holder(fd))
        os.ftruncate(fd, 0)  # not before it is held: the text belongs to the holder
        with contextlib.suppress(OSError):  # a full disk: emptying the queue is what helps
            os.write(fd, b"%d\n" % os.getpid())
    except BaseException:
        os.close(fd)
        raise
    return fd


def _holder(fd: int) -> str:
    return os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "(unknown)"


def serving_process(directory: str) -> str | None:
    """The pid of the server that consumes the directory, or None. Raises QueueError where that cannot be told."""
    import fcntl

    path = f"{directory}/{_LOCK_NAME}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except PermissionError:
        raise QueueError(f"user id {os.getuid()} may not open {path}") from None
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _holder(fd)
    finally:
        os.close(fd)


# Waking up. The kernel is only ever an accelerator of the poll: inotify is silent on NFS and some container volumes.


class Waker:
    """A descriptor that any thread can make readable: how a selector is interrupted.

    What is to be looked at is noted before set(), and looked at after clear(): so set() may do nothing where it is set.
    """

    def __init__(self) -> None:
        self._is_set = False  # or about to be
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def set(self) -> None:
        if not self._is_set:  # a send() takes 15 µs, and in a rush each connection asks for one
            self._is_set = True
            with contextlib.suppress(OSError):  # closed: nobody waits any more
                self._writer.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(KIB)
        self._is_set = False  # not before: who sets it in between would have his byte taken, and all after him none

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


class _Inotify:
    """inotify(7) through ctypes: a descriptor that is readable once a file has been finished in the directory."""

    _EVENT = struct.Struct("iIII")
    _MASK = 0x8 | 0x80 | 0x400 | 0x800  # IN_CLOSE_WRITE, IN_MOVED_TO, IN_DELETE_SELF, IN_MOVE_SELF

    def __init__(self, directory: str) -> None:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0 or libc.inotify_add_watch(self.fd, os.fsencode(directory), self._MASK) < 0:
            number = ctypes.get_errno()
            if self.fd >= 0:
                os.close(self.fd)
            raise OSError(number, os.strerror(number))

    def consume(self) -> bool:
        """Whether what happened concerns an event. Temporary files are closed in the directory, too."""
        data, offset, relevant = os.read(self.fd, 64 * KIB), 0, False
        while offset < len(data):
            length = self._EVENT.unpack_from(data, offset)[3]
            start = offset + self._EVENT.size
            offset = start + length
            name = data[start:offset].rstrip(b"\0")
            relevant |= not name or (name.endswith(b".json") and not name.startswith(b"."))
        return relevant

    def close(self) -> None:
        os.close(self.fd)


class _Kqueue:  # pragma: no cover - not on Linux
    """kqueue(2) on BSD and macOS: the directory itself changes when an entry appears."""

    def __init__(self, directory: str) -> None:
        kernel: Any = select  # the names below exist on BSD and macOS only
        self._directory = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        self._queue = kernel.kqueue()
        self.fd: int = self._queue.fileno()
        self._queue.control([kernel.kevent(
            self._directory, kernel.KQ_FILTER_VNODE, kernel.KQ_EV_ADD | kernel.KQ_EV_CLEAR,
            kernel.KQ_NOTE_WRITE | kernel.KQ_NOTE_DELETE | kernel.KQ_NOTE_RENAME)], 0, 0)

    def consume(self) -> bool:
        return bool(self._queue.control(None, 8, 0))

    def close(self) -> None:
        self._queue.close()
        os.close(self._directory)


def _watch(directory: str) -> _Inotify | _Kqueue | None:
    try:
        return _Inotify(directory) if sys.platform.startswith("linux") else _Kqueue(directory)
    except (OSError, AttributeError, ImportError) as error:  # a Python may lack ctypes
        log.info("no kernel wake-up for %s (%s): events wait for the next poll", directory, error)
        return None


def _signature_of(status: os.stat_result) -> tuple[int, int, int]:
    """Differs if a file was changed or replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_at(path: str, status: os.stat_result) -> bool:
    """Whether this very file is there: directories are replaced, and files tidied away, while a server runs."""
    try:
        return os.path.samestat(os.stat(path), status)
    except OSError:
        return False


class _Suspect(NamedTuple):
    """A file that did not parse."""

    held_until: float  # seconds, monotonic: the batch waits for it so long
    signature: Any
    unchanged_since: float


def without_stale(events: list[Event], max_age: float, now: float) -> list[Event]:
    """Events that have not waited for too long; 0 is never."""
    fresh = [event for event in events if event.queued_at >= now - max_age] if max_age else events
    if len(fresh) < len(events):
        log.warning("dropped %d event(s) that waited longer than max_age=%g s", len(events) - len(fresh), max_age)
    return fresh


class DirectoryQueue:
    """The queue directory. Options are the settings of the same names; the clocks are there for tests."""

    shared = is_new = False

    def __init__(self, path: str, *, node: str = "", poll_interval: float = 0.1, wakeup: bool = True,
                 max_event_bytes: int = MIB, max_age: float = 0.0, clock: Clock = time.time,
                 monotonic: Clock = time.monotonic) -> None:
        self.path = path
        self.max_event_bytes = max_event_bytes
        self._hold = HOLD_TICKS * poll_interval
        self._wakeup, self._max_age, self._clock, self._monotonic = wakeup, max_age, clock, monotonic
        self._lock_fd = -1  # the flock, while this queue is the consumer
        self._watcher: _Inotify | _Kqueue | None = None
        self._poll: Any = None

    # Producers.

    def put(self, events: Iterable[Pair], *, to: Topics = None, durable: bool = False) -> None:
        """Queue (event, payload) pairs, all or nothing. Raises EventError, or QueueError with the reason."""
        data = encode_batch(events, to, self._clock(), self.max_event_bytes)
        if not data:
            return
        try:
            try:
                _publish(self.path, data, durable)
            except FileNotFoundError:
                os.makedirs(self.path, mode=0o755, exist_ok=True)
                _publish(self.path, data, durable)
        except OSError as error:
            raise QueueError(f"cannot write to queue directory {self.path}: {error.strerror or error}") from error

    # The consumer.

    def open(self) -> None:
        """Become the one consumer. Raises QueueError."""
        self._waker = Waker()
        self._poll = select.poll()  # lighter than a selector, ten times a second
        self._poll.register(self._waker, select.POLLIN)
        self._pending: list[tuple[int, str]] = []  # the scan, last first; what take() has not reached
        self._taken: set[str] = set()  # and not done
        self._suspects: dict[str, _Suspect] = {}  # did not parse
        self._ahead: dict[str, float] = {}  # stamped at or after the scan that found it -> first seen
        self._stuck: dict[str, Any] = {}  # cannot be removed, or set aside -> signature, whether it was sent
        self._next_sweep = 0.0
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    def _attach(self) -> None:
        with _FORK_LOCK:
            self._become_consumer()
        self._watcher = _watch(self.path) if self._wakeup else None
        if self._watcher:
            self._poll.register(self._watcher.fd, select.POLLIN)

    def _become_consumer(self) -> None:
        try:
            os.makedirs(self.path, mode=0o755, exist_ok=True)
            if not os.access(self.path, os.R_OK | os.W_OK | os.X_OK):
                raise QueueError(f"queue directory {self.path} must be readable and writable for user id {os.getuid()}:"
                                 " sent events are removed from it")
            self._lock_fd = _lock_directory(self.path)
            self._lock_status = os.fstat(self._lock_fd)
        except OSError as error:
            which = f" ({error.filename})" if error.filename and error.filename != self.path else ""
            raise QueueError(f"cannot use queue directory {self.path}: {error.strerror or error}{which}") from error

    def _detach(self) -> None:
        if self._lock_fd >= 0:
            with _FORK_LOCK:
                os.close(self._lock_fd)
                self._lock_fd = -1
        watcher, self._watcher = self._watcher, None  # before it is closed, which takes long: a fork may come meanwhile
        if watcher:
            self._poll.unregister(watcher.fd)
            watcher.close()

    def close(self) -> None:
        self._detach()
        if self._poll:
            self._waker.close()

    def wake(self) -> None:
        self._waker.set()

    def wait(self, timeout: float) -> None:
        deadline = self._monotonic() + timeout
        while True:
            left = deadline - self._monotonic()
            fds = [fd for fd, _ in self._poll.poll(max(0.0, left) * 1000)]
            if self._waker.fileno() in fds:
                self._waker.clear()
                return
            if left <= 0 or not fds or (self._watcher and self._watcher.fd in fds and self._watcher.consume()):
                return  # at the deadline in any case: a queue that was closed has descriptors that are ready for ever

    def take(self, max_bytes: int = TICK_BYTES) -> list[Event]:
        if not self._pending:
            self._reattach_if_replaced()
            self._pending = self._scan()
        taken: list[Event] = []
        size = 0
        while self._pending and size < max_bytes:
            stamp, name = self._pending[-1]
            try:
                events = self._load(name, stamp)
            except UnfinishedError as error:
                if self._must_wait_for(name, str(error)):
                    self._pending.clear()  # nothing may overtake it; look again at the next tick
                    break
                events = []
            except QueueError:
                if taken:
                    break  # these first; then the trouble
                raise
            self._pending.pop()
            if events:
                self._taken.add(name)
                taken += events
                size += sum(event.size for event in events)
        return self._drop_stale(taken) if self._max_age else taken

    def done(self, events: Iterable[Event]) -> None:
        for name, signature in dict.fromkeys(event.source for event in events):
            self._taken.discard(name)
            if signature == self._signature(name):  # else a new event has taken its name meanwhile
                self._remove(name)

    def retake(self) -> None:
        self._taken.clear()
        self._pending.clear()

    def backlog(self) -> Backlog:
        """Of the directory as it is now; any process may ask."""
        try:
            stamps = [stamp for stamp, _ in self._entries()]
        except OSError as error:
            raise QueueError(f"cannot read queue directory {self.path}: {error.strerror}") from error
        failed, failures = self._failures()
        oldest = max(0.0, self._clock() - min(stamps) / 1e6) if stamps else 0.0
        return Backlog(len(stamps), oldest, failed, failures)

    def _failures(self) -> tuple[int, list[dict[str, str]]]:
        failures: list[dict[str, str]] = []
        try:
            entries = [entry for entry in os.scandir(f"{self.path}/failed") if not entry.name.endswith(".reason")]
            entries.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_ctime, reverse=True)
        except OSError:  # there is none; or one is being mended
            return 0, failures
        for entry in entries[:MONITOR_FAILURES]:
            reason = "its .reason cannot be read"
            with contextlib.suppress(OSError, WsqueueError):
                reason = self._read(f"{entry.path}.reason")[0].decode("utf-8", "replace").strip()
            failures.append({"name": entry.name, "reason": reason[:KIB]})
        return len(entries), failures

    # Scanning.

    def _reattach_if_replaced(self) -> None:
        """Directories are removed, renamed and mounted over while a server runs, and lock files tidied away."""
        if self.is_ours():
            return
        if self._lock_fd >= 0:
            log.warning("queue directory %s, or its lock, has vanished or was replaced: opening it anew", self.path)
        self._detach()
        self._attach()

    def is_ours(self) -> bool:
        """Whether the lock that we hold is the directory's."""
        return self._lock_fd >= 0 and _is_at(f"{self.path}/{_LOCK_NAME}", self._lock_status)

    def _entries(self) -> list[tuple[int, str]]:
        entries = []
        for name in filter(_is_ready, os.listdir(self.path)):
            stamp = name_stamp(name)
            if stamp is None:
                with contextlib.suppress(OSError):
                    stamp = os.lstat(f"{self.path}/{name}").st_mtime_ns // 1000
            if stamp is not None:
                entries.append((stamp, name))
        return entries

    def _scan(self) -> list[tuple[int, str]]:
        """Every ready file, last first.

        readdir may miss an older file and show a younger one that appeared while it ran; but what was stamped
        before the scan began cannot be such a younger one. So the rest waits, two ticks at most: its writer's clock
        may simply be ahead of ours.
        """
        started, now = int(self._clock() * 1e6), self._monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            self._sweep()
        entries = [entry for entry in self._entries() if entry[1] not in self._taken]
        if self._stuck or self._suspects or self._ahead:
            present = {name for _, name in entries}
            for memory in (self._stuck, self._suspects, self._ahead):
                for name in [name for name in memory if name not in present]:
                    del memory[name]
            entries = [entry for entry in entries if entry[1] not in self._stuck or self._is_new(entry[1])]
        entries = [entry for entry in entries
                   if entry[0] < started or now - self._ahead.setdefault(entry[1], now) >= self._hold]
        entries.sort(reverse=True)
        return entries

    def _sweep(self) -> None:
        """Producers that were killed leave temporary files, and what could not be set aside may be mended by now."""
        self._stuck = {name: stuck for name, stuck in self._stuck.items() if stuck[1]}
        self._trim_failed()
        for name in os.listdir(self.path):
            path = f"{self.path}/{name}"
            if name.startswith(".") and name.endswith(".json.tmp"):
                with contextlib.suppress(OSError):
                    if self._clock() - os.lstat(path).st_mtime > SWEEP_SECONDS:
                        os.unlink(path)

    # Reading.

    def _load(self, name: str, stamp: int) -> list[Event]:
        """The file's events, none if it is gone or set aside. Raises UnfinishedError."""
        try:
            data, signature = self._read(f"{self.path}/{name}")
            events = parse_events(data, event_id(name, signature), stamp / 1e6, (name, signature))
        except FileNotFoundError:
            return []
        except UnfinishedError:
            raise
        except EventError as error:
            self._set_aside(name, str(error))
            return []
        if self._suspects:
            self._suspects.pop(name, None)
        if not events:  # an empty array says nothing to anyone
            self._remove(name)
        return events

    def _read(self, path: str) -> tuple[bytes, Any]:
        """A regular file's bytes and signature. Raises UnfinishedError, EventError; QueueError for our own trouble."""
        try:
            fd = os.open(path, _READ)  # O_NONBLOCK: a FIFO must not hang us; O_NOFOLLOW: a link must not mislead us
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in _OWN_TROUBLE:
                raise QueueError(f"cannot open {path!r}: {error.strerror}") from error
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise EventError("not a regular file") from None
            cure = " (a umask of 027 lets its group read it)" if error.errno == errno.EACCES else ""
            raise UnfinishedError(f"user id {os.getuid()} cannot open it: {error.strerror}{cure}") from None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise EventError("not a regular file")
            if status.st_size > self.max_event_bytes:
                raise EventError(f"{status.st_size} bytes, more than the {self.max_event_bytes} of max_event_bytes")
            return os.read(fd, status.st_size), _signature_of(status)
        except OSError as error:
            raise UnfinishedError(f"cannot be read: {error.strerror}") from None
        finally:
            os.close(fd)

    def _must_wait_for(self, name: str, reason: str) -> bool:
        """Not yet is not never: PHP and shell redirection write non-atomically."""
        now, signature = self._monotonic(), self._signature(name)
        known = self._suspects.get(name)
        if known is None:
            idle = self._clock() - signature[2] / 1e9 if signature else 0.0
            known = _Suspect(now + max(0.0, self._hold - max(idle, 0.0)), signature, now)  # floats: not now + a - a
        unchanged_since = known.unchanged_since if signature == known.signature else now
        if now - unchanged_since >= GIVE_UP_SECONDS:
            self._set_aside(name, reason)
            return False
        self._suspects[name] = _Suspect(known.held_until, signature, unchanged_since)
        return now < known.held_until

    def _signature(self, name: str) -> Any:
        try:
            return _signature_of(os.lstat(f"{self.path}/{name}"))
        except OSError:
            return None

    def _drop_stale(self, events: list[Event]) -> list[Event]:
        fresh = without_stale(events, self._max_age, self._clock())
        kept = {event.source for event in fresh}
        self.done(event for event in events if event.source not in kept)
        return fresh

    # Removing.

    def _remove(self, name: str) -> None:
        try:
            os.unlink(f"{self.path}/{name}")
        except FileNotFoundError:
            pass
        except OSError as error:
            if name not in self._stuck:
                log.error("sent %r, but cannot remove it from %s (%s): it is not sent again; remove it by hand",
                          name, self.path, error.strerror)
            self._stuck[name] = self._signature(name), True

    def _is_new(self, name: str) -> bool:
        """Whether a stuck name now holds another file; if not, and it was sent, try once more to be rid of it."""
        signature, sent = self._stuck[name]
        if self._signature(name) != signature:
            del self._stuck[name]
            return True
        if sent:
            self._remove(name)
        return False

    def _set_aside(self, name: str, reason: str) -> None:
        failed = f"{self.path}/failed"
        target = f"{failed}/{name}"
        try:
            os.makedirs(failed, mode=0o755, exist_ok=True)
            numbers = itertools.count(1)
            while os.path.lexists(target):
                target = f"{failed}/{name[:-5]}.{next(numbers)}.json"
            os.rename(f"{self.path}/{name}", target)
        except OSError as error:
            log.error("%r is not an event (%s), and cannot be moved to %s: %s", name, reason, failed, error.strerror)
            self._stuck[name] = self._signature(name), False
            return
        log.error("%r is not an event: %s. It is now %r; mend it and move it back", name, reason, target)
        with contextlib.suppress(OSError):  # a full disk, a name of 255 bytes: the log has the reason
            _write(f"{target}.reason", _CREATE, f"{reason}\n".encode("utf-8", "replace"))
        self._trim_failed()

    def _trim_failed(self) -> None:
        """Bounded by count and age."""
        failed, oldest = f"{self.path}/failed", self._clock() - FAILED_SECONDS
        with contextlib.suppress(OSError):  # none, or somebody else tidies up: then the next time
            files = sorted((entry.stat(follow_symlinks=False).st_ctime, entry.path) for entry in os.scandir(failed))
            surplus = len(files) // 10 if len(files) > 2 * FAILED_FILES else 0
            for path in [path for index, (changed, path) in enumerate(files) if index < surplus or changed < oldest]:
                log.warning("removing %r: more than %d files, or older than a month", path, FAILED_FILES)
                with contextlib.suppress(OSError):
                    os.unlink(path)


# The producer's calls.

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_ENGINES: dict[str, Callable[..., Any]] = {"": DirectoryQueue}  # by the URL's scheme; section 11 adds the others
_PRODUCERS: dict[str, Any] = {}  # queues of this process, by URL: their connections are used again


def open_queue(queue: Any, **options: Any) -> EventQueue:
    """The queue at a directory path or a URL; its put() raises, for those who want to know why. Raises QueueError.

    An open DB-API connection (sqlite3, psycopg) gives a queue whose put() writes in the caller's transaction.
    """
    if hasattr(queue, "put"):
        return queue  # type: ignore[no-any-return]
    if hasattr(queue, "cursor"):
        return _ENGINES["(connection)"](queue, **options)  # type: ignore[no-any-return]
    try:
        location = os.fsdecode(queue)
    except TypeError:
        raise QueueError(f"a queue is a directory path or a URL, not {type(queue).__name__}") from None
    if not location or "\0" in location:
        raise QueueError("the queue's path is empty or holds a NUL: give a directory path")
    match = _URL.match(location)
    engine = _ENGINES.get(match.group(1).lower() if match else "")
    if engine is None:
        raise QueueError(f"no queue of the kind {location[:match.end()] if match else ''}: give a directory path, or a"
                         " URL with sqlite:///, postgresql://, redis:// or amqp://")
    return engine(location, **options)  # type: ignore[no-any-return]


def _kept_queue(queue: Any) -> EventQueue:
    if not isinstance(queue, str) or not _URL.match(queue):
        return open_queue(queue)
    found = _PRODUCERS.get(queue)
    if found is None:
        if len(_PRODUCERS) >= MOST_PRODUCERS:
            close_queues()
        found = _PRODUCERS.setdefault(queue, open_queue(queue))  # of two threads, both take one
    return found  # type: ignore[no-any-return]


def close_queues() -> None:
    """Close the connections that queue_event() has kept in this process; its next call opens what it needs."""
    while _PRODUCERS:
        with contextlib.suppress(KeyError):  # another thread does it, too
            _PRODUCERS.popitem()[1].close()


def queue_event(queue: Any, event: str, payload: Any = None, *, to: Topics = None, durable: bool = False) -> bool:
    """Queue one event for every connected client, from any process.

    queue: a directory path, made if it is missing; a URL; or an open DB-API connection, whose transaction it then is
    part of: sent if and only if it commits. event: a non-empty name. payload: anything JSON holds, and
    datetime, date, Decimal, UUID (as text), set (as a list), dataclass (as an object). to: a topic or a list of
    topics; None is everyone. durable: survive a power cut (fsync; milliseconds instead of microseconds).
    Never raises: False means not queued, and the reason is logged at ERROR under "wsqueue".
    """
    return queue_events(queue, ((event, payload),), to=to, durable=durable)


def queue_events(queue: Any, events: Iterable[Pair], *, to: Topics = None, durable: bool = False) -> bool:
    """Queue (event, payload) pairs, all or nothing, next to each other. Otherwise as queue_event()."""
    try:
        _kept_queue(queue).put(events, to=to, durable=durable)
    except WsqueueError as error:
        log.error("event not queued: %s", error)
        return False
    except Exception as error:  # a producer's request must not fail because its notification did
        log.error("event not queued: %s: %s", type(error).__name__, error)
        return False
    return True


# 6 ─ WebSocket frames ─────────────────────────────────────────────────────────────────────────────────────────────
# In: bytes as they come off a socket, in any pieces. Out: messages, or ProtocolError with the close code. RFC 6455,
# sections 5 and 7; RFC 7692. No I/O; a parser belongs to one thread.

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
NORMAL, GOING_AWAY, PROTOCOL_ERROR, INVALID_DATA, POLICY_VIOLATION, TOO_BIG = 1000, 1001, 1002, 1007, 1008, 1009
SERVER_ERROR, TRY_AGAIN_LATER = 1011, 1013
NO_STATUS, ABNORMAL = 1005, 1006  # never on the wire (section 7.4.1)
_FIN, _RSV1, _RSV23, _OPCODE = 0x80, 0x40, 0x30, 0x0F  # a frame's first byte (section 5.2)
_CONTROL = 0x8  # the opcode bit of control frames
_OPCODES = frozenset((CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG))
_LENGTH_16, _LENGTH_64 = struct.Struct("!H"), struct.Struct("!Q")
Message = Union[str, bytes]
Function = typing.TypeVar("Function", bound=Callable[..., Any])  # what a decorator returns as it was


def encode_frame(opcode: int, payload: bytes, *, fin: bool = True, rsv1: bool = False, mask: bytes = b"") -> bytes:
    """One frame (section 5.2). A client must give a mask of four unpredictable bytes, a server must not."""
    first, masked, size = opcode | _FIN * fin | _RSV1 * rsv1, 0x80 if mask else 0, len(payload)
    if size < 126:
        head = bytes((first, masked | size))
    elif size < 65536:
        head = bytes((first, masked | 126)) + _LENGTH_16.pack(size)
    else:
        head = bytes((first, masked | 127)) + _LENGTH_64.pack(size)
    return head + mask + apply_mask(payload, mask) if mask else head + payload


def apply_mask(data: bytes, mask: bytes) -> bytes:
    """XOR with the repeated mask (section 5.3), as one integer: 100 times faster than byte by byte."""
    size = len(data)
    repeated = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(repeated, "little")).to_bytes(size, "little")


def is_close_code(code: int) -> bool:
    """Whether the code may be on the wire (section 7.4)."""
    return (1000 <= code <= 1014 and code not in (1004, NO_STATUS, ABNORMAL)) or 3000 <= code <= 4999


def encode_close(code: int, reason: str = "") -> bytes:
    if code == NO_STATUS:
        return encode_frame(CLOSE, b"")
    text = reason.encode()[:123].decode("utf-8", "ignore").encode()  # cut between characters, not within one
    return encode_frame(CLOSE, _LENGTH_16.pack(code) + text)


def decode_close(payload: bytes) -> tuple[int, str]:
    if not payload:
        return NO_STATUS, ""
    code = _LENGTH_16.unpack_from(payload)[0] if len(payload) > 1 else 0
    if not is_close_code(code):
        raise ProtocolError(PROTOCOL_ERROR, f"close code {code} is not one to be sent")
    return code, _decode_text(payload[2:])


def _decode_text(payload: bytes | bytearray) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise ProtocolError(INVALID_DATA, "text is not UTF-8") from None


# permessage-deflate (RFC 7692) without context takeover in either direction: an idle client holds no zlib state, which
# would be 300 KB, and one compressed frame serves everyone who agreed on the same window.

_EMPTY_BLOCK = b"\x00\x00\xff\xff"  # ends every message, and is not sent (section 7.2.1)
_FINAL_BLOCK = b"\x03\x00"  # an empty one that ends zlib's stream, if it comes where a block may begin


def accept_deflate(offers: str) -> tuple[str, int]:
    """Answer a Sec-WebSocket-Extensions header: the response's, and the window's bits; ("", 0) declines."""
    for offer in offers.split(","):
        name, *parameters = (part.strip() for part in offer.split(";"))
        if name == "permessage-deflate":
            bits = _window_bits(parameters)
            if bits:
                answer = f"{name}; server_no_context_takeover; client_no_context_takeover"
                asked = "server_max_window_bits" in offer  # its value must be confirmed, be it the usual one
                return answer + (f"; server_max_window_bits={bits}" if asked else ""), bits
    return "", 0


def _window_bits(parameters: list[str]) -> int:
    """The window that an offer asks for; 0 declines it, as section 7 demands for what is unknown, wrong or doubled."""
    bits, seen = 15, set()
    for parameter in parameters:
        name, equals, value = parameter.partition("=")
        pattern = _DEFLATE_PARAMETERS.get(name)
        if name in seen or pattern is None or not pattern.fullmatch(equals + value):
            return 0
        seen.add(name)
        if name == "server_max_window_bits":
            bits = int(value.strip('"'))
    return bits if bits == 15 else 9 if bits > 8 else 0  # few windows, few compressions; zlib has none of 2^8 bytes


_WINDOW = r'=("?)(8|9|1[0-5])\1'
_DEFLATE_PARAMETERS = {"server_no_context_takeover": re.compile(""), "client_no_context_takeover": re.compile(""),
                       "server_max_window_bits": re.compile(_WINDOW),
                       "client_max_window_bits": re.compile(f"(?:{_WINDOW})?")}


def encode_message(opcode: int, payload: bytes, window_bits: int = 0, least: int = 0) -> bytes:
    """An unfragmented message, compressed for who has agreed on a window, where it has `least` bytes and it helps."""
    if window_bits and len(payload) >= least:
        import zlib

        deflater = zlib.compressobj(DEFLATE_LEVEL, zlib.DEFLATED, -window_bits)
        deflated = (deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-len(_EMPTY_BLOCK)]
        if len(deflated) < len(payload):
            return encode_frame(opcode, deflated, rsv1=True)
    return encode_frame(opcode, payload)


class _Inflater:
    """Decompresses one message, in pieces."""

    def __init__(self) -> None:
        import zlib

        self._zlib, self._stream, self._streams = zlib, zlib.decompressobj(-15), 1

    def inflate(self, piece: bytes, most: int) -> bytes:
        """The next bytes, `most` of them at most; there may then be more, and the message is of no use."""
        inflated = b""
        try:
            while piece and len(inflated) < most:  # 0 would be no limit
                if self._stream.eof:  # a final block ends zlib's stream, but not the message (section 7.2.1)
                    self._stream, self._streams = self._zlib.decompressobj(-15), self._streams + 1
                    if self._streams > FINAL_BLOCKS:
                        raise ProtocolError(POLICY_VIOLATION, f"more than {FINAL_BLOCKS} final blocks in a message")
                inflated += self._stream.decompress(piece, most - len(inflated))
                piece = self._stream.unused_data
        except self._zlib.error:
            raise ProtocolError(INVALID_DATA, "compressed data is damaged") from None
        return inflated

    def finish(self) -> None:
        """Of a message that was cut short, zlib would make something longer or shorter, and say nothing."""
        if not self._stream.eof and (self.inflate(_EMPTY_BLOCK + _FINAL_BLOCK, 1) or not self._stream.eof):
            raise ProtocolError(INVALID_DATA, "compressed data is cut short")


class FrameParser:
    """Bytes in any pieces -> (opcode, payload) of whole messages and control frames.

    masked: whether the peer must mask, as a client must and a server must not (section 5.1).
    max_bytes: the largest message; a longer one is refused when a header announces it, or once it inflates beyond.
    deflate: whether permessage-deflate was agreed on.

    A frame's payload is taken as it comes: text that is not UTF-8 fails at its first wrong byte, and not when the
    frame is whole (section 8.1).
    """

    def __init__(self, *, masked: bool, max_bytes: int, deflate: bool = False) -> None:
        self._masked, self._max_bytes, self._deflate = masked, max_bytes, deflate
        self._buffer = bytearray()
        self._left = -1  # of the frame in hand, bytes that are still to come; -1: its head is
        self._first, self._mask = 0, b""  # of the frame in hand
        self.scraps = 0  # small fragments; whoever reads it may set it back
        self._begin_message(CONTINUATION)

    def _begin_message(self, opcode: int, compressed: bool = False) -> None:
        self._opcode = opcode  # of the message in hand; CONTINUATION: there is none
        self._inflater = _Inflater() if compressed else None
        self._message = bytearray()  # what has come of it
        self._announced = 0  # bytes of payload in its frames so far
        self._checked = 0  # bytes of it that are known to be UTF-8

    @property
    def at_rest(self) -> bool:
        """Nothing half received: the parser can be thrown away."""
        return not self._buffer and self._left < 0 and self._opcode == CONTINUATION

    def feed(self, data: bytes) -> Iterator[tuple[int, Any]]:
        """TEXT: str; BINARY, PING, PONG: bytes; CLOSE: (code, reason). Raises ProtocolError.

        Who iterates may stop: what is left of the data comes with the next call.
        """
        self._buffer += data
        while self._left >= 0 or self._read_head():
            if self._first & _CONTROL:
                if len(self._buffer) < self._left:
                    return
                opcode, payload = self._first & _OPCODE, self._take()
                self._left = -1  # before the yield, behind which it may not go on
                yield opcode, decode_close(payload) if opcode == CLOSE else payload
            else:
                payload = self._take()
                last = not self._left and self._first & _FIN
                self._extend_message(payload, not last)
                if self._left:
                    return
                self._left = -1
                if last:
                    yield self._finish_message()

    def _take(self) -> bytes:
        """What is here of the frame's payload, unmasked and taken off the buffer."""
        size = min(self._left, len(self._buffer))
        payload = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._left -= size
        if self._mask:
            payload = apply_mask(payload, self._mask)
            self._mask = self._mask[size % 4:] + self._mask[:size % 4]
        return payload

    def _extend_message(self, payload: bytes, more: bool) -> None:
        if self._inflater:
            payload = self._inflater.inflate(payload, self._max_bytes + 1 - len(self._message))
        self._message += payload
        too_big = len(self._message) > self._max_bytes
        if self._opcode == TEXT and (more or too_big):
            self._check_utf8()
        if too_big:
            raise ProtocolError(TOO_BIG, f"a compressed message of more than {self._max_bytes} bytes")

    def _finish_message(self) -> tuple[int, Message]:
        if self._inflater and self._announced:
            self._inflater.finish()
        opcode, message = self._opcode, self._message
        self._begin_message(CONTINUATION)
        return opcode, _decode_text(message) if opcode == TEXT else bytes(message)

    def _check_utf8(self) -> None:
        """Of a text that is not whole yet. An incremental decoder would be late: it waits for a surrogate's end."""
        try:
            self._message[self._checked:].decode()
            self._checked = len(self._message)
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":  # it ends within a character
                raise ProtocolError(INVALID_DATA, "text is not UTF-8") from None
            self._checked += error.start

    def _read_head(self) -> bool:
        """Take the next frame's head off the buffer; False while it is not whole."""
        buffer = self._buffer
        if len(buffer) < 2:
            return False
        first, masked, size = buffer[0], buffer[1] & 0x80, buffer[1] & 0x7F
        self._check_start(first, bool(masked), size)
        start = 2 + (0, 2, 8)[max(0, size - 125)]
        end = start + (4 if masked else 0)
        if start > 2 and len(buffer) >= start:
            size = self._long_size(size)
        if len(buffer) >= start and not first & _CONTROL:
            self._check_size(first, size)
        if len(buffer) < end:
            return False
        self._first, self._mask, self._left = first, bytes(buffer[start:end]), size
        del buffer[:end]
        if first & _OPCODE in (TEXT, BINARY):
            self._begin_message(first & _OPCODE, bool(first & _RSV1))
        self._announced += 0 if first & _CONTROL else size
        self.scraps += not first & _FIN and size < SCRAP_BYTES
        return True

    def _check_start(self, first: int, masked: bool, size: int) -> None:
        opcode = first & _OPCODE
        if first & _RSV23 or (first & _RSV1 and not (self._deflate and opcode in (TEXT, BINARY))):
            raise ProtocolError(PROTOCOL_ERROR, "a reserved bit is set, which no agreed extension sets here")
        if opcode not in _OPCODES:
            raise ProtocolError(PROTOCOL_ERROR, f"opcode {opcode:#x} is reserved")
        if masked != self._masked:
            raise ProtocolError(PROTOCOL_ERROR, "a client must mask its frames, a server must not")
        if opcode & _CONTROL and (not first & _FIN or size > 125):
            raise ProtocolError(PROTOCOL_ERROR, "a control frame must be whole and hold at most 125 bytes")
        if opcode == CONTINUATION and self._opcode == CONTINUATION:
            raise ProtocolError(PROTOCOL_ERROR, "a continuation of nothing")
        if opcode in (TEXT, BINARY) and self._opcode != CONTINUATION:
            raise ProtocolError(PROTOCOL_ERROR, "a new message inside a fragmented one")

    def _long_size(self, marker: int) -> int:
        size: int = (_LENGTH_16 if marker == 126 else _LENGTH_64).unpack_from(self._buffer, 2)[0]
        if size < (126 if marker == 126 else 65536) or size >> 63:
            raise ProtocolError(PROTOCOL_ERROR, "a length not in its shortest form, or of 2^63 and more")
        return size

    def _check_size(self, first: int, size: int) -> None:
        """What does not compress may grow by an eighth (a byte of 9 bits), or by five bytes."""
        compressed = first & _RSV1 or (self._inflater and not first & _OPCODE)
        limit = self._max_bytes + (self._max_bytes // 8 + 64 if compressed else 0)
        if self._announced * (not first & _OPCODE) + size > limit:
            raise ProtocolError(TOO_BIG, f"a message of more than {self._max_bytes} bytes")


def accept_key(key: str) -> str:
    """The Sec-WebSocket-Accept that answers a Sec-WebSocket-Key (section 4.2.2)."""
    from base64 import b64encode
    from hashlib import sha1

    return b64encode(sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()).decode()  # noqa: S324


# 7 ─ Connection ───────────────────────────────────────────────────────────────────────────────────────────────────
# One client, from its first byte on. Who touches what: only the I/O thread reads the socket (the accept thread does,
# before it parks the connection there), parses, and closes the descriptor (so that its number cannot be reused while
# another thread sends); any thread may send, under the connection's lock, which guards the sending side, the state, and
# each use of the socket, because a TLS object bears one thread at a time. Promises: send() never waits, and what waits
# to be sent is bounded.

_TLS_TROUBLE = {  # OpenSSL's reasons, where somebody can do something about them
    "HTTP_REQUEST": "it sent plain HTTP or ws:// to a port that speaks TLS: use wss://, and https:// for a page",
    "WRONG_VERSION_NUMBER": "it does not speak TLS; is it ws://?",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not trusted (SSL_CERT_FILE can name a CA): {.verify_message}",
}


class Request:
    """An HTTP request's head, as authenticate() sees it; `user` is from its ticket."""

    def __init__(self, method: str, path: str, raw_query: str, headers: dict[str, str]) -> None:
        self.method, self.path, self.raw_query = method, path, raw_query
        self.headers = headers  # names in lower case
        self.address: tuple[Any, ...] = ("", 0)
        self.user: Any = None
        self.topics: list[str] = []

    @functools.cached_property
    def query(self) -> dict[str, str]:
        from urllib.parse import parse_qsl

        return dict(parse_qsl(self.raw_query, True))

    @property
    def cookies(self) -> dict[str, str]:
        """By name; of several of a name, the first, which has the longest path (RFC 6265, section 5.4)."""
        pairs = [pair.partition("=") for pair in self.headers.get("cookie", "").split(";")]
        return {name.strip(): value.strip().strip('"') for name, equals, value in reversed(pairs) if equals}

    def join(self, topic: str) -> None:
        """Receive events that are sent to the topic, also those which the client missed."""
        self.topics += _checked_topics(topic)

    def is_upgrade(self) -> bool:
        return "upgrade" in self.headers


def parse_request(head: bytes) -> Request:
    """Parse what stands before the blank line (RFC 9112, sections 2 to 5). Raises HandshakeError."""
    from urllib.parse import unquote, urlsplit

    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[0].isalpha() or words[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise HandshakeError("400 Bad Request", "This is not an HTTP/1.1 request.")
    if len(lines) > HEAD_LINES:
        raise HandshakeError("431 Request Header Fields Too Large", f"Send at most {HEAD_LINES - 1} header lines.")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip() or set("\0\r\n") & set(line):
            raise HandshakeError("400 Bad Request", "A header line of this request is malformed.")
        name, value = name.lower(), value.strip()
        comma = "; " if name == "cookie" else ", "  # HTTP/2 splits it, and a proxy may not join it again
        headers[name] = f"{headers[name]}{comma}{value}" if name in headers else value
    try:
        target = urlsplit(words[1])
        path = unquote(target.path) or "/"
        if not path.startswith("/"):  # it is a topic, too, and topics without a slash are for handlers to grant
            raise ValueError
        return Request(words[0], path, target.query, headers)
    except ValueError:
        raise HandshakeError("400 Bad Request", "The target of this request is malformed.") from None


def head_end(data: bytes) -> int:
    """Where an HTTP head ends; -1 while it is not whole. Raises HandshakeError."""
    end = data.find(b"\r\n\r\n")
    if end > HEAD_BYTES or (end < 0 and len(data) > HEAD_BYTES):
        raise HandshakeError("431 Request Header Fields Too Large", f"Send at most {HEAD_BYTES} bytes of headers.")
    if end < 0 and data and not data[:1].isalpha():
        raise HandshakeError("400 Bad Request", "This is not HTTP. Is it wss:// to a port that speaks ws://?")
    return end


def encode_head(status: str, fields: Mapping[str, str]) -> bytes:
    """The head of an HTTP response; a "_" in a field's name stands for a "-"."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode("latin-1")


def encode_response(status: str, body: bytes, kind: str = "text/plain; charset=utf-8", **headers: str) -> bytes:
    """A whole HTTP response, the last one of its connection."""
    fields = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **headers}
    return encode_head(status, fields) + body


class Encoding(NamedTuple):
    """How a client is sent its messages; all of one kind are sent the same bytes."""

    window: int = 0  # bits of the one that permessage-deflate was agreed on with; 0: it was not
    ids: bool = False  # the client can resume: each event carries its id
    stream: bool = False  # server-sent events (HTML, section 9.2) instead of frames

    def message(self, text: bytes, identity: str = "", least: int = 0) -> bytes:
        """One message; `least`: bytes from which on it is compressed."""
        if self.stream:
            lines = b"\ndata: ".join(re.split(b"\r\n|\r|\n", text))
            return (b"id: %s\n" % identity.encode() if identity else b"") + b"data: %s\n\n" % lines
        if self.ids and identity:
            text = b'%s,"id":"%s"}' % (text[:-1], identity.encode())  # of characters that need no escape
        return encode_message(TEXT, text, self.window, least)


PLAIN = Encoding()
shared_encoding = functools.lru_cache(None)(Encoding)  # connections of a kind have the same object


class Inbox:
    """Messages that a handler or a callback has not consumed yet. Its lock is a leaf; any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())  # guards all below
        self._messages: deque[Message] = deque()
        self._size = 0  # bytes of memory that they take
        self._was_full = False
        self.has_room_again = False  # since the message just taken: the connection can be read for a while
        self._closed = False
        self.claimed = False  # a callback thread has it, or is about to

    def put(self, message: Message, claim: bool = False) -> bool:
        """Returns whether a callback thread must be found for it."""
        with self._changed:
            self._messages.append(message)
            self._size += sys.getsizeof(message)
            self._was_full |= self.full
            self._changed.notify()
            found, self.claimed = claim and not self.claimed, self.claimed or claim
            return found

    def get(self, timeout: float | None) -> Message:
        with self._changed:
            if not self._changed.wait_for(lambda: self._messages or self._closed, timeout):
                raise TimeoutError(f"no message within {timeout} s")
            if not self._messages:
                raise ConnectionClosed("the connection is closed")
            return self._pop()

    def next(self) -> Message | None:
        """For a callback thread: None gives the inbox back."""
        with self._changed:
            self.claimed = bool(self._messages)
            return self._pop() if self._messages else None

    def _pop(self) -> Message:
        message = self._messages.popleft()
        self._size -= sys.getsizeof(message)
        half_empty = len(self._messages) * 2 <= INBOX_MESSAGES and self._size * 2 <= INBOX_BYTES
        self.has_room_again, self._was_full = self._was_full and half_empty, self._was_full and not half_empty
        return message

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def full(self) -> bool:
        return len(self._messages) >= INBOX_MESSAGES or self._size >= INBOX_BYTES


# A state is only ever left for a later one:
#   GREETING   the TLS handshake and the HTTP request are to come, within handshake_timeout
#   ANSWERING  a thread finds the answer, within handshake_timeout; what the client says meanwhile is not read
#   OPEN       frames go both ways
#   CLOSING    our close frame is out (or behind what waits); the peer's is awaited for close_timeout
#   LINGERING  both are out, or the peer broke the rules, or it has an answer instead of a 101: for LINGER_SECONDS, what
#              waits is sent, then our end of the stream, and the peer's end awaited: closing with unread data would
#              send a reset that overtakes the rest
#   CLOSED     the I/O thread closes the descriptor
GREETING, ANSWERING, OPEN, CLOSING, LINGERING, CLOSED = range(6)


class Connection:
    """A connected client, as handlers see it. `user` is its ticket's, or what authenticate() said, or yours to set."""

    __slots__ = ("__weakref__", "_awaited", "_behind_at", "_changed_at", "_encoding", "_head", "_heard_at", "_held",
                 "_host", "_idle_frames", "_inbox", "_last_frame", "_lock", "_outbox", "_parser", "_pending",
                 "_pinged_at", "_position", "_progress_at", "_sock", "_state", "address", "path", "user")

    def __init__(self, sock: socket.socket, address: tuple[Any, ...], host: IOThread) -> None:
        sock.setblocking(False)
        self._sock, self._host = sock, host
        self._head = b""  # the request's; it is parsed again when asked for, which saves 1 KB
        self.path = ""
        self.address = address[:2]
        self.user: Any = None
        self._lock = host.sending_lock()  # guards _state, _outbox, _pending, two times of it and every use of _sock
        self._state = GREETING
        self._encoding = PLAIN
        self._position: int | None = None  # in the history, of what it is to get next; None: what comes is sent to it
        self._held = False  # not yet: its handler may still join topics
        self._awaited = ""  # the id that it is ahead with
        self._outbox: deque[bytes | memoryview] | None = None  # what the kernel did not take
        self._pending = 0  # bytes in it
        self._parser: FrameParser | None = None  # only while something is half received
        self._inbox: Inbox | None = None  # only while somebody consumes messages
        self._last_frame = b""  # set: the client has said its last; sent once its messages have been worked off
        self._idle_frames = 0  # in this second
        self._heard_at = self._behind_at = self._progress_at = self._changed_at = time.monotonic()
        self._pinged_at = 0.0  # 0: no pong is awaited

    # For handlers: any thread.

    @property
    def query(self) -> dict[str, str]:
        return parse_request(self._head).query

    @property
    def headers(self) -> dict[str, str]:
        """The request's headers, names in lower case."""
        return parse_request(self._head).headers

    def is_connected(self) -> bool:
        return self._state == OPEN

    def send(self, message: Any) -> bool:
        """Send text (str), binary (bytes) or JSON (dict, list). Never waits; False if the client has gone."""
        binary = isinstance(message, (bytes, bytearray, memoryview)) and not self._encoding.stream
        if isinstance(message, str):
            payload = message.encode()
        elif isinstance(message, (dict, list)):
            payload = encode_json(message, "a message")
        elif binary:
            payload = bytes(message)
        else:
            kinds = "str, dict or list to an event stream" if self._encoding.stream else "str, bytes, dict or list"
            raise TypeError(f"send() takes {kinds}, not {type(message).__name__}")
        least = self._host.settings.deflate_min_bytes
        return self.send_frames(encode_message(BINARY, payload, self._encoding.window, least) if binary else
                                self._encoding.message(payload, "", least)) >= 0

    def recv(self, timeout: float | None = None) -> Message:
        """The client's next message. Raises TimeoutError, and ConnectionClosed, which a handler need not catch."""
        if self._inbox is None:
            raise RuntimeError("recv() is for a handler while it runs, on a route without an on_message callback")
        self.release()
        message = self._inbox.get(timeout)
        if self._inbox.has_room_again:
            self._host.refresh(self)
        return message

    def __iter__(self) -> Iterator[Message]:
        with contextlib.suppress(ConnectionClosed):
            while True:
                yield self.recv()

    def join(self, topic: str) -> None:
        """Receive events that are sent to the topic, from now on."""
        self._host.registry.join(self, *_checked_topics(topic))

    def leave(self, topic: str) -> None:
        self._host.registry.leave(self, topic)

    def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Start the closing handshake (RFC 6455, section 7.1.2); what waits has close_timeout to go out."""
        if not is_close_code(code):
            raise ValueError(f"close code {code}: use 1000 to 1014 as in RFC 6455 section 7.4.1, or 3000 to 4999")
        self.wind_down(CLOSING, encode_close(code, reason))

    # Sending: any thread.

    def send_frames(self, data: bytes | memoryview) -> int:
        """Send encoded frames. Returns the bytes that now wait, or -1 if the connection is not open."""
        if self._state == CLOSED:  # not even its lock can be had, in a forked child
            return -1
        with self._lock:
            if self._state != OPEN:
                return -1
            if not self._pending:
                try:
                    sent = self._sock.send(data)
                except BlockingIOError:
                    sent = 0
                except OSError:  # the peer is gone; a broadcast goes on with the next client
                    sent, self._state = len(data), CLOSED
                if sent == len(data) and self._state == OPEN:
                    return 0
                data = memoryview(data)[sent:]  # no copy: thousands may wait for the rest of the same buffer
            entries = len(self._outbox) if self._outbox else 0  # each costs its 250 bytes, whatever it holds
            too_slow = max(self._pending, 250 * entries) > self._host.settings.outbox_bytes
            if not too_slow and data:
                self._enqueue(data)
        if too_slow:
            self.give_up("outbox", f"{self._pending} bytes wait for it (outbox_bytes)")
        self._host.refresh(self)
        return self._pending if self._state == OPEN else -1

    def _enqueue(self, data: bytes | memoryview) -> None:
        if self._outbox is None:
            self._outbox = deque()
            self._behind_at = self._progress_at = time.monotonic()
        self._outbox.append(data)
        self._pending += len(data)

    def flush(self) -> None:
        """Send what waits, as far as the kernel takes it."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._outbox:
                sent = self._sock.send(self._outbox[0])
                self._pending -= sent
                self._progress_at = time.monotonic()
                if sent < len(self._outbox[0]):
                    self._outbox[0] = memoryview(self._outbox[0])[sent:]
                else:
                    self._outbox.popleft()
            self._outbox = None
            if self._state == LINGERING:
                self._sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:
            self._state = CLOSED

    def keeps_up(self, now: float, grace: float) -> bool:
        """Whether it is worth waiting for: it has something to take, takes it, and has not lagged for too long."""
        return (self._state == OPEN and self._pending > 0 and now - self._progress_at < grace
                and now - self._behind_at < self._host.settings.send_timeout)

    # Changing the state: any thread.

    def open(self, request: Request, encoding: Encoding, response: bytes, position: int | None, held: bool) -> None:
        """The handshake is done; the response goes out before any frame, with the next flush()."""
        with self._lock:
            if self._state < OPEN:
                self.path, self.user, self._encoding = request.path, request.user, encoding
                self._position, self._held = position, held and position is not None
                self._state, self._changed_at = OPEN, time.monotonic()
                self._enqueue(response)

    def expect_acknowledgements(self, seconds: float) -> None:
        """A client that only listens, and has vanished, shows itself by acknowledging nothing (tcp(7))."""
        option = getattr(socket, "TCP_USER_TIMEOUT", 0)
        if option:  # pragma: no branch - Linux has it
            self._sock.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))

    def release(self) -> None:
        """Its topics are complete: what it missed on them can be sent."""
        if self._held:
            self._held = False
            self._host.refresh(self)

    def wind_down(self, state: int, last: bytes = b"") -> bool:
        """Go to a later state; `last` is the last thing sent: a close frame, or an HTTP response. False: too late."""
        if self._state == CLOSED:
            return False
        if self._encoding.stream and state != CLOSED:  # which ends with the stream, and knows no close frames
            state, last = LINGERING, b""
        with self._lock:
            if state <= self._state:
                return False
            if last and self._state <= OPEN:
                self._enqueue(last)
            self._state, self._changed_at = state, time.monotonic()
            if state != CLOSED:
                self._flush()
        self._host.refresh(self)
        return True

    def refuse(self, error: HandshakeError) -> None:
        body = f"{error}\n".encode("utf-8", "replace")
        if self.wind_down(LINGERING, encode_response(error.status, body, **error.headers)):
            self._host.totals.add(f'refused_total{{status="{error.status[:3]}"}}')
            log.info("refused %s:%s: %s %s", *self.address, error.status, error)

    def give_up(self, kind: str, why: str) -> None:
        """Close a client that does not keep up; should it read on, it learns why."""
        if self.wind_down(CLOSING, encode_close(TRY_AGAIN_LATER, f"too slow: {why}")):
            self._host.totals.add(f'closed_total{{reason="{kind}"}}')
            # Not here, where a fan-out may be amid its work: a log handler that broadcasts would wait for it.
            self._host.park(self, functools.partial(
                log.warning, "closed %s:%s on %r: %s", *self.address, self.path, why))

    def abort(self) -> bool:
        """Close at once, without a handshake. False if it was closed already."""
        return self.wind_down(CLOSED)

    # The I/O thread.

    def interest(self) -> int:
        """What a selector should wait for."""
        inbox = self._inbox  # its handler may end meanwhile
        deaf = self._state == ANSWERING or (self._state < LINGERING and self._last_frame) or (
            self._state == OPEN and inbox is not None and inbox.full)
        return (0 if deaf else selectors.EVENT_READ) | (selectors.EVENT_WRITE if self._pending else 0)

    def read(self, now: float) -> None:
        try:
            with self._lock:
                data = self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if self._state == GREETING:
                why = _TLS_TROUBLE.get(getattr(error, "reason", ""), error)
                log.info("%s:%s left during the handshake: %s", *self.address, why)
            data = b""
        if not data:
            if not self.wind_down(LINGERING):  # which tells our end, as TLS has to (RFC 8446, section 6.1)
                self.abort()
            return
        self._heard_at, self._pinged_at = now, 0.0
        self.receive(data)

    def receive(self, data: bytes) -> None:
        """Act on what the client sent."""
        if self._state == GREETING:
            data = self.greet(data)
        if data and self._state >= OPEN:
            self._parse(data)

    def resume(self) -> None:
        """Go on with what was received when there was no room for its messages."""
        if self._parser is not None and self.interest() & selectors.EVENT_READ:
            self._parse(b"")

    def _parse(self, data: bytes) -> None:
        if self._state >= LINGERING:
            return  # what it goes on to say is read, so that it sees our end, and that is all
        parser = self._parser or FrameParser(masked=True, max_bytes=self._host.settings.max_message_bytes,
                                             deflate=self._encoding.window > 0)
        try:
            if self._encoding.stream:
                self._count_idle_frames(1 + len(data) // (16 * KIB))  # there is nothing to be said
            for opcode, payload in () if self._encoding.stream else parser.feed(data):
                self._ON_FRAME[opcode](self, payload)
                if self._state >= LINGERING or not self.interest() & selectors.EVENT_READ:
                    break  # what is left waits in the parser
            self._count_idle_frames(parser.scraps)
            parser.scraps = 0
        except ProtocolError as error:
            self._punish(error)
        self._parser = None if parser.at_rest or self._state >= LINGERING else parser

    def greet(self, data: bytes) -> bytes:
        """More of the HTTP request; returns what came behind it, once it is accepted."""
        self._head += data
        try:
            end = head_end(self._head)
            if end < 0:
                return b""
            self._head, rest = self._head[:end], self._head[end + 4:]
            request = parse_request(self._head)
            request.address = self.address
            return self._host.answer(self, request, rest)
        except HandshakeError as error:
            self.refuse(error)
            return b""

    def await_answer(self) -> None:
        """A thread will find it."""
        with self._lock:
            if self._state == GREETING:
                self._state, self._changed_at = ANSWERING, time.monotonic()

    def _punish(self, error: ProtocolError) -> None:
        log.info("%s:%s broke the protocol: %s", *self.address, error)
        self._host.totals.add(f'closed_total{{reason="{error.code}"}}')
        self._say_last(encode_close(error.code, str(error)))

    def _on_message(self, message: Message) -> None:
        if self._state == OPEN and not self._host.deliver(self, message):
            self._on_idle_frame(message)

    def _on_ping(self, payload: bytes) -> None:
        self._on_idle_frame(payload)
        self.send_frames(encode_frame(PONG, payload))

    def _on_idle_frame(self, payload: Message) -> None:
        """Also a pong: read() has noted that the client is alive."""
        self._count_idle_frames(1 + len(payload) // (16 * KIB))

    def _count_idle_frames(self, number: int) -> None:
        self._idle_frames += number
        if self._idle_frames > IDLE_FRAMES:
            raise ProtocolError(POLICY_VIOLATION, f"more than {IDLE_FRAMES} frames a second that nobody asked for")

    def _on_close(self, payload: tuple[int, str]) -> None:
        self._say_last(encode_close(payload[0]))  # section 5.5.1: echo the code

    _ON_FRAME: ClassVar[dict[int, Callable[[Any, Any], Any]]] = {
        TEXT: _on_message, BINARY: _on_message, PING: _on_ping, PONG: _on_idle_frame, CLOSE: _on_close}

    def _say_last(self, frame: bytes) -> None:
        """Close, but not before callbacks have answered what the client said before (or tick() loses its patience)."""
        self._last_frame, self._changed_at = frame, time.monotonic()
        inbox = self._inbox
        if inbox is None or not inbox.claimed:
            self.worked_off()

    def worked_off(self) -> None:
        """No message is left for a callback; any thread."""
        if self._last_frame:
            self.wind_down(LINGERING, self._last_frame)

    def tick(self, now: float) -> None:
        """Once a second: is anything overdue?"""
        settings, since = self._host.settings, now - self._changed_at
        self._idle_frames = 0
        if self._state == GREETING:
            if since > settings.handshake_timeout:
                self.refuse(HandshakeError("408 Request Timeout",
                                           f"Send the request within {settings.handshake_timeout:g} s."))
        elif self._state == ANSWERING:
            if since > settings.handshake_timeout:
                self.refuse(HandshakeError("503 Service Unavailable", "To find out whether this client may connect"
                                           f" takes more than {settings.handshake_timeout:g} s (handshake_timeout)."))
        elif self._state > OPEN:
            if since > (settings.close_timeout if self._state == CLOSING else LINGER_SECONDS):
                self.abort()
        elif self._last_frame:
            if since > settings.close_timeout:
                self.worked_off()
        elif self._pending:
            if now - self._progress_at > settings.send_timeout:
                self.give_up("send_timeout", f"it has taken nothing for {settings.send_timeout:g} s (send_timeout)")
        elif self._held or self._awaited:
            if since > HELD_SECONDS:
                self._held, self._awaited = False, ""
                self._host.refresh(self)
        elif self.interest():  # else its inbox is full: its pong may be behind what we do not read
            self._keep_alive(now)

    def _keep_alive(self, now: float) -> None:
        settings = self._host.settings
        if self._encoding.stream:  # nothing answers, but a proxy sees that it lives, and we whether it takes it
            if settings.ping_interval and now - self._heard_at > settings.ping_interval:
                self._heard_at = now
                self.send_frames(b":\n\n")
        elif self._pinged_at:
            if now - self._pinged_at > settings.ping_timeout and self.abort():
                self._host.totals.add('closed_total{reason="ping_timeout"}')
                log.warning("closed %s:%s on %r: no answer to a ping for %g s (ping_timeout)", *self.address, self.path,
                            settings.ping_timeout)
        elif settings.ping_interval and now - self._heard_at > settings.ping_interval:
            self._pinged_at = now
            self.send_frames(encode_frame(PING, b""))

    def dispose(self) -> None:
        """Free what it holds; only once no selector knows the descriptor."""
        with self._lock:
            self._sock.close()
            self._outbox, self._pending, self._parser = None, 0, None

    def forget(self) -> None:
        """In a forked child: close our copy of the descriptor, and leave the stream alone; it is the parent's."""
        self._lock = threading.Lock()  # whoever held it is not here
        self._state = CLOSED
        if self._inbox is not None:
            self._inbox = Inbox()  # nothing comes any more; a handler that was forked with us must not wait for it
            self._inbox.close()
        self.dispose()


def send_to_all(audience: Iterable[Connection], data: bytes) -> list[Connection]:
    """send_frames() to each; returns those for whom something waits now.

    Connections that came one after another share a lock, so that the broadcast takes one for many of them: a lock for
    each, and a call of send_frames(), would cost a sixth of the whole.
    """
    size, unfinished, lock = len(data), [], threading.Lock()
    lock.acquire()
    try:
        for conn in audience:
            if conn._lock is not lock:
                lock.release()
                lock = conn._lock
                lock.acquire()
            sent = -1  # not begun
            if not conn._pending and conn._state == OPEN:
                try:
                    sent = conn._sock.send(data)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    pass  # it is gone: send_frames() finds out
            if sent != size:
                unfinished.append((conn, sent))
                if sent >= 0:  # while the lock is held: what TLS has begun to send must go on with the same bytes
                    conn._enqueue(memoryview(data)[sent:])
    finally:
        lock.release()
    for conn, sent in unfinished:
        conn.send_frames(data) if sent < 0 else conn._host.refresh(conn)
    return [conn for conn, _ in unfinished]


class Senders:
    """send_to_all() by two threads: it is the kernel's work, for which send() releases the GIL.

    With two cores and 9,000 clients the median one has an event after 0.6 of the time. For one caller at a time.
    """

    def __init__(self) -> None:
        self._executor: Any = None
        self._least = SENDERS_FROM if os.cpu_count() != 1 else sys.maxsize  # to ask takes 6 µs: not for each event

    def send(self, audience: Sequence[Connection], data: bytes) -> list[Connection]:
        if len(audience) < self._least:
            return send_to_all(audience, data)
        parts = deque(audience[start:start + SENDER_PART] for start in range(0, len(audience), SENDER_PART))
        late: list[Connection] = []
        second = self._start(self._work, parts, data, late)
        try:
            self._work(parts, data, late)
        finally:
            parts.clear()
            if second and not second.cancel():  # it has a part in hand; who comes to nothing need not be waited for
                second.result()
        return late

    @staticmethod
    def _work(parts: deque[Sequence[Connection]], data: bytes, late: list[Connection]) -> None:
        while True:
            try:
                part = parts.popleft()  # and extend() are atomic
            except IndexError:
                return
            late.extend(send_to_all(part, data))

    def _start(self, work: Callable[..., None], *args: Any) -> Any:
        if self._executor is None:
            from concurrent.futures import ThreadPoolExecutor

            self._executor = ThreadPoolExecutor(1, "wsqueue-sender")
        try:
            return self._executor.submit(work, *args)
        except RuntimeError:  # the process may have no more threads, or is about to end
            return None

    def stop(self) -> None:
        if self._executor:
            self._executor.shutdown()
            self._executor = None


# 8 ─ ClientRegistry and history ───────────────────────────────────────────────────────────────────────────────────
# Who is connected, and to which topics; and what was sent last, for who comes back. In: connections, events. Out: the
# audience of an event, as a list of its own, so that nothing is ever sent, logged or called under a lock. Any thread.


class ClientRegistry:
    """The connected clients, by topic. Who is still behind is connected, but in no audience."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._topics_of: dict[Any, tuple[str, ...]] = {}
        self._behind: set[Any] = set()
        self._on_topic: dict[str, dict[Any, None]] = {}  # dicts, because they keep the order of arrival

    def add(self, conn: Any, topics: Iterable[str] = (), behind: bool = False) -> None:
        with self._lock:
            self._topics_of[conn] = ()
            if behind:
                self._behind.add(conn)
            for topic in topics:
                self._join(conn, topic)

    def catch_up(self, conn: Any) -> None:
        """It is behind no longer."""
        with self._lock:
            if conn in self._behind:
                self._behind.remove(conn)
                for topic in self._topics_of[conn]:
                    self._on_topic.setdefault(topic, {})[conn] = None

    def discard(self, conn: Any) -> None:
        with self._lock:
            for topic in self._topics_of.pop(conn, ()):
                self._forget(conn, topic)
            self._behind.discard(conn)

    def join(self, conn: Any, topic: str) -> None:
        """Nothing if the connection has left: a handler may be later than its client."""
        with self._lock:
            if conn in self._topics_of:
                self._join(conn, topic)

    def leave(self, conn: Any, topic: str) -> None:
        with self._lock:
            topics = self._topics_of.get(conn, ())
            if topic in topics:
                self._topics_of[conn] = tuple(other for other in topics if other != topic)
                self._forget(conn, topic)

    def _join(self, conn: Any, topic: str) -> None:
        if topic not in self._topics_of[conn]:
            self._topics_of[conn] += (topic,)
            if conn not in self._behind:
                self._on_topic.setdefault(topic, {})[conn] = None

    def _forget(self, conn: Any, topic: str) -> None:
        if conn in self._behind:
            return
        members = self._on_topic[topic]
        del members[conn]
        if not members:  # topics come and go with users: an empty one must not stay
            del self._on_topic[topic]

    def audience(self, to: Sequence[str] = ()) -> list[Any]:
        """Who is on any of the topics, each once; everyone if there are none."""
        with self._lock:
            if not to:
                return [conn for conn in self._topics_of if conn not in self._behind] if self._behind else list(
                    self._topics_of)
            if len(to) == 1:
                return list(self._on_topic.get(to[0], ()))
            return list({conn: None for topic in to for conn in self._on_topic.get(topic, ())})

    def everyone(self) -> list[Any]:
        with self._lock:
            return list(self._topics_of)

    def topics(self, conn: Any) -> tuple[str, ...]:
        return self._topics_of.get(conn, ())

    def sizes(self, most: int) -> dict[str, int]:
        """How many are on each topic; the largest first."""
        with self._lock:
            sizes = [(len(members), topic) for topic, members in self._on_topic.items()]
        return {topic: size for size, topic in sorted(sizes, reverse=True)[:most]}

    def __len__(self) -> int:
        return len(self._topics_of)


def _by_encoding(conns: Iterable[Connection]) -> Iterable[tuple[Encoding, list[Connection]]]:
    groups: dict[Encoding, list[Connection]] = {}
    last: Encoding | None = None
    for conn in conns:
        if conn._encoding is not last:  # who comes one after another is mostly of a kind
            last = conn._encoding
            group = groups.setdefault(last, [])
        group.append(conn)
    return groups.items()


Audience = Tuple[Encoding, Sequence[int], "list[Connection]"]  # is sent the events of these numbers


def audiences_of(events: Sequence[Event], registry: ClientRegistry) -> list[Audience]:
    """Who is to be sent what: each client all of its events in one piece, and those that get the same, the same."""
    by_topics: dict[tuple[str, ...], list[int]] = {}
    for number, event in enumerate(events):
        by_topics.setdefault(event.to, []).append(number)
    if len(by_topics) == 1 and events[0].exclude is None:
        to, numbers = by_topics.popitem()
        return [(encoding, numbers, conns) for encoding, conns in _by_encoding(registry.audience(to))]
    everyone = by_topics.pop((), [])
    on: dict[Connection, tuple[int, ...]] = dict.fromkeys(registry.audience() if everyone else (), ())
    for index, to in enumerate(by_topics):
        for conn in registry.audience(to):
            on[conn] = (*on.get(conn, ()), index)
    for event in events:
        if event.exclude is not None:  # of a broadcast(), which is alone
            on.pop(event.exclude(), None)
    members: dict[tuple[int, ...], list[Connection]] = {}
    for conn, indices in on.items():
        members.setdefault(indices, []).append(conn)
    targeted = list(by_topics.values())
    return [(encoding, sorted(everyone + [number for index in indices for number in targeted[index]]), conns)
            for indices, alike in members.items() for encoding, conns in _by_encoding(alike)]


_RESET = "~reset"  # ends the id of what stands for entries that were removed
AHEAD = sys.maxsize  # the position of a client that has seen what this server has yet to send
LOST = -sys.maxsize  # and of one that has missed what is not kept


class History:
    """The last events that were sent, in this order, each under a number.

    A client's position is the number of what it is to get next. Two steps must not be torn apart, and are taken under
    `lock`: events are added and their audience is asked for; a client finds nothing that it has missed and joins
    that audience. So each event reaches it in exactly one of the two ways.

    An event that was sent, and may still be in its queue, is kept beyond the bounds: should we be killed, the next
    server finds it there again, and must know that it has been sent.

    Where servers share a queue, ids are places in it (place_of), in order: a client may come from another server, and
    be ahead of this one. What is sent past the queue gets the place before it, and is told apart by what follows a "~".
    """

    def __init__(self, most_events: int, most_bytes: int, most_seconds: float, clock: Clock = time.time) -> None:
        self.lock = threading.Lock()  # guards all below, but for _unsettled; the registry's comes after it
        self._most, self.most_seconds = (most_events, most_bytes, most_seconds), most_seconds
        self._clock = clock
        self._events: deque[tuple[float, Event]] = deque()  # when each was sent
        self._numbers: dict[str, int] = {}  # of their ids
        self._first = self._size = 0  # number of the oldest; bytes of all
        self._base = ""  # the id before the oldest, with which a client has missed nothing
        self._epoch = os.urandom(6).hex()  # of this numbering
        self._unsettled: set[Any] = set()  # sources of what may still be in its queue; who sends changes it
        self.shared = False
        self._last = ""  # where it is, its last event that came from the queue
        self._void: tuple[float, ...] = ()  # up to here ids mean nothing: they are from before the queue went back
        self.awaiting: set[Any] = set()  # connections that are ahead

    @property
    def current(self) -> str:
        """An id for where the history ends; that of the last event would tell everyone the name of its file."""
        if self.shared:
            return self._events[-1][1].id if self._events else self._last or f"~{self._epoch}"
        return f"{self._epoch}-{self.end}"

    @property
    def knows_nothing(self) -> bool:
        return self.shared and not self._base

    def recall(self, base: str, events: Iterable[Event]) -> None:
        """Put before all else what was sent before us; `base` is the id before that."""
        with self.lock:
            past = list(events)
            self._base, self._last = base, past[-1].id if past else base
            for event in reversed(past):
                self._first -= 1
                self._numbers[event.id] = self._first
                self._events.appendleft((min(event.queued_at, self._clock()), event))
                self._size += event.size
            self._trim()

    @property
    def end(self) -> int:
        return self._first + len(self._events)

    def restore(self, epoch: str, first: int, base: str, events: Iterable[tuple[float, Event]]) -> None:
        self._epoch, self._first, self._base = epoch, first, base
        for at, event in events:
            self._append(at, event)
        self._trim()

    def enter(self, events: Iterable[Event]) -> tuple[list[Event], set[int]]:
        """Events with ids of their own, and the numbers of those that were sent already: not yet added."""
        entered, repeats, ids = [], set(), set()
        for number, event in enumerate(events):
            if event.id.endswith(_RESET) and (place_of(event.id) or ()) < (place_of(self._last) or ()):
                self._begin_anew(event.id)
            if self.shared and place_of(event.id) is None:
                event = event._replace(id=f"{self._last}~{event.id}")
            known = self.shared and event.id in self._numbers
            if known or (event.source is not None and event.source in self._unsettled):
                repeats.add(number)
            else:
                while event.id in self._numbers or event.id in ids:  # a file's name may be used again
                    event = event._replace(id=f"{event.id}~{time.time_ns():x}")
                ids.add(event.id)
            entered.append(event)
        return entered, repeats

    def _begin_anew(self, base: str) -> None:
        """The queue has gone back, and may use ids again."""
        with self.lock:
            self._void = max(self._void, place_of(self._last) or ())
            self._first, self._size = self.end, 0
            self._events.clear()
            self._numbers.clear()
            self._base = self._last = base

    def settle(self, events: Iterable[Event]) -> None:
        """These are in their queue no longer."""
        self._unsettled.difference_update([event.source for event in events])
        with self.lock:
            self._trim()

    def add(self, events: Iterable[Event]) -> None:
        now = self._clock()
        for event in events:
            self._append(now, event)
        self._trim()

    def _append(self, at: float, event: Event) -> None:
        self._numbers[event.id] = self.end
        self._last = self._last if "~" in event.id else event.id
        self._events.append((at, event))
        if event.source is not None:
            self._unsettled.add(event.source)
        self._size += event.size

    def _trim(self) -> None:
        count, size, seconds = self._most
        oldest = self._clock() - seconds
        while self._events and (len(self._events) > count or self._size > size or self._events[0][0] < oldest):
            event = self._events[0][1]
            if event.source in self._unsettled and self._size <= size + LAGGING_TICKS * TICK_BYTES:
                return
            self._events.popleft()
            if self._numbers.get(event.id) == self._first:
                del self._numbers[event.id]
            self._base, self._first, self._size = event.id, self._first + 1, self._size - event.size

    def position(self, identity: str) -> int | None:
        """Where a client goes on that has seen this event last; None: it is not known (any more). Or AHEAD."""
        self._trim()
        if self._void and (place_of(identity) or ()) <= self._void:
            return None
        if identity in self._numbers:
            return self._numbers[identity] + 1
        if self.shared:
            return self._position_of(place_of(identity))
        epoch, _, number = identity.rpartition("-")
        if epoch == self._epoch and re.fullmatch("[0-9]{1,18}", number) and self._first <= int(number) <= self.end:
            return int(number)
        return self._first if identity == self._base else None

    def _position_of(self, place: tuple[float, ...] | None) -> int | None:
        base, last = place_of(self._base), place_of(self._last)
        if place is None or (base and place < base) or (place == base and self._base.endswith(_RESET)):
            return None
        if not base or not last or place > last:
            return AHEAD
        position = self.end
        for _, event in reversed(self._events):
            if "~" not in event.id and (place_of(event.id) or base) <= place:
                break
            position -= 1
        is_known = position > self._first or not self._events or place == base  # else of a queue that was made anew
        return position if is_known else None

    def after(self, position: int, conn: Any, topics: Iterable[str], most: int) -> tuple[list[Event], int] | None:
        """The next events (`most` bytes and one) for a client on the topics, and the position behind them.

        None: they are not kept any more.
        """
        self._trim()
        if position < self._first:
            return None
        mine, events, size = set(topics), [], 0
        for _, event in itertools.islice(self._events, position - self._first, None):
            if size >= most:
                break
            position += 1
            excluded = event.exclude is not None and event.exclude() is conn
            if not excluded and (not event.to or not mine.isdisjoint(event.to)):
                events.append(event)
                size += event.size
        return events, position

    def let_go(self) -> set[Any]:
        """The connections that were ahead: to be looked at again."""
        if not self.awaiting:
            return self.awaiting
        with self.lock:
            awaiting, self.awaiting = self.awaiting, set()
        return awaiting

    def kept(self) -> tuple[str, int, str, list[tuple[float, Event]]]:
        """What restore() takes."""
        with self.lock:
            self._trim()
            return self._epoch, self._first, self._base, list(self._events)


class HistoryFile:
    """history/events.log: what History keeps, for the next server. A line each, added before the event is sent.

    What is in the file counts as sent: nobody's position can then be behind it. It belongs to the thread that sends.
    No file is better than one with a hole: clients are then told to start anew, and not that they missed nothing. So
    it goes when it cannot be written, and is not believed after a crash of the machine, which may forget its end.
    """

    def __init__(self, directory: str, history: History, most_bytes: int, is_ours: Callable[[], bool]) -> None:
        self._directory, self._path = directory, f"{directory}/events.log"
        self._history, self._most_bytes, self._is_ours = history, most_bytes, is_ours
        self._fd, self._size, self._limit = -1, 0, 0  # bytes it has; and may have before it is written anew
        self._retry_at = self._anew_at = 0.0  # monotonic
        self._trouble = ""

    def open(self) -> None:
        """Restore the history; what cannot be read is logged, and forgotten. Raises QueueError."""
        try:
            self._history.restore(*self._load())
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("the history in %s is not used (%s): clients that come back start anew", self._directory, error)
        try:
            self._write_anew(b"", durable=True)  # or a crash of the machine could bring a complete, older one back
        except OSError as error:
            self.remove(error)

    def _load(self) -> tuple[str, int, str, list[tuple[float, Event]]]:
        self._check_directory()
        fd = os.open(self._path, _READ)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > 4 * self._most_bytes + 64 * MIB:
                raise ValueError("not a regular file, or too large")
            head, *lines = file.read(status.st_size).split(b"\n")
        first = json.loads(head)
        if lines[-2:-1] != [_CLOSED] and not first["boot"] == _boot_id() != "":
            raise ValueError("the machine may have crashed since")
        if lines[-1] and not self._is_unsent(lines[-1]):
            raise ValueError("its end is damaged")
        events = [self._settled(*_parse_line(line)) for line in lines[:-1] if line != _CLOSED]
        return str(first["epoch"]), int(first["first"]), str(first["base"]), events

    def _settled(self, at: float, event: Event) -> tuple[float, Event]:
        """Without its source, if that is not in the queue any more."""
        return at, event if event.source and self._is_queued(event.source[0]) else event._replace(source=None)

    def _is_queued(self, name: str) -> bool:
        return os.path.lexists(os.path.join(os.path.dirname(self._directory), name))

    def _is_unsent(self, line: bytes) -> bool:
        """Whether a line was torn when we were killed: then its event has not been sent, and is still in the queue."""
        match = re.match(rb'\{"id":"[^"]*","source":\["((?:[^"\\]|\\.)*)",\[', line)
        name = json.loads(b'"%s"' % match[1]) if match else ""
        return bool(name) and self._is_queued(name)

    def write(self, events: Sequence[Event]) -> str:
        """Add events that are about to be sent. Returns what went wrong anew, to be logged under no lock."""
        data, now = b"".join(_encode_line(time.time(), event) for event in events), time.monotonic()
        try:
            if self._fd >= 0 and self._size + len(data) <= self._limit and _is_at(self._path, self._status):
                _write_all(self._fd, data)
                self._size += len(data)
            elif self._fd >= 0 or now >= self._retry_at:
                self._write_anew(data)
        except OSError as error:
            self._retry_at = now + 1.0
            self.remove(error)
            known, self._trouble = self._trouble, str(error.strerror)
            if self._trouble in (known, _NOT_OURS):  # the queue thread says so, too
                return ""
            return (f"cannot keep the history in {self._directory} ({error.strerror}): clients that come back after a"
                    " restart start anew")
        self._trouble = ""
        return ""

    def expire(self) -> None:
        """What the history has dropped for its age is not to stay in the file."""
        if self._fd >= 0 and time.monotonic() >= self._anew_at:
            with contextlib.suppress(OSError):  # the next write() will tell
                self._write_anew(b"")

    def _write_anew(self, data: bytes, durable: bool = False) -> None:
        """Without what the history has dropped."""
        if not self._is_ours():
            raise OSError(errno.EBUSY, _NOT_OURS)
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        self._check_directory()
        epoch, first, base, kept = self._history.kept()
        head = json.dumps({"epoch": epoch, "first": first, "base": base, "boot": _boot_id()}).encode() + b"\n"
        data = head + b"".join(_encode_line(at, event) for at, event in kept) + data
        temporary = f"{self._directory}/.events.log.tmp"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        fd = os.open(temporary, _CREATE, 0o600)
        try:
            _write_all(fd, data)
            if durable:
                os.fsync(fd)
            os.rename(temporary, self._path)
        except BaseException:
            os.close(fd)
            raise
        self.abandon()
        self._fd, self._status, self._size, self._limit = fd, os.fstat(fd), len(data), 2 * len(data) + MIB
        self._anew_at = time.monotonic() + min(SWEEP_SECONDS, max(1.0, self._history.most_seconds))
        if durable:
            _write(self._directory, os.O_RDONLY, b"", durable)

    def _check_directory(self) -> None:
        """Whoever may write to the queue must not send the history elsewhere."""
        if not stat.S_ISDIR(os.lstat(self._directory).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory, or a link")

    def remove(self, reason: OSError | None = None) -> None:
        """Raises QueueError if an old one stays, which the next server would believe."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
        self.abandon()
        with contextlib.suppress(OSError):
            self._check_directory()
            if not self._is_ours():
                return
            for name in (f"{self._directory}/.events.log.tmp", self._path):
                with contextlib.suppress(OSError):  # where the directory may not be written, the file may
                    os.close(os.open(name, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK))
                with contextlib.suppress(OSError):
                    os.unlink(name)
            status = os.lstat(self._path)
            if status.st_size and stat.S_ISREG(status.st_mode):
                why = f" ({reason.strerror})" if reason else ""
                raise QueueError(f"{self._path} can be neither written{why} nor removed: what it says would be wrong;"
                                 " make its directory writable, or remove it")

    def abandon(self) -> None:
        """Close it as it is; also in a forked child."""
        fd, self._fd = self._fd, -1  # in this order: a fork may come between
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def close(self) -> None:
        """What was written until now survives the machine's end, too."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                _write_all(self._fd, _CLOSED + b"\n")
                os.fsync(self._fd)
        self.abandon()


_CLOSED = b"{}"
_NOT_OURS = "another server may have the directory"


def _boot_id() -> str:
    """Differs after each start of the machine; "" where nothing says so."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:  # pragma: no cover - not on Linux
        return ""


def _encode_line(at: float, event: Event) -> bytes:
    to = b',"to":' + encode_json(list(event.to), "topics") if event.to else b""
    source = b""
    if event.source is not None:
        name, signature = event.source
        source = b',"source":[%s,[%d,%d,%d]]' % (json.dumps(name).encode(), *signature)
    return b'{"id":"%s"%s,"at":%.6f%s,"message":%s}\n' % (event.id.encode(), source, at, to, event.text)


def _parse_line(line: bytes) -> tuple[float, Event]:
    record = _DECODE(line.decode())
    text = line.partition(b',"message":')[2][:-1]  # as it was sent; within a string the quotes would be escaped
    return float(record["at"]), Event(str(record["id"]), _checked_topics(record.get("to")), record["at"], text,
                                      _frozen(record.get("source")))


def _frozen(value: Any) -> Any:
    """A tuple where JSON made a list of it."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


# 9 ─ Tickets ──────────────────────────────────────────────────────────────────────────────────────────────────────
# Who may connect, and as whom: a JSON Web Token (RFC 7519) signed with HS256 (RFC 7518, section 3.2), which any
# language makes in five lines. No I/O, no state, any thread. Promises: nothing of a ticket is looked at before its
# signature is found good, and no error says more than what is wrong with it.


class Ticket(NamedTuple):
    """What a valid ticket grants."""

    user: str | None
    topics: tuple[str, ...]


def sign_ticket(secret: str | bytes, *, user: Any = None, topics: Iterable[str] = (), path: str | None = None,
                ttl: float = 60.0) -> str:
    """A ticket to connect with, as ?ticket=… or as Authorization: Bearer …, within the next `ttl` seconds.

    secret: one of the server's. user: an id, which puts the client on the topic "user:ID". topics: what it is on
    besides. path: the only one it may connect to; None is any. Raises SettingError.
    """
    key, now = secret if isinstance(secret, bytes) and secret else checked_secrets(secret)[0], time.time()
    claims: dict[str, Any] = {}
    claims.update({} if user is None else {"sub": str(user)}, **{} if path is None else {"path": path})
    try:
        claims.update(topics=list(_checked_topics(topics or None)), iat=int(now), exp=int(now + ttl))
        _granted_by(claims)
    except (ValueError, OverflowError) as error:
        raise SettingError(f"a ticket cannot be made: {error}") from None
    signed = b".".join(_base64url(encode_json(part, "a ticket")) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    ticket = signed + b"." + _signature(key, signed)
    if len(ticket) > TICKET_BYTES:
        raise SettingError(f"a ticket of {len(ticket)} bytes is more than the {TICKET_BYTES} that a server accepts")
    return ticket.decode()


def verify_ticket(ticket: str, secrets: Iterable[str], path: str, now: float) -> Ticket:
    """What the ticket grants to who connects to the path. Raises HandshakeError."""
    try:
        if len(ticket) > TICKET_BYTES:
            raise ValueError(f"it has more than {TICKET_BYTES} bytes")
        signed, _, signature = ticket.encode("latin-1", "replace").rpartition(b".")
        if signed.count(b".") != 1:
            raise ValueError("it is not a JSON Web Token")
        if not _is_signed(signed, signature, secrets):
            raise ValueError("its signature is not one of HS256 with a secret of this server")
        header, claims = map(_json_object, signed.split(b"."))
        if header.get("alg") != "HS256" or "crit" in header:  # "crit": extensions that must be understood (RFC 7515)
            raise ValueError("only HS256, without extensions, is accepted")
        _check_times(claims, now)
        if "aud" in claims:  # RFC 7519, section 4.1.3: we are in nobody's list
            raise ValueError('it is for another audience ("aud")')
        if claims.get("path") not in (None, path):
            raise ValueError("it is for another path")
        return _granted_by(claims)
    except (ValueError, RecursionError) as error:
        raise refused_ticket(f"This ticket is refused: {error}.") from None


def refused_ticket(sentence: str) -> HandshakeError:
    return HandshakeError("401 Unauthorized", sentence, WWW_Authenticate="Bearer")


def _is_signed(signed: bytes, signature: bytes, secrets: Iterable[str]) -> bool:
    """As text: base64 has several spellings of the same bytes, and only one is ours. All secrets, in constant time."""
    from hmac import compare_digest

    return sum(compare_digest(_signature(secret, signed), signature) for secret in secrets) > 0


def _signature(secret: str | bytes, signed: bytes) -> bytes:
    import hmac

    key = secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
    return _base64url(hmac.new(key, signed, "sha256").digest())


def _base64url(data: bytes) -> bytes:
    from base64 import urlsafe_b64encode

    return urlsafe_b64encode(data).rstrip(b"=")


def _json_object(part: bytes) -> dict[str, Any]:
    from base64 import urlsafe_b64decode

    try:
        value = _DECODE(urlsafe_b64decode(part + b"==").decode())
    except ValueError:
        raise ValueError("it does not hold JSON") from None
    if not isinstance(value, dict):
        raise ValueError("it does not hold JSON objects")
    return value


def _check_times(claims: dict[str, Any], now: float) -> None:
    """exp, which a ticket must have, and nbf (RFC 7519, section 4.1)."""
    for name in ("exp", "nbf"):
        value: Any = claims.get(name, 0 if name == "nbf" else None)
        if type(value) not in (int, float) or not abs(value) < 1e15:  # a bool, text, or beyond any date
            raise ValueError(f'"{name}" must be a time in seconds since 1970')
    if now > claims["exp"] + LEEWAY_SECONDS:
        raise ValueError("it has expired; fetch a new one each time you connect")
    if now < claims.get("nbf", 0) - LEEWAY_SECONDS:
        raise ValueError("it is not valid yet; compare the clocks")


def _granted_by(claims: dict[str, Any]) -> Ticket:
    user, topics, path = claims.get("sub"), claims.get("topics") or [], claims.get("path")
    if type(user) is int:  # a StringOrURI by the RFC, but a number in many a database
        user = str(user)
    if user is not None and (not isinstance(user, str) or not user):
        raise ValueError('"sub" must be a user id, a non-empty string')
    if not isinstance(topics, list) or not all(isinstance(topic, str) and topic for topic in topics):
        raise ValueError('"topics" must be a list of non-empty strings')
    if path is not None and not (isinstance(path, str) and path.startswith("/")):
        raise ValueError('"path" must start with a slash')
    return Ticket(user, tuple(topics))


# 10 ─ The server ──────────────────────────────────────────────────────────────────────────────────────────────────
# The accept thread is that of the websocket_server package; this replaces the rest of it, and why:
#   accept    its listen backlog of 5 drops connections in a rush; an accept() that fails for want of descriptors spins
#   handshake request lines are read without limit or deadline, malformed ones end in a traceback on stderr, nothing
#             but a closed connection tells the client what was wrong, and a page of any origin may connect
#   TLS       ssl.wrap_socket is gone from Python 3.12, and a handshake would block whoever makes it
#   reading   fragments and binary are refused, lengths and UTF-8 believed, and a thread is kept for each client
#   sending   send() is blocking and its result ignored: one client that does not read stops the broadcast for all,
#             and a short write corrupts the stream
#   clients   the list is changed and iterated by all threads without a lock, and is searched for each disconnect


class Totals:
    """What has happened since the server was made, by the name and label of the metric. Its lock is a leaf."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _totals
        self._totals = {"events_total": 0, "deliveries_total": 0, "connections_total": 0}

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._totals[name] = self._totals.get(name, 0) + amount

    def all(self) -> dict[str, int]:
        with self._lock:
            return dict(self._totals)


class WorkerPool:
    """Runs what users wrote, and what may wait, never on the I/O thread: up to CALLBACK_THREADS at a time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._ready: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._lock = threading.Lock()  # guards _threads; a leaf
        self._threads: list[threading.Thread] = []

    def submit(self, work: Callable[..., Any], *args: Any) -> None:
        self.go_on(work, *args)
        with self._lock:
            if len(self._threads) >= CALLBACK_THREADS:
                return
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the process may have no more; those that are here will do
                if not self._threads:
                    raise
            else:
                self._threads.append(thread)

    def waiting(self) -> int:
        return self._ready.qsize()

    def go_on(self, work: Callable[..., Any], *args: Any) -> None:
        """For work itself: behind the others, so that a flood from one client does not starve them."""
        self._ready.put((work, args))

    def _work(self) -> None:
        for work, args in iter(self._ready.get, None):
            try:
                work(*args)
            except BaseException:
                log.exception("%r failed", work)

    def stop(self) -> list[threading.Thread]:
        for _ in self._threads:
            self._ready.put(None)
        return self._threads


class IOThread:
    """Every connection is parked here: one selector, which only this thread touches.

    Others call refresh(), which queues the connection for a look and interrupts the selector. answer(conn, request,
    rest) is called once a request is whole, by this thread or the one that has the connection before it is parked; it
    returns what of the rest is to be read now, and raises HandshakeError.
    """

    def __init__(self, registry: ClientRegistry, history: History, settings: Any, totals: Totals,
                 callbacks: Mapping[str, Callable[..., Any]],
                 answer: Callable[[Connection, Request, bytes], bytes]) -> None:
        self.registry, self.history, self.settings, self.totals = registry, history, settings, totals
        self.callbacks, self.answer = callbacks, answer
        self.pool, self.checks = WorkerPool("wsqueue-callback"), WorkerPool("wsqueue-check")
        self._parked: dict[Connection, int] = {}  # -> what the selector waits for; 0: nothing
        self._greeting: dict[Connection, None] = {}  # those in the handshake, the oldest first
        self._selector = selectors.DefaultSelector()
        self._waker = Waker()
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._touched: deque[tuple[Connection, Callable[[], Any] | None]] = deque()  # append and popleft are atomic
        self._arrivals = itertools.count()
        self._shared_lock = threading.Lock()
        self._to_tick: list[Connection] = []  # not yet looked at in this second
        self._next_tick, self._tick_seconds = 0.0, 1.0
        self._stop_by: float | None = None
        self._said_goodbye = False
        self.thread = threading.Thread(target=self._loop, name="wsqueue-io", daemon=True)

    def refresh(self, conn: Connection) -> None:
        self._touched.append((conn, None))
        if threading.current_thread() is not self.thread:
            self._waker.set()

    def sending_lock(self) -> threading.Lock:
        if next(self._arrivals) % SHARED_LOCK == 0:
            self._shared_lock = threading.Lock()
        return self._shared_lock

    def park(self, conn: Connection, step: Callable[[], Any]) -> None:
        """Hand the connection over, and run step() there. New ones come from a thread that ends before stop()."""
        self._touched.append((conn, step))
        self._waker.set()

    def stop(self, timeout: float) -> None:
        """Close every connection, for at most `timeout` seconds, and end the thread."""
        self._stop_by = time.monotonic() + timeout
        self._waker.set()

    def _loop(self) -> None:
        while not self._finished():
            timeout = 0.0 if self._touched else 0.05 if self._stop_by else max(0.0, self._next_tick - time.monotonic())
            for key, mask in self._selector.select(timeout):
                if key.data is None:
                    self._waker.clear()
                else:
                    self._guarded(self._serve, key.data, None, mask)
            self._tick(time.monotonic())
            while self._touched:
                self._guarded(self._serve, *self._touched.popleft())
        self._selector.close()
        self._waker.close()

    def _tick(self, now: float) -> None:
        """Look at each connection once a second, at TICK_PART of them in one go."""
        if now < self._next_tick:
            return
        if not self._to_tick:
            self._waker.clear()  # a signal handler may have broken off who was to write its byte
            self._to_tick = list(self._parked)
            self._tick_seconds = 1.0 / max(1, -(-len(self._to_tick) // TICK_PART))
        self._next_tick = now + self._tick_seconds
        for conn in self._to_tick[-TICK_PART:]:
            self._guarded(Connection.tick, conn, now)  # what it changes, it has settled through refresh()
        del self._to_tick[-TICK_PART:]

    def _guarded(self, function: Callable[..., None], conn: Connection, *args: Any) -> None:
        """A bug of ours with one client must not take the others down."""
        try:
            function(conn, *args)
        except Exception:
            log.exception("closed %s:%s", *conn.address)
            conn.abort()
            self._drop(conn)

    def _serve(self, conn: Connection, step: Callable[[], Any] | None, mask: int = 0) -> None:
        if step is not None:
            self._welcome(conn)
            step()
        if mask & selectors.EVENT_WRITE:
            conn.flush()
        if mask & selectors.EVENT_READ:
            conn.read(time.monotonic())
        conn.resume()
        if conn._position is not None and not conn._held and not conn._pending and conn._state == OPEN:
            self._catch_up(conn)
        self._settle(conn)

    def _catch_up(self, conn: Connection) -> None:
        """Send the next of what the client missed; once there is nothing, it is in the audience of what comes."""
        history, most = self.history, min(CATCH_UP_BYTES, self.settings.outbox_bytes)
        encoding = conn._encoding._replace(window=0)  # to compress for each client would take too long
        with history.lock:
            if conn._position == AHEAD:
                conn._position = history.position(conn._awaited) if conn._awaited else LOST
                if conn._position == AHEAD:
                    history.awaiting.add(conn)
                    return
                conn._position, conn._awaited = LOST if conn._position is None else conn._position, ""
            found = history.after(conn._position or 0, conn, self.registry.topics(conn), most)
            if found is None:
                conn._position, current = history.end, history.current
            elif found[0]:
                conn._position = found[1]
            else:
                conn._position = None
                self.registry.catch_up(conn)
                return
        missed = [encoding.message(event.text, event.id) for event in found[0]] if found else [
            encoding.message(notice("wsqueue.reset"), current)]
        conn.send_frames(b"".join(missed))
        self.refresh(conn)

    def _drop(self, conn: Connection) -> None:
        self.registry.discard(conn)
        if conn._awaited:
            with self.history.lock:
                self.history.awaiting.discard(conn)
        self._greeting.pop(conn, None)
        if conn._inbox is not None:
            conn._inbox.close()
        with contextlib.suppress(KeyError, ValueError):  # it waited for nothing
            self._selector.unregister(conn._sock)
        with _FORK_LOCK:
            self._parked.pop(conn, None)
            conn.dispose()

    def _welcome(self, conn: Connection) -> None:
        if conn in self._parked or conn._sock.fileno() < 0:
            return
        self._parked[conn] = 0
        if conn._state < OPEN:
            self._greeting[conn] = None
            while len(self._greeting) > min(HALF_OPEN, descriptors() // 4):
                oldest = next(iter(self._greeting))
                del self._greeting[oldest]  # now, and not with its descriptor: many may come before that is closed
                oldest.abort()

    def _settle(self, conn: Connection) -> None:
        """Make the selector and the registry agree with the connection's state."""
        before, inbox = self._parked.get(conn), conn._inbox
        if before is None:  # not here yet, or gone already
            return
        if conn._state >= OPEN:
            self._greeting.pop(conn, None)
        if conn._state > OPEN:
            self.registry.discard(conn)
            if inbox is not None:
                inbox.close()
        if conn._state == CLOSED:
            self._drop(conn)
            return
        wanted = conn.interest()
        if wanted == before:
            return
        self._parked[conn] = wanted
        if not before and wanted:
            self._selector.register(conn._sock, wanted, conn)
        elif wanted:
            self._selector.modify(conn._sock, wanted, conn)
        elif before:
            self._selector.unregister(conn._sock)

    def _finished(self) -> bool:
        if self._stop_by is None:
            return False
        if not self._said_goodbye and not self._touched:
            self._said_goodbye = True
            for conn in list(self._parked):
                if conn._state < OPEN:
                    conn.abort()
                else:
                    conn.close(GOING_AWAY, "the server is stopping")
        if self._parked and time.monotonic() < self._stop_by:
            return False
        for conn in list(self._parked):
            conn.abort()
        return not self._touched and not self._parked

    def deliver(self, conn: Connection, message: Message) -> bool:
        """To the route's callback, else to its handler if that still runs, else to nobody (False): never to others."""
        inbox = conn._inbox
        if conn.path not in self.callbacks:
            if inbox is not None:
                inbox.put(message)
            return inbox is not None
        if inbox is None:
            inbox = conn._inbox = Inbox()
        if inbox.put(message, claim=True):
            self.pool.submit(self._run_callback, conn, inbox)
        return True

    def _run_callback(self, conn: Connection, inbox: Inbox) -> None:
        """One at a time and in order for each connection."""
        message = inbox.next()
        if message is None:
            conn.worked_off()
            return
        if inbox.has_room_again:
            self.refresh(conn)
        _run_user_code(self.callbacks[conn.path], conn, message)
        self.pool.go_on(self._run_callback, conn, inbox)

    def forget(self) -> None:
        """In a forked child, which has copies of our descriptors, but not our thread."""
        for conn in {*self._parked, *(conn for conn, _ in self._touched)}:
            conn.forget()
        self.registry = ClientRegistry()  # whoever held the other one's lock is not here
        self._selector.close()
        self._waker.close()


def notice(name: str) -> bytes:
    """The text of a message from the server itself."""
    return encode_json({"event": name, "payload": None, "timestamp": int(time.time())}, name)


def _run_user_code(function: Callable[..., Any], conn: Connection, *args: Any) -> None:
    try:
        function(conn, *args)
    except ConnectionClosed:
        pass  # recv() said so: the client has left, and nobody need be told
    except BaseException:  # sys.exit() would end a callback thread, and the pool has only so many
        log.exception("%r failed on %s; its connection is closed", function, conn.path)
        conn.close(SERVER_ERROR, "the handler failed")


# The handshake (RFC 6455, section 4.2).


def websocket_key(request: Request) -> str:
    """The key of a request that is a WebSocket handshake. Raises HandshakeError."""
    headers = request.headers
    if request.method != "GET":
        raise HandshakeError("405 Method Not Allowed", "This port speaks WebSocket. To publish an event, put it in the"
                             " queue: wsqueue send EVENT JSON --queue DIR.", Allow="GET")
    if headers.get("upgrade", "").lower() != "websocket" or "upgrade" not in re.split(
            r"[\s,]+", headers.get("connection", "").lower()):
        raise HandshakeError("426 Upgrade Required", "This is a WebSocket server: connect with new WebSocket(url), or"
                             " through a proxy that passes the Upgrade and Connection headers on.",
                             Upgrade="websocket", Connection="Upgrade, close")
    if headers.get("sec-websocket-version") != "13":
        raise HandshakeError("426 Upgrade Required", "Use version 13 of the WebSocket protocol (RFC 6455).",
                             Sec_WebSocket_Version="13")
    if "host" not in headers:
        raise HandshakeError("400 Bad Request", "The Host header is missing.")
    key = headers.get("sec-websocket-key", "")
    if not re.fullmatch(r"[A-Za-z0-9+/]{22}==", key):
        raise HandshakeError("400 Bad Request", "Sec-WebSocket-Key must be 16 bytes in base64.")
    return key


def check_origin(request: Request, allowed: Sequence[str]) -> None:
    """Browsers say which page connects, and connect to anything for any page: only the server can refuse."""
    from urllib.parse import urlsplit

    origin = request.headers.get("origin")
    if origin is None and request.headers.get("sec-fetch-mode") == "no-cors":  # any page may, with the user's cookies
        raise HandshakeError("403 Forbidden", "A page may not ask for this without CORS: use EventSource or WebSocket.")
    if origin is None or "*" in allowed or origin in allowed:
        return
    with contextlib.suppress(ValueError):
        page = urlsplit(origin).hostname
        if page and page == host_name(request):
            return
    raise HandshakeError("403 Forbidden", f"Pages of {origin[:200]!r} may not connect. Add it to the setting"
                         " allowed_origins (--allowed-origins) if they should.")


def cors_headers(origin: str | None, allowed: Sequence[str]) -> dict[str, str]:
    """For a page whose origin has been checked (Fetch, section 3.2): with cookies, unless any page may read it."""
    if origin is None:
        return {}
    if "*" in allowed:
        return {"Access-Control-Allow-Origin": "*"}
    return {"Access-Control-Allow-Origin": origin, "Access-Control-Allow-Credentials": "true", "Vary": "Origin"}


def asks_for_stream(request: Request) -> bool:
    """Whether it is for server-sent events, which any GET can be."""
    accepted = request.headers.get("accept", "").lower()
    return request.method == "GET" and "text/event-stream" in accepted and not request.is_upgrade()


def stream_head(cors: Mapping[str, str]) -> bytes:
    """A browser comes back after a time of its own, so that not all do at once."""
    import random

    head = encode_head("200 OK", {"Content-Type": "text/event-stream", "Cache-Control": "no-store",
                                  "X-Accel-Buffering": "no", "Connection": "close", **cors})
    return head + b"retry: %d\n\n" % random.randint(1000, 5000)  # noqa: S311


def host_name(request: Request) -> str:
    from urllib.parse import urlsplit

    with contextlib.suppress(ValueError):
        return urlsplit("//" + request.headers.get("host", "")).hostname or ""
    return ""


def is_loopback(host: str) -> bool:
    import ipaddress

    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def read_secrets(path: str) -> tuple[str, ...]:
    """A file's secrets, one a line. Raises SettingError, which does not show them."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise SettingError(f"setting secret_file {path!r} cannot be read: {reason}") from None
    return checked_secrets(text, f"what is in secret_file {path!r}")


def tls_context(certificate: str, key: str) -> Any:
    """An ssl.SSLContext for a server, TLS 1.2 and later. Raises SettingError that names the files."""
    import ssl

    class TLSSocket(ssl.SSLSocket):
        """Behaves as a non-blocking socket does; the first recv() also shakes hands."""

        def recv(self, size: int = READ_BYTES, flags: int = 0) -> bytes:
            try:
                return super().recv(size)  # more than a record's 16 KiB: nothing stays where no selector sees it
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise BlockingIOError from None

        def send(self, data: Any, flags: int = 0) -> int:
            """In records of 16 KiB: OpenSSL would take all or nothing, and a slow client would show no progress."""
            view, sent = memoryview(data), 0
            try:
                while sent < len(view):
                    sent += super().send(view[sent:sent + 16 * KIB])
            except ssl.SSLWantWriteError:  # SSLWantReadError: no keys yet, and a selector would return at once
                if not sent:
                    raise BlockingIOError from None
            return sent

        def shutdown(self, how: int) -> None:
            with contextlib.suppress(OSError, ValueError):
                self.unwrap()  # sends close_notify; that the peer's is not here yet is no error of ours
            super().shutdown(how)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)  # a client could make us shake hands for ever
    context.sslsocket_class = TLSSocket
    try:
        context.load_cert_chain(certificate, key or None, password="")  # None: OpenSSL asks the terminal
    except (OSError, ValueError) as error:
        named = f"tls_cert {certificate!r}" + (f" with tls_key {key!r}" if key else "")
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise SettingError(f"setting {named} cannot be used: {reason}; both must be PEM, a certificate chain and its"
                           " private key without a passphrase") from None
    return context


def descriptors() -> int:
    """How many this process may have open (RLIMIT_NOFILE)."""
    limit = os.sysconf("SC_OPEN_MAX")
    return limit if limit >= 0 else 2**31


_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 0)


class _Listener:
    """Mixed into websocket_server.WebsocketServer; it lives in the accept thread."""

    request_queue_size = BACKLOG
    socket: Any
    core: WebSocketServer
    _quiet_until = 0.0
    _is_rush = False  # another connection may be there already

    def _handle_request_noblock(self) -> None:
        """socketserver's: accept one connection and process it; here what is there, without another select()."""
        for _ in range(ACCEPTS):
            with _FORK_LOCK:
                super()._handle_request_noblock()  # type: ignore[misc]
            if not self._is_rush:
                return

    def get_request(self) -> Any:
        self._is_rush = False
        try:
            sock, address = self.socket.accept()
            if sock.fileno() < descriptors() - SPARE_FILES:
                self._is_rush = True
                return sock, address
            sock.close()
            raise OSError(errno.EMFILE, "too many clients")
        except OSError as error:
            if error.errno in _OWN_TROUBLE:
                if time.monotonic() > self._quiet_until:
                    log.error("cannot accept connections: %s; raise the limit (ulimit -n)", error.strerror)
                self._quiet_until = time.monotonic() + 60.0  # at the limit, it comes and goes with each client
                time.sleep(0.1)  # the connection stays in the backlog, so the selector would return at once
            raise

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # an event must not wait for an ACK
        # Without it the kernel hides megabytes, and a client's progress for as long as they take.
        if _NOTSENT_LOWAT:  # pragma: no branch - Linux has it
            request.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, UNSENT_BYTES)
        self.core._accept(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.info("%s:%s left during the handshake: %s", *client_address[:2], sys.exc_info()[1])


def _listen(host: str, port: int) -> Any:
    """A listening websocket_server.WebsocketServer that accepts as we do. Raises ServerError."""
    root, guard = logging.getLogger(), logging.NullHandler()
    root.addHandler(guard)  # the package calls logging.basicConfig(), which leaves a configured logger alone
    try:
        from websocket_server import WebsocketServer  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        raise ServerError("a server needs the websocket-server package: pip install websocket-server") from None
    finally:
        root.removeHandler(guard)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener: Any = type("Listener", (_Listener, WebsocketServer), {"address_family": family})(host, port)
        listener.socket.setblocking(False)  # who has left before accept() is not waited for
        return listener
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        taken = number in (errno.EADDRINUSE, errno.EACCES)
        remedy = ("stop what uses it, or choose another port with port() or --port (0 picks a free one)" if taken else
                  "raise the limit (ulimit -n)" if number in _OWN_TROUBLE else
                  "give an address of this machine with host() or --host")
        reason = getattr(error, "strerror", None) or error
        kind = PortInUseError if number == errno.EADDRINUSE else ServerError
        raise kind(f"cannot listen on {host} port {port}: {reason}; {remedy}") from error


class Page(NamedTuple):
    """What the port answers to who does not want to listen."""

    respond: Callable[[WebSocketServer, Request], bytes]
    public: bool = False  # else it is for monitoring
    waits: bool = False  # for a disk


PAGES: dict[tuple[str, str], Page] = {}  # by method and path; filled by section 12


def _restore(handlers: dict[int, Any]) -> None:
    """Give signals back to whom they belonged; in a forked child, nobody reads what our handler notes."""
    import signal

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)  # one that comes amid this is for them, and not half ours
    while handlers:
        number, handler = handlers.popitem()
        signal.signal(number, handler or signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class WebSocketServer:
    """Broadcasts the events of a queue to the WebSocket clients that are connected to it.

    app: anything; kept as `server.app` for handlers. settings: those of the table SETTINGS.
    """

    _instance: ClassVar[WebSocketServer | None] = None
    _instance_lock = threading.Lock()
    queue_event = staticmethod(queue_event)

    def __init__(self, app: Any = None, **settings: Any) -> None:
        self.app = app
        self._given = settings
        self._settings = checked_settings(settings)
        self._handlers: dict[str, Callable[[Connection], Any]] = {}
        self._callbacks: dict[str, Callable[[Connection, Message], Any]] = {}
        self._check: Callable[[Request], Any] | None = None
        self._reset()
        _SERVERS.add(self)

    def _reset(self) -> None:
        """As if never started; also in a forked child, where other threads may have held the locks."""
        self._lifecycle = threading.Lock()  # guards _state and _spawned
        self._state = "new"  # -> running -> stopping -> stopped -> running; or standby in between
        self._stopped, self._stopping = threading.Event(), threading.Event()
        self._signals: SimpleQueue[int] = SimpleQueue()  # put() may interrupt itself: Event.set() in a handler may not
        self._replaced_handlers: dict[int, Any] = {}  # signal -> what start() gives back
        self._spawned: set[threading.Thread] = set()
        self._listener: Any = None
        self._queue: EventQueue | None = None
        self._tls: Any = None
        self._trouble = ""  # with the queue, as the queue thread met it last; the next three are that thread's, too
        self._backlog, self._looked_at, self._note_at = Backlog(0, 0.0, 0), time.monotonic(), 0.0
        self.registry, self._totals = ClientRegistry(), Totals()
        self._started_at, self._token = time.monotonic(), ""
        self._sending = threading.RLock()  # guards the order of the history and of all sending, which is the same
        self._senders = Senders()
        self._file: HistoryFile | None = None
        self._history = History(0, 0, 0.0)

    @classmethod
    def get_instance(cls, app: Any = None) -> WebSocketServer:
        """The process's one server, made at the first call."""
        with cls._instance_lock:
            cls._instance = cls._instance or cls()
            cls._instance.app = cls._instance.app if app is None else app
            return cls._instance

    # Settings and routes.

    def _set(self, **settings: Any) -> WebSocketServer:
        if self._state in ("running", "standby"):
            raise ServerError("the server runs: change its settings before start()")
        given = {**self._given, **settings}
        self._settings, self._given = checked_settings(given), given
        return self

    def host(self, host: str) -> WebSocketServer:
        return self._set(host=host)

    def port(self, port: int) -> WebSocketServer:
        return self._set(port=port)

    def event_queue(self, queue: Any) -> WebSocketServer:
        """Serve the events of this queue directory."""
        return self._set(queue=queue)

    @typing.overload
    def on(self, path: str) -> Callable[[Function], Function]: ...
    @typing.overload
    def on(self, path: str, handler: Callable[[Connection], Any]) -> WebSocketServer: ...
    def on(self, path: str, handler: Callable[[Connection], Any] | None = None) -> Any:
        """Run handler(conn), in a thread of its own, when a client connects to the path; also as a decorator.

        It may return, and the connection stays; or stay in conn.recv(), and keep its thread.
        """
        return self._route(self._handlers, path, handler)

    @typing.overload
    def on_message(self, path: str) -> Callable[[Function], Function]: ...
    @typing.overload
    def on_message(self, path: str, callback: Callable[[Connection, Message], Any]) -> WebSocketServer: ...
    def on_message(self, path: str, callback: Callable[[Connection, Message], Any] | None = None) -> Any:
        """Run callback(conn, message) for each message, in order for each client; also as a decorator."""
        return self._route(self._callbacks, path, callback)

    def authenticate(self, check: Callable[[Request], Any]) -> WebSocketServer:
        """Let in whom check(request) knows; also as a decorator.

        It sees method, path, query, headers, cookies, address and the ticket's user, runs in a thread, and may take
        its time (handshake_timeout). A user id (str or int) or True lets the client in, as that user; False or None
        refuses it with 401. request.join(topic) puts it on a topic.
        """
        self._check = check
        return self

    def _route(self, table: dict[str, Any], path: str, function: Any) -> Any:
        if not isinstance(path, str) or not path.startswith("/"):
            raise SettingError(f"a route must start with a slash, as /chat does: {path!r}")
        if function is None:
            return lambda function: self._route(table, path, function) and function
        table[path] = function
        return self

    # Life.

    def start(self, background: bool = False, ready: Callable[[], Any] | None = None) -> None:
        """Serve until stop(); in the main thread, SIGINT and SIGTERM stop it, too. ready() is called once it listens.

        With background=True, return once it listens; or, where another process serves the queue already, at once, and
        serve when that one has gone: so all workers of a preforking server may call it. Raises ServerError (the
        port), QueueError (the queue), SettingError (the certificate).
        """
        try:
            self._launch()  # what cannot start has nothing to stop: it may be a server that runs already
        except WsqueueError as error:
            if not background or not self._is_served(error):
                raise
            self._stand_by(error)
        if not background:
            self._serve_until_stopped(ready)

    def _is_served(self, error: Exception) -> bool:
        """Whether another process serves the queue. Where several may, only the port tells."""
        shared = self._queue is not None and not isinstance(self._queue, DirectoryQueue)
        return isinstance(error, QueueInUseError) or (shared and isinstance(error, PortInUseError))

    def _serve_until_stopped(self, ready: Callable[[], Any] | None) -> None:
        import signal

        def note(number: int, frame: Any) -> None:
            self._signals.put(number)

        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in (signal.SIGINT, signal.SIGTERM)
                      if signal.getsignal(number) != signal.SIG_IGN]  # nohup and shells ask for that
            wanted += [signal.SIGHUP] if self._tls else []
            self._replaced_handlers = {number: signal.signal(number, note) for number in wanted}
        try:
            if ready:
                ready()
            number = 0
            while not self._stopped.is_set() and number not in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(Empty):  # a signal that comes just before we fall asleep wakes nobody
                    number = self._signals.get(timeout=1.0)
                    log.info("stopping" if number != signal.SIGHUP else "reading the certificate again")
                    if number == signal.SIGHUP:
                        self.reload_certificates()
        finally:
            self.stop()
            _restore(self._replaced_handlers)

    def _launch(self) -> None:
        with _FORK_LOCK, self._lifecycle:
            if self._state in ("running", "stopping"):
                raise ServerError("the server runs already")
            if self._state == "standby" and threading.current_thread() is not self._standby:
                raise ServerError("the server stands by already, for the one that serves the queue to go")
            self._prepare()
            self._state = "running"
            for thread in self._threads:
                thread.start()

    def _prepare(self) -> None:
        settings = self._settings
        self._tls = tls_context(settings.tls_cert, settings.tls_key) if settings.tls_cert else None
        self._secrets = settings.secret + (read_secrets(settings.secret_file) if settings.secret_file else ())
        self._queue = self._open_queue() if settings.queue else None  # before the port, which its holder has, too
        with contextlib.ExitStack() as undo:
            if self._queue:
                undo.callback(self._queue.close)
            listener = _listen(settings.host, settings.port)
            undo.callback(listener.server_close)
            history = self._open_history()
            undo.callback(self._close_history)
            self._io = IOThread(self.registry, history, settings, self._totals, self._callbacks, self._answer)
            undo.pop_all()
        self._listener = listener
        self._listener.core = self
        self._stopped, self._stopping, self._signals = threading.Event(), threading.Event(), SimpleQueue()
        self._looked_at = self._started_at = time.monotonic()
        self._token = _base64url(os.urandom(16)).decode()  # of the monitor page
        self._threads = [self._io.thread, threading.Thread(
            target=self._listener.serve_forever, args=(2.0,), name="wsqueue-accept", daemon=True)]
        if self._queue:
            self._threads.append(threading.Thread(target=self._consume, args=(self._queue,), name="wsqueue-queue",
                                                  daemon=True))

    def _open_queue(self) -> EventQueue:
        names = ("node", "poll_interval", "wakeup", "max_event_bytes", "max_age")
        queue = open_queue(self._settings.queue, **{name: getattr(self._settings, name) for name in names})
        queue.open()
        return queue

    def _open_history(self) -> History:
        settings = self._settings
        self._history = history = History(settings.history_events, settings.history_bytes, settings.history_seconds)
        history.shared = self._queue is not None and self._queue.shared
        if isinstance(self._queue, DirectoryQueue):
            file = HistoryFile(f"{self._queue.path}/history", history, settings.history_bytes, self._queue.is_ours)
            if settings.history_events:
                file.open()
                self._file = file
            else:
                file.remove()  # what is sent from now on would be a hole in it
        return history

    def _close_history(self) -> None:
        file, self._file = self._file, None  # the directory may soon be somebody else's
        if self._sending.acquire(timeout=self._settings.close_timeout):  # who writes to it may hang with its disk
            try:
                if file:
                    file.close()
            finally:
                self._sending.release()

    def _stand_by(self, error: WsqueueError) -> None:
        with self._lifecycle:
            if self._state in ("running", "standby"):  # another thread was faster
                return
            self._awaited = str(error)
            if isinstance(error, QueueInUseError):
                self._awaited = f"process {error.holder} serves the queue"
            log.info("standing by: %s", self._awaited)
            self._state, self._stopping = "standby", threading.Event()
            self._standby = threading.Thread(target=self._await_turn, name="wsqueue-standby", daemon=True)
            self._standby.start()

    def _await_turn(self) -> None:
        trouble = ""
        while not self._stopping.wait(STANDBY_SECONDS):
            try:
                self._launch()
                log.info("no longer standing by: serving %s", self.url)
                return
            except Exception as error:
                if self._is_served(error):
                    continue
                if str(error) != trouble:
                    log.error("%s; trying again", error, exc_info=not isinstance(error, (WsqueueError, OSError)))
                trouble = str(error)

    def stop(self) -> None:
        """Finish the event in hand, say goodbye to the clients, free the queue. Any thread, any number of times."""
        if self._state == "standby":
            self._stopping.set()
            self._join([self._standby])
        with self._lifecycle:
            first = self._state in ("running", "standby")
            serving = self._state == "running"
            if first:
                self._state, self._stopper = "stopping", threading.current_thread()
        if first:
            try:
                self._shut_down(serving)
            finally:  # also when Ctrl-C breaks it off
                self._state = "stopped"
                self._stopped.set()
                self._signals.put(0)
        elif self._state == "stopping" and not self._is_ours(threading.current_thread()):
            self._stopped.wait()

    def _is_ours(self, thread: threading.Thread) -> bool:
        """Whether the stop waits for this thread, and not the other way round."""
        return thread is self._stopper or thread.name.startswith("wsqueue-")

    def _shut_down(self, serving: bool) -> None:
        if serving:
            self._stopping.set()
            self._close_listener()
            if self._queue:
                self._queue.wake()
                self._join(self._threads[2:])
            self._io.stop(self._settings.close_timeout)
            with self._lifecycle:
                spawned = list(self._spawned)
            self._join([*self._threads, *spawned])
            self._join([*self._io.pool.stop(), *self._io.checks.stop()])  # after the I/O thread, which starts them
            self._senders.stop()
            self._close_history()
            if self._queue:
                self._queue.close()

    def _close_listener(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.socket.shutdown(socket.SHUT_RDWR)  # wakes its selector; it would sleep for two seconds
        if self._threads[1].is_alive():  # else it would wait for ever
            self._listener.shutdown()
        self._listener.server_close()

    def _join(self, threads: Iterable[threading.Thread]) -> None:
        deadline = time.monotonic() + self._settings.close_timeout + 2 * LINGER_SECONDS
        for thread in threads:
            if thread.ident and thread is not threading.current_thread():  # a handler may have called stop()
                thread.join(max(0.0, deadline - time.monotonic()))

    def _forget(self) -> None:
        """In a forked child: the parent serves. Copies of its descriptors would keep its port, lock and clients."""
        if self._listener:
            self._listener.socket.close()
            self._io.forget()
        if self._file:
            self._file.abandon()
        if self._queue:
            with contextlib.suppress(OSError):  # a kqueue is not inherited
                self._queue.close()
        _restore(self._replaced_handlers)
        self._reset()

    def reload_certificates(self) -> None:
        """Read tls_cert and tls_key again, for connections from now on; what cannot be read is logged, and not used."""
        try:
            self._tls = tls_context(self._settings.tls_cert, self._settings.tls_key)
            log.info("the certificate is now that of %s", self._settings.tls_cert)
        except SettingError as error:
            log.error("still using the old certificate: %s", error)

    def __enter__(self) -> WebSocketServer:
        self.start(background=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def is_running(self) -> bool:
        return self._state == "running"

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the server. Raises ServerError while it does not listen yet."""
        if self._state == "standby":  # it may have served before
            raise ServerError(f"this server stands by: {self._awaited}")
        if self._listener is None:
            raise ServerError("the URL is known once the server listens: start() it")
        host, port = self._listener.server_address[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - it is read, not bound
        return f"{'wss' if self._tls else 'ws'}://{f'[{host}]' if ':' in host else host}:{port}"

    def get_connections(self) -> list[Connection]:
        return self.registry.everyone()

    def get_connection_count(self) -> int:
        return len(self.registry)

    # Clients: the accept thread, then the I/O thread, or a thread of their own.

    def _accept(self, sock: socket.socket, address: Any) -> None:
        """Answer at once what is here: in a rush, requests come before they are accepted."""
        rest = b""
        if self._tls:
            sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        conn = Connection(sock, address, self._io)
        try:
            if not self._tls:
                rest = conn.greet(sock.recv(READ_BYTES))
        except OSError:
            pass  # nothing is here, or nobody any more: the I/O thread finds out
        except Exception:
            log.exception("the handshake of %s:%s failed", *conn.address)
            conn.abort()
        self._io.park(conn, lambda: conn.receive(rest))

    def _answer(self, conn: Connection, request: Request, rest: bytes) -> bytes:
        """Let the client in, or give it a page; or have a thread find out. Raises HandshakeError."""
        stream = asks_for_stream(request)
        page = None if stream or request.is_upgrade() else PAGES.get((request.method, request.path))
        if page and (page.public or self._is_monitored(request)):
            respond = functools.partial(page.respond, self, request)
            if page.waits:
                self._ponder(conn, lambda: functools.partial(conn.wind_down, LINGERING, respond()))
            else:
                conn.wind_down(LINGERING, respond())
            return b""
        encoding, response = self._agree(request, stream)
        self._check_ticket(request)
        if self._check:
            if len(rest) > HEAD_BYTES or self._io.checks.waiting() > CHECKS_WAITING:
                raise HandshakeError("503 Service Unavailable", "Too many wait to be let in.", Retry_After="5")
            self._ponder(conn, functools.partial(self._authenticate, conn, request, encoding, response, rest))
            return b""
        self._admit(conn, request, encoding, response)
        return rest

    def _agree(self, request: Request, stream: bool) -> tuple[Encoding, bytes]:
        """How the client is to be served, and the head of the response. Raises HandshakeError."""
        settings, origin = self._settings, request.headers.get("origin")
        if stream:
            check_origin(request, settings.allowed_origins)
            return shared_encoding(0, True, True), stream_head(cors_headers(origin, settings.allowed_origins))
        key = websocket_key(request)
        check_origin(request, settings.allowed_origins)
        offers = request.headers.get("sec-websocket-extensions", "") if settings.deflate else ""
        extension, window = accept_deflate(offers)
        agreed = {"Sec-WebSocket-Extensions": extension} if extension else {}
        response = encode_head("101 Switching Protocols", {"Upgrade": "websocket", "Connection": "Upgrade",
                                                           "Sec-WebSocket-Accept": accept_key(key), **agreed})
        return shared_encoding(window, "last_event_id" in request.query), response

    def _check_ticket(self, request: Request) -> None:
        if not self._secrets:
            return
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        ticket = bearer.strip() if scheme.lower() == "bearer" else request.query.get("ticket")
        if not ticket:
            raise refused_ticket("A ticket is needed: add ?ticket=… to the URL, or send Authorization: Bearer …;"
                                 " sign_ticket() makes one.")
        granted = verify_ticket(ticket, self._secrets, request.path, time.time())
        request.user = granted.user
        request.topics += granted.topics

    def _ponder(self, conn: Connection, work: Callable[[], Callable[[], Any]]) -> None:
        """Run work() in a thread, and in the I/O thread what it returns."""
        conn.await_answer()
        self._io.checks.submit(self._find_answer, conn, work)

    def _find_answer(self, conn: Connection, work: Callable[[], Callable[[], Any]]) -> None:
        if conn._state != ANSWERING:  # it has left, or was too late
            return
        try:
            step = work()
        except HandshakeError as error:
            step = functools.partial(conn.refuse, error)
        except BaseException:  # what was raised in a thread of ours ends nothing else
            log.exception("cannot say whether %s:%s may connect", *conn.address)
            step = functools.partial(conn.refuse, HandshakeError("500 Internal Server Error", "The server failed."))
        self._io.park(conn, step)

    def _authenticate(self, conn: Connection, request: Request, encoding: Encoding, response: bytes,
                      rest: bytes) -> Callable[[], Any]:
        verdict = self._check(request) if self._check else True
        if not verdict:
            raise HandshakeError("401 Unauthorized", "This server does not know you. Log in, and connect again.")
        if verdict is not True:
            if not isinstance(verdict, (str, int)):
                raise TypeError("the function given to authenticate() must return a user id (str or int), True, False"
                                f" or None, not {type(verdict).__name__}")
            request.user = verdict
        return functools.partial(self._enter, conn, request, encoding, response, rest)

    def _enter(self, conn: Connection, request: Request, encoding: Encoding, response: bytes, rest: bytes) -> None:
        if conn._state == ANSWERING:
            try:
                self._admit(conn, request, encoding, response)
                conn.receive(rest)
            except HandshakeError as error:
                conn.refuse(error)

    def _resume(self, conn: Connection, request: Request, encoding: Encoding) -> tuple[int | None, bytes]:
        """Where in the history the client is, and what it is told of that."""
        if not encoding.ids:
            return None, b""
        asked = request.query.get("last_event_id", "")
        if encoding.stream:
            asked = request.headers.get("last-event-id", asked)
        history = self._history
        with history.lock:
            position = history.position(asked) if asked else history.end
            current, up_to_date = history.current, position == history.end
        conn._awaited = asked if position == AHEAD else ""
        identity = asked if _IDENTITY.fullmatch(asked) else "" if asked else current
        least = self._settings.deflate_min_bytes
        if up_to_date and not self._settings.history_events:  # nothing is kept for it while its handler joins topics
            return None, encoding.message(notice("wsqueue.hello"), identity, least)
        return LOST if position is None else position, encoding.message(notice("wsqueue.hello"), identity, least)

    def _admit(self, conn: Connection, request: Request, encoding: Encoding, response: bytes) -> None:
        """Let the client in, and run its route's handler.

        The 101 goes into the outbox before the registry knows the client, so that a broadcast from another thread
        comes after it; and the registry knows it before the 101 is out, so that who is connected misses nothing.
        """
        path, most = request.path, self._settings.max_clients
        handler = self._handlers.get(path)
        if handler and path not in self._callbacks:
            conn._inbox = Inbox()
        position, hello = self._resume(conn, request, encoding)
        if encoding.stream and self._settings.ping_interval:
            conn.expect_acknowledgements(self._settings.ping_interval + self._settings.ping_timeout)
        topics = [path, *request.topics] + ([] if request.user is None else [f"user:{request.user}"])
        with self._lifecycle:  # two threads let clients in
            if most and len(self.registry) >= most:
                raise HandshakeError("503 Service Unavailable", f"{most} clients are connected, as many as may"
                                     " (max_clients). Try again later.", Retry_After="5")
            conn.open(request, encoding, response + hello, position, handler is not None)
            self.registry.add(conn, topics, behind=position is not None)
        conn.flush()
        self._totals.add("connections_total")
        if handler:
            try:
                self._spawn(self._run_handler, conn, handler)
            except RuntimeError as error:
                log.error("no thread for the handler of %s:%s: %s", *conn.address, error)
                conn.close(SERVER_ERROR, "the server is overloaded")

    def _spawn(self, run: Callable[..., Any], *args: Any) -> None:
        """run(*args) in a thread that stop() knows of."""
        def work() -> None:
            try:
                run(*args)
            finally:
                with self._lifecycle:
                    self._spawned.discard(threading.current_thread())

        thread = threading.Thread(target=work, name="wsqueue-handler", daemon=True)
        with self._lifecycle:  # the thread's end waits for it, too
            thread.start()
            self._spawned.add(thread)

    def _run_handler(self, conn: Connection, handler: Callable[[Connection], Any]) -> None:
        _run_user_code(handler, conn)
        conn.release()
        if conn.path not in self._callbacks:
            conn._inbox = None  # nobody consumes messages any more
            self._io.refresh(conn)

    def _is_monitored(self, request: Request) -> bool:
        """Whether it may see the pages. Through a proxy, or by a name that resolves to us, anyone comes from here."""
        settings = self._settings
        if settings.monitoring != "auto":
            return bool(settings.monitoring == "on")
        headers = request.headers
        direct = not headers.keys() & {"forwarded", "via", "x-forwarded-for"} and "upgrade" not in headers.get(
            "connection", "").lower()  # nginx, as its manual sets it up for WebSocket, says so with every request
        return direct and is_loopback(settings.host) and (is_loopback(host_name(request)) or "host" not in headers)

    def _note_backlog(self, queue: EventQueue) -> None:
        """For the pages, which must not wait for a disk; it takes a hundredth of the time at most."""
        now = self._looked_at = time.monotonic()
        if now >= self._note_at:
            self._backlog = queue.backlog()
            self._note_at = now + max(1.0, 100 * (time.monotonic() - now))

    def trouble(self) -> str:
        """What is wrong with the queue; "" if it is served."""
        silence = time.monotonic() - self._looked_at
        return self._trouble or (f"the queue has not been looked at for {silence:.0f} s" if (
            self._queue and silence > STALE_SECONDS) else "")

    # Events: the queue thread, and whoever calls broadcast().

    def broadcast(self, event: str, payload: Any = None, to: Topics = None, exclude: Connection | None = None) -> None:
        """Send an event from inside the server's process, past the queue; not to `exclude`. Raises EventError."""
        made = make_event(event, payload, to, time.time(), _NAMES.next())
        self._fan_out([made if exclude is None else made._replace(exclude=weakref.ref(exclude))])

    def _consume(self, queue: EventQueue) -> None:
        owed: deque[_Owed] = deque()  # sent, but not taken by all; the oldest first
        stopping = self._stopping  # the next start has another
        while not stopping.is_set():
            events: list[Event] = []  # taken, and perhaps not sent
            try:
                if self._history.knows_nothing:
                    settings = self._settings
                    self._history.recall(*queue.recall(settings.history_events, settings.history_bytes))
                    if queue.is_new and len(self.registry):  # they may lack what other servers sent since they came
                        self.broadcast("wsqueue.reset")
                events = queue.take()
                took = bool(events)
                if events:
                    late = self._fan_out(events)
                    self._pace(late, sum(len(event.text) for event in events) >= TICK_BYTES)
                    owed.append(_Owed(events, late, time.monotonic() + LAG_SECONDS))
                    events = []
                for conn in self._history.let_go():
                    self._io.refresh(conn)
                while owed and (len(owed) > LAGGING_TICKS or owed[0].is_settled(time.monotonic())):
                    sent = owed.popleft().events
                    queue.done(sent)  # only now: a crash repeats an event, it does not lose it
                    self._history.settle(sent)
                self._note_backlog(queue)
                self._expire_history()
                if self._trouble:
                    log.info("the queue is served again")
                self._trouble = ""
                if took:
                    continue
            except Exception as error:
                if str(error) != self._trouble:
                    log.error("%s; trying again", error, exc_info=not isinstance(error, (WsqueueError, OSError)))
                self._trouble = str(error)
                if events:
                    owed.clear()
                    queue.retake()
            queue.wait(self._settings.poll_interval)
        for entry in owed:
            queue.done(entry.events)  # the I/O thread flushes what waits

    def _expire_history(self) -> None:
        file = self._file  # who stops the server takes it away, and does not wait for long
        if file:
            with self._sending:
                file.expire()

    def _fan_out(self, events: list[Event]) -> set[Connection]:
        """Send events, joined into one buffer for each client; returns those for whom something waits."""
        late: set[Connection] = set()
        with self._sending:
            entered, repeats = self._history.enter(events)
            fresh = [event for number, event in enumerate(entered) if number not in repeats]
            trouble = self._file.write(fresh) if self._file and fresh else ""
            with self._history.lock:
                self._history.add(fresh)
                audiences = audiences_of(entered, self.registry)
            try:
                deliveries = self._send(entered, repeats, audiences, late)
            except BaseException:  # who can resume has a gap now, and would not know of it
                for conn in [conn for encoding, _, members in audiences if encoding.ids for conn in members]:
                    conn.abort()
                raise
        if trouble:
            log.error("%s", trouble)
        self._totals.add("events_total", len(events))
        self._totals.add("deliveries_total", deliveries)
        return late

    def _send(self, events: list[Event], repeats: set[int], audiences: list[Audience], late: set[Connection]) -> int:
        """Returns how many events went to how many clients."""
        frames: dict[tuple[Encoding, int], bytes] = {}
        least, deliveries = self._settings.deflate_min_bytes, 0
        for encoding, numbers, members in audiences:
            if encoding.ids and repeats:  # they have these, or will be told that they missed them
                numbers = [number for number in numbers if number not in repeats]
            for number in numbers:
                if (encoding, number) not in frames:
                    event = events[number]
                    frames[encoding, number] = encoding.message(event.text, event.id, least)
            if numbers:
                late.update(self._senders.send(members, b"".join([frames[encoding, number] for number in numbers])))
            deliveries += len(members) * len(numbers)
        return deliveries

    def _pace(self, late: set[Connection], more: bool) -> None:
        """Wait until clients that read, just not as fast as a burst, have taken it: the queue is their buffer.

        If all lag, or most do in a burst, the machine is busy, and to wait is all there is to do. A few who lag are
        slow, and may hold up the others to 256 KiB/s for send_timeout; where no more is queued, only those may whose
        outbox is half full. Who takes nothing is not waited for. Whose outbox overflows, or does not move, is closed.
        """
        everyone, most = len(late) >= len(self.registry), len(late) * 2 > len(self.registry)
        grace, patience = (1.0, 5.0) if everyone or (more and most) else (0.5, 1.0) if more else (0.1, 1.0)
        half = 0 if everyone or more else self._settings.outbox_bytes // 2
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            late = {conn for conn in late if conn._pending > half and conn.keeps_up(time.monotonic(), grace)}
            if not late or self._stopping.wait(0.001):
                return


class _Owed(NamedTuple):
    """Events that some clients lag with.

    What the kernel has is sent even if we are killed now; what our outboxes have is not, but is still queued.
    """

    events: list[Event]
    late: set[Connection]
    deadline: float  # monotonic

    def is_settled(self, now: float) -> bool:
        return now >= self.deadline or not any(conn.keeps_up(now, LAG_SECONDS) for conn in self.late)


# A fork copies descriptors and not threads: the child must not hold the parent's port, lock and clients open. So it
# waits until each of them is in the table in which the child finds it.

_SERVERS: weakref.WeakSet[WebSocketServer] = weakref.WeakSet()
_BEFORE_FORK: list[Callable[[], None]] = []  # what else is to be done, under the lock
_SIGNAL_MASK: Any = None  # to be set again after a fork


def _before_fork() -> None:
    global _SIGNAL_MASK
    _FORK_LOCK.acquire()
    for prepare in _BEFORE_FORK:
        prepare()
    if any(server._replaced_handlers for server in _SERVERS):  # else who is told to end at once would take it for ours
        import signal

        _SIGNAL_MASK = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def _after_fork() -> None:
    global _SIGNAL_MASK
    if _SIGNAL_MASK is not None:
        import signal

        signal.pthread_sigmask(signal.SIG_SETMASK, _SIGNAL_MASK)
        _SIGNAL_MASK = None
    _FORK_LOCK.release()


def _after_fork_in_child() -> None:
    _NAMES.reset()
    WebSocketServer._instance_lock = threading.Lock()
    for server in list(_SERVERS):
        server._forget()
    _after_fork()


if hasattr(os, "register_at_fork"):  # pragma: no branch - not on Windows
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


# 11 ─ Other event queues ──────────────────────────────────────────────────────────────────────────────────────────
# In: a URL. Out: the contract of section 5, over what several machines share: SQL, Redis, RabbitMQ. An entry (a row, a
# stream's entry, a message) holds the bytes of an event file; every server gets every entry, and goes on where its node
# was. All is the queue thread's, but for what put() uses, which has a lock. A library is imported when its URL is used.
# Promises: as in section 5; but entries are removed by age and number, seen or not, and clients then told so.

KEEP_EVENTS, KEEP_SECONDS = 100_000, 7 * 86400.0  # where the URL does not say
PUT_SECONDS = 1.8  # in which put() succeeds or fails: it promises two seconds
READ_SECONDS = 5.0  # in which the broker answers a server, or is taken for dead
FAST_FAIL_SECONDS = 1.0  # after a failure, in which put() does not try again: a request must not wait for each event
RETRY_SECONDS = 5.0  # between two attempts of a server, at most
SEEN_SECONDS = 10.0  # how often a node says that it is there, and what is too old is removed
ENTRIES = 1000  # of one read, at most
CHUNK = 100  # entries in one answer, where only their number can be bounded: each may have 1 MiB

_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]{0,39}")  # of a queue: PostgreSQL's have 63 characters at most
_NAME_RULE = "a letter and up to 39 letters, digits and underscores"


class Entry(NamedTuple):
    """What a file is to the queue directory."""

    place: Any  # in the queue; places are in order
    id: str
    stamp: float  # seconds since the epoch
    data: bytes | None  # None: more than max_event_bytes, and not fetched


class Location(NamedTuple):
    """What a queue's URL says, and what outlives a connection."""

    url: str  # for the library
    name: str  # of the table, stream or exchange
    keep_events: int
    keep_seconds: float
    node: str
    most: int  # max_event_bytes
    memory: SimpleNamespace


def _without_password(url: str) -> str:
    return re.sub(r"(?i)([?&][^=&]*pass[^=&]*=)[^&]*", r"\1***", re.sub(r"://([^:/]*):.*@", r"://\1:***@", url))


def _locate(url: str, node: str, most: int) -> Location:
    base, _, query = url.partition("?")
    pairs = [pair for pair in query.split("&") if pair]
    given = {"queue": "wsqueue", "keep_events": str(KEEP_EVENTS), "keep_seconds": str(KEEP_SECONDS)}
    rest = "&".join(pair for pair in pairs if pair.partition("=")[0] not in given)
    given.update((key, value) for key, _, value in (pair.partition("=") for pair in pairs) if key in given)
    name, node = given["queue"], node or re.sub(r"[^\w.-]", "-", socket.gethostname(), flags=re.ASCII)
    try:
        if not _NAME.fullmatch(name):
            raise ValueError(f"queue must be {_NAME_RULE}")
        if not re.fullmatch(r"[\w.-]{1,100}", node, re.ASCII):
            raise ValueError("the node's name must be of letters, digits, dots and dashes")
        numbers = re.fullmatch(r"(\d{1,9}) (\d{1,7}(?:\.\d*)?)", f"{given['keep_events']} {given['keep_seconds']}")
        if not numbers or min(float(numbers[1]), float(numbers[2])) < 1 or float(numbers[2]) > 4e6:
            raise ValueError("keep_events must be from 1 to 999999999, and keep_seconds from 1 to 4000000")
    except ValueError as error:
        raise QueueError(f"{_without_password(url)} for node {node!r}: {error}") from None
    memory = SimpleNamespace(run=os.urandom(4).hex(), is_new=False, count=0, sent={},
                             directory=os.getcwd() if url[:7].lower() == "sqlite:" else "")
    return Location(base + (f"?{rest}" if rest else ""), name, int(numbers[1]), float(numbers[2]), node, most, memory)


def _reason(error: BaseException) -> str:
    """The first line; what follows it are hints for whoever typed the SQL."""
    return _without_password((str(error).strip() or repr(error)).splitlines()[0].rstrip("."))


def _library(module: str, extra: str) -> Any:
    import importlib

    package = "psycopg[binary]" if module == "psycopg" else module
    try:
        return importlib.import_module(module)
    except ImportError:
        raise QueueError(f'a queue of this kind needs the package {package}: pip install "wsqueue[{extra}]", or'
                         f' pip install "{package}"') from None
    except Exception as error:  # with `python -W error`, a warning about the age of this Python
        raise QueueError(f"the package {package} does not load: {_reason(error)}") from None


def id_of(place: tuple[int, int]) -> str:
    return f"{place[0]}-{place[1]}"


class Link:
    """One connection to a broker: it knows the broker's language, and nothing else.

    append() adds an entry; attach() makes it a node's; save() remembers its place, and cursor() returns it (to a new
    one, that of the furthest); read() returns the entries behind a place, has_lost() whether others were removed there;
    tidy() removes what is too old, or too much; listen() waits until there may be more; set_aside() keeps what is no
    event; backlog() is as in section 5.
    Where it is shared, past() returns `count` entries before a place, the last first, and removed() up to where there
    are none any more (None: nobody knows). All end by the deadline, and raise one of `errors`, or QueueError.
    """

    errors: ClassVar[tuple[type[Exception], ...]] = ()  # the library's; load() imports it, and checks the URL
    shared = True  # all nodes see the same entries in the same order, under the same ids
    grace = 0.0  # seconds, for which save() may fail before somebody is told
    guard: ClassVar[Any] = contextlib.nullcontext()  # held while it is used

    def __init__(self, location: Location, patience: float) -> None:
        self.location, self.reads = location, patience >= READ_SECONDS  # for a server; else it is a producer's
        self.limit(patience)

    def limit(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def attach(self) -> None:
        """Where there is anything to do for that."""

    def complaint(self) -> str:
        """What keeps entries from being read, though nothing has failed."""
        return ""

    def is_alive(self) -> bool:
        """Whether append() has a chance, as far as this side knows."""
        return True


_NO_FORK = threading.RLock()  # held while a library is loaded, and while SQLite is used; inside of a queue's lock
_ORPHANS: list[Any] = []  # links of the process that we were forked from
_BROKER_QUEUES: weakref.WeakSet[BrokerQueue] = weakref.WeakSet()


class BrokerQueue:
    """A queue at a URL. Options are the settings of the same names."""

    def __init__(self, link: Any, url: str, *, node: str = "", poll_interval: float = 0.1,
                 wakeup: bool = True, max_event_bytes: int = MIB, max_age: float = 0.0) -> None:
        self.path = _without_password(url)
        self._link = link
        self._location = _locate(url, node, max_event_bytes)
        self.max_event_bytes, self._wakeup, self._max_age = max_event_bytes, wakeup, max_age
        try:
            _holding(_NO_FORK, self._load)  # a child of another thread would wait for the import for ever
        except QueueError:
            raise
        except Exception:  # what the library says may quote a part of the password
            raise QueueError(f"{self.path} is not a URL that its library understands: look at its parameters, and write"
                             " what is special in user and password as %XX") from None
        self.shared = self._link.shared
        self._reader: Any = None
        self._writer: Any = None
        self.forget()
        _holding(_NO_FORK, lambda: _BROKER_QUEUES.add(self))  # a fork looks at them all

    def _load(self) -> None:
        _library("encodings.idna", "")  # which the first connection needs
        self._link.load(self._location)

    def forget(self) -> None:
        """As if never used; also in a forked child, where to close a link would end the parent's."""
        _ORPHANS.extend(link for link in (self._reader, self._writer) if link)
        self._lock = threading.Lock()  # guards the next three
        self._writer = None
        self._refused, self._refused_at = "", 0.0
        self._woken = threading.Event()
        self._reader = None
        self._place: Any = None  # behind what take() has returned
        self._last: Any = None  # behind the last event that it has returned: what follows that has none
        self._mark: Any = None  # the entry before _place, in a list; None: not known
        self._done: Any = None  # behind what is done
        self._saved: Any = None  # what the broker knows of that
        self._age = 0  # how often the broker has gone back
        self._hole = ""  # why clients are to be told to start anew
        self._failures, self._trouble, self._unsaved = 0, "", ""
        self._retry_at = self._tidy_at = self._save_at = self._unsaved_at = 0.0  # monotonic

    # Producers: any thread.

    def put(self, events: Iterable[Pair], *, to: Topics = None, durable: bool = False) -> None:
        """Queue (event, payload) pairs, all or nothing. Raises EventError, or QueueError with the reason."""
        data = encode_batch(events, to, time.time(), self.max_event_bytes)
        if not data:
            return
        deadline = time.monotonic() + PUT_SECONDS
        if not self._alone(PUT_SECONDS / 2, lambda: self._append(data, durable, deadline)):
            raise QueueError(f"queue {self.path} is slow, and other threads wait for it, too")

    def _alone(self, seconds: float, act: Callable[[], Any]) -> bool:
        """Whether the lock was free in time, and act() was called under it."""
        guarded = functools.partial(_holding, _NO_FORK, act) if self._link.guard is _NO_FORK else act
        return _holding(self._lock, guarded, seconds)

    def _append(self, data: bytes, durable: bool, deadline: float) -> None:
        if time.monotonic() < self._refused_at + FAST_FAIL_SECONDS and self._refused:
            raise QueueError(self._refused)
        try:
            left = max(0.1, deadline - time.monotonic())
            if self._writer:
                self._writer.limit(left)
            if self._writer is None or not self._writer.is_alive():
                self._end_writing()
                _holding(_NO_FORK, lambda: self._connect(left))  # libpq has a lock meanwhile; a child would wait
            self._writer.append(data, durable)
            self._refused = ""
        except BaseException as error:  # also Ctrl-C: an answer may be on its way
            self._end_writing()
            if not isinstance(error, (QueueError, *self._link.errors)):
                raise
            self._refused = f"cannot write to queue {self.path}: {_reason(error)}"
            self._refused_at = time.monotonic()
            raise QueueError(self._refused) from error

    def _connect(self, seconds: float) -> None:
        self._writer = self._link(self._location, seconds)

    # The consumer.

    def open(self) -> None:
        """It connects with the first take(): a broker that is not there must not keep a server from its clients."""
        self.close()

    def take(self, max_bytes: int = TICK_BYTES) -> list[Event]:
        with self._reading() as link:
            self._save(link)
            entries = link.read(self._place, max_bytes)
            events = []
            if not self._hole and entries and link.has_lost(self._place):
                self._hole = "has removed entries before this node had sent them (keep_events, keep_seconds)"
            if self._hole:
                log.warning("%s %s: clients are told to start anew", self.path, self._hole)
                events.append(make_event("wsqueue.reset", None, None, time.time(), f"{id_of(self._place)}{_RESET}"))
            for entry in entries:
                events += self._parse(link, entry)
            complaint = self._unsaved or link.complaint()
        self._hole = ""
        if entries:
            self._place, self._mark = entries[-1].place, entries[-1:]
            if not self.shared:
                self._remember(entries)
        elif complaint:
            raise QueueError(f"queue {self.path}: {complaint}")
        events = without_stale(events, self._max_age, time.time())
        self._last = self._furthest(events, self._last)
        self._pass_by()
        return events

    def _remember(self, entries: Iterable[Entry]) -> None:
        """What the broker delivers again, should the link break now."""
        sent = self._location.memory.sent
        sent.update(dict.fromkeys((entry.id, hash(entry.data)) for entry in entries))
        for identity in list(itertools.islice(sent, max(0, len(sent) - 4 * ENTRIES))):
            del sent[identity]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        if time.monotonic() < self._retry_at:
            raise QueueError(self._trouble)
        with self._link.guard:
            try:
                if self._reader is None:
                    self._reader = self._link(self._location, READ_SECONDS)
                    self._attach(self._reader)
                self._reader.limit(READ_SECONDS)
                yield self._reader
                self._failures = 0
            except Exception as error:
                self._reader = _drop(self._reader)
                if not isinstance(error, (QueueError, *self._link.errors)):
                    raise  # a bug: with its traceback, and with another link the next time
                pause = min(RETRY_SECONDS, 0.1 * 2 ** min(self._failures, 6)) * (0.5 + os.urandom(1)[0] / 512)
                self._failures, self._retry_at = self._failures + 1, time.monotonic() + pause
                self._trouble = f"cannot read queue {self.path}: {_reason(error)}"
                raise QueueError(self._trouble) from error

    def _attach(self, link: Any) -> None:
        """A broker goes back when a copy that lags behind takes over, or an older backup is restored; then it may use
        places again. It has if, up to our place, its last entry is not what we took there. We promise that nothing is
        skipped: we go on where it knows us to have been, what we have sent since may come twice, and clients are told.
        A server that is started after that cannot know of it, and takes ids from before for those of now.
        """
        link.attach()
        self._unsaved, self._save_at = "", 0.0  # which the link before it could not
        if self._place is not None and self.shared:
            found = link.past(_behind(self._place), 1)
            if self._mark in (None, found) if found else link.cursor() >= self._saved:  # none: they were removed by age
                return
            self._hole, self._age = "has gone back to an earlier state", self._age + 1
        place = link.cursor()
        if self._hole and self.is_new:
            place = 0, 0  # it has forgotten us: all may be new
        self._mark = link.past(_behind(place), 1) if self.shared else None
        self._place = self._done = self._saved = self._last = place

    def _save(self, link: Any) -> None:
        """What goes wrong here must not keep events from clients."""
        now = time.monotonic()
        if now < self._save_at or (self._done == self._saved and now < self._tidy_at):
            return
        try:
            link.save(self._done)
            self._saved = self._done
            if now >= self._tidy_at:
                link.tidy()
                self._tidy_at = now + SEEN_SECONDS
            self._unsaved, self._save_at, self._unsaved_at = "", 0.0, 0.0
        except self._link.errors as error:
            self._save_at, self._unsaved_at = time.monotonic() + 1.0, self._unsaved_at or now
            if now - self._unsaved_at >= link.grace:
                self._unsaved = _reason(error)

    def _parse(self, link: Any, entry: Entry) -> list[Event]:
        try:
            if entry.data == b"":
                raise EventError("it is empty: there is no data")
            if entry.data is None or len(entry.data) > self.max_event_bytes:
                raise EventError(f"more than the {self.max_event_bytes} bytes of max_event_bytes")
            return parse_events(entry.data, entry.id, entry.stamp, (self._age, entry.place))
        except (ValueError, ArithmeticError) as error:  # EventError, or a number that nobody thought of
            log.error("entry %s of %s is not an event: %s. It is set aside", entry.id, self.path, error)
            link.set_aside(entry, str(error))
            return []

    @property
    def is_new(self) -> bool:
        return bool(self._location.memory.is_new)

    def recall(self, count: int, size: int) -> tuple[str, list[Event]]:
        """What was sent before the first take(), so many events or bytes, or some more; and the id before it."""
        past: list[Event] = []
        with self._reading() as link:
            base, place = None, _behind(self._place)
            while len(past) < count and sum(event.size for event in past) < size:
                entries = link.past(place, CHUNK)
                if not entries:
                    base = link.removed()
                    break
                for entry in entries:
                    place = entry.place
                    with contextlib.suppress(ValueError, ArithmeticError):
                        past += reversed(parse_events(entry.data or b"", entry.id, entry.stamp))
        if base is None:  # nobody knows whether there was something before the oldest
            base = min(place, self._place)
            past = [event for event in past if (place_of(event.id) or ())[:2] > base]
        past.reverse()
        return id_of(base), past

    def done(self, events: Iterable[Event]) -> None:
        self._done = self._furthest(events, self._done)
        self._pass_by()

    def _furthest(self, events: Iterable[Event], default: Any) -> Any:
        """Places from before the broker went back are none any more."""
        sources = [event.source for event in events if event.source]
        return max([place for age, place in sources if age == self._age], default=default)

    def _pass_by(self) -> None:
        """Entries behind the last event that have none, because they are set aside, too old, or empty."""
        if self._done == self._last:
            self._done = self._last = self._place

    def retake(self) -> None:
        self._location.memory.sent.clear()
        self._place, self._mark, self._last = self._done, None, self._done
        if not self.shared:  # the broker delivers again what it was not told of
            self._part()

    def _part(self) -> None:
        """From the broker, which is told what is done."""
        reader, self._reader = self._reader, None
        if reader:
            with contextlib.suppress(QueueError, *self._link.errors):
                reader.limit(1.0)
                reader.save(self._done)
        _drop(reader)

    def wake(self) -> None:
        self._woken.set()

    def wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self._woken.is_set():
            left = deadline - time.monotonic()
            if left <= 0 or self._listen(left):
                break
        self._woken.clear()

    def _listen(self, seconds: float) -> bool:
        """Slices, because wake() is not heard meanwhile."""
        link = self._reader
        if link is None or not self._wakeup or not hasattr(link, "listen"):
            return self._woken.wait(seconds)
        try:
            link.limit(READ_SECONDS)
            return bool(link.listen(self._place, min(seconds, 0.1)))
        except Exception:
            self._reader = _drop(link)  # take() will say what it is
            return True

    def backlog(self) -> Backlog:
        return self._look(lambda link: link.backlog(self._place))  # type: ignore[no-any-return]

    def nodes(self) -> list[tuple[str, float]]:
        """The servers of this queue, and how many seconds ago each was last there."""
        return self._look(lambda link: link.nodes())  # type: ignore[no-any-return]

    def _look(self, ask: Callable[[Any], Any]) -> Any:
        """Also from outside of a server."""
        if self._reader:
            with self._reading() as link:
                return ask(link)
        link = None
        with self._link.guard:
            try:
                link = self._link(self._location, READ_SECONDS)
                return ask(link)
            except (QueueError, *self._link.errors) as error:
                raise QueueError(f"cannot read queue {self.path}: {_reason(error)}") from error
            finally:
                _drop(link)

    def close(self) -> None:
        with self._link.guard:
            self._part()
        self._alone(PUT_SECONDS, self._end_writing)

    def _end_writing(self) -> None:
        writer, self._writer = self._writer, None  # in this order: it is not used again, should a signal come between
        _drop(writer)


def _behind(place: tuple[int, int]) -> tuple[int, int]:
    return place[0], place[1] + 1


def _drop(link: Any) -> Any:
    """Returns None, to be put in its place."""
    if link is not None:
        with contextlib.suppress(Exception):  # it may be half open, or half closed
            link.close()


def _close_before_fork() -> None:
    """What SQLite knows of its locks would be wrong in a child (sqlite.org/howtocorrupt.html, section 2.6)."""
    _NO_FORK.acquire()
    for queue in list(_BROKER_QUEUES):
        if queue._link.guard is _NO_FORK:
            queue._reader, queue._writer = _drop(queue._reader), _drop(queue._writer)


def _forget_links() -> None:
    _NO_FORK.release()
    for queue in list(_BROKER_QUEUES):
        queue.forget()


if hasattr(os, "register_at_fork"):  # pragma: no branch - not on Windows
    _BEFORE_FORK.append(_close_before_fork)
    os.register_at_fork(after_in_parent=_NO_FORK.release, after_in_child=_forget_links)


# SQL. A place is (xid, id). In PostgreSQL xid is the transaction's number: ids are taken in one order and committed in
# another, so a node reads only what is below the oldest transaction that still runs, and nothing can appear before it.
# In SQLite, with its one writer, xid is when the table was made: a new file has other ids than the one it replaces.

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS {t} (xid BIGINT NOT NULL DEFAULT {xid}, id {serial}, queued_at DOUBLE PRECISION NOT"
    " NULL DEFAULT ({now}), data TEXT NOT NULL)",
    "CREATE UNIQUE INDEX IF NOT EXISTS {t_place} ON {t} (xid, id)",
    "CREATE TABLE IF NOT EXISTS {t_nodes} (node TEXT PRIMARY KEY, xid BIGINT NOT NULL, id BIGINT NOT NULL, seen_at"
    " DOUBLE PRECISION NOT NULL)",  # the row with the empty name says up to where entries were removed
    "CREATE TABLE IF NOT EXISTS {t_failed} (place TEXT PRIMARY KEY, reason TEXT NOT NULL, data TEXT NOT NULL, failed_at"
    " DOUBLE PRECISION NOT NULL)",
)


class _SqlLink(Link):
    """What SQLite and PostgreSQL have in common, which is most."""

    words: ClassVar[dict[str, str]]  # of the dialect
    _connect: Callable[[], None]  # sets _connection, and makes the tables
    _connection: Any
    mark = "?"

    def __init__(self, location: Location, patience: float) -> None:
        super().__init__(location, patience)
        self._held, self._held_at = 0, 0.0  # how often a row was not to be sent yet, and since when (monotonic)
        ends = ("", "_nodes", "_failed", "_place", "_notify")
        self._words = {**self.words, **{f"t{end}": f'"{location.name}{end}"' for end in ends}}
        self._connect()

    def _run(self, statement: str, *values: Any) -> Any:
        return self._connection.execute(statement.format(**self._words).replace("?", self.mark), values)

    def append(self, data: bytes, durable: bool) -> None:
        self._run("INSERT INTO {t} (data) VALUES (?)", _in_ascii(data, self.location.most))

    def cursor(self) -> Any:
        found = self._run("SELECT xid, id, node FROM {t_nodes} WHERE node <> '' ORDER BY node = ? DESC, xid DESC, id"
                          " DESC LIMIT 1", self.location.node).fetchone()
        *place, node = found or (0, 0, "")
        self.location.memory.is_new = node not in ("", self.location.node)
        return tuple(place)

    def read(self, place: Any, max_bytes: int) -> list[Entry]:
        entries, size, held, self._held = [], 0, self._held, 0
        for *row, settled in self._rows(place, max_bytes):
            if not settled:
                self._held, self._held_at = held + 1, self._held_at if held else time.monotonic()
            if not settled or size >= max_bytes:
                break
            entries.append(_row_entry(*row))
            size += len(entries[-1].data or b"")
        return entries

    def _rows(self, place: Any, max_bytes: int) -> Any:
        return self._run("SELECT xid, id, queued_at, CASE WHEN {size} <= ? THEN {data} END, 1 FROM {t} WHERE (xid, id)"
                         " > (?, ?) ORDER BY xid, id LIMIT ?", self.location.most, *place, ENTRIES)

    def has_lost(self, place: Any) -> bool:
        return bool(self.removed() > place)

    def removed(self) -> Any:
        return self._run("SELECT xid, id FROM {t_nodes} WHERE node = ''").fetchone() or (0, 0)

    def past(self, place: Any, count: int) -> list[Entry]:
        rows = self._run("SELECT xid, id, queued_at, CASE WHEN {size} <= ? THEN {data} END FROM {t} WHERE (xid, id) <"
                         " (?, ?) ORDER BY xid DESC, id DESC LIMIT ?", self.location.most, *place, count)
        return [_row_entry(*row) for row in rows.fetchall()]

    def save(self, place: Any) -> None:
        self._note(self.location.node, place)

    def _note(self, node: str, place: Any) -> None:
        """Of what was removed, the furthest: two nodes may remove at the same time. A node itself may go back."""
        self._run("INSERT INTO {t_nodes} (node, xid, id, seen_at) VALUES (?, ?, ?, {now}) ON CONFLICT (node) DO UPDATE"
                  " SET xid = excluded.xid, id = excluded.id, seen_at = excluded.seen_at WHERE excluded.node <> '' OR"
                  " (excluded.xid, excluded.id) > ({t_nodes}.xid, {t_nodes}.id)", node, *place)

    def set_aside(self, entry: Entry, reason: str) -> None:
        self._run("INSERT INTO {t_failed} (place, reason, data, failed_at) SELECT ?, ?, data, {now} FROM {t} WHERE xid"
                  " = ? AND id = ? ON CONFLICT DO NOTHING", entry.id, reason, *entry.place)

    def tidy(self) -> None:
        """Entries go in their order: up to one place all are gone, and behind it none. The clock is the broker's."""
        location, end = self.location, (1 << 63) - 1
        too_many = self._run("SELECT xid, id FROM {t} ORDER BY xid DESC, id DESC LIMIT 1 OFFSET ?",
                             location.keep_events)
        too_old = self._run("SELECT xid, id FROM {t} WHERE (xid, id) < (SELECT * FROM (SELECT xid, id FROM {t} WHERE"
                            " queued_at >= {now} - ? ORDER BY xid, id LIMIT 1) AS young UNION ALL SELECT ?, ? ORDER BY"
                            " 1 LIMIT 1) ORDER BY xid DESC, id DESC LIMIT 1", location.keep_seconds, end, end)
        place = max(too_many.fetchone() or (0, 0), too_old.fetchone() or (0, 0))
        if place > self.removed():
            self._note("", place)  # first: who reads meanwhile must not take it for whole
            self._run("DELETE FROM {t} WHERE (xid, id) <= (?, ?)", *place)
        self._run("DELETE FROM {t_nodes} WHERE seen_at < {now} - ? AND node <> ''", location.keep_seconds)
        self._run("DELETE FROM {t_failed} WHERE failed_at < {now} - ? OR failed_at < (SELECT failed_at FROM {t_failed}"
                  " ORDER BY failed_at DESC LIMIT 1 OFFSET ?)", FAILED_SECONDS, FAILED_FILES)

    def backlog(self, place: Any) -> Backlog:
        place = place or self.cursor()
        waiting = self._run("SELECT count(*) FROM {t} WHERE (xid, id) > (?, ?)", *place).fetchone()[0]
        first = self._run("SELECT {now} - queued_at FROM {t} WHERE (xid, id) > (?, ?) ORDER BY xid, id LIMIT 1", *place)
        failed = self._run("SELECT count(*) FROM {t_failed}").fetchone()[0]
        failures = self._run("SELECT place, reason FROM {t_failed} ORDER BY failed_at DESC LIMIT ?", MONITOR_FAILURES)
        return Backlog(waiting, max(0.0, _finite((first.fetchone() or (0.0,))[0], 0.0)), failed,
                       [{"name": name, "reason": reason[:KIB]} for name, reason in failures.fetchall()])

    def nodes(self) -> list[tuple[str, float]]:
        return list(self._run("SELECT node, {now} - seen_at FROM {t_nodes} WHERE node <> '' ORDER BY node").fetchall())

    def close(self) -> None:
        self._connection.close()


def _row_entry(xid: int, number: int, stamp: float, data: Any) -> Entry:
    raw = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    return Entry((xid, number), id_of((xid, number)), _finite(stamp, time.time()), raw)


def _finite(value: Any, default: float) -> float:
    """A column holds what somebody has put there: infinity, or a text."""
    return float(value) if isinstance(value, (int, float)) and value - value == 0 else default


class _SqliteLink(_SqlLink):
    """sqlite:///file. Nothing would wake a server: the poll is all."""

    grace = 10.0  # for its one writer may be another
    guard = _NO_FORK
    words: ClassVar = {
        "serial": "INTEGER PRIMARY KEY AUTOINCREMENT", "size": "length(CAST(data AS BLOB))", "data": "data",
        "now": "(julianday('now') - 2440587.5) * 86400.0"}

    @classmethod
    def load(cls, location: Location) -> None:
        import sqlite3

        cls.errors = (OSError, sqlite3.Error)
        if not cls._path(location) or "?" in location.url or location.url.endswith("/:memory:"):
            raise QueueError("the URL of an SQLite file has three slashes and a path: sqlite:///events.db, or four and"
                             " an absolute one: sqlite:////var/lib/events.db; and no parameters but queue, keep_events"
                             " and keep_seconds")

    @staticmethod
    def _path(location: Location) -> str:
        from urllib.parse import unquote

        path = unquote(location.url[len("sqlite:///"):]) if location.url[:10].lower() == "sqlite:///" else ""
        return path and os.path.join(location.memory.directory, path)

    def _connect(self) -> None:
        import sqlite3

        path = self._path(self.location)
        os.makedirs(os.path.dirname(path) or ".", mode=0o755, exist_ok=True)
        xid = int(time.time() * 1e6)
        self._words["xid"] = f"{xid} CHECK (xid = {xid})"  # a made-up one would be ahead of all that are to come
        # A writer waits for another one. A server has to send meanwhile, and can save its place later.
        patience = min(max(0.0, self.deadline - time.monotonic()), 0.25 if self.reads else 1.5)
        connection = sqlite3.connect(path, timeout=patience, isolation_level=None, check_same_thread=False)
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")  # a bad row must not hide the rest
        self._connection = connection
        try:
            while not self._is_prepared():
                time.sleep(0.005)
            self._status = os.stat(path)
        except BaseException:
            connection.close()
            raise

    def _is_prepared(self) -> bool:
        """SQLite waits for a lock, but not for one that it needs to begin with the WAL."""
        try:
            for statement in ("PRAGMA journal_mode = WAL", *_SCHEMA):
                self._run(statement)
            return True
        except self.errors as error:
            if "locked" not in str(error) or time.monotonic() >= self.deadline:
                raise
            return False

    def is_alive(self) -> bool:
        """Files are removed and replaced while a process has them open; what goes there would be lost."""
        return _is_at(self._path(self.location), self._status)

    def read(self, place: Any, max_bytes: int) -> list[Entry]:
        if not self.is_alive():
            raise QueueError("its file was removed or replaced")
        return super().read(place, max_bytes)

    def append(self, data: bytes, durable: bool) -> None:
        self._run(f"PRAGMA busy_timeout = {int((self.deadline - time.monotonic()) * 1000)}")
        self._run(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")  # the latter may forget it in a power cut
        super().append(data, durable)


def _is_readable(fd: int, seconds: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _wait_patiently(connection: Any, generator: Any, *_: Any, **__: Any) -> Any:
    """In place of psycopg's Connection.wait(), which would wait for an answer for ever."""
    try:
        wanted = next(generator)
        while True:
            poll = select.poll()
            poll.register(connection.fileno(), select.POLLIN * (wanted & 1) | select.POLLOUT * (wanted >> 1 & 1))
            found = poll.poll(max(0.0, connection.link.deadline - time.monotonic()) * 1000)
            if not found:
                raise QueueError("it does not answer")
            ready = (found[0][1] != select.POLLOUT) | (found[0][1] != select.POLLIN) << 1  # an error is for both
            wanted = generator.send(type(wanted)(wanted & ready))
    except StopIteration as end:
        return end.value


_TRIGGER = (
    "CREATE OR REPLACE FUNCTION {t_notify}() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM"
    " pg_notify(TG_TABLE_NAME, ''); RETURN NULL; END$$",
    "DROP TRIGGER IF EXISTS {t_notify} ON {t}",
    "CREATE TRIGGER {t_notify} AFTER INSERT ON {t} FOR EACH STATEMENT EXECUTE FUNCTION {t_notify}()",
)


class _PostgresLink(_SqlLink):
    """postgresql://, with psycopg 3. A trigger sends the NOTIFY, so that a plain INSERT does, too."""

    mark = "%s"
    words: ClassVar = {
        "xid": "(pg_current_xact_id()::text::bigint)", "serial": "BIGINT GENERATED BY DEFAULT AS IDENTITY",
        "size": "octet_length(data)", "data": "data", "now": "extract(epoch FROM clock_timestamp())",
        "oldest": "pg_snapshot_xmin(pg_current_snapshot())::text::bigint",
        "ahead": "xid >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint"}

    @classmethod
    def load(cls, location: Location) -> None:
        psycopg = _library("psycopg", "postgres")
        psycopg.conninfo.conninfo_to_dict(location.url)
        cls.errors = (OSError, psycopg.Error)

    def _connect(self) -> None:
        psycopg = _library("psycopg", "postgres")
        kind: Any = type("Patient", (psycopg.Connection,), {"wait": _wait_patiently, "link": self})
        try:
            connection = kind.connect(self.location.url, autocommit=True, connect_timeout=2, client_encoding="UTF8",
                                      row_factory=psycopg.rows.tuple_row)
        except self.errors as error:
            error.__traceback__ = None  # else its frames keep what is half connected
            raise QueueError(_reason(error)) from error
        self._connection, self._notified = connection, False
        connection.add_notify_handler(self._hear)
        try:
            if connection.info.parameter_status("server_encoding") == "SQL_ASCII":  # any bytes, and UTF-8 is not sure
                self._words["data"] = "convert_to(data, 'SQL_ASCII')"
            tables = [self._words[name] for name in ("t", "t_nodes", "t_failed")]
            if None in self._run("SELECT to_regclass(?), to_regclass(?), to_regclass(?)", *tables).fetchone():
                with connection.transaction():
                    self._run("SELECT pg_advisory_xact_lock(8081)")
                    for statement in (*_SCHEMA, *_TRIGGER):
                        self._run(statement)
        except BaseException:
            connection.close()
            raise

    def _hear(self, notification: Any) -> None:
        self._notified = True

    def is_alive(self) -> bool:
        return not self._connection.closed and not _is_readable(self._connection.fileno())

    def attach(self) -> None:
        self._run("SET lock_timeout = 1000")  # whose table somebody locks is still sent what can be read
        self._run("LISTEN {t}")
        with self._connection.transaction():  # what was restored into another cluster has numbers from its future
            if self._run("UPDATE {t_nodes} SET xid = 0 WHERE {ahead}").rowcount:
                self._run("UPDATE {t} SET xid = 0 WHERE {ahead}")

    def tidy(self) -> None:
        self._run("UPDATE {t} SET xid = {xid} WHERE {ahead}")  # made up, and no number of a transaction before long
        super().tidy()

    def _rows(self, place: Any, max_bytes: int) -> Any:
        return self._run(
            "SELECT xid, id, queued_at, CASE WHEN size <= ? THEN {data} END, xid < {oldest} FROM (SELECT *, sum(size)"
            " OVER (ORDER BY xid, id) - size AS before FROM (SELECT *, {size} AS size FROM {t} WHERE (xid, id) >"
            " (?, ?) ORDER BY xid, id LIMIT ?) AS next) AS few WHERE before < ? ORDER BY xid, id",
            self.location.most, *place, ENTRIES, max_bytes)

    def complaint(self) -> str:
        if not self._held or time.monotonic() - self._held_at < 10.0:
            return ""
        return ("events wait for a transaction that has written something and is open for more than 10 s: see"
                " pg_prepared_xacts, and SELECT * FROM pg_stat_activity WHERE backend_xid IS NOT NULL")

    def listen(self, place: Any, seconds: float) -> bool:
        """Nobody says when the transaction has ended that holds the others up: it is most often a short one."""
        soon = 0 < self._held < 20
        seconds = min(seconds, 0.005) if soon else seconds
        if not self._notified and _is_readable(self._connection.fileno(), seconds):
            self._connection.pgconn.consume_input()
            while self._connection.pgconn.notifies():
                self._notified = True
        heard, self._notified = self._notified or soon, False
        return heard


class OutboxQueue:
    """put() into the caller's own transaction, on an open DB-API connection to SQLite or PostgreSQL: psycopg's, or
    whichever has a cursor() that takes %s."""

    def __init__(self, connection: Any, *, name: str = "wsqueue", max_event_bytes: int = MIB, **_: Any) -> None:
        self._connection, self._table, self._max_event_bytes = connection, f'"{name}"', max_event_bytes
        if not _NAME.fullmatch(name):
            raise QueueError(f"a queue's name is {_NAME_RULE}, not {name!r}")
        if "Async" in type(connection).__name__:
            raise QueueError(f"{type(connection).__name__} is not a synchronous connection: nothing would be sent")

    def put(self, events: Iterable[Pair], *, to: Topics = None, durable: bool = False) -> None:
        """Sent if and only if the caller commits. Raises EventError; QueueError, and the transaction goes on."""
        data = encode_batch(events, to, time.time(), self._max_event_bytes)
        if not data:
            return
        try:
            with contextlib.closing(self._connection.cursor()) as cursor:
                self._insert(cursor, _in_ascii(data, self._max_event_bytes))
        except Exception as error:  # of a library that only the caller knows
            raise QueueError(f"cannot queue in the caller's transaction: {_reason(error)}. A server, or `wsqueue status"
                             " --queue URL`, makes the table") from error

    def _insert(self, cursor: Any, text: str) -> None:
        statement, sqlite = f"INSERT INTO {self._table} (data) VALUES (%s)", sys.modules.get("sqlite3")  # noqa: S608
        if sqlite and isinstance(cursor, sqlite.Cursor):
            cursor.execute(statement.replace("%s", "?"), (text,))
        elif getattr(self._connection, "vendor", "") == "sqlite":  # Django's
            cursor.execute(statement, (text,))
        else:
            self._insert_into_postgres(cursor, statement, text)

    def _insert_into_postgres(self, cursor: Any, statement: str, text: str) -> None:
        """What fails breaks the transaction. So look first; and, where there is one, make a savepoint."""
        cursor.execute("SELECT 1 WHERE has_column_privilege(to_regclass(%s), 'data', 'INSERT') AND"
                       " current_setting('transaction_read_only') = 'off'", (self._table,))
        if cursor.fetchone() is None:
            raise QueueError(f"there is no table {self._table}, or no right to INSERT into it")
        if getattr(getattr(self._connection, "info", None), "transaction_status", 0) != 2:  # psycopg's INTRANS
            cursor.execute(statement, (text,))
            return
        cursor.execute("SAVEPOINT wsqueue")
        try:
            cursor.execute(statement, (text,))
        except Exception:
            cursor.execute("ROLLBACK TO SAVEPOINT wsqueue")
            raise
        cursor.execute("RELEASE SAVEPOINT wsqueue")


def _in_ascii(data: bytes, most: int) -> str:
    """For a connection, or a database, of any encoding: in JSON, such characters stand in strings alone. Not if it is
    then too long: an event that was accepted must not be refused later."""
    text = data.decode()
    longer = re.sub(r"[^\x00-\x7f]+", lambda match: json.dumps(match[0])[1:-1], text)
    return longer if len(longer) <= most else text


class _RedisLink(Link):
    """redis://: a stream. Not Pub/Sub, which forgets what nobody hears. A place is (milliseconds, number)."""

    @classmethod
    def load(cls, location: Location) -> None:
        cls.errors = (OSError, _library("redis", "redis").RedisError)
        cls(location, PUT_SECONDS)._redis.connection_pool.make_connection()  # which does not connect yet

    def __init__(self, location: Location, patience: float) -> None:
        super().__init__(location, patience)
        self._key, self._is_connected = location.name, False
        self._ahead: float | None = None  # seconds, of the broker's clock to ours
        self._chunk = 10  # entries, as many as are likely to be wanted: nobody knows their size before
        redis, seconds = _library("redis", "redis"), max(patience, PUT_SECONDS) / 4  # for each of some four answers
        retry = _library("redis.retry", "redis").Retry(_library("redis.backoff", "redis").NoBackoff(), 0)
        names = ("driver_info",) if hasattr(redis, "DriverInfo") else ("lib_name", "lib_version")  # not to be told
        pool = redis.ConnectionPool.from_url(location.url)
        pool.connection_kwargs.update(dict.fromkeys(names), socket_connect_timeout=seconds, socket_timeout=seconds,
                                      retry=retry, decode_responses=False,  # whatever the URL says
                                      redis_connect_func=self._connect_once)
        self._redis = redis.Redis(connection_pool=pool)

    def _connect_once(self, connection: Any) -> None:
        """A server's link must not outlive its connection, as the library would have it: attach() looks for changes."""
        if self._is_connected and self.reads:
            raise _library("redis", "redis").ConnectionError("the connection was closed")
        self._is_connected = True
        connection.on_connect()

    def append(self, data: bytes, durable: bool) -> None:
        self._redis.xadd(self._key, {"data": data}, maxlen=self.location.keep_events, approximate=True)

    def _info(self) -> tuple[tuple[int, int], int, int]:
        """The last place, how many entries there are, and how many there have ever been (Redis 7; before it, 0)."""
        if not self._redis.exists(self._key):
            return (0, 0), 0, 0
        info = self._redis.xinfo_stream(self._key)
        return _redis_place(info["last-generated-id"]), info["length"], info.get("entries-added", 0)

    def cursor(self) -> Any:
        found, memory, (last, length, added) = self._notes(), self.location.memory, self._info()
        memory.is_new = bool(found) and self.location.node not in found
        place, count, _ = found.get(self.location.node, max(found.values(), default=((0, 0), 0, 0.0)))
        memory.count = added - length if place == (0, 0) else count
        return min(place, last)  # the stream alone may have been deleted

    def _notes(self) -> dict[str, tuple[Any, int, float]]:
        """Of each node: its place, how many entries have ever been up to it, and when that was."""
        notes = {}
        for node, value in self._redis.hgetall(f"{self._key}:nodes").items():
            with contextlib.suppress(ValueError):  # anyone may write there
                place, count, seen_at = value.split()
                notes[node.decode()] = _redis_place(place), int(count), float(seen_at)
        return notes

    def read(self, place: Any, max_bytes: int) -> list[Entry]:
        entries: list[Entry] = []
        size, chunk, more = 0, self._chunk, True
        while more and size < max_bytes:
            found = self._redis.xrange(self._key, min=f"({id_of(place)}", count=chunk)
            for entry in itertools.starmap(self._entry, found):
                if size < max_bytes:
                    entries.append(entry)
                    place, size = entry.place, size + len(entry.data or b"")
            more = len(found) == chunk and len(entries) < ENTRIES
            chunk = self._chunk = max(1, min(CHUNK, 2 * chunk, max_bytes * len(entries) // (size + 1)))
        self.location.memory.count += len(entries)
        return entries

    def _entry(self, identity: bytes, fields: dict[bytes, bytes]) -> Entry:
        place = _redis_place(identity)
        return Entry(place, id_of(place), place[0] / 1000, fields.get(b"data", b""))

    def has_lost(self, place: Any) -> bool:
        if place == (0, 0):
            _, length, added = self._info()
            return added > length
        return not self._redis.xrange(self._key, id_of(place), id_of(place))

    def removed(self) -> Any:
        _, length, added = self._info()
        return (0, 0) if 0 < added == length else None

    def past(self, place: Any, count: int) -> list[Entry]:
        return [self._entry(*pair) for pair in self._redis.xrevrange(self._key, f"({id_of(place)}", count=count)]

    def save(self, place: Any) -> None:
        self._redis.hset(f"{self._key}:nodes", self.location.node,
                         f"{id_of(place)} {self.location.memory.count} {self._clock():.3f}")

    def _clock(self) -> float:
        """The broker's: nodes must not remove what is old by their own."""
        if self._ahead is None:
            seconds, micros = self._redis.time()
            self._ahead = seconds + micros / 1e6 - time.time()
        return time.time() + self._ahead

    def listen(self, place: Any, seconds: float) -> bool:
        return bool(self._redis.xread({self._key: id_of(place)}, count=1, block=max(1, int(seconds * 1000))))

    def set_aside(self, entry: Entry, reason: str) -> None:
        found = self._redis.xrange(self._key, entry.id, entry.id)
        try:
            self._redis.xadd(f"{self._key}:failed", {**(found[0][1] if found else {}), b"reason": reason.encode(
                "utf-8", "replace")}, id=entry.id, maxlen=FAILED_FILES)
        except self.errors as error:
            if "equal or smaller" not in str(error):  # another node was faster
                raise

    def tidy(self) -> None:
        oldest, last = self._clock() - self.location.keep_seconds, self._info()[0]
        self._redis.xtrim(self._key, maxlen=self.location.keep_events)
        self._redis.xtrim(self._key, minid=min(int(oldest * 1000), last[0]))  # but for the last, where nodes are
        for node, (_, _, seen_at) in self._notes().items():
            if seen_at < oldest:
                self._redis.hdel(f"{self._key}:nodes", node)

    def backlog(self, place: Any) -> Backlog:
        (last, length, added), memory = self._info(), self.location.memory
        place = place or self.cursor()
        if place >= last:
            memory.count = added
        waiting = 0 if place >= last else max(1, min(length, added - memory.count if added else length))
        first = self._redis.xrange(self._key, f"({id_of(place)}", count=1) if waiting else []
        failed = self._redis.xlen(f"{self._key}:failed")
        failures = self._redis.xrevrange(f"{self._key}:failed", count=MONITOR_FAILURES) if failed else []
        oldest = max(0.0, self._clock() - _redis_place(first[0][0])[0] / 1000) if first else 0.0
        return Backlog(waiting, oldest, failed, [
            {"name": identity.decode(), "reason": fields.get(b"reason", b"").decode("utf-8", "replace")[:KIB]}
            for identity, fields in failures])

    def nodes(self) -> list[tuple[str, float]]:
        return [(node, self._clock() - seen_at) for node, (_, _, seen_at) in sorted(self._notes().items())]

    def close(self) -> None:
        self._redis.connection_pool.disconnect()


def _redis_place(identity: bytes | str) -> tuple[int, int]:
    text = identity.decode() if isinstance(identity, bytes) else identity
    match = re.fullmatch("([0-9]{1,20})-([0-9]{1,20})", text)
    if not match or max(int(match[1]), int(match[2])) >= 1 << 64:
        raise ValueError(f"{text!r} is no place in a stream")
    return int(match[1]), int(match[2])


class _AmqpLink(Link):
    """amqp://: a fan-out exchange, and a durable queue for each node. A place is (link, delivery tag).

    Two queues may hold the messages of two producers in different orders: no place is good on two nodes.
    """

    shared = False

    @classmethod
    def load(cls, location: Location) -> None:
        pika = _library("pika", "rabbitmq")
        workflow = _library("pika.adapters.utils.connection_workflow", "rabbitmq")
        cls.errors = (OSError, pika.exceptions.AMQPError, workflow.AMQPConnectorException)
        pika.URLParameters(location.url)

    def __init__(self, location: Location, patience: float) -> None:
        super().__init__(location, patience)
        self._pika = pika = _library("pika", "rabbitmq")
        self._serial, self._acked, self._confirms = time.monotonic_ns(), 0, False
        self._messages: deque[Entry] = deque()
        self._has_lost = self._is_cancelled = False
        self._queue, self._failed = f"{location.name}.{location.node}", f"{location.name}:failed"
        parameters = pika.URLParameters(location.url)
        parameters.connection_attempts, parameters.stack_timeout, parameters.socket_timeout = 1, patience, patience
        parameters.heartbeat = 5 if self.reads else 0  # who only sends does not look at it in between
        self._connection = type("Patient", (pika.BlockingConnection,), {
            "_flush_output": _flush_patiently, "link": self})(parameters)
        self._connection._impl._read_frame = functools.partial(_read_frame, pika, self._connection._impl)
        try:
            self._channel = self._connection.channel()
            self._channel.exchange_declare(location.name, "fanout", durable=True)
        except BaseException:
            _drop(self)
            raise

    def append(self, data: bytes, durable: bool) -> None:
        if not self._confirms:
            self._channel.confirm_delivery()
            self._confirms = True
        try:
            self._channel.basic_publish(self.location.name, "", data, self._pika.BasicProperties(
                delivery_mode=2, content_type="application/json", message_id=_NAMES.next()), mandatory=True)
        except self._pika.exceptions.UnroutableError:
            raise QueueError("no server has ever served it, and RabbitMQ would drop the event: start one, and events"
                             " are kept from then on") from None

    def is_alive(self) -> bool:
        with contextlib.suppress(*self.errors):
            self._connection.process_data_events()
            return bool(self._channel.is_open)
        return False

    def attach(self) -> None:
        milliseconds, lost = int(self.location.keep_seconds * 1000), f"{self._queue}:lost"
        self._channel.queue_declare(self._failed, durable=True, arguments={"x-max-length": FAILED_FILES})
        try:
            self._channel.queue_declare(self._queue, durable=True, arguments={
                "x-max-length": self.location.keep_events, "x-message-ttl": milliseconds, "x-expires": milliseconds,
                "x-dead-letter-exchange": "", "x-dead-letter-routing-key": lost})
        except self._pika.exceptions.ChannelClosedByBroker as error:
            log.warning("%s keeps the bounds that it was made with: %s", self._queue, _reason(error))
            self._channel = self._connection.channel()
            self._channel.queue_declare(self._queue, passive=True)
        self._channel.queue_bind(self._queue, self.location.name)  # RabbitMQ 3 writes it with the next one, or in 2 s
        # What is dropped goes there: so we know. Behind the binding, which a broker killed in between would forget.
        self._channel.queue_declare(lost, durable=True, arguments={
            "x-max-length": 1, "x-expires": int(FAILED_SECONDS * 1000)})
        self._channel.basic_qos(prefetch_count=ENTRIES)
        self._channel.basic_consume(lost, self._note_loss, auto_ack=True)
        self._channel.add_on_cancel_callback(self._note_cancel)
        try:
            self._channel.basic_consume(self._queue, self._receive, exclusive=True)
        except self._pika.exceptions.ChannelClosedByBroker as error:
            raise QueueError(f"{_reason(error)}; another server is the node {self.location.node}: give each a name of"
                             " its own (node, --node)") from error

    def cursor(self) -> Any:
        return self._serial, 0

    def _note_loss(self, *_: Any) -> None:
        self._has_lost = True

    def _note_cancel(self, *_: Any) -> None:
        self._is_cancelled = True

    def has_lost(self, place: Any) -> bool:
        known, self._has_lost = self._has_lost, False
        return known

    def _receive(self, _: Any, delivery: Any, properties: Any, body: bytes) -> None:
        given = properties.message_id if isinstance(properties.message_id, str) else ""  # else of no UTF-8
        name = given if _IDENTITY.fullmatch(given) and len(given) <= 200 else _NAMES.next()
        identity = f"{name}~{self.location.memory.run}"  # good for this run of this node
        if delivery.redelivered and (identity, hash(body)) in self.location.memory.sent:
            self._channel.basic_ack(delivery.delivery_tag)
        else:
            self._messages.append(Entry((self._serial, delivery.delivery_tag), identity, time.time(), body))

    def read(self, place: Any, max_bytes: int) -> list[Entry]:
        if self._is_cancelled or not self._channel.is_open:
            raise QueueError("the broker has ended the consumer, or the connection")
        known = -1
        while known < len(self._messages) < ENTRIES:
            known = len(self._messages)
            self._connection.process_data_events()
        entries, size = [], 0
        while self._messages and size < max_bytes:
            entries.append(self._messages.popleft())
            size += len(entries[-1].data or b"")
        return entries

    def save(self, place: Any) -> None:
        serial, tag = place
        if serial == self._serial and tag > self._acked:  # else of a link that broke: they come again
            self._channel.basic_ack(tag, multiple=True)
            self._acked = tag

    def tidy(self) -> None:
        """The broker does it."""

    def listen(self, place: Any, seconds: float) -> bool:
        self._connection.process_data_events(seconds)
        return bool(self._messages)

    def set_aside(self, entry: Entry, reason: str) -> None:
        self._channel.basic_publish("", self._failed, entry.data or b"", self._pika.BasicProperties(
            delivery_mode=2, headers={"reason": reason[:KIB]}))

    def backlog(self, place: Any) -> Backlog:
        self._connection.process_data_events()
        waiting = self._declared(self._queue).message_count + len(self._messages)  # another's are not counted
        oldest = time.time() - self._messages[0].stamp if self._messages else 0.0
        return Backlog(waiting, oldest, self._declared(self._failed).message_count)

    def _declared(self, queue: str) -> Any:
        """Asked on a channel of its own, which the broker closes where there is no such queue."""
        try:
            with self._connection.channel() as channel:
                return channel.queue_declare(queue, passive=True).method
        except self._pika.exceptions.ChannelClosedByBroker:
            return SimpleNamespace(message_count=0, consumer_count=0)

    def nodes(self) -> list[tuple[str, float]]:
        """The one that is asked for: RabbitMQ has no list of the others."""
        return [(self.location.node, 0.0)] if self._declared(self._queue).consumer_count else []

    def close(self) -> None:
        """Politely, where there is time for it; else pika lets go of the socket once it is told that it is gone."""
        transport = self._connection._impl._transport
        is_late = time.monotonic() >= self.deadline
        self.limit(0.5)
        try:
            if not is_late:
                self._connection.close()
        finally:
            with contextlib.suppress(Exception):  # which it will raise, because it is
                if self._connection.is_open and transport:
                    transport.abort()
                    self._connection._flush_output(lambda: False)
            self._connection._impl.ioloop.close()


def _flush_patiently(connection: Any, *waiters: Any) -> None:
    """pika's BlockingConnection._flush_output(), in which all of it waits, and for an answer would for ever."""
    def give_up() -> None:
        raise QueueError("it does not answer")

    timer = connection._impl.ioloop.call_later(max(0.0, connection.link.deadline - time.monotonic()), give_up)
    try:
        super(type(connection), connection)._flush_output(*waiters)
    finally:
        connection._impl.ioloop.remove_timeout(timer)


def _read_frame(pika: Any, impl: Any) -> Any:
    """pika's Connection._read_frame(), which at properties that it cannot decode (a time beyond the year 9999) stands
    still for good. Such a message comes without them."""
    try:
        return type(impl)._read_frame(impl)
    except Exception:
        kind, channel, size, _, body_size = struct.unpack_from(">BHLLQ", impl._frame_buffer)
        if kind != pika.spec.FRAME_HEADER or impl._frame_buffer[size + 7] != pika.spec.FRAME_END:
            raise
        return size + 8, pika.frame.Header(channel, body_size, pika.BasicProperties())


_ENGINES.update({
    scheme: functools.partial(BrokerQueue, link)
    for link, schemes in ((_SqliteLink, "sqlite"), (_PostgresLink, "postgresql postgres"),
                          (_RedisLink, "redis rediss unix"), (_AmqpLink, "amqp amqps"))
    for scheme in schemes.split()})
_ENGINES["(connection)"] = OutboxQueue


# 12 ─ The browser's side ──────────────────────────────────────────────────────────────────────────────────────────
# Pages on the server's port: the JavaScript client, which anyone may fetch, and those for monitoring. They are made on
# the I/O thread (or the accept thread) and wait for nothing, but for the one that queues an event, which has a thread.

# Names and types of the metrics; the text format is that of Prometheus, version 0.0.4.
_METRICS = {
    "clients": ("gauge", "Clients that are connected, by WebSocket or as event streams."),
    "backlog_events": ("gauge", "Event files, or entries, that wait in the queue."),
    "backlog_oldest_seconds": ("gauge", "Age of the oldest of them."),
    "failed_files": ("gauge", "Files, or entries, that were set aside because they are no events."),
    "events_total": ("counter", "Events that were sent."),
    "deliveries_total": ("counter", "Events that were sent, times the clients that each was sent to."),
    "connections_total": ("counter", "Clients that have connected."),
    "refused_total": ("counter", "Requests that were answered with an HTTP error."),
    "closed_total": ("counter", "Connections that the server closed, by what the client did wrong."),
}


def metrics_text(samples: Mapping[str, float]) -> bytes:
    """Samples by name and label: {'refused_total{status="403"}': 1}."""
    lines = []
    for name, (kind, text) in _METRICS.items():
        lines += [f"# HELP wsqueue_{name} {text}", f"# TYPE wsqueue_{name} {kind}"]
        lines += [f"wsqueue_{sample} {value}" for sample, value in samples.items() if sample.partition("{")[0] == name]
    return ("\n".join(lines) + "\n").encode()


def _health(server: WebSocketServer) -> dict[str, Any]:
    backlog, trouble = server._backlog, server.trouble()
    return {"status": "trouble" if trouble else "ok", "clients": len(server.registry), "backlog": backlog.waiting,
            "oldest_seconds": round(backlog.oldest, 3), "failed": backlog.failed, "trouble": trouble or None}


def _json_page(value: Any, status: str = "200 OK") -> bytes:
    return encode_response(status, encode_json(value, "a page") + b"\n", "application/json", Cache_Control="no-store")


def _healthz(server: WebSocketServer, request: Request) -> bytes:
    health = _health(server)
    return _json_page(health, "503 Service Unavailable" if health["trouble"] else "200 OK")


def _metrics_page(server: WebSocketServer, request: Request) -> bytes:
    backlog = server._backlog
    samples = {**server._totals.all(), "clients": len(server.registry), "backlog_events": backlog.waiting,
               "backlog_oldest_seconds": round(backlog.oldest, 3), "failed_files": backlog.failed}
    return encode_response("200 OK", metrics_text(samples), "text/plain; version=0.0.4; charset=utf-8")


def _monitor_json(server: WebSocketServer, request: Request) -> bytes:
    totals, everyone = server._totals.all(), server.get_connections()
    return _json_page({
        **_health(server), "topics": server.registry.sizes(MONITOR_TOPICS),
        "streams": sum(conn._encoding.stream for conn in everyone), "events_total": totals["events_total"],
        "deliveries_total": totals["deliveries_total"], "failures": server._backlog.failures, "version": __version__,
        "things": ["entry", "entries"] if isinstance(server._queue, BrokerQueue) else ["file", "files"],
        "uptime_seconds": round(time.monotonic() - server._started_at, 1)})


def _monitor(server: WebSocketServer, request: Request) -> bytes:
    nonce = _base64url(os.urandom(16)).decode()
    page = MONITOR_HTML.replace("{{nonce}}", nonce).replace("{{token}}", server._token)
    policy = (f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self' ws: wss:;"
              " base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    return encode_response("200 OK", page.encode(), "text/html; charset=utf-8", Content_Security_Policy=policy,
                           Cache_Control="no-store", X_Content_Type_Options="nosniff", Referrer_Policy="no-referrer")


def _send_page(server: WebSocketServer, request: Request) -> bytes:
    """Queue an event for the monitor page. Its token is what a page of another site cannot read."""
    from hmac import compare_digest

    check_origin(request, ())
    given = request.headers.get("x-wsqueue-token", "")
    if not compare_digest(given.encode(), server._token.encode()):
        raise HandshakeError("403 Forbidden", "The token is not that of this server: reload the page.")
    if server._queue is None:
        raise HandshakeError("409 Conflict", "This server has no queue.")
    query = request.query
    try:
        payload = json.loads(query.get("payload") or "null")
        server._queue.put([(query.get("event", ""), payload)], to=query.get("to") or None)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and EventError are ValueErrors
        raise HandshakeError("400 Bad Request", f"This is not an event: {error}") from None
    except QueueError as error:
        raise HandshakeError("503 Service Unavailable", str(error)) from None
    return encode_response("204 No Content", b"")


def _script(body: bytes) -> Page:
    return Page(lambda server, request: encode_response(
        "200 OK", body, "text/javascript; charset=utf-8", Access_Control_Allow_Origin="*",
        Cache_Control="max-age=300", X_Content_Type_Options="nosniff"), public=True)


WSQUEUE_JS = r"""
// wsqueue in the browser: events over a WebSocket or, where that does not get through, over an event stream.
//   const queue = new WSQueue("/chat", { ticket: async () => (await fetch("/ticket")).text() });
//   queue.on("order_paid", (payload, message) => show(payload)).on("*", message => console.log(message));
//   queue.onreset = () => refresh();        // what was missed is not known any more: fetch the present state
//   queue.onstatus = status => { ... };     // "connecting", "open", "waiting" (for the next attempt) or "closed"
//   queue.send("text"); queue.close();      // send() is false unless a WebSocket is open
// The URL is relative to this script's. After a loss it goes on where it was; to go on where an earlier page was, set
// queue.lastEventId right after `new`. queue.onmessage gets what is no event: a text that a handler sends.
globalThis.WSQueue = class WSQueue {
  static base = globalThis.document?.currentScript?.src || globalThis.location?.href;
  static LONGEST = 30e3;     // ms between two attempts, at most
  static STABLE = 5e3;       // a connection that lasted so long was a good one: the next delay is short again
  static PATIENCE = 20e3;    // an attempt that has not said hello by then has failed
  static LOOK_AGAIN = 300e3; // beside a stream, now and then: does a WebSocket work by now?
  static REMEMBERED = 1000;  // ids, to know repeats by

  status = "waiting"; lastEventId = ""; onstatus = null; onreset = null; onmessage = null;
  #url; #options; #timer; #socket; #stream = false; #failures = 0; #listeners = new Map(); #seen = new Set();
  #attempts = new Set(); // the connection, or what is to become one; beside a stream, the WebSocket to replace it
  #online = () => { if (this.status === "waiting") this.#connect(); };

  constructor(url, { ticket, credentials = true } = {}) { // a stream from allowed_origins "*" wants credentials: false
    this.#url = new URL(url, WSQueue.base);
    if (!/^(ws|http)s?:$/.test(this.#url.protocol)) throw new TypeError(`WSQueue: not a server's URL: ${this.#url}`);
    this.#options = { ticket, withCredentials: credentials };
    globalThis.addEventListener?.("online", this.#online);
    queueMicrotask(() => this.#connect()); // once the listeners are there
  }
  on(event, listener) {
    this.#listeners.set(event, [...(this.#listeners.get(event) || []), listener]);
    return this;
  }
  send(text) {
    if (this.#socket?.readyState !== 1) return false;
    return this.#socket.send(text), true;
  }
  close() {
    for (const attempt of this.#attempts) this.#drop(attempt);
    clearTimeout(this.#timer);
    globalThis.removeEventListener?.("online", this.#online);
    this.#tell("closed");
  }

  #connect() {
    clearTimeout(this.#timer);
    this.#tell("connecting");
    if (this.status === "connecting") this.#try(this.#stream);
  }
  #try(stream) {
    const attempt = { stream, lastId: "", timer: setTimeout(() => this.#end(attempt), WSQueue.PATIENCE) };
    this.#attempts.add(attempt);
    const { ticket } = this.#options, ask = async () => typeof ticket === "function" ? ticket() : ticket;
    ask().then(given => { if (this.#attempts.has(attempt)) this.#open(attempt, given); })
      .catch(error => { console.error("WSQueue:", error); this.#end(attempt); });
  }
  #open(attempt, ticket) {
    const url = new URL(this.#url);
    url.protocol = url.protocol.replace(/ws|http/, attempt.stream ? "http" : "ws");
    url.hash = "";
    url.searchParams.set("last_event_id", this.lastEventId);
    if (ticket) url.searchParams.set("ticket", String(ticket).trim());
    attempt.tried = true;
    const link = attempt.link = attempt.stream ? new EventSource(url, this.#options) : new WebSocket(url);
    link.onmessage = received => this.#receive(attempt, received);
    link.onerror = link.onclose = () => this.#end(attempt); // before an EventSource tries again by itself
  }
  #end(attempt) {
    if (!this.#drop(attempt)) return;
    const opened = "openedAt" in attempt;
    if (performance.now() - attempt.openedAt >= WSQueue.STABLE) this.#failures = 0;
    if (this.#attempts.size) return opened && this.#tell("connecting");
    if (attempt.tried && !opened && globalThis.EventSource) this.#stream = !attempt.stream;
    const longest = Math.min(WSQueue.LONGEST, 1000 * 2 ** this.#failures++);
    this.#timer = setTimeout(() => this.#connect(), Math.random() * longest); // full jitter: not all at once
    this.#tell("waiting");
  }
  #drop(attempt) {
    clearInterval(attempt.timer); // or the timeout: they are one list
    attempt.link?.close();
    return this.#attempts.delete(attempt);
  }

  #receive(attempt, { data, lastEventId }) {
    let message;
    try { message = JSON.parse(data); } catch { /* it is no event */ }
    if (typeof message?.event !== "string") return this.#call(this.onmessage, data);
    if (attempt.stream) { // where ids stand beside the messages, and one without seems to have that of the one before
      message.id = lastEventId === attempt.lastId ? undefined : lastEventId;
      attempt.lastId = lastEventId;
    }
    const { event, payload } = message, id = typeof message.id === "string" && message.id;
    if (id) this.lastEventId = id;
    if (event === "wsqueue.hello") return this.#hello(attempt);
    if (event === "wsqueue.reset") return this.#seen.clear(), this.#call(this.onreset);
    if (id && this.#seen.has(id)) return;
    if (id && this.#seen.add(id).size > WSQueue.REMEMBERED) this.#seen.delete(this.#seen.values().next().value);
    for (const listener of this.#listeners.get(event) || []) this.#call(listener, payload, message);
    for (const listener of this.#listeners.get("*") || []) this.#call(listener, message);
  }
  #hello(attempt) {
    clearTimeout(attempt.timer);
    for (const other of this.#attempts) if (other !== attempt) this.#drop(other);
    attempt.openedAt = performance.now();
    this.#stream = attempt.stream;
    if (!attempt.stream) this.#socket = attempt.link;
    else attempt.timer = setInterval(() => this.#try(false), WSQueue.LOOK_AGAIN * (1 + Math.random()));
    if (attempt.stream && this.#socket) this.#try(false); // that has worked: it was the server that was down
    this.#tell("open");
  }
  #tell(status) {
    if (status === this.status || this.status === "closed") return;
    this.status = status;
    this.#call(this.onstatus, status);
  }
  #call(listener, ...values) {
    try { listener?.(...values); } catch (error) { (globalThis.reportError || console.error)(error); }
  }
};
if (typeof module === "object" && module) module.exports = { WSQueue: globalThis.WSQueue };
"""[1:]

MONITOR_HTML = r"""
<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>wsqueue</title>
<style nonce="{{nonce}}">
  :root { color-scheme: light dark; --page: #fff; --ink: #14171a; --quiet: #5f676f; --line: #d9dde1; --field: #848c94;
    --tint: #f3f4f6; --ok: #08763f; --trouble: #a04f00; --bad: #bf2319; --sans: system-ui, sans-serif;
    --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace; }
  @media (prefers-color-scheme: dark) { :root { --page: #101214; --ink: #e4e7ea; --quiet: #959da5; --line: #2a2e33;
    --field: #69717a; --tint: #191c1f; --ok: #4cc586; --trouble: #efa63c; --bad: #ff8073; } }
  * { box-sizing: border-box; margin: 0; padding: 0; list-style: none; }
  body { background: var(--page); color: var(--ink); font: 15px/1.45 var(--sans); font-variant-numeric: tabular-nums;
    overflow-wrap: anywhere; }
  header > div, main { max-width: 82rem; margin: 0 auto; padding: 0 clamp(1rem, 3vw, 2.5rem); }
  h1, h2, dt, label, small, .note { font-size: .8rem; font-weight: 400; color: var(--quiet); }
  h1 b, h2 { color: var(--ink); font-weight: 650; }
  h2 { display: flex; gap: .7rem; align-items: baseline; padding-bottom: .35rem; border-bottom: 1px solid var(--ink); }
  h2 small { flex: 1; } h2 button { all: unset; cursor: pointer; font-weight: 400; text-decoration: underline; }
  :focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }

  header > div { padding-block: 1.1rem 1.5rem; } .ok #state { color: var(--ok); }
  #state { font: 650 clamp(3rem, 9vw, 4.75rem)/1 var(--sans); letter-spacing: -.04em; margin: 1.3rem 0 .5rem -.02em; }
  #sentence { font-size: 1.05rem; max-width: 64ch; min-height: 1.45em; }
  .trouble, .unreachable { background: var(--trouble); color: var(--page); } .unreachable { background: var(--bad); }
  :is(.trouble, .unreachable) :is(h1, b) { color: inherit; } .unreachable + main .figure { opacity: .55; }

  dl { display: grid; grid-template-columns: 1fr 1.9fr 1fr 1fr; border-top: 1px solid; margin-bottom: 2rem; }
  :is(.trouble, .unreachable) + main dl { border-color: transparent; }
  dl > div { padding: .6rem 1.2rem .4rem; border-left: 1px solid var(--line); }
  dl > div:first-child { padding-left: 0; border: 0; }
  dd { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 0 1.2rem; }
  dd b { font-size: 2.1rem; font-weight: 350; line-height: 1.3; letter-spacing: -.02em; }
  dd small { grid-column: 1 / -1; width: 0; min-width: 100%; } .bad b { color: var(--trouble); font-weight: 600; }
  svg { width: 100%; height: 2.2rem; align-self: center; overflow: visible; color: var(--ok); }

  .columns { display: grid; grid-template-columns: minmax(0, 1fr) 21rem; gap: 2.2rem 3rem; padding-bottom: 3rem; }
  aside, form { display: grid; gap: 2.2rem; align-content: start; } form { gap: .7rem; padding-top: .6rem; }
  li { border-bottom: 1px solid var(--line); } .note:not(:empty), summary, aside li { padding: .25rem 0; }
  aside li { font-size: .87rem; display: grid; } #topics li { grid-template-columns: 1fr auto; gap: 1rem; }
  pre, summary, code { font: .8rem/1.55 var(--mono); } time, summary span, code { color: var(--quiet); }
  summary { display: grid; grid-template-columns: 4.6rem 13rem minmax(0, 1fr); gap: 0 1rem; cursor: pointer; }
  summary > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  summary:hover { background: var(--tint); }
  summary::-webkit-details-marker { display: none; } #events:empty::before { content: "None yet"; color: var(--quiet); }
  pre { white-space: pre-wrap; padding-bottom: .6rem; max-height: 24rem; overflow: auto; }
  input, textarea, form button { display: block; width: 100%; padding: .4rem .5rem; border: 1px solid var(--field);
    border-radius: 2px; background: var(--tint); color: var(--ink); font: .82rem/1.45 var(--mono); resize: vertical; }
  form button { background: var(--ink); color: var(--page); font: 600 .85rem/1.45 var(--sans); cursor: pointer; }
  @media (max-width: 60rem) { .columns { grid-template-columns: minmax(0, 1fr); } aside { display: contents; }
    #failures-part { order: -1; } }
  @media (max-width: 44rem) { dl { grid-template-columns: repeat(3, minmax(0, 1fr)); } dl > div { padding-right: 0; }
    dl > .wide { grid-column: 1 / -1; order: -1; padding: .6rem 0; border: 0; border-bottom: 1px solid var(--line); }
    dl > div:nth-child(n + 3) { padding-left: .8rem; } dd b { font-size: 1.7rem; } summary b { order: -1; }
    summary { grid-template-columns: minmax(0, 1fr) auto; } summary span { grid-column: 1 / -1; }
    input, textarea { font-size: 16px; } /* phones zoom in on less */ }
</style>
<header id="top"><div><h1><b>wsqueue</b> <span id="about"></span></h1>
  <div role="status"><p id="state">…</p><p id="sentence"></p></div></div></header>
<main><dl>
    <div><dt>Clients</dt><dd class="figure"><b id="clients">&ndash;</b><small id="clients-more"></small></dd></div>
    <div class="wide"><dt>Events per second</dt><dd class="figure"><b id="rate">&ndash;</b>
      <svg viewBox="0 0 119 30" preserveAspectRatio="none" role="img" aria-label="The last two minutes"><path id="line"
        fill="none" stroke="currentColor" stroke-width="1.5" vector-effect="non-scaling-stroke"/></svg>
      <small id="rate-more"></small></dd></div>
    <div><dt>Waiting</dt><dd class="figure"><b id="backlog">&ndash;</b><small id="backlog-more"></small></dd></div>
    <div id="failed-part"><dt>Failed</dt><dd class="figure"><b id="failed">&ndash;</b><small id="failed-more"></small>
      </dd>
  </div></dl><div class="columns">
    <section><h2>Live <small id="which"></small><button id="hold" aria-pressed="false">Hold</button></h2>
      <p class="note" id="live"></p><ol id="events"></ol></section>
    <aside>
      <section id="failures-part" hidden><h2>Failed <small>in failed/, each beside its .reason</small></h2>
        <ul id="failures" class="figure"></ul></section>
      <section><h2>Topics <small id="topics-more"></small></h2><ul id="topics" class="figure"></ul></section>
      <section><h2>Send</h2><form id="send" autocomplete="off" autocapitalize="off" spellcheck="false">
        <label>Event<input name="event" required></label>
        <label>Payload, as JSON<textarea name="payload" rows="3"></textarea></label>
        <label>Topic; without one, everyone gets it<input name="to"></label>
        <button>Send</button><output id="sent"></output></form></section>
    </aside></div></main>
<script src="/wsqueue.js" nonce="{{nonce}}"></script>
<script nonce="{{nonce}}">
"use strict";
const $ = id => document.getElementById(id), ticket = new URLSearchParams(location.search).get("ticket");
const number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });
const many = (count, one, more = one + "s") => `${number(count)} ${count === 1 ? one : more}`;
const clock = (seconds = Date.now() / 1000) => new Date(seconds * 1000).toLocaleTimeString("en", { hourCycle: "h23" });
const element = (name, ...parts) => { const made = document.createElement(name); made.append(...parts); return made; };
const rates = [], fresh = [], shown = {};
let before = null, answered = "", opened = false;

function put(texts) { // only what changed: else a selection would go each second, and a screen reader read it anew
  for (const [id, text] of Object.entries(texts)) if ($(id).textContent !== text) $(id).textContent = text;
}
function lasted(seconds) {
  const units = [["days", 86400], ["h", 3600], ["min", 60], ["s", 0]];
  const [unit, size] = units.find(([, size]) => seconds >= 2 * size);
  return `${number(seconds / (size || 1), 1)} ${unit}`;
}
function fill(id, rows, tags) {
  if (shown[id] === (shown[id] = JSON.stringify(rows))) return;
  $(id).replaceChildren(...rows.map(row => element("li", ...row.map((text, i) => element(tags[i], text)))));
}
function say(state, sentence) {
  $("top").className = state.toLowerCase();
  document.title = `${state} \u2013 wsqueue`;
  put({ state, sentence });
}
function draw(rate) { // null: not known
  if (rates.push(rate) > 120) rates.shift();
  const peak = Math.max(...rates), latest = rates.slice(-5).filter(value => value !== null);
  const mean = latest.reduce((sum, value) => sum + value, 0) / latest.length;
  const point = (value, i) => `${120 - rates.length + i} ${30 - 30 * value / (peak || 1)}`;
  const step = (value, i) => value === null ? "" : ((rates[i - 1] ?? null) === null ? "M" : "L") + point(value, i);
  $("line").setAttribute("d", rates.map(step).join(""));
  put({ rate: latest.length ? number(mean, mean < 100 ? 1 : 0) : "\u2013" });
  return peak;
}
function show({ clients, streams, topics, backlog, failed, failures, things, ...facts }) {
  const now = performance.now(), total = facts.events_total, deliveries = facts.deliveries_total;
  const peak = draw(before && total >= before.total ? (total - before.total) * 1000 / (now - before.now) : null);
  before = { now, total };
  answered = clock();
  say(facts.trouble ? "Trouble" : "OK", facts.trouble
    || (backlog ? `${many(backlog, ...things)} still to be sent.` : "All that was queued has been sent."));
  put({ about: `${facts.version} on ${location.host}, up ${lasted(facts.uptime_seconds)}`, clients: number(clients),
    "clients-more": streams ? `${many(streams, "event stream")} among them` : "", backlog: number(backlog),
    "rate-more": `peak ${number(peak)}; ${many(total, "event")}, ${many(deliveries, "delivery", "deliveries")} in all`,
    "backlog-more": backlog ? `${things[1]}, the oldest for ${lasted(facts.oldest_seconds)}` : things[1],
    failed: number(failed),
    "failed-more": failed > failures.length ? `${things[1]}; the newest ${failures.length} below` : things[1],
    "topics-more": Object.keys(topics).length ? "clients on each" : "no client is on any" });
  $("failed-part").className = failed ? "bad" : "";
  $("failures-part").hidden = !failures.length;
  fill("failures", failures.map(({ name, reason }) => [reason, name]), ["span", "code"]);
  fill("topics", Object.entries(topics).map(([topic, count]) => [topic, number(count)]), ["span", "b"]);
}
async function look() {
  const asked = fetch("/monitor.json", { cache: "no-store", signal: AbortSignal.timeout(3000) });
  const text = await asked.then(response => response.text()).catch(() => "");
  setTimeout(look, 1000);
  if (text.startsWith("{")) return show(JSON.parse(text));
  draw(before = null);
  if (text) say("Trouble", `Instead of its state the server says: ${text.slice(0, 500)}`);
  else say("Unreachable", `No answer from ${location.host}${answered && ` since ${answered}; the figures are old`}.`);
}

function row({ event, payload, timestamp }) {
  const text = JSON.stringify(payload, null, 2), lines = text.split(String.fromCharCode(10));
  const line = element("summary", element("time", clock(timestamp)), element("b", event),
    element("span", lines.slice(0, 99).map(part => part.trim()).join(" ").slice(0, 500)));
  return element("li", element("details", line, element("pre", text.slice(0, 50000))));
}
function list() {
  if ($("hold").ariaPressed === "true") return;
  $("events").prepend(...fresh.splice(0).map(row).reverse());
  while ($("events").children.length > 100) $("events").lastChild.remove();
}
async function send(form) {
  const { event, to, ...more } = Object.fromEntries(new FormData(form)), payload = more.payload.trim() || "null";
  try { JSON.parse(payload); } catch (error) { return `The payload is not JSON: ${error.message}`; }
  const query = new URLSearchParams({ event, payload, ...(to && { to }) });
  const request = { method: "POST", headers: { "X-Wsqueue-Token": "{{token}}" } };
  const response = await fetch(`/send?${query}`, request).catch(() => null);
  if (response?.ok) return `Queued at ${clock()}.`;
  const reason = response ? await response.text() : "The server does not answer.";
  const stale = response?.status === 403 && reason.toLowerCase().includes("token");
  return stale ? "The server has started anew: reload the page." : reason;
}
$("send").onsubmit = async event => { event.preventDefault(); put({ sent: await send(event.target) }); };
$("hold").onclick = () => { $("hold").ariaPressed = String($("hold").ariaPressed !== "true"); };
look();
setInterval(list, 250);

const queue = new WSQueue("/", { ticket }).on("*", message => { if (fresh.push(message) > 100) fresh.shift(); });
queue.onstatus = status => {
  opened ||= status === "open";
  const expired = ticket ? " The ticket in this page's address may have expired." : "";
  put({ live: status === "open" ? "" : opened ? "The connection is lost; trying again." + expired
    : "Not connected yet. If the server wants a ticket, put ?ticket= into this page's address." });
};
put({ which: `only events for everyone or the topic /${ticket ? ", or that the ticket grants" : ""}` });
</script>
"""[1:]

PAGES.update({
    ("GET", "/wsqueue.js"): _script(WSQUEUE_JS.encode()),
    ("GET", "/wsqueue.mjs"): _script(f"{WSQUEUE_JS}\nexport const {{ WSQueue }} = globalThis;\n"
                              "WSQueue.base = import.meta.url;\n".encode()),
    ("GET", "/"): Page(_monitor), ("GET", "/monitor.json"): Page(_monitor_json), ("GET", "/healthz"): Page(_healthz),
    ("GET", "/metrics"): Page(_metrics_page), ("POST", "/send"): Page(_send_page, waits=True),
})


# 13 ─ Command line ────────────────────────────────────────────────────────────────────────────────────────────────
# Each command returns its exit status; what a user did wrong is one line on stderr.


def _parser() -> Any:
    import argparse
    import shutil
    import textwrap

    width = max(11, shutil.get_terminal_size().columns - 2)  # as argparse counts
    wrap = functools.partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)

    def manual(command: str) -> dict[str, Any]:
        """What its parser is made with. Lines fit the terminal, but for examples: those are to be copied."""
        _, about, good, bad, examples, *more = _COMMANDS[command]
        status = f"Exit status: 0 if {good}; 1 if {bad}; 2 for a command line that makes no sense."
        below = [*map(wrap, [*more, status]), "Example:", *(f"  wsqueue {example}" for example in examples)]
        return {"description": wrap(about), "epilog": "\n".join(below), "allow_abbrev": False,  # --secret X is an error
                "formatter_class": argparse.RawDescriptionHelpFormatter}

    parser = argparse.ArgumentParser(prog="wsqueue", **manual(""))
    parser.add_argument("--version", action="version", version=f"wsqueue {__version__}")
    add: Any = parser.add_subparsers(dest="command", metavar="COMMAND", required=True).add_parser
    serve, send, listen, status, ticket = (
        add(name, help=row[1].partition(".")[0], **manual(name)) for name, row in _COMMANDS.items() if name)
    serve.usage, group = "wsqueue serve [OPTION ...]", serve
    for setting in SETTINGS:
        group = serve.add_argument_group(_GROUPS[setting.name]) if setting.name in _GROUPS else group
        _add_option(group, setting)
    send.add_argument("event", metavar="EVENT", help="its name, such as order_paid")
    send.add_argument("payload", nargs="?", default="null", metavar="JSON", help="(default: null); - reads stdin")
    send.add_argument("--to", action="append", metavar="TOPIC", help="who gets it (default: all); may be repeated")
    send.add_argument("--durable", action="store_true", help="survive a power cut (fsync), which takes milliseconds")
    listen.add_argument("url", metavar="URL", help="such as ws://127.0.0.1:8081/; its path is a topic")
    listen.add_argument("--count", type=int, metavar="MESSAGES", help="end after so many (default: none)")
    listen.add_argument("--timeout", type=float, metavar="SECONDS", help="end after so long (default: none)")
    ticket.add_argument("--user", metavar="ID", help="who connects; gets events to user:ID (default: none)")
    ticket.add_argument("--topic", action="append", default=[], help="gets its events (default: none); may be repeated")
    ticket.add_argument("--path", help="the only path that it is for (default: any)")
    ticket.add_argument("--ttl", type=float, default=60.0, metavar="SECONDS", help="to connect within (default: 60)")
    for each, name in ((send, "queue"), (status, "queue"), (status, "node"), (ticket, "secret_file")):
        _add_option(each, _BY_NAME[name])
    return parser


def _add_option(parser: Any, setting: Setting) -> None:
    """An option of the same name; its default is the environment's, where the setting has a variable."""
    import argparse

    if setting.unit == "secret":
        return  # every user of the machine sees command lines (ps)
    kind, usual = type(setting.default), "ws_queue" if setting.name == "queue" else setting.default
    given = os.environ.get(setting.variable)
    named = given is not None and setting.unit == "file"  # a secret's, that is not there: never serve all instead
    default = given if given or named else usual
    shown = "none" if usual in ("", ()) else "on" if usual is True else usual
    variable = f"${setting.variable}, else " if setting.variable else ""  # not its value, which may hold a password
    text = f"{setting.meaning} (default: {variable}{shown})" + ("; may be repeated" if kind is tuple else "")

    def convert(value: str) -> Any:  # argparse applies it to a default that is text, too
        if setting.unit == "file" and not value:  # of a variable that is not set: never serve in the clear instead
            raise argparse.ArgumentTypeError("must name a file, and is empty")
        try:
            return value if kind is tuple else kind(value)
        except ValueError:
            source = f" (from {setting.variable})" if value is given else ""
            raise argparse.ArgumentTypeError(f"must be of type {kind.__name__}, not {value!r}{source}") from None

    if kind is bool:
        parser.add_argument(f"--no-{setting.name}", dest=setting.name, action="store_false", help=f"Turn off: {text}")
    else:
        metavar = setting.unit if "|" in setting.unit else setting.unit.upper().replace(" OR ", "|")  # "a|b": words
        parser.add_argument(f"--{setting.name.replace('_', '-')}", type=convert, metavar=metavar, help=text,
                            default=None if default in ("", ()) and not named else default,
                            action="append" if kind is tuple else "store")


def _serve(options: Any) -> int:
    import resource
    import signal

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    given = {name: value for name, value in vars(options).items() if name in _BY_NAME and value is not None}
    if not given["queue"]:
        raise SettingError("the name of the queue directory is empty: give --queue DIR")
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # our own line says what went wrong, once
    given["secret"] = _secrets_of_environment()
    server = WebSocketServer(**given)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # what an admin meant; the soft one, 1,024, is for select(2)
    with contextlib.suppress(ValueError, OSError):  # macOS has "infinity" there, and refuses it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def ready() -> None:
        for number in server._replaced_handlers:  # we end with it: a second Ctrl-C on the way out is no news
            server._replaced_handlers[number] = signal.SIG_IGN
        print(f"listening on {server.url}", flush=True)
        log.info("queue %s; stop with Ctrl-C", _shown_queue(given["queue"]))

    server.start(ready=ready)
    return 0


def _secrets_of_environment() -> tuple[str, ...]:
    secrets = os.environ.get("WS_SECRET")
    return () if secrets is None else checked_secrets(secrets, "the environment variable WS_SECRET")


def _ticket(options: Any) -> int:
    secrets = _secrets_of_environment() or (read_secrets(options.secret_file) if options.secret_file else ())
    if not secrets:
        raise SettingError("there is no secret to sign with: set WS_SECRET, or name a file with --secret-file")
    print(sign_ticket(secrets[0], user=options.user, topics=options.topic, path=options.path, ttl=options.ttl))
    return 0


def _send(options: Any) -> int:
    try:
        payload = json.loads(sys.stdin.buffer.read().decode() if options.payload == "-" else options.payload)
    except (ValueError, RecursionError) as error:
        raise SettingError(f"the payload is not JSON ({error}); text needs its quotes: '\"hello\"'") from None
    with contextlib.closing(open_queue(options.queue)) as queue:
        queue.put([(options.event, payload)], to=options.to, durable=options.durable)
    return 0


def _warn_of_password(queue: str, arguments: Sequence[str]) -> None:
    if _without_password(queue) != queue and any(queue in argument for argument in arguments):
        print("wsqueue: every user of this machine can see the password in --queue (ps): put the URL into the variable"
              " WS_QUEUE_PATH", file=sys.stderr)


def _shown_queue(queue: str) -> str:
    return _without_password(queue) if _URL.match(queue) else os.path.abspath(queue)


def _status(options: Any) -> int:
    queue = open_queue(options.queue, **({"node": options.node} if options.node else {}))
    nobody = "none: start one with wsqueue serve"
    backlog = queue.backlog()
    if isinstance(queue, BrokerQueue):
        servers, hint = [f"node {name}, there {age:.0f} s ago" for name, age in queue.nodes()
                         if age < 3 * SEEN_SECONDS], ""
        more = " or more" if servers and not queue.shared else ""  # RabbitMQ does not tell what a server has fetched
    else:
        servers, hint, more = [], ", see failed/*.reason", ""
        try:
            pid = serving_process(options.queue)
            servers = [f"process {pid}"] if pid else []
        except QueueError as error:
            nobody = f"unknown: {error}"
    print(f"queue    {_shown_queue(options.queue)}")
    for server in servers or [nobody]:
        print(f"server   {server}")
    age = f", the oldest waits for {backlog.oldest:.1f} s" if backlog.waiting else ""
    print(f"backlog  {backlog.waiting}{more}{age}")
    print(f"failed   {backlog.failed}" + (hint if backlog.failed else ""))
    return 0 if servers else 1


def _listen_command(options: Any) -> int:
    if not all(limit is None or limit > 0 for limit in (options.count, options.timeout)):  # nor NaN
        raise SettingError("--count and --timeout must be more than 0")
    deadline = None if options.timeout is None else time.monotonic() + options.timeout
    with contextlib.suppress(TimeoutError):
        for number, message in enumerate(receive_messages(options.url, deadline), 1):
            print(message if isinstance(message, str) else message.hex(), flush=True)
            if number == options.count:
                return 0
    return 1 if options.count else 0


def receive_messages(url: str, deadline: float | None) -> Iterator[Message]:
    """The messages of a server until it closes. Raises ServerError; TimeoutError at the deadline (monotonic)."""
    sock, answer = _connect(url, deadline)
    url = url.partition("?")[0]  # what follows may be a ticket
    parser = FrameParser(masked=False, max_bytes=64 * MIB)
    with sock, answer:
        while True:
            sock.settimeout(_remaining(deadline))
            try:
                data = answer.fp.read1(READ_BYTES)  # what its buffer holds came right behind the 101
            except socket.timeout:
                raise TimeoutError from None
            except OSError as error:
                raise ServerError(f"the connection to {url} broke: {error.strerror}") from error
            if not data:
                raise ServerError(f"{url} closed the connection without saying goodbye")
            for opcode, payload in parser.feed(data):
                if opcode in (TEXT, BINARY):
                    yield payload
                elif opcode != PONG:
                    with contextlib.suppress(OSError):  # the next read will tell
                        reply = (PONG, payload) if opcode == PING else (CLOSE, b"")
                        sock.sendall(encode_frame(*reply, mask=os.urandom(4)))
                if opcode == CLOSE:
                    return


def _remaining(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    seconds = deadline - time.monotonic()  # asked once: a socket refuses less than no time
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _connect(url: str, deadline: float | None) -> tuple[socket.socket, Any]:
    """The client's side of the handshake (RFC 6455, section 4.1): the socket, and the response, which reads it."""
    import http.client
    from base64 import b64encode
    from urllib.parse import urlsplit

    shown = url.partition("?")[0]  # what follows may be a ticket
    try:
        target = urlsplit(url)
        make = {"ws": http.client.HTTPConnection, "wss": http.client.HTTPSConnection}[target.scheme]
        client = make(target.hostname or "", target.port, timeout=_remaining(deadline) or 10.0)
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        if not target.hostname:
            raise ValueError
    except (KeyError, ValueError, http.client.InvalidURL):
        raise SettingError(f"{shown!r} is not a WebSocket URL such as ws://127.0.0.1:8081/") from None
    key, ticket = b64encode(os.urandom(16)).decode(), os.environ.get("WS_TICKET", "").strip()
    if not re.fullmatch(r"[\w.~+/=-]*", ticket, re.ASCII):
        raise SettingError("the environment variable WS_TICKET does not hold a ticket")
    try:
        client.request("GET", path, headers={"Upgrade": "websocket", "Connection": "Upgrade",
                                             "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key,
                                             **({"Authorization": f"Bearer {ticket}"} if ticket else {})})
        answer = client.getresponse()
        if answer.status != 101:
            sentence = answer.read(KIB).decode("utf-8", "replace").strip()
            raise ServerError(f"{shown} answered {answer.status} {answer.reason}: {sentence}")
        if answer.headers["Sec-WebSocket-Accept"] != accept_key(key):
            raise http.client.BadStatusLine("the wrong Sec-WebSocket-Accept")
    except (socket.timeout, http.client.HTTPException) as error:
        raise ServerError(f"{shown} does not answer as a WebSocket server does") from error
    except (OSError, ValueError) as error:
        why = _TLS_TROUBLE.get(getattr(error, "reason", ""), "{}").format(error)
        raise ServerError(f"cannot connect to {shown}: {why}") from error
    return client.sock, answer


# By command: its function, what it does, when its exit status is 0 and 1, examples, and what else --help should say.
_COMMANDS: dict[str, tuple[Any, ...]] = {
    "": (None, "Push events from any process to every connected browser. Without a command it serves.", "all went well",
         "not (one line on stderr says why)", ["serve --queue ws_queue", "send order_paid '{\"id\": 42}'"],
         "Environment: a $VARIABLE beside an option of a command stands in for it.",
         "Files: the queue is the directory ws_queue, unless --queue names another."),
    "serve": (_serve, "Broadcast a queue's events to every connected client. Says on stdout where it listens.",
              "Ctrl-C or SIGTERM stopped it", "it cannot serve", ["serve --queue ws_queue --port 8081"],
              "Environment: $WS_SECRET holds what a --secret-file would; it has no option, because ps would show it.",
              "Files in a queue directory: *.json waits, failed/ was not understood, history/ is what was sent last."),
    "send": (_send, "Queue an event. A server need not run; a queue directory that is missing is made.", "it is queued",
             "it cannot be", ["send order_paid '{\"id\": 42}'", "send rows - --to /reports < rows.json"]),
    "listen": (_listen_command, "Print the messages of a server, one a line. It ends when the server does.",
               "it ended in order", "--count was not reached or the connection failed; 130 after Ctrl-C",
               ["listen ws://127.0.0.1:8081/ --count 1"],
               "Environment: $WS_TICKET is the ticket to connect with, $SSL_CERT_FILE what to trust at a wss:// URL."),
    "status": (_status, "Show what waits in a queue, and who serves it. It changes nothing.", "it is served",
               "nobody serves it or it cannot be read", ["status --queue ws_queue"]),
    "ticket": (_ticket, "Print a ticket to connect with. Its secret is the server's; of several, the first one signs.",
               "it is printed", "it cannot be", ["ticket --user 42 --secret-file secret"],
               "Environment: $WS_SECRET holds the secret, and wins over a file."),
}
_GROUPS = {  # of options: the first setting of each
    "host": "where it listens", "queue": "what is served", "max_message_bytes": "limits", "tls_cert": "encryption",
    "allowed_origins": "who may connect", "history_events": "history", "monitoring": "monitoring"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "serve")
    if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show must not end us
    try:
        try:
            options = _parser().parse_args(arguments)
            _warn_of_password(getattr(options, "queue", ""), arguments)
            return _COMMANDS[options.command][0](options)  # type: ignore[no-any-return]
        finally:
            sys.stdout.flush()  # here, and not at the interpreter's exit, a reader that has left is no trouble
    except WsqueueError as error:
        print(f"wsqueue: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingError) else 1
    except BrokenPipeError:  # `wsqueue listen URL | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes stdout once more at exit
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
