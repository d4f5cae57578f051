#!/usr/bin/env python3
"""Lets wsqueue run for long under faults, and proves from what its clients received that nothing was lost.

    python tests/soak.py faults        [--seconds 600]    random faults under a steady flow with bursts
    python tests/soak.py kill-server   [--times 50]       kill -9 of the server in the middle of a burst
    python tests/soak.py kill-producer [--times 1000]     kill -9 of a producer in the middle of a write
    python tests/soak.py churn         [--seconds 600] [--rate 100]   clients that come and vanish; memory
    python tests/soak.py resume        [--times 20] [--clients 100]   kill -9 of the server; clients that come back
    python tests/soak.py nodes         [--broker redis] [--nodes 3] [--clients 300] [--events 5000] [--rounds 1]
                                       many servers on one broker; kill -9 of one, whose clients go to the others

`--seed` makes the same choices again (not the same interleaving: processes and the kernel have their own mind).
Exit status 1, with the evidence and the servers' logs kept, if anything that is promised did not hold.

What can be proved: an event that was queued is either still in the directory or was sent to everybody who was
connected. So a witness is connected whenever events are sent: a restarted server is first given an empty directory,
and the real one is put in its place, at once and with all that waits in it, when the witnesses are back. Then each
witness must receive every number of every producer, in order. Only a kill of the server excuses a repeat, which
starts at an earlier number and goes on from there without a gap.

Clients that come back with the id of their last event (resume) need no such care: they come and go as they like, and
each must in the end have exactly the events of its topics, in order, none of them twice. Those of many nodes stay,
until they lose theirs: then they come to another one with the id of their last event.

Needs Linux, and the packages that the tests need. Root can mount a small disk and fill it; others get a limit on
the size of the producers' files, which fails in the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import logging
import os
import random
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, deque
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as websockets_connect

import wsqueue
from brokers import free_port, postgres_server, redis_server
from clients import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    Follower,
    RawClient,
    client_frame,
    close_payload,
    handshake,
    open_socket,
    stream_request,
    with_last_id,
)
from helpers import ROOT, TIME_UNIT, WSQUEUE, Server
from wsqueue import queue_event, queue_events, sign_ticket

KIB, MIB = 1024, 1024 * 1024
RECEIVE_BUFFER = 4 * MIB  # a witness that is not scheduled for a moment must not look like a slow client
TCP_REPAIR = 19  # linux/tcp.h; Python has no name for it
OLD_SECONDS = 2 * 3600  # twice the age from which on left-over temporary files are removed

# ---- The checker -------------------------------------------------------------------------------------------


class Ledger:
    """What one client received, checked as it comes.

    anywhere: the client came in the middle of it, so that a producer's first number may be any.
    """

    def __init__(self, anywhere: bool = False) -> None:
        self.violations: list[str] = []
        self.received = self.repeated = self.misplaced = 0
        self.missing: dict[str, set[int]] = {}
        self._anywhere = anywhere
        self._connection = 0
        self._due: dict[str, int] = {}  # in this connection
        self._top: dict[str, int] = {}  # one more than the largest number in all of them
        self._last: dict[str, deque[str]] = {}  # evidence

    def begin(self) -> None:
        """A new connection, after a crash: whatever comes first may be a repeat."""
        self._connection += 1
        self._due.clear()

    def take(self, message: Any) -> None:
        """A message as it came off the wire."""
        try:
            payload = json.loads(message)["payload"]
            producer, number, size, pad = (payload[key] for key in ("producer", "number", "size", "pad"))
        except (ValueError, TypeError, KeyError) as error:
            self._violation(f"not a whole event ({error!r}): {message[:200]!r}")
            return
        if pad != "x" * size:
            self._violation(f"{producer} {number} is damaged: {len(pad)} of {size} characters")
        self.see(producer, number)

    def see(self, producer: str, number: int) -> None:
        self.received += 1
        top = self._top.setdefault(producer, number if self._anywhere else 0)
        missing = self.missing.setdefault(producer, set())
        due = self._due.setdefault(producer, min(number, top))  # a repeat may start anywhere, but behind no gap
        if number < top and number not in missing:
            self.repeated += 1
        if number != due:
            self.misplaced += 1
            self._violation(f"{producer}: {number} came where {due} was due, after {self._tail(producer)}")
        missing.update(range(max(due, top), number))
        missing.discard(number)
        self._due[producer] = max(due, number + 1)
        self._top[producer] = max(top, number + 1)
        self._last.setdefault(producer, deque(maxlen=8)).append(f"{self._connection}/{number}")

    def _tail(self, producer: str) -> str:
        return " ".join(self._last.get(producer, ())) + " (connection/number)"

    def _violation(self, text: str) -> None:
        if len(self.violations) < 20:  # the first ones tell what happened
            self.violations.append(text)

    def has_all(self, totals: Mapping[str, int]) -> bool:
        return all(self._top.get(producer, 0) >= total for producer, total in totals.items())

    def end(self, totals: Mapping[str, int], spare: int = 0) -> list[str]:
        """The verdict. totals: how many each producer has queued; `spare` more may have been, unbeknown to it."""
        for producer, total in totals.items():
            top = self._top.get(producer, 0)
            self.missing.setdefault(producer, set()).update(range(top, total))
            if top > total + spare:
                self._violation(f"{producer}: {top} events came, of {total} that were queued")
        lost = {producer: sorted(numbers) for producer, numbers in self.missing.items() if numbers}
        return self.violations + [
            f"{producer}: lost {len(numbers)}, from {numbers[0]} to {numbers[-1]}; the last that came:"
            f" {self._tail(producer)}" for producer, numbers in lost.items()]

    @property
    def lost(self) -> int:
        return sum(map(len, self.missing.values()))


def numbered(producer: str, number: int, size: int | None = None) -> tuple[str, dict[str, Any]]:
    """An event; most are small, some fill buffers, and a large one takes its time to be written."""
    if size is None:
        size = 100_000 if number % 200 == 99 else number * 37 % 1000
    return "soak", {"producer": producer, "number": number, "size": size, "pad": "x" * size}


# ---- Clients that stay -------------------------------------------------------------------------------------


@contextlib.contextmanager
def raw_messages(url: str, receive_buffer: int = RECEIVE_BUFFER) -> Iterator[Iterator[Any]]:
    with RawClient(url, receive_buffer=receive_buffer) as client:
        client.socket.settimeout(None)
        yield iter(client.recv, None)


@contextlib.contextmanager
def library_messages(url: str) -> Iterator[Any]:
    """No pings: what a killed server has not read becomes a reset, which may overtake what it has sent."""
    sock = open_socket(url, RECEIVE_BUFFER)
    with websockets_connect(url, sock=sock, ping_interval=None, max_queue=None) as client:
        yield client


def is_goodbye(error: BaseException | None) -> bool:
    """Whether a raw client complains about no more than the close frame of a server that is told to stop."""
    return error is None or repr(close_payload(1001))[2:-1] in str(error)


class Witness:
    """A client that is connected whenever events are sent, and reads until the server ends."""

    def __init__(self, open_messages: Callable[..., Any] = raw_messages) -> None:
        self.ledger = Ledger()
        self._open = open_messages
        self._thread = threading.Thread()
        self._error: BaseException | None = None

    def connect(self, url: str, pause: float = 0.0, **options: Any) -> None:
        """pause: seconds between two messages."""
        stack = contextlib.ExitStack()
        messages = stack.enter_context(self._open(url, **options))
        self.ledger.begin()
        self._error = None
        self._thread = threading.Thread(target=self._read, args=(stack, messages, pause), daemon=True)
        self._thread.start()

    def _read(self, stack: contextlib.ExitStack, messages: Iterator[Any], pause: float) -> None:
        try:
            with stack:
                for message in messages:
                    self.ledger.take(message)
                    if pause:
                        time.sleep(pause)
        except Exception as error:
            self._error = error

    def is_connected(self) -> bool:
        return self._thread.is_alive()

    def read_to_the_end(self) -> None:
        """Receive what the kernel had when the server ended."""
        self._thread.join(60 * TIME_UNIT)
        assert not self._thread.is_alive(), "a witness still reads from a server that has ended"
        if not isinstance(self._error, (EOFError, OSError, ConnectionClosed)) and not is_goodbye(self._error):
            self.ledger.violations.append(f"a witness received what it should not: {self._error!r}")

    def why(self) -> str:
        return repr(self._error)


# ---- Clients that come and vanish --------------------------------------------------------------------------


def close_at_once(client: RawClient) -> None:
    """With or without unread data: a FIN or a reset."""


def reset(client: RawClient) -> None:
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def say_goodbye(client: RawClient) -> None:
    client.send_frame(CLOSE, close_payload(1000))


def stop_sending(client: RawClient) -> None:
    client.socket.shutdown(socket.SHUT_WR)


def break_off_a_frame(client: RawClient) -> None:
    client.socket.sendall(client_frame(TEXT, b"x" * 1000)[:500])


def drop_off_the_net(client: RawClient) -> None:
    """Half-open: neither FIN nor reset tells the server."""
    client.socket.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)


def may_drop_off_the_net() -> bool:
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        except OSError:
            return False
        return True


WAYS = [close_at_once, reset, say_goodbye, stop_sending, break_off_a_frame]
if may_drop_off_the_net():
    WAYS.append(drop_off_the_net)

Strange = Callable[["Strangers", random.Random, str], None]


def visit(crowd: Strangers, rng: random.Random, url: str) -> None:
    """Receive some events, and vanish. What a visitor receives must be in order, too."""
    ledger, way = Ledger(anywhere=True), rng.choice(WAYS)
    try:
        with RawClient(url) as client:
            for _ in range(rng.randrange(1, 20)):
                ledger.take(client.recv())
            way(client)
    finally:
        crowd.violations += ledger.violations
    crowd.counts[way.__name__] += 1


def stall(crowd: Strangers, rng: random.Random, url: str) -> None:
    with RawClient(url, receive_buffer=4 * KIB):
        crowd.stopped.wait(rng.uniform(0.2, 2.0))


def flood(crowd: Strangers, rng: random.Random, url: str) -> None:
    """Pings without end, and never a look at the pongs."""
    with RawClient(url) as client:
        for _ in range(500):
            client.send_frame(PING, b"x" * 100)


def send_garbage_frames(crowd: Strangers, rng: random.Random, url: str) -> None:
    with RawClient(url) as client:
        client.socket.sendall(bytes(rng.randrange(256) for _ in range(rng.randrange(2, 300))))
        client.socket.settimeout(0.5)
        while True:
            client.read_more()


def send_a_garbage_request(crowd: Strangers, rng: random.Random, url: str) -> None:
    with open_socket(url) as sock:
        sock.settimeout(0.5)
        sock.sendall(bytes(rng.randrange(256) for _ in range(rng.randrange(1, 3000))))
        while sock.recv(64 * KIB):
            pass


def send_half_a_request(crowd: Strangers, rng: random.Random, url: str) -> None:
    with open_socket(url) as sock:
        sock.sendall(handshake()[:rng.randrange(100)])
        crowd.stopped.wait(rng.uniform(0.0, 2.0))


STRANGE: Sequence[Strange] = (
    visit, visit, visit, visit, visit, stall, flood, send_garbage_frames, send_a_garbage_request, send_half_a_request)


class Strangers:
    """Clients that come, do something strange, and vanish: so many at any time, until stop()."""

    def __init__(self, url: str, count: int, seed: int) -> None:
        self.url = url
        self.counts: Counter[str] = Counter()  # only ever an estimate: threads share it
        self.violations: list[str] = []
        self.stopped = threading.Event()
        self._threads = [threading.Thread(target=self._live, args=(random.Random(f"{seed}/stranger {index}"),),
                                          daemon=True) for index in range(count)]
        for thread in self._threads:
            thread.start()

    def _live(self, rng: random.Random) -> None:
        while not self.stopped.wait(rng.uniform(0.0, 0.2)):
            strange = rng.choice(STRANGE)
            try:
                self.counts[strange.__name__] += 1
                strange(self, rng, self.url)
            except (OSError, EOFError):
                pass  # the server was killed, or has thrown us out
            except AssertionError as error:
                if not is_goodbye(error):
                    self.violations.append(f"a stranger ({strange.__name__}) was told: {error}")

    def stop(self) -> None:
        self.stopped.set()
        for thread in self._threads:
            thread.join(30 * TIME_UNIT)


# ---- Producers ---------------------------------------------------------------------------------------------

# As in the reference: the name, and a file that is there before its content is. What could not be written stays
# behind, broken, and is written again under another name. A line on stdin is the size of a burst; its end is the end.
PHP = r"""
[, $directory, $producer, $rate] = $argv;
$number = $refused = $due = 0;
$broken = [];
while (true) {
    [$read, $write, $except] = [[STDIN], null, null];
    if (stream_select($read, $write, $except, 0, $due > 0 ? 0 : intdiv(1000000, (int) $rate))) {
        $line = fgets(STDIN);
        if ($line === false) {
            break;
        }
        $due += (int) $line;
    }
    $size = $number % 200 == 99 ? 100000 : $number * 37 % 1000;
    $event = ['event' => 'soak', 'payload' => ['producer' => $producer, 'number' => $number, 'size' => $size,
                                               'pad' => str_repeat('x', $size)]];
    $name = microtime(true) . '_' . uniqid() . '.json';
    if (@file_put_contents("$directory/$name", json_encode($event)) === false) {
        $refused++;
        $broken[] = $name;
        usleep(300000);
        continue;
    }
    $number++;
    $due = max(0, $due - 1);
}
echo json_encode(['queued' => $number, 'refused' => $refused, 'broken' => $broken]);
"""


class Plain:
    """queue_event, one after the other."""

    broken: Sequence[str] = ()

    def put(self, directory: str, producer: str, number: int) -> int:
        """How many were queued."""
        return int(queue_event(directory, *numbered(producer, number)))


class Batches(Plain):
    """queue_events, durable: one to five events in a file, all or nothing."""

    def put(self, directory: str, producer: str, number: int) -> int:
        size = number % 5 + 1
        events = [numbered(producer, number + index) for index in range(size)]
        return size if queue_events(directory, events, durable=True) else 0


class Small(Plain):
    """queue_event; thousands of clients get each of them."""

    def put(self, directory: str, producer: str, number: int) -> int:
        return int(queue_event(directory, *numbered(producer, number, number * 37 % 300)))


class SmallBatches(Plain):
    """queue_events, one to five at a time."""

    def put(self, directory: str, producer: str, number: int) -> int:
        numbers = range(number, number + number % 5 + 1)
        events = [numbered(producer, each, each * 37 % 300) for each in numbers]
        return len(events) if queue_events(directory, events) else 0


class Pieces(Plain):
    """What the PHP producer does, where there is no PHP, and slower: in three pieces."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self._last = 0

    def put(self, directory: str, producer: str, number: int) -> int:
        self._last = max(self._last + 1, int(time.time() * 1e6))
        seconds, micros = divmod(self._last, 1_000_000)
        name = f"{seconds}.{micros // 100:04d}_{seconds:08x}{micros:05x}.json"
        event, payload = numbered(producer, number)
        data = json.dumps({"event": event, "payload": payload}).encode()
        try:
            with open(f"{directory}/{name}", "wb", buffering=0) as file:
                for start in range(3):
                    piece = data[start * len(data) // 3:(start + 1) * len(data) // 3]
                    if file.write(piece) != len(piece):
                        raise OSError("a short write")
        except OSError:
            self.broken.append(name)
            return 0
        return 1


GROUPS, PATHS, USERS = 6, 4, 10  # topics of three kinds; a follower is on one path, is one user, and is in some groups


@functools.lru_cache(maxsize=None)
def topics_of(producer: str, number: int) -> str | list[str] | None:
    """To whom an event of an aiming producer goes; everybody works it out alike."""
    dice = zlib.crc32(f"{producer}/{number}".encode())
    group, path, user = f"group {dice % GROUPS}", f"/path{dice % PATHS}", f"user:{dice % USERS}"
    return (None, group, path, user, [path, group, user])[dice // 1000 % 5]  # whom a list names twice gets it once


class Aimed(Plain):
    """queue_event, to those on some topics."""

    def put(self, directory: str, producer: str, number: int) -> int:
        event, payload = numbered(producer, number, number * 37 % 300)
        return int(queue_event(directory, event, payload, to=topics_of(producer, number)))


class AimedBatches(Plain):
    """One to five events in a file, each to others."""

    def put(self, directory: str, producer: str, number: int) -> int:
        numbers = range(number, number + number % 5 + 1)
        records = [dict(zip(("event", "payload"), numbered(producer, n, n * 37 % 300)), to=topics_of(producer, n))
                   for n in numbers]
        data = json.dumps([{key: value for key, value in record.items() if value is not None} for record in records])
        temporary = f"{directory}/.{producer}.json.tmp"
        Path(temporary).write_text(data)
        micros = time.time_ns() // 1000  # writing the next one takes longer than that
        os.rename(temporary, f"{directory}/{micros / 1e6:.4f}_{micros // 10**6:08x}{micros % 10**6:05x}.json")
        return len(numbers)


STYLES = {style.__name__: style for style in (Plain, Batches, Small, SmallBatches, Pieces, Aimed, AimedBatches)}


def produce(directory: str, producer: str, rate: str, style: str) -> None:
    """The producer's process: a steady flow, and bursts when told to; says at the end what it has done."""
    logging.getLogger("wsqueue").addHandler(logging.NullHandler())  # refusals are counted
    wsqueue.PUT_SECONDS *= 10  # a broker may have what it did not confirm in time, and would be given it once more
    writer = STYLES[style]()
    queued = refused = due = 0
    while True:
        if select.select([0], [], [], 0 if due else 1 / int(rate))[0]:
            sizes = os.read(0, 4 * KIB).split()
            if not sizes:
                break
            due += sum(map(int, sizes))
        done = writer.put(directory, producer, queued)
        if not done:
            refused += 1
            time.sleep(0.3)
        queued += done
        due = max(0, due - done)
    print(json.dumps({"queued": queued, "refused": refused, "broken": list(writer.broken)}))


class Producer:
    """A producer in a process of its own. It ends when our end of its stdin does, at the latest when we do."""

    def __init__(self, directory: Path | str, name: str, style: str, rate: int = 20) -> None:
        """directory: or the URL of a queue."""
        self.name = name
        if style == "Pieces" and shutil.which("php"):
            command = ["php", "-r", PHP, "--", str(directory), name, str(rate)]
        else:
            command = [sys.executable, __file__, "produce", str(directory), name, str(rate), style]
        # restore_signals would let a file that is too large (LimitedFiles) kill it, instead of failing.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, restore_signals=False)

    def burst(self, size: int) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"%d\n" % size)
        self.process.stdin.flush()

    def finish(self) -> dict[str, Any]:
        """What it has queued, and what it could not."""
        output, _ = self.process.communicate(timeout=60 * TIME_UNIT)
        result: dict[str, Any] = json.loads(output)
        return result


# ---- The server and its directory --------------------------------------------------------------------------


@contextlib.contextmanager
def asleep(*processes: subprocess.Popen[bytes]) -> Iterator[None]:
    """The processes stand still in the block."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def until(condition: Callable[[], Any], seconds: float) -> bool:
    """Wait for the condition, but no longer than that; whether it came true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def launch(output: Path, port: int, queue: Path | str, *flags: str) -> Server:
    """A server in a process of its own, which does not listen yet; its log goes to the directory `output`."""
    output.mkdir()
    command = [sys.executable, WSQUEUE, "serve", "--port", str(port), "--queue", str(queue), *flags]
    with open(output / "stdout", "wb") as out, open(output / "stderr", "wb") as err:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    return Server(process, output)


class Field:
    """A directory, the server that is killed and started on it, its producers and its witnesses."""

    def __init__(self, base: Path, disk: Path, *witnesses: Any, flags: Sequence[str] = ()) -> None:
        """base: where the servers' logs go. disk: what holds the queue directory. flags: of the server."""
        self.queue = disk / "queue"
        self.witnesses = witnesses
        self.producers: list[Producer] = []
        self.servers: list[Server] = []
        self.totals: dict[str, int] = {}  # queued by each producer
        self.refused = 0
        self.broken: list[str] = []  # files that a producer could not write to their end
        self._base, self._flags = base, flags
        self._port = free_port()

    @property
    def server(self) -> Server:
        return self.servers[-1]

    def start(self, **options: Any) -> None:
        """Start a server, and connect the witnesses; options: how they connect."""
        self.servers.append(launch(self._base / f"server-{len(self.servers)}", self._port, self.queue, *self._flags))
        self.server.wait_until_it_listens()
        for witness in self.witnesses:
            witness.connect(self.server.url, **options)

    def produce(self, *styles: str) -> None:
        for style in styles:
            self.producers.append(Producer(self.queue, f"{style} {len(self.producers)}", style))

    def kill(self) -> None:
        """kill -9; the witnesses get what the kernel has."""
        self.check()
        self.server.process.kill()
        self.server.process.wait()
        for witness in self.witnesses:
            witness.read_to_the_end()

    def restart(self, **options: Any) -> None:
        """Start the server again, and let it find what has waited once the witnesses are connected."""
        aside, empty = self.queue.with_name("aside"), self.queue.with_name("empty")
        with asleep(*(producer.process for producer in self.producers)):
            self.queue.rename(aside)
            self.start(**options)
            with asleep(self.server.process):
                self.queue.rename(empty)
                aside.rename(self.queue)
        shutil.rmtree(empty)

    def check(self) -> None:
        assert self.server.process.poll() is None, f"the server has ended: {self.server.stderr_text()}"
        for witness in self.witnesses:
            assert witness.is_connected(), f"a witness was disconnected by a running server: {witness.why()}"

    def received(self) -> int:
        return sum(witness.ledger.received for witness in self.witnesses)

    def finish(self) -> None:
        """The producers end, what waits is sent, and the server stops, as it does for an init system."""
        for producer in self.producers:
            result = producer.finish()
            self.totals[producer.name] = result["queued"]
            self.refused += result["refused"]
            self.broken += result["broken"]
        started = time.monotonic()
        self.drain()
        say("seconds until all that waited was sent", time.monotonic() - started)
        self.check()
        self.server.end()
        for witness in self.witnesses:
            witness.read_to_the_end()

    def drain(self) -> None:
        """Wait until everything is sent. If that stops before it is over, violations() says what is missing."""
        before, now = None, self._progress()
        while now != before and not until(self._is_drained, 10 * TIME_UNIT):
            before, now = now, self._progress()

    def _progress(self) -> tuple[int, int]:
        return self.received(), len(self.waiting())

    def _is_drained(self) -> bool:
        return not self.waiting() and all(witness.ledger.has_all(self.totals) for witness in self.witnesses)

    def waiting(self) -> list[str]:
        return [name for name in self._names() if name.endswith(".json") and not name.startswith(".")]

    def temporary(self) -> set[str]:
        return {name for name in self._names() if name.startswith(".") and name.endswith(".json.tmp")}

    def set_aside(self) -> set[str]:
        return {name for name in self._names("failed") if not name.endswith(".reason")}

    def _names(self, below: str = "") -> list[str]:
        try:
            return os.listdir(self.queue / below)
        except FileNotFoundError:
            return []

    def violations(self, corrupt: Sequence[str] = (), spare: int = 0) -> list[str]:
        """Everything that must not be: in what was received, in the directory, and in the servers' logs."""
        found = [text for witness in self.witnesses for text in witness.ledger.end(self.totals, spare)]
        found += [f"{len(names)} file(s) still in the queue, such as {names[0]}" for names in [self.waiting()] if names]
        expected, failed = {*corrupt, *self.broken}, self.set_aside()
        found += [f"broken, but not in failed/: {name}" for name in sorted(expected - failed - self.tidied_away())]
        found += [f"in failed/ for no reason: {name}" for name in sorted(failed - expected)]
        return found + tracebacks(self.servers)

    def tidied_away(self) -> set[str]:
        """What was in failed/, and had to make room: it keeps some thousand files, and the log names who goes."""
        return {name for server in self.servers
                for name in re.findall(r"removing '[^']*/failed/([^/']+)'", server.stderr_text())}

    def say(self) -> None:
        ledgers = [witness.ledger for witness in self.witnesses]
        say("events queued", sum(self.totals.values()))
        say("refused by a full disk, and queued later", self.refused)
        say(f"deliveries to {len(ledgers)} witness(es)", sum(ledger.received for ledger in ledgers))
        for what in ("lost", "misplaced", "repeated"):
            say(what, sum(getattr(ledger, what) for ledger in ledgers))

    def close(self) -> None:
        end_all([party.process for party in (*self.producers, *self.servers)])


def tracebacks(servers: Sequence[Server]) -> list[str]:
    texts = [server.stderr_text() for server in servers]
    return [f"a traceback in a server's log: {text[text.index('Traceback'):][:2000]}"
            for text in texts if "Traceback" in text]


def end_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Whatever happened: no process is left."""
    for process in processes:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def field_of(base: Path, disk: Path, *witnesses: Any, kind: type[Field] = Field, **options: Any) -> Iterator[Field]:
    """A field with a started server."""
    disk.mkdir(exist_ok=True)
    field = kind(base, disk, *witnesses, **options)
    try:
        field.start()
        yield field
    finally:
        field.close()


@contextlib.contextmanager
def noting(found: list[str]) -> Iterator[None]:
    """What went so wrong that the run cannot go on is a violation, beside those that tell why."""
    try:
        yield
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")


def say(what: str, value: object) -> None:
    print(f"{what:<50} {value:>8}" if isinstance(value, (int, str)) else f"{what:<50} {value:>8.3f}", flush=True)


# ---- faults ------------------------------------------------------------------------------------------------


class TinyDisk:
    """A file system of its own under the queue directory."""

    name = "full disk (a tmpfs)"

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self._path = path
        command = ["mount", "-t", "tmpfs", "-o", "size=32m,mode=700", "wsqueue-soak", str(path)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        stack.callback(subprocess.run, ["umount", "--lazy", str(path)], check=True)

    @contextlib.contextmanager
    def full(self, producers: Sequence[Producer]) -> Iterator[None]:
        filler = self._path / "filler"
        with open(filler, "wb", buffering=0) as file:
            for size in (MIB, 4 * KIB):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
            yield
        filler.unlink()


class LimitedFiles:
    """For those who may not mount: the producers' writes fail in the middle, but the server's do not."""

    name = "full disk (RLIMIT_FSIZE of the producers)"

    @contextlib.contextmanager
    def full(self, producers: Sequence[Producer]) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._limit(producers, (500, before[1]))
        yield
        self._limit(producers, before)

    @staticmethod
    def _limit(producers: Sequence[Producer], limits: tuple[int, int]) -> None:
        for producer in producers:
            resource.prlimit(producer.process.pid, resource.RLIMIT_FSIZE, limits)


def make_disk(path: Path, stack: contextlib.ExitStack, mount: bool) -> TinyDisk | LimitedFiles:
    path.mkdir()
    if mount and os.geteuid() == 0:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return TinyDisk(path, stack)
    return LimitedFiles()


def write_file(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


# None of them becomes an event when a full disk cuts it short.
CORRUPT: Sequence[Callable[[Path], Any]] = (
    write_file(b""),
    write_file(b'{"event": "cut off", "payl'),
    write_file(b'{"payload": "no event"}'),
    write_file(b'[{"event": "good"}, {"event": 1}]'),
    write_file(b"\x80\xff not text"),
    write_file(b"[" * 100_000),
    write_file(b"x" * 2 * MIB),
    lambda path: path.symlink_to("/etc/passwd"),
    lambda path: path.mkdir(),
    os.mkfifo,
)


class Faults:
    """Does one fault after another to a field; each method is a fault."""

    def __init__(self, field: Field, disk: TinyDisk | LimitedFiles, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.corrupt: list[str] = []
        self._field, self._disk = field, disk
        self._rng = random.Random(f"{seed}/faults")

    def run(self, seconds: float) -> None:
        """Each fault once, in any order, and so on until the time is over."""
        deadline, faults = time.monotonic() + seconds, [self.kill, self.plant, self.fill_disk, self.stop]
        deck: list[Callable[[], Any]] = []
        for count in itertools.count():
            if time.monotonic() > deadline and count >= len(faults):
                return
            deck = deck or self._rng.sample(faults, len(faults))
            time.sleep(self._rng.uniform(0.0, 0.5))
            deck.pop()()
            self._field.check()

    def burst(self, size: int) -> None:
        for producer in self._field.producers:
            producer.burst(size)
        self.counts["bursts"] += 1

    def kill(self, size: int = 300, **options: Any) -> None:
        """kill -9 in the middle of a burst; the producers go on meanwhile. options: how the witnesses come back."""
        self.burst(size)
        if self._rng.random() < 0.5:
            time.sleep(self._rng.uniform(0.0, 0.1))
        else:
            self._await_some(size)
        self._field.kill()
        time.sleep(self._rng.uniform(0.0, 0.7))
        self._field.restart(**options)
        self.counts["kill -9 of the server"] += 1

    def _await_some(self, size: int) -> None:
        """Up to half of the burst; not for certain, as the disk may be full."""
        most = size * len(self._field.producers) * len(self._field.witnesses)
        goal = self._field.received() + self._rng.randrange(1, most // 2)
        until(lambda: self._field.received() >= goal, 3.0)

    def plant(self) -> None:
        """Files that are no events, in front of and among those that are."""
        for make in self._rng.sample(CORRUPT, 4):
            name = f"{time.time() - self._rng.uniform(0.0, 5.0):.6f}-corrupt{len(self.corrupt)}.json"
            with contextlib.suppress(OSError):  # a full disk; what has come of the file is corrupt all the same
                make(self._field.queue / name)
            if os.path.lexists(self._field.queue / name) or name in self._field.set_aside():
                self.corrupt.append(name)
                self.counts["corrupt files"] += 1

    def fill_disk(self) -> None:
        """Nothing can be written for a while, and half the times something else happens as well."""
        with self._disk.full(self._field.producers):
            self.burst(100)
            time.sleep(self._rng.uniform(0.3, 1.5))
            self._rng.choice([self.kill, self.plant, lambda: None, lambda: None])()
        self.counts[self._disk.name] += 1

    def stop(self) -> None:
        """The server stands still: swapped out, or its machine suspended."""
        with asleep(self._field.server.process):
            self.burst(200)
            time.sleep(self._rng.uniform(0.5, 2.0))
        self.counts["SIGSTOP of the server"] += 1


def faults(options: argparse.Namespace, base: Path) -> list[str]:
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        disk = make_disk(base / "disk", stack, options.mount)
        witnesses = [Witness(), Witness(library_messages), Witness()]
        field = stack.enter_context(field_of(base, base / "disk", *witnesses))
        field.produce("Plain", "Plain", "Batches", "Pieces")
        strangers = Strangers(field.server.url, 8, options.seed)
        stack.callback(strangers.stop)
        fate = Faults(field, disk, options.seed)
        with noting(found):
            fate.run(options.seconds)
            field.finish()
        strangers.stop()
        found += field.violations(fate.corrupt) + strangers.violations
        if found:
            with contextlib.suppress(shutil.Error):  # pipes cannot be copied
                shutil.copytree(field.queue, base / "queue", symlinks=True)
    for what, count in [*sorted(fate.counts.items()), *sorted(strangers.counts.items())]:
        say(what.replace("_", " "), count)
    field.say()
    return found


# ---- kill-server -------------------------------------------------------------------------------------------


def kill_server(options: argparse.Namespace, base: Path) -> list[str]:
    """Every second time the client is slower than the burst, so that much waits for it when the server dies."""
    found: list[str] = []
    with field_of(base, base / "disk", Witness()) as field:
        field.produce("Plain", "Plain")
        fate = Faults(field, LimitedFiles(), options.seed)
        with noting(found):
            for number in range(options.times):
                if number % 2:
                    fate.kill(500)
                    field.drain()  # or what the slow ones leave would pile up
                else:
                    fate.kill(500, pause=0.001, receive_buffer=64 * KIB)
            field.finish()
        found += field.violations()
    say("kills of the server", options.times)
    field.say()
    return found


# ---- resume ------------------------------------------------------------------------------------------------


class Diary:
    """What a follower received, whatever the connection: it must be what was sent to its topics, and nothing else."""

    def __init__(self, name: str, topics: Sequence[str]) -> None:
        self.violations: list[str] = []
        self.received = self.repeated = self.misplaced = self.lost = self.strange = self.resets = 0
        self.dropped = 0  # repeats that a client would not show, because they carry an id that it has seen
        self.name, self._topics = name, {*topics}
        self._seen: dict[str, None] = {}  # ids, the oldest first
        self._numbers: dict[str, list[int]] = {}  # by producer
        self._due: dict[tuple[str, int], list[int]] = {}

    def take(self, number: str | None, event: str, payload: Any) -> None:
        """Everything that comes behind the hello."""
        if event == "wsqueue.reset":
            self.resets += 1
            self._violation(f"it is told that events are gone, after {self._tail()}")
        elif number is None:
            self._violation(f"an event without an id: {event} {payload!r:.200}")
        elif payload["pad"] != "x" * payload["size"]:
            self._violation(f"a damaged event: {payload!r:.200}")
        elif number in self._seen:
            self.dropped += 1
            self._violation(f"{number} came twice, after {self._tail()}")
        else:
            self._see(number, payload["producer"], payload["number"])

    def _see(self, number: str, producer: str, index: int) -> None:
        self._seen[number] = None
        if len(self._seen) > 10_000:
            del self._seen[next(iter(self._seen))]
        self.received += 1
        self._numbers.setdefault(producer, []).append(index)

    def _tail(self) -> str:
        return " ".join(list(self._seen)[-3:])

    def _violation(self, text: str) -> None:
        if len(self.violations) < 5:  # the first ones tell what happened
            self.violations.append(f"{self.name}: {text}")

    def due(self, producer: str, total: int) -> list[int]:
        """What of a producer's events is for this client."""
        key = producer, total
        if key not in self._due:
            self._due[key] = [number for number in range(total) if self._is_for_me(producer, number)]
        return self._due[key]

    def _is_for_me(self, producer: str, number: int) -> bool:
        to = topics_of(producer, number) if producer.startswith("Aimed") else None
        return to is None or not self._topics.isdisjoint([to] if isinstance(to, str) else to)

    def has_all(self, totals: Mapping[str, int]) -> bool:
        return all(len(self._numbers.get(producer, ())) >= len(self.due(producer, total))
                   for producer, total in totals.items())

    def end(self, totals: Mapping[str, int], spare: int = 0) -> list[str]:
        for producer in {*totals, *self._numbers}:
            self._judge(producer, self.due(producer, totals.get(producer, 0)), self._numbers.get(producer, []))
        return self.violations

    def _judge(self, producer: str, due: list[int], came: list[int]) -> None:
        """The four are counted apart, so that one lost event does not make all others misplaced."""
        count, wanted = Counter(came), {*due}
        found = {"lost": [number for number in due if not count[number]],
                 "repeated": [number for number, times in count.items() if times > 1],
                 "strange": [number for number in count if number not in wanted],
                 "misplaced": [later for earlier, later in zip(came, came[1:]) if later < earlier]}
        for what, numbers in found.items():
            setattr(self, what, getattr(self, what) + len(numbers))
            if numbers:
                self._violation(f"{producer}: {len(numbers)} {what}, such as {numbers[:3]}, of {len(due)}")


class Wanderer:
    """A follower that comes and goes as it likes, and goes on where it was: each time with the id that it had last."""

    def __init__(self, index: int, seed: int, secret: str) -> None:
        self.stream, self.slow = index % 4 == 3, index % 20 in (5, 11)
        self._rng, self._secret = random.Random(f"{seed}/wanderer {index}"), secret
        self._user, self._path = f"{index % USERS}", f"/path{index % PATHS}"
        self._groups = [f"group {number}" for number in range(GROUPS) if self._rng.random() < 0.4]
        kind = "event stream" if self.stream else "WebSocket"
        self.ledger = Diary(f"{kind} {index}", [self._path, f"user:{self._user}", *self._groups])
        self.counts: Counter[str] = Counter()
        self.settled = threading.Event()  # it has come again, and stays
        self._tired = threading.Event()
        self._last, self._url = "", ""
        self._follower: Follower | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    # What a field asks of a witness.

    def connect(self, url: str) -> None:
        """Once; from then on it comes back by itself."""
        if not self._url:
            self._url = url
            self._last = self._visit(lambda follower: None)  # before anything is queued: nothing is before it
            self._thread.start()

    def is_connected(self) -> bool:
        return self._thread.is_alive()

    def read_to_the_end(self) -> None:
        """Its end is not that of a server."""

    def why(self) -> str:
        return " ".join(self.ledger.violations)

    # Its life.

    def stop(self) -> None:
        self._stopped.set()
        self._wake()
        if self._thread.ident:
            self._thread.join(60 * TIME_UNIT)

    def settle(self) -> None:
        """Leave, come again, and stay."""
        self._tired.set()
        self._wake()

    def _wake(self) -> None:
        """Let it find the end of its stream; a timeout might tear a message."""
        if self._follower:
            with contextlib.suppress(OSError):
                self._follower.client.socket.shutdown(socket.SHUT_RDWR)

    def _live(self) -> None:
        while not self._stopped.is_set():
            try:
                self._visit(self._stay)
            except (OSError, EOFError):
                self.counts["broken connections"] += 1
            except AssertionError as error:
                self._judge_end(error)
            self._stopped.wait(self._rng.choice((0.0, 0.01, 0.1, 0.5)) * self._rng.random())

    def _judge_end(self, error: AssertionError) -> None:
        """A server that stops says goodbye, and so does one for which a client is too slow: it comes back."""
        too_slow = repr(close_payload(1013))[2:-1] in str(error)
        if too_slow:
            self.counts["closed for being slow"] += 1
        elif not is_goodbye(error):
            self.ledger.violations.append(f"{self.ledger.name}: {error}")

    def _visit(self, stay: Callable[[Follower], None]) -> str:
        """One connection; returns the id of its hello."""
        with Follower(self._url, self._target(), self._last, stream=self.stream,
                      receive_buffer=8 * KIB if self.slow else RECEIVE_BUFFER) as follower:
            position: str = follower.hello()
            if not position or (self._last and position != self._last):
                self.ledger.violations.append(f"{self.ledger.name}: came with {self._last}, greeted with {position}")
            self._follower = follower
            stay(follower)
        return position

    def _target(self) -> str:
        ticket = sign_ticket(self._secret, user=self._user, topics=self._groups)
        return f"{self._path}?ticket={quote(ticket)}"

    def _stay(self, follower: Follower) -> None:
        """For some events, or none; or for as long as there are any."""
        self.counts["connections that went on"] += 1
        if self._tired.is_set():
            self.settled.set()
            most = 10**9
        else:
            most = int(10 ** self._rng.uniform(0.0, 4.0)) - 1
        for _ in range(most):
            if self._stopped.is_set():
                return
            self._receive(follower)
        if not self.stream:
            self._rng.choice(WAYS)(follower.client)
        self.counts["left in the middle"] += 1

    def _receive(self, follower: Follower) -> None:
        self.ledger.take(*follower.recv())
        self._last = follower.last
        if self.slow:
            time.sleep(0.001)


class OpenField(Field):
    """Nobody is waited for: whoever comes back later gets what was sent meanwhile."""

    def restart(self, **options: Any) -> None:
        self.start()


RESUME_FLAGS = ("--history-events", "1000000", "--history-bytes", str(1024 * MIB), "--outbox-bytes", str(256 * KIB))


def resume(options: argparse.Namespace, base: Path) -> list[str]:
    """Everybody leaves and comes back once more at the end: what was not to be sent again would come now."""
    found: list[str] = []
    secret, rng = f"{random.getrandbits(256):064x}", random.Random(f"{options.seed}/resume")
    (base / "secret").write_text(secret)
    crowd = [Wanderer(index, options.seed, secret) for index in range(options.clients)]
    flags = (*RESUME_FLAGS, "--secret-file", str(base / "secret"))
    with contextlib.ExitStack() as stack:
        for wanderer in crowd:
            stack.callback(wanderer.stop)
        field = stack.enter_context(field_of(base, base / "disk", *crowd, kind=OpenField, flags=flags))
        field.produce("Aimed", "Aimed", "AimedBatches", "Plain")
        fate = Faults(field, LimitedFiles(), options.seed)
        with noting(found):
            for _ in range(options.times):
                fate.kill(300)
                time.sleep(rng.uniform(0.0, 2.0))  # they come and go while it runs, too
            gather(field, crowd)
            field.finish()
        found += field.violations()
    say("kills of the server", options.times)
    say_crowd(crowd)
    field.say()
    return found


def gather(field: Field, crowd: Sequence[Wanderer]) -> None:
    for wanderer in crowd:
        wanderer.settle()
    assert until(lambda: all(wanderer.settled.is_set() for wanderer in crowd), 60 * TIME_UNIT), "not all came back"
    for number in range(3):
        assert queue_event(field.queue, *numbered("the last", number, 1))
    field.totals["the last"] = 3


def say_crowd(crowd: Sequence[Wanderer]) -> None:
    counts = sum((wanderer.counts for wanderer in crowd), Counter())
    for what, count in sorted(counts.items()):
        say(what, count)
    for what in ("strange", "dropped", "resets"):
        say(what, sum(getattr(wanderer.ledger, what) for wanderer in crowd))


# ---- nodes -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=100_000)  # each text comes to hundreds of clients
def read_text(text: bytes, number: str | None = None) -> tuple[str, str, Any]:
    """The id, the name and the payload of a message; of an event's, who queued it as which, if it is whole."""
    message = json.loads(text)
    payload = message["payload"]
    if message["event"] == "soak":
        whole = payload["pad"] == "x" * payload["size"]
        payload = (payload["producer"], payload["number"]) if whole else None
    return message.get("id") or number or "", message["event"], payload


@functools.lru_cache(maxsize=100_000)
def read_block(block: bytes) -> tuple[str, str, Any] | None:
    """The same of a message in an event stream; None: a comment."""
    fields = dict(line.split(b": ", 1) for line in block.split(b"\n") if not line.startswith(b":"))
    return read_text(fields[b"data"], fields.get(b"id", b"").decode()) if b"data" in fields else None


class Nomad:
    """A client that stays until it loses its node, and goes on at another with the id that it has; one of many."""

    def __init__(self, index: int, urls: Sequence[str]) -> None:
        """It prefers the first of the URLs, then the second, and so on."""
        self.name = f"{'event stream' if index % 4 == 3 else 'WebSocket'} {index}"
        self.ledger = Ledger()
        self.counts: Counter[str] = Counter()
        self.url = ""  # of its node
        self._answered = self._greeted = False
        self._stream, self._last = index % 4 == 3, ""
        self._routes = itertools.cycle(urls)
        self._data = bytearray()

    def connect(self) -> socket.socket | None:
        """To the next node but the one that was lost, if it is there."""
        before, self.url = self.url, next(self._routes)
        if self.url == before:
            self.url = next(self._routes)
        self._data.clear()  # a torn message comes again
        self._answered = self._greeted = False
        try:
            sock = open_socket(self.url)
        except OSError:
            return None
        last = {"Last_Event_ID": self._last} if self._last else {}
        sock.sendall(stream_request(**last) if self._stream else handshake(with_last_id("/", self._last)))
        sock.setblocking(False)
        return sock

    def feed(self, data: bytes, sock: socket.socket) -> None:
        self._data += data
        if not self._answered and not self._read_head():
            return
        if self._stream:
            *blocks, rest = self._data.split(b"\n\n")
            self._data = rest
            for block in blocks:
                self._take(read_block(bytes(block)))
        else:
            self._read_frames(sock)

    def _read_head(self) -> bool:
        """What stands in front of the hello."""
        head, end, rest = self._data.partition(b"\r\n\r\n")
        if not end:
            return False
        if not head.startswith(b"HTTP/1.1 200 " if self._stream else b"HTTP/1.1 101 "):
            self.complain(f"the answer was {bytes(head)!r}")
        self._data, self._answered = rest, True
        return True

    def _read_frames(self, sock: socket.socket) -> None:
        data, start = bytes(self._data), 0
        while len(data) >= start + 2:
            body, size = start + 2, data[start + 1]
            if size > 125:
                body += 2 if size == 126 else 8
                if len(data) < body:
                    break
                size = int.from_bytes(data[start + 2:body], "big")
            if len(data) < body + size:
                break
            self._take_frame(data[start] & 0x0F, data[body:body + size], sock)
            start = body + size
        del self._data[:start]

    def _take_frame(self, opcode: int, payload: bytes, sock: socket.socket) -> None:
        if opcode == TEXT:
            self._take(read_text(payload))
        elif opcode == PING:
            sock.sendall(client_frame(PONG, payload))
        elif opcode == CLOSE and payload[:2] == close_payload(1013):
            self.counts["closed for being slow"] += 1
        elif opcode != CLOSE:
            self.complain(f"a frame of opcode {opcode}: {payload[:100]!r}")

    def _take(self, message: tuple[str, str, Any] | None) -> None:
        if message is None:
            return
        number, event, payload = message
        if not number:
            self.complain(f"{event} without an id")
        elif event == "soak" and payload and self._greeted:
            self.ledger.see(*payload)
        elif event == "wsqueue.hello" and not self._greeted and self._last in ("", number):
            self._greeted = True
        elif event == "wsqueue.reset":
            self.counts["resets"] += 1
            self.complain(f"it is told that events are gone, after {self._last}")
        else:
            self.complain(f"{event} {number} after {self._last}: {payload!r:.100}")
        self._last = number

    def is_settled(self) -> bool:
        """Whether it has its hello, and so a place to go on from."""
        return self._greeted

    def complain(self, text: str) -> None:
        if len(self.ledger.violations) < 5:  # the first ones tell what happened
            self.ledger.violations.append(text)


class Nomads(threading.Thread):
    """Many of them, in one thread."""

    def __init__(self, urls: Sequence[str], count: int) -> None:
        """count: at each node, at first. Whoever loses it goes to one of the others: an equal share to each."""
        super().__init__(name="soak-nomads", daemon=True)
        self.nomads = []
        for index in range(count * len(urls)):
            others = [url for url in urls if url != urls[index // count]]
            turn = index % max(1, len(others))
            self.nomads.append(Nomad(index, [urls[index // count], *others[turn:], *others[:turn]]))
        self.received = 0
        self._selector, self._stopped = selectors.DefaultSelector(), threading.Event()
        self._homeless = list(self.nomads)

    def run(self) -> None:
        while not self._stopped.is_set():
            homeless, self._homeless = self._homeless, []
            for nomad in homeless:
                self._settle(nomad)
            for key, _ in self._selector.select(0.02 if self._homeless else 0.2):
                self._read(key.data, key.fileobj)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def _settle(self, nomad: Nomad) -> None:
        sock = nomad.connect()
        if sock:
            self._selector.register(sock, selectors.EVENT_READ, nomad)
        else:
            self._homeless.append(nomad)

    def _read(self, nomad: Nomad, sock: Any) -> None:
        before = nomad.ledger.received
        try:
            data = sock.recv(256 * KIB)
            nomad.feed(data, sock)
        except OSError:
            data = b""
        except (ValueError, KeyError, TypeError) as error:
            nomad.complain(f"it cannot read what came: {error!r}")
            data = b""
        self.received += nomad.ledger.received - before
        if not data:
            self._selector.unregister(sock)
            sock.close()
            self._homeless.append(nomad)

    def stop(self) -> None:
        self._stopped.set()
        if self.ident:
            self.join(60 * TIME_UNIT)

    def at(self, url: str) -> int:
        """How many are there, or have not noticed that it has gone."""
        return sum(nomad.url == url for nomad in self.nomads)

    def are_settled(self) -> bool:
        return all(nomad.is_settled() for nomad in self.nomads)

    def count(self, what: str) -> int:
        return sum(nomad.counts[what] for nomad in self.nomads)

    def violations(self, totals: Mapping[str, int]) -> list[str]:
        return [f"{nomad.name}: {text}" for nomad in self.nomads for text in nomad.ledger.end(totals)]


class Nodes:
    """Servers that share a queue on a broker, each of which may be killed and started again on its port."""

    def __init__(self, base: Path, queue: str, count: int, flags: Sequence[str] = ()) -> None:
        self.ports = [free_port() for _ in range(count)]
        self.servers: list[Server] = []  # the dead ones, too
        self._base, self._queue, self._flags = base, queue, flags
        self._running: dict[int, Server] = {}

    @property
    def urls(self) -> list[str]:
        return [f"ws://127.0.0.1:{port}" for port in self.ports]

    def start(self, *numbers: int) -> None:
        for number in numbers:
            server = launch(self._base / f"server-{len(self.servers)}", self.ports[number], self._queue,
                            "--node", f"node-{number}", *self._flags)
            self.servers.append(server)
            self._running[number] = server
        for number in numbers:
            self._running[number].wait_until_it_listens()

    def kill(self, number: int) -> None:
        self.check()
        server = self._running.pop(number)
        server.process.kill()
        server.process.wait()

    def process(self, number: int) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = self._running[number].process
        return process

    def check(self) -> None:
        for number, server in self._running.items():
            assert server.process.poll() is None, f"node {number} has ended: {server.stderr_text()}"

    def end(self) -> None:
        """As an init system would."""
        self.check()
        for server in self._running.values():
            server.end()

    def memory(self) -> int:
        """Of the largest, in KiB."""
        return max(status_of(server.pid)["memory"] for server in self._running.values())


@contextlib.contextmanager
def queue_on(broker: str, base: Path) -> Iterator[str]:
    """The URL of a queue on a broker of our own."""
    if broker == "sqlite":
        yield f"sqlite:///{base}/queue.db"
    else:
        directory = base / "broker"
        directory.mkdir()
        with {"redis": redis_server, "postgresql": postgres_server}[broker](directory) as server:
            yield server.queue_url()


def knows_its_place(url: str) -> bool:
    """Whether a node has found its queue; who comes before that is told to start anew, if the queue is a new one."""
    with Follower(url) as client:
        return not client.hello().startswith("~")


class Migration:
    """The figures of what follows one kill after the other."""

    def __init__(self, nodes: Nodes, crowd: Nomads, producers: Sequence[Producer]) -> None:
        self.moved, self.slowest = 0, 0.0
        self._nodes, self._crowd, self._producers = nodes, crowd, producers

    def run(self, events: int, victim: int, stands_still: bool) -> None:
        """kill -9 in the middle of so many events; the node is started again while the others send.

        stands_still: it first does, until the others have sent what its clients then lack.
        """
        crowd, url = self._crowd, self._nodes.urls[victim]
        goal = crowd.received + events * len(crowd.nomads)
        for producer in self._producers:
            producer.burst(-(-events // len(self._producers)))
        assert until(lambda: crowd.received > goal - events * len(crowd.nomads) * 2 // 3, 120 * TIME_UNIT), "too slow"
        with asleep(self._nodes.process(victim)) if stands_still else contextlib.nullcontext():
            more = crowd.received + (events * len(crowd.nomads) // 6 if stands_still else 0)
            assert until(lambda: crowd.received >= more, 60 * TIME_UNIT), "the other nodes stand still, too"
            here, started = crowd.at(url), time.monotonic()
            self._nodes.kill(victim)
        assert until(lambda: not crowd.at(url) and crowd.are_settled(), 60 * TIME_UNIT), "not all found another node"
        self.slowest = max(self.slowest, time.monotonic() - started)
        self.moved += here
        self._nodes.start(victim)
        assert until(lambda: crowd.received >= goal, 120 * TIME_UNIT), f"{goal - crowd.received} did not come"


# Nearly a thousand clients in one thread read slowly, and most are to stay: so much may wait for each.
NODES_FLAGS = (*RESUME_FLAGS[:-1], str(4 * MIB))


def nodes(options: argparse.Namespace, base: Path) -> list[str]:
    """Who stays and who goes to another node must both have every event, in order, and none of them twice."""
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        queue = stack.enter_context(queue_on(options.broker, base))
        field = Nodes(base, queue, options.nodes, NODES_FLAGS)
        stack.callback(lambda: end_all([server.process for server in field.servers]))
        field.start(*range(options.nodes))
        assert until(lambda: all(map(knows_its_place, field.urls)), 60 * TIME_UNIT), "no node found the queue"
        crowd = Nomads(field.urls, options.clients)
        stack.callback(crowd.stop)
        producers: list[Producer] = []
        stack.callback(lambda: end_all([producer.process for producer in producers]))
        with noting(found):
            crowd.start()
            assert until(crowd.are_settled, 60 * TIME_UNIT), "not everybody could connect"
            producers += [Producer(queue, f"{style} {index}", style, rate=1)
                          for index, style in enumerate(("Small", "SmallBatches", "Small", "SmallBatches"))]
            found += migrate(options, Migration(field, crowd, producers), field, crowd, producers)
        found += tracebacks(field.servers)
    return found


def migrate(options: argparse.Namespace, migration: Migration, field: Nodes, crowd: Nomads,
            producers: Sequence[Producer]) -> list[str]:
    started = time.monotonic()
    for number in range(options.rounds):
        # Not on SQLite, where all would wait for a node that is stopped while it writes.
        migration.run(options.events, number % options.nodes, number % 2 == 0 and options.broker != "sqlite")
    results = {producer.name: producer.finish() for producer in producers}
    totals = {name: result["queued"] for name, result in results.items()}
    until(lambda: all(nomad.ledger.has_all(totals) for nomad in crowd.nomads), 30 * TIME_UNIT)
    seconds, memory = time.monotonic() - started, field.memory()
    crowd.stop()  # before the servers, so that nobody goes anywhere
    field.end()
    found = crowd.violations(totals)
    say_migration(options, migration, crowd, totals, seconds)
    say("memory of the largest node, KiB", memory)
    refused = {name: result["refused"] for name, result in results.items() if result["refused"]}
    return found + [f"{name}: {count} were refused" for name, count in refused.items()]


def say_migration(options: argparse.Namespace, migration: Migration, crowd: Nomads, totals: Mapping[str, int],
                  seconds: float) -> None:
    ledgers = [nomad.ledger for nomad in crowd.nomads]
    say(f"nodes on {options.broker}", options.nodes)
    say("clients of all nodes", len(ledgers))
    say("kills of a node", options.rounds)
    say("clients that went to another node", migration.moved)
    say("seconds until all of them were there", migration.slowest)
    say("closed for being slow", crowd.count("closed for being slow"))
    say("events queued", sum(totals.values()))
    say("deliveries", crowd.received)
    say("deliveries each second", int(crowd.received / seconds))
    for what in ("lost", "misplaced", "repeated"):
        say(what, sum(getattr(ledger, what) for ledger in ledgers))
    say("resets", crowd.count("resets"))


# ---- kill-producer -----------------------------------------------------------------------------------------

WRITER = """
import sys
from wsqueue import queue_event
directory, producer, size, durable = sys.argv[1:]
payload = {"producer": producer, "number": 0, "size": int(size), "pad": "x" * int(size)}
while queue_event(directory, "soak", payload, durable=durable == "True"):
    payload["number"] += 1
    print(end=".", flush=True)
"""


class Killer:
    """Kills producers, and counts what they had queued by then, and what they left."""

    def __init__(self, field: Field, seed: int) -> None:
        self.hit = {"at a random moment": 0, "once a temporary file was seen": 0}
        self._field = field
        self._rng = random.Random(f"{seed}/killer")

    def kill(self, number: int) -> None:
        """Every second time it is stopped again and again, until it stands still in the middle of a write."""
        rng, producer, before = self._rng, f"producer {number}", self._field.temporary()
        arguments = [self._field.queue, producer, rng.choice([1, 50, 500]) * KIB, rng.random() < 0.5]
        process = subprocess.Popen([sys.executable, "-c", WRITER, *map(str, arguments)], cwd=ROOT,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        try:
            assert process.stdout and process.stdout.read(1) == b".", f"{producer} could not queue an event"
            time.sleep(rng.uniform(0.0, 0.02))
            if number % 2:
                self._stop_in_mid_write(process, before)
        finally:
            process.kill()
            dots, _ = process.communicate()
        self._field.totals[producer] = 1 + len(dots)
        self.hit[list(self.hit)[number % 2]] += bool(self._field.temporary() - before)

    def _stop_in_mid_write(self, process: subprocess.Popen[bytes], before: set[str]) -> None:
        for _ in range(1000):
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            if self._field.temporary() - before:
                return
            process.send_signal(signal.SIGCONT)
            time.sleep(self._rng.uniform(0.0, 0.002))


def kill_producer(options: argparse.Namespace, base: Path) -> list[str]:
    found: list[str] = []
    with field_of(base, base / "disk", Witness()) as field:
        killer = Killer(field, options.seed)
        with noting(found):
            for number in range(options.times):
                killer.kill(number)
                until(lambda: len(field.waiting()) < 100, 60 * TIME_UNIT)  # or gigabytes would pile up
            field.drain()
            say("kills of a producer", options.times)
            for when, count in killer.hit.items():
                say(f"hit in mid-write, {when}", count)
            found += sweep(field)
            field.finish()
        found += field.violations(spare=1)  # a producer may die between the rename and the next line
    field.say()
    return found


def sweep(field: Field) -> list[str]:
    """A server that starts removes the temporary files of the dead, but only those that are old."""
    left = field.temporary()
    look_again(field)
    young = field.temporary()
    for name in left:
        with contextlib.suppress(FileNotFoundError):
            os.utime(field.queue / name, (time.time() - OLD_SECONDS,) * 2)
    look_again(field)
    say("temporary files left by the kills", len(left))
    say("of these, left by the sweep while young", len(young))
    say("and once they were old", len(field.temporary()))
    return ([f"the sweep removed {len(left - young)} files that might still be written"] if young != left else []) + [
        f"the sweep left {name}" for name in sorted(field.temporary())]


def look_again(field: Field) -> None:
    """Start another server, and wait until it has scanned the directory: it then has swept it, too."""
    field.kill()
    field.start()
    number = field.totals.get("marker", 0)
    assert queue_event(field.queue, *numbered("marker", number))
    field.totals["marker"] = number + 1
    field.drain()


# ---- churn -------------------------------------------------------------------------------------------------


class Churn:
    """So many clients each second: each receives an event, or does not wait for it, and vanishes."""

    def __init__(self, url: str, rate: float, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self._url, self._rate, self._started = url, rate, time.monotonic()
        self._slots = itertools.count()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._live, args=(random.Random(f"{seed}/churn {index}"),),
                                          daemon=True) for index in range(32)]
        for thread in self._threads:
            thread.start()

    def _live(self, rng: random.Random) -> None:
        for slot in self._slots:
            if self._stopped.wait(max(0.0, self._started + slot / self._rate - time.monotonic())):
                return
            way = rng.choice(WAYS)
            try:
                self._come_and_go(rng, way)
                self.counts[way.__name__] += 1
            except (OSError, EOFError, AssertionError) as error:
                self.violations.append(f"a client was not served ({way.__name__}): {error!r}")

    def _come_and_go(self, rng: random.Random, way: Callable[[RawClient], None]) -> None:
        ledger = Ledger(anywhere=True)
        with RawClient(self._url) as client:
            if rng.random() < 0.9:
                ledger.take(client.recv())
            way(client)
        self.violations += ledger.violations

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(30 * TIME_UNIT)


def status_of(pid: int) -> dict[str, int]:
    """Resident memory in KiB, threads and descriptors."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    found = {words[0]: int(words[1]) for words in lines if words[0] in ("VmRSS:", "Threads:")}
    return {"memory": found["VmRSS:"], "threads": found["Threads:"],
            "descriptors": len(os.listdir(f"/proc/{pid}/fd"))}


def churn(options: argparse.Namespace, base: Path) -> list[str]:
    found: list[str] = []
    with field_of(base, base / "disk") as field, noting(found):
        pid = field.server.pid
        start = status_of(pid)
        field.produce("Plain")
        crowd = Churn(field.server.url, options.rate, options.seed)
        memory = []
        try:
            for _ in range(int(options.seconds)):
                time.sleep(1.0)
                memory.append(status_of(pid)["memory"])
        finally:
            crowd.stop()
        found += crowd.violations + settle(pid, start) + judge_memory(memory)
        say("connections", sum(crowd.counts.values()))
        say("connections each second", sum(crowd.counts.values()) / options.seconds)
        for way, count in sorted(crowd.counts.items()):
            say(way.replace("_", " "), count)
        field.finish()
        found += field.violations()
    return found


def settle(pid: int, start: Mapping[str, int]) -> list[str]:
    """Once everybody is gone, the server is as it was."""
    kinds = ("threads", "descriptors")
    until(lambda: all(status_of(pid)[kind] <= start[kind] for kind in kinds), 60 * TIME_UNIT)
    end = status_of(pid)
    for kind in kinds:
        say(f"{kind} at the start", start[kind])
        say(f"{kind} at the end", end[kind])
    return [f"{end[kind]} {kind} at the end, {start[kind]} at the start" for kind in kinds if end[kind] > start[kind]]


def judge_memory(memory: Sequence[int]) -> list[str]:
    """What one minute of it has not needed, the rest must not need either."""
    if len(memory) <= 60:
        say("memory at the end, KiB (too short to judge)", memory[-1])
        return []
    early, late = memory[59], max(memory[60:])
    say("memory after one minute, KiB", early)
    say("largest after that, KiB", late)
    say("ratio (wanted: at most 1.05)", late / early)
    return [f"memory grew from {early} to {late} KiB"] if late > 1.05 * early else []


# ---- Command line ------------------------------------------------------------------------------------------

COMMANDS: Mapping[str, Callable[[argparse.Namespace, Path], list[str]]] = {
    "faults": faults, "kill-server": kill_server, "resume": resume, "nodes": nodes, "kill-producer": kill_producer,
    "churn": churn}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--times", type=int, help="50 for kill-server, 20 for resume, 1000 for kill-producer")
    parser.add_argument("--clients", type=int, help="that come back (resume, 100), or of each node (nodes, 300)")
    parser.add_argument("--broker", choices=("redis", "postgresql", "sqlite"), default="redis", help="of the nodes")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--events", type=int, default=5000, help="in each round (nodes)")
    parser.add_argument("--rounds", type=int, default=1, help="in each of which another node is killed (nodes)")
    parser.add_argument("--rate", type=float, default=100.0, help="connections each second (churn)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--no-mount", dest="mount", action="store_false", help="fill no disk, limit files (faults)")
    options = parser.parse_args(arguments)
    if options.nodes < 2:
        parser.error("--nodes: at least two, so that a client has somewhere to go")
    options.clients = options.clients or {"nodes": 300}.get(options.command, 100)
    options.times = options.times or {"kill-server": 50, "resume": 20, "kill-producer": 1000}.get(options.command)
    return options


def main() -> int:
    if sys.argv[1:2] == ["produce"]:
        produce(*sys.argv[2:])
        return 0
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started ends, and the disk is unmounted
    base = Path(tempfile.mkdtemp(prefix="wsqueue-soak-"))
    say("seed", options.seed)
    found: list[str] = []
    try:
        found = COMMANDS[options.command](options, base)
    finally:
        if not found:
            shutil.rmtree(base)
    for text in found[:30]:
        print(f"VIOLATION: {text}", flush=True)
    if found:
        print(f"{len(found)} violation(s); the evidence is kept in {base}")
        return 1
    print("everything that is promised held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
