#!/usr/bin/env python3
"""Measures wsqueue beside its peers: all sides in one run, in alternating rounds, medians and p99 in a table.

    python tests/bench.py latency     from queue_event, `mv` and PHP to one idle client
    python tests/bench.py fanout      one event to 1,000 and to 9,000 clients
    python tests/bench.py target      one event to one user among 10,000 idle clients
    python tests/bench.py burst       10,000 events through the directory to 500 and to 1,000 clients
    python tests/bench.py sustained   2,000 events a second from four processes to 1,000 clients
    python tests/bench.py drain       100,000 files that are there when the server starts
    python tests/bench.py growth      more clients, more files, more topics: what each of them costs
    python tests/bench.py stages      where the microseconds go between queue_event and the last byte
    python tests/bench.py memory      resident memory per idle client, 15,000 clients
    python tests/bench.py connect     opening 9,000 connections
    python tests/bench.py publish     the producer's side: queue_event, XADD, queue_events, import, start
    python tests/bench.py idle        processor time with 1,000 clients and nothing to send
    python tests/bench.py deflate     what compression costs and saves, with 1,000 clients
    python tests/bench.py threshold   from what size on an event is worth compressing
    python tests/bench.py stall       what 20 clients that stop reading do to the 480 others
    python tests/bench.py flood       what one hostile client does to 100 others
    python tests/bench.py resume      1,000 clients that come back at once, each for 1,000 events that it missed
    python tests/bench.py queues      directory, SQLite, PostgreSQL, Redis and RabbitMQ side by side
    python tests/bench.py plot        fan-out and memory over the number of clients: bench.png and bench.csv
    python tests/bench.py all         every one of them

`--quick` takes seconds: it shows that the script works, its figures mean nothing. `--clients`, `--events` and the
like replace the sizes in SIZES; several are written 1000,9000. Needs what tests/run installs: the `test` extra, nginx
with nchan, for `publish` and `queues` the brokers, and a C compiler for the load client (bench_load.c), which runs in
its own process and counts messages without looking at them. Queues are in TMPDIR: name one on tmpfs, or on a disk with
a journal, to measure what the machine can do.

No side compresses (but for `deflate`), and all set TCP_NODELAY (but for nchan, which cannot). Times are
CLOCK_MONOTONIC, which all processes of a machine share. Where a message is lost, comes twice or out of order, or a
client that reads is disconnected, the run ends with an error instead of figures.
"""

import argparse
import array
import asyncio
import contextlib
import csv
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import pwd
import random
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, ClassVar, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Type, TypeVar
from unittest import mock
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# subcommand: setting: (in full, with --quick)
SIZES: Dict[str, Dict[str, Tuple[Any, Any]]] = {
    "latency": {"events": (100, 4), "rounds": (6, 1)},
    "fanout": {"clients": ([1_000, 9_000], [10, 20]), "rounds": (100, 2)},
    "target": {"clients": (10_000, 50), "events": (100, 4), "rounds": (6, 1)},
    "burst": {"clients": ([500, 1_000], [10, 20]), "events": (10_000, 200), "rounds": (3, 1)},
    "sustained": {"clients": (1_000, 20), "events": (2_000, 200), "seconds": (60, 1), "processes": (4, 4)},
    "drain": {"events": (100_000, 500), "rounds": (3, 1)},
    "growth": {"clients": ([1, 10, 100, 1_000, 5_000, 15_000], [1, 5, 20]),
               "backlogs": ([1_000, 10_000, 100_000], [1, 200]), "topics": ([1, 100, 10_000], [1, 100]),
               "backlog": (50_000, 500), "newcomers": (1_000, 20), "rounds": (5, 1)},
    "stages": {"clients": ([1, 1_000], [1, 20]), "rounds": (200, 3)},
    "memory": {"clients": (15_000, 50), "seconds": (3, 0)},
    "connect": {"clients": (9_000, 50), "rounds": (5, 1)},
    "publish": {"events": (500, 50), "batch": (1_000, 50), "rounds": (20, 2)},
    "idle": {"clients": (1_000, 20), "seconds": (30, 1)},
    "deflate": {"clients": (1_000, 20), "rounds": (60, 3)},
    "threshold": {"events": (20, 4), "rounds": (100, 3)},
    "stall": {"clients": (500, 10), "stalled": (20, 2), "seconds": (10, 2), "rounds": (5, 1)},
    "flood": {"clients": (100, 10), "silent": (2_000, 50), "seconds": (5, 1), "rounds": (5, 1)},
    "resume": {"clients": (1_000, 20), "events": (1_000, 50), "rounds": (5, 1)},
    "plot": {"clients": ([1, 10, 100, 1_000, 5_000, 15_000], [1, 10]), "rounds": (30, 2), "seconds": (1, 0)},
    "queues": {"events": (100, 4), "backlog": (20_000, 200), "batches": (50, 2), "rounds": (5, 1)},
}
Events = List[Tuple[str, Dict[str, Any]]]
Span = Tuple[int, int]  # start and end, nanoseconds
now = time.monotonic_ns


class Wrong(Exception):
    """What was measured did not do its job, so that its figures would mean nothing."""


# ---- Figures and tables ----------------------------------------------------------------------------------


def p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * 99 // 100)]


def figures(values: Sequence[float], unit: float, digits: int = 2) -> List[str]:
    """Median and p99 of nanoseconds, in units of so many nanoseconds."""
    return [f"{statistics.median(values) / unit:.{digits}f}", f"{p99(values) / unit:.{digits}f}"]


def verdict(wanted: str, holds: bool) -> List[str]:
    return [wanted, "yes" if holds else "NO"]


def print_table(method: str, heading: str, rows: List[List[str]]) -> None:
    """What was done, and a Markdown table; its last two columns are what must hold and whether it does."""
    print(f"\n{textwrap.fill(method, 100)}\n")
    columns = [*heading.split(" | "), "wanted", "holds"]
    rows = [columns] + [row + [""] * (len(columns) - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def text_of(event: str, payload: Any) -> str:
    message = {"event": event, "payload": payload, "timestamp": int(time.time())}
    return json.dumps(message, separators=(",", ":"))


def make_events(count: int, size: int, first: int = 0) -> Events:
    """Numbered events, each about `size` bytes of JSON when a client receives it."""
    return [("bench", {"n": n, "pad": "x" * max(0, size - 70)}) for n in range(first, first + count)]


NAMES = ("Ada Byrne", "Boris Chen", "Carla Okafor", "Dmitri Sand", "Elif Novak", "Farid Holm", "Grace Imai", "Hugo Lee")
CITIES = ("Bergen", "Cork", "Dakar", "Graz", "Leeds", "Lima", "Osaka", "Turin")


def make_order(pick: random.Random) -> Dict[str, Any]:
    items = [{"sku": f"{pick.choice('ABCD')}{pick.randrange(10_000)}", "count": pick.randint(1, 9),
              "price": pick.randrange(100, 20_000) / 100} for _ in range(pick.randint(1, 3))]
    return {"id": pick.randrange(10**6), "name": pick.choice(NAMES), "city": pick.choice(CITIES),
            "status": pick.choice(("open", "paid", "sent")), "items": items}


def make_record(seed: int, size: int) -> Tuple[str, Dict[str, Any]]:
    """An event as a shop would send it, of `size` bytes when a client receives it (64 are the least)."""
    pick, orders = random.Random(seed), []  # the same for every side
    payload: Dict[str, Any] = {"by": ""}
    while len(text_of("paid", payload)) <= size:
        orders.append(make_order(pick))
        payload["orders"] = orders
    payload = {"by": "", "orders": orders[:-1]} if orders[1:] else {"by": ""}
    names = ", ".join(pick.choice(NAMES) for _ in range(size // 8))
    return "paid", {**payload, "by": names[:size - len(text_of("paid", payload))]}


def make_records(count: int, size: int, first: int = 0) -> Events:
    """Events that compress as real ones do: nested records with the same keys again, names, numbers."""
    return [make_record(seed, size) for seed in range(first, first + count)]


MAKERS: Dict[str, Callable[[int, int, int], Events]] = {"pad": make_events, "records": make_records}


# ---- The sides -------------------------------------------------------------------------------------------
# Each runs in its own process, `bench.py side NAME`, and broadcasts when a line on its stdin says so.


class Side:
    label: str
    url: str
    most = 10**6  # clients that it can bear
    deflates = False  # if the client offers it
    send: Callable[[str, Any], Any]

    def broadcast(self, events: Events) -> Span:
        """Send every event to every client; return when the first send began and the last call returned."""
        start = now()
        for event, payload in events:
            self.send(event, payload)
        return start, now()

    def pids(self) -> List[int]:
        """The processes that hold its clients."""
        return [os.getpid()]

    def close(self) -> None:
        """End what outlives this process."""


class Ours(Side):
    label = "wsqueue"
    settings: ClassVar[Dict[str, Any]] = {}

    def __init__(self) -> None:
        from wsqueue import WebSocketServer
        self.server = WebSocketServer(ping_interval=0, **self.settings).host("127.0.0.1").port(0)
        self.server.start(background=True)
        self.url, self.send = self.server.url, self.server.broadcast


class OursPlain(Ours):
    label, settings = "wsqueue, deflate=False", {"deflate": False}


class OursDeflate(Ours):
    label, settings, deflates = "wsqueue, deflate=True", {"deflate": True}, True


class Floor(Side):
    """The least that one thread can do: one `send` per client, of a frame made beforehand. See bench_floor.c."""

    label = "bare `send` loop, C"


class Stock(Side):
    label, most = "websocket-server", 1_000

    def __init__(self) -> None:
        from websocket_server import WebSocketHandler, WebsocketServer
        WebSocketHandler.disable_nagle_algorithm = True  # the others do not wait for an ACK, either
        self.server = WebsocketServer(host="127.0.0.1", port=0)
        self.server.run_forever(threaded=True)
        self.url = f"ws://127.0.0.1:{self.server.port}"

    def send(self, event: str, payload: Any) -> None:
        self.server.send_message_to_all(text_of(event, payload))


class Websockets(Side):
    label = "websockets, asyncio"
    compression: Optional[str] = None  # the others do not compress
    ping_interval: Optional[float] = None  # a ping would fall into another side's round

    def __init__(self) -> None:
        self.clients: Any = set()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.url = asyncio.run_coroutine_threadsafe(self._listen(), self.loop).result()

    async def _listen(self) -> str:
        from websockets.asyncio.server import serve
        self.server = await serve(self._stay, "127.0.0.1", 0, compression=self.compression,
                                  ping_interval=self.ping_interval)
        return f"ws://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def _stay(self, client: Any) -> None:
        self.clients.add(client)
        await client.wait_closed()
        self.clients.discard(client)

    def broadcast(self, events: Events) -> Span:
        return asyncio.run_coroutine_threadsafe(self._broadcast(events), self.loop).result()

    async def _broadcast(self, events: Events) -> Span:
        from websockets.asyncio.server import broadcast
        start = now()
        for event in events:
            broadcast(self.clients, text_of(*event))
            await asyncio.sleep(0)  # lets the loop write what a full socket did not take
        return start, now()


class WebsocketsAsStarted(Websockets):
    """With its keep-alive."""

    ping_interval = 20


class WebsocketsDeflate(Websockets):
    """Its broadcast() compresses once for every client, because each has a window of its own."""

    label, compression, deflates = "websockets, deflate", "deflate", True


class WebsocketsThreads(Side):
    """A thread for each client, and a loop over all of them."""

    label, most = "websockets, threads", 1_000

    def __init__(self) -> None:
        from websockets.sync.server import serve
        self.clients: Any = []
        keep_alive = {"ping_interval": None} if sys.version_info >= (3, 9) else {}  # 3.8 has a version without any
        self.server = serve(self._stay, "127.0.0.1", 0, compression=None, **keep_alive)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"ws://127.0.0.1:{self.server.socket.getsockname()[1]}"

    def _stay(self, client: Any) -> None:
        self.clients.append(client)
        for _ in client:
            pass

    def send(self, event: str, payload: Any) -> None:
        text = text_of(event, payload)
        for client in self.clients:
            client.send(text)


NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")  # not on everybody's PATH
NCHAN = next(Path("/usr").glob("lib*/nginx/modules/ngx_nchan_module.so"), None)

# The buffer holds whatever is on its way, so that nothing is lost. With reuseport each worker has its share of clients.
NCHAN_CONFIGURATION = """
load_module {module};
user {user};
worker_processes 2;
worker_rlimit_nofile {files};
daemon off;
pid {directory}/pid;
events {{ worker_connections {files}; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    client_body_temp_path {directory}/body;
    nchan_shared_memory_size 1g;
    nchan_message_buffer_length 100000;
    nchan_message_timeout 10m;
    server {{
        listen 127.0.0.1:{port} reuseport backlog=4096;
        location = /publish {{ nchan_publisher http; nchan_channel_id bench; }}
        location = / {{
            nchan_subscriber websocket;
            nchan_channel_id bench;
            nchan_subscriber_first_message newest;
        }}
    }}
}}
"""


class Nchan(Side):
    """nginx with two workers; what is published goes there by HTTP, on one connection that is kept."""

    label = "nginx with nchan"
    pipelined = 256  # requests that are sent before their responses are read

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="wsqueue-bench-nginx-")
        port, log = free_port(), Path(self.directory, "log")
        self.url = f"ws://127.0.0.1:{port}"
        configuration = Path(self.directory, "nginx.conf")
        configuration.write_text(NCHAN_CONFIGURATION.format(
            module=NCHAN, user=pwd.getpwuid(os.getuid()).pw_name, directory=self.directory, port=port,
            files=resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
        command = [str(NGINX), "-p", self.directory, "-c", str(configuration), "-e", str(log)]
        self.nginx = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            self._await_workers(log)
            self.publisher = socket.create_connection(("127.0.0.1", port))
            self.publisher.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.responses = self.publisher.makefile("rb")
            # Makes the channel. Where clients make it while the workers are still starting, those of one worker may
            # never get a message: 18 of 400 starts with 50 clients, 0 of 1,100 with this.
            self.broadcast(make_events(1, 0))
        except BaseException:
            self.close()  # nobody else knows of it
            raise

    def _await_workers(self, log: Path) -> None:
        """They are started when nginx listens."""
        deadline = time.monotonic() + 30
        while len(self.pids()) < 3:
            if self.nginx.poll() is not None or time.monotonic() > deadline:
                raise Wrong(f"nginx does not start: {log.read_text()}")
            time.sleep(0.01)

    def broadcast(self, events: Events) -> Span:
        """The clock starts when the first request is sent."""
        texts = [text_of(*event).encode() for event in events]
        requests = [b"POST /publish HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)
                    for text in texts]
        start = now()
        for first in range(0, len(requests), self.pipelined):
            batch = requests[first:first + self.pipelined]
            self.publisher.sendall(b"".join(batch))
            for _ in batch:
                self._read_response()
        return start, now()

    def _read_response(self) -> None:
        status, length = self.responses.readline(), 0
        for line in iter(self.responses.readline, b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        self.responses.read(length)
        if not status.startswith(b"HTTP/1.1 20"):
            raise Wrong(f"nchan does not take an event: {status!r}")

    def pids(self) -> List[int]:
        """nginx's, without that of the publisher."""
        children = Path(f"/proc/{self.nginx.pid}/task/{self.nginx.pid}/children").read_text()
        return [self.nginx.pid, *map(int, children.split())]

    def close(self) -> None:
        self.nginx.terminate()
        self.nginx.wait()
        shutil.rmtree(self.directory)


SIDES: Tuple[Type[Side], ...] = (Floor, Ours, Nchan, Websockets, WebsocketsThreads, Stock)
DEFLATE_SIDES: Tuple[Type[Side], ...] = (OursPlain, OursDeflate, WebsocketsDeflate)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def run_side(name: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends, too, what it is about to start
    side = globals()[name]()

    def leave(*_: Any) -> None:
        side.close()
        os._exit(0)  # a thread for each client would be waited for

    signal.signal(signal.SIGTERM, leave)
    print("listening on", side.url, *side.pids(), flush=True)
    events: Events = []
    for line in sys.stdin:
        if line == "send\n":
            print(*side.broadcast(events), flush=True)
        else:
            kind, *numbers = line.split()
            events = MAKERS[kind](*map(int, numbers))
            print("made", flush=True)
    leave()


# ---- Processes that this one starts, commands and ends ---------------------------------------------------


class Child:
    """A process that answers the lines it is sent. Every wait has a deadline."""

    def __init__(self, *command: Any, **popen: Any) -> None:
        words = [str(word) for word in command]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 -- end() closes it; shown where the process fails
        self.process = subprocess.Popen(words, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.log, **popen)
        self.name, self.pid, self.unread = " ".join(words[-3:]), self.process.pid, b""

    def read_line(self, timeout: float = 60) -> List[str]:
        assert self.process.stdout
        deadline = time.monotonic() + timeout
        while b"\n" not in self.unread:
            if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"{self.name}: no answer within {timeout} s")
            chunk = os.read(self.process.stdout.fileno(), 65536)
            if not chunk:
                self.log.seek(0)
                raise Wrong(f"{self.name}: the process has ended\n{self.log.read().decode()}")
            self.unread += chunk
        line, _, self.unread = self.unread.partition(b"\n")
        return line.decode().split()

    def tell(self, *words: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write((" ".join(map(str, words)) + "\n").encode())

    def ask(self, *words: Any, timeout: float = 60) -> List[str]:
        self.tell(*words)
        return self.read_line(timeout)

    def end(self) -> None:
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self.log.close()

    def cpu_seconds(self) -> float:
        """User and system time of all its threads, in nanoseconds where /proc/PID/stat has ticks of 10 ms."""
        return time.clock_gettime(~self.pid << 3 | 2)  # clock_getcpuclockid(3), which Python has for threads alone

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def status_kb(pid: int, name: str) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split(f"\n{name}:")[1].split()[0])


class Server(Child):
    """A side, listening. It bears `most` clients, which the processes `pids` hold."""

    def __init__(self, label: str, *command: Any, most: int = Side.most, **popen: Any) -> None:
        super().__init__(*command, **popen)
        self.label, self.most = label, most
        try:
            url, *pids = self.read_line()[2:]
        except BaseException:
            self.end()
            raise
        self.port, self.pids = int(url.rpartition(":")[2]), list(map(int, pids)) or [self.pid]

    def resident_kb(self) -> int:
        """VmRSS; the memory that several processes share counts once."""
        parts = [[status_kb(pid, name) for pid in self.pids] for name in ("RssAnon", "RssFile", "RssShmem")]
        return sum(parts[0]) + sum(parts[1]) + max(parts[2])

    def make(self, count: int, size: int, kind: str = "pad", first: int = 0) -> None:
        """Have the events ready that send() will send, so that it is only sending that is measured."""
        self.ask(kind, count, size, first)

    def send(self) -> Span:
        start, end = self.ask("send", timeout=600)
        return int(start), int(end)

    def broadcast(self, count: int, size: int = 200) -> Span:
        self.make(count, size)
        return self.send()


SERVE = (sys.executable, ROOT / "wsqueue.py", "serve", "--host", "127.0.0.1", "--port", 0)


class DirectoryServer(Server):
    """`wsqueue.py serve`, broadcasting what is put in its directory."""

    def __init__(self, queue: Path, *flags: Any, backlog: bool = False) -> None:
        super().__init__("wsqueue serve", *SERVE, "--queue", queue, *flags)
        self.queue, self.backlog = queue, backlog

    def broadcast(self, count: int, size: int = 200, topics: Sequence[Optional[str]] = (None,)) -> Span:
        """Start the clock before the first queue_event; with a backlog, when all of them are queued."""
        if self.backlog:
            self.process.send_signal(signal.SIGSTOP)
        events = make_events(count, size)
        start = now()
        fill_directory(str(self.queue), events, topics)
        if self.backlog:
            start = now()
            self.process.send_signal(signal.SIGCONT)
        return start, now()


class Load(Child):
    """The clients: bench_load.c, compiled."""

    def __init__(self, program: Path, result_file: Path) -> None:
        super().__init__(program)
        self.result_file = result_file
        self.clients = self.messages = self.delivered = self.bytes = 0

    def connect(self, server: Server, clients: int, agreed: Optional[int] = None, paths: Sequence[str] = "/") -> float:
        """Open so many connections; return the seconds it took.

        agreed: offer permessage-deflate, which so many must be granted. paths: one for each client, or "/" for all.
        After expect(), these clients are expected to get the messages, too.
        """
        if paths != "/":
            Path(f"{self.result_file}.paths").write_text("\n".join(paths))
            paths = f"@{self.result_file}.paths"
        # The stock server's backlog is 5: more at once would wait for lost SYNs to be sent again.
        at_once = 4 if server.label == Stock.label else 64
        offer = int(agreed is not None)
        answer = self.ask("connect", server.port, clients, at_once, offer, paths, timeout=300)
        opened, failed, start, end, deflating = map(int, answer)
        if opened != clients:
            raise Wrong(f"{server.label}: {failed} of {clients} clients could not connect")
        if deflating != (agreed or 0):
            raise Wrong(f"{server.label}: {deflating} of {clients} clients have permessage-deflate")
        self.clients += clients
        return (end - start) / 1e9

    def expect(self, messages: int, *, every: int = 0, check: int = 0) -> None:
        """Count from here. See bench_load.c for what `every` and `check` do."""
        self.messages = messages
        stray = self.ask("expect", messages, every, check, self.result_file)[0]
        if stray != "0":
            raise Wrong(f"{stray} messages more than were sent")

    def finish(self, timeout: float = 60) -> Sequence[int]:
        """Wait until every client has every message; return when each came, or only each client's last."""
        try:
            complete, connected, alike, size = self.read_line(timeout)
        except TimeoutError:
            complete, connected, alike, size = self.ask("stop")
        if [complete, connected, alike] != [str(self.clients), str(self.clients), "1"]:
            raise Wrong(f"{complete} of {self.clients} clients got all {self.messages} messages, {connected} "
                        f"are still connected, all got the same: {alike == '1'}")
        self.delivered += self.clients * self.messages
        self.bytes = int(size)
        return array.array("q", self.result_file.read_bytes())

    def texts(self) -> List[bytes]:
        """With `check`: the messages of the first client."""
        return Path(f"{self.result_file}.stream").read_bytes().splitlines()

    def numbers(self) -> List[int]:
        return [json.loads(text)["payload"]["n"] for text in self.texts()]


Kept = TypeVar("Kept", bound=Child)


class Run:
    """The sizes of one subcommand and everything it starts; end() leaves nothing behind."""

    def __init__(self, sizes: Dict[str, Any]) -> None:
        vars(self).update(sizes)  # run.clients, run.events and the like
        self.children: List[Child] = []
        self.numbers = itertools.count()
        self.directory = Path(tempfile.mkdtemp(prefix="wsqueue-bench-"))

    def new_directory(self) -> Path:
        path = self.directory / f"directory{next(self.numbers)}"
        path.mkdir()
        return path

    def keep(self, child: Kept) -> Kept:
        self.children.append(child)
        return child

    def side(self, side: Type[Side]) -> Server:
        if side is Nchan and not (NGINX and NCHAN):
            raise Wrong("nginx with nchan is missing: install it (Debian: nginx libnginx-mod-nchan)")
        command = [self.compiled("floor")] if side is Floor else [sys.executable, __file__, "side", side.__name__]
        return self.keep(Server(side.label, *command, most=side.most))

    def serve(self, *flags: Any, backlog: bool = False) -> DirectoryServer:
        return self.keep(DirectoryServer(self.new_directory(), *flags, backlog=backlog))

    def product(self, side: Type[Side]) -> Server:
        """As a user starts it: ours with a queue directory, and with keep-alive."""
        return self.serve() if side is Ours else self.side(WebsocketsAsStarted if side is Websockets else side)

    def compiled(self, name: str) -> Path:
        program, source = self.directory / name, Path(__file__).with_name(f"bench_{name}.c")
        if not program.exists():
            compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
            if not compiler:
                raise Wrong(f"{source.name} is written in C: install a C compiler (Debian: gcc libc6-dev)")
            subprocess.run([compiler, "-O2", "-o", str(program), str(source)], check=True)
        return program

    def load(self) -> Load:
        return self.keep(Load(self.compiled("load"), self.directory / f"times{next(self.numbers)}"))

    def audience(self, server: Server, clients: int, agreed: Optional[int] = None, paths: Sequence[str] = "/") -> Load:
        load = self.load()
        load.connect(server, clients, agreed, paths)
        time.sleep(0.3)  # the server's side of the last handshake
        return load

    def end(self) -> int:
        """End every process; return how many messages were delivered."""
        for child in self.children:
            child.end()
        shutil.rmtree(self.directory, ignore_errors=True)
        return sum(child.delivered for child in self.children if isinstance(child, Load))


# ---- latency ---------------------------------------------------------------------------------------------


def event_name() -> str:
    """A file name as the PHP reference makes it: microtime(true) . '_' . uniqid() . '.json'."""
    seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
    return f"{seconds}.{microseconds // 100:04d}_{seconds:08x}{microseconds:05x}.json"


def pause() -> None:
    time.sleep(random.uniform(0.002, 0.012))  # so that events meet the poll at any point of its period


def put_by_queue_event(run: Run, queue: Path) -> Iterator[int]:
    """Queue events, `run.events` of them; yield the time just before each."""
    from wsqueue import queue_event
    for event, payload in make_events(run.events, 200):
        pause()
        yield now()
        queue_event(str(queue), event, payload)


def put_by_rename(run: Run, queue: Path, program: str = "") -> Iterator[int]:
    elsewhere = run.new_directory()
    for event in make_events(run.events, 200):
        file = elsewhere / event_name()
        file.write_text(text_of(*event))
        pause()
        yield now()
        if program:
            subprocess.run([program, str(file), str(queue)], check=True)
        else:
            file.rename(queue / file.name)


PHP = """
for ($n = 0; $n < $argv[2]; $n++) {
    usleep(random_int(2000, 12000));
    $payload = ["n" => $n, "pad" => str_repeat("x", 130)];
    $event = json_encode(["event" => "bench", "payload" => $payload, "timestamp" => time()]);
    echo hrtime(true), "\n";
    file_put_contents($argv[1] . "/" . microtime(true) . "_" . uniqid() . ".json", $event);
}
"""


def put_by_php(run: Run, queue: Path) -> Iterator[int]:
    command = ["php", "-r", PHP, str(queue), str(run.events)]
    yield from map(int, subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split())


PRODUCERS: Dict[str, Callable[[Run, Path], Iterator[int]]] = {
    "`queue_event`": put_by_queue_event,
    "rename(2), as `mv` does": put_by_rename,
    "`mv`, with its start": functools.partial(put_by_rename, program="mv"),
    "PHP `file_put_contents`": put_by_php,
}


def latency(run: Run) -> None:
    producers = [name for name in PRODUCERS if name[:3] != "PHP" or shutil.which("php")]
    servers = {"kernel wake-up": run.serve(), "poll alone": run.serve("--no-wakeup")}
    loads = {how: run.audience(server, 1) for how, server in servers.items()}
    taken: Dict[Tuple[str, str], List[float]] = {key: [] for key in itertools.product(producers, servers)}
    for _, (producer, how) in itertools.product(range(run.rounds), taken):
        loads[how].expect(run.events, every=1)
        stamps = list(PRODUCERS[producer](run, servers[how].queue))
        taken[producer, how] += [came - stamp for stamp, came in zip(stamps, loads[how].finish())]
    rows = []
    for (producer, how), values in taken.items():
        rows.append([producer, how, *figures(values, 1e6), f"{max(values) / 1e6:.2f}"])
        if how == "poll alone":
            rows[-1] += verdict("p99 ≤ 110", p99(values) <= 110e6)
        elif producer != "`mv`, with its start":
            rows[-1] += verdict("≤ 0.7, p99 ≤ 3", statistics.median(values) <= 0.7e6 and p99(values) <= 3e6)
    missing = " PHP is not installed: its rows are left out." if len(producers) < len(PRODUCERS) else ""
    print_table(
        f"One client, {run.rounds * run.events} events from each producer, 2 to 12 ms apart. Milliseconds.{missing}",
        "from | server | median | p99 | most", rows)


# ---- target ----------------------------------------------------------------------------------------------


def paths_of(secret: str, users: Sequence[str]) -> List[str]:
    """Where each user connects, with a ticket that says who it is."""
    from wsqueue import sign_ticket
    return [f"/?ticket={sign_ticket(secret, user=user, ttl=3600)}" for user in users]


def queue_to(queue: Path, topic: str, events: Events) -> Iterator[int]:
    """Queue events for a topic; yield the time just before each."""
    from wsqueue import queue_event
    for event, payload in events:
        pause()
        yield now()
        queue_event(str(queue), event, payload, to=topic)


def target(run: Run) -> None:
    secret, file = os.urandom(32).hex(), run.new_directory() / "secret"
    file.write_text(secret)
    alone, among = "nobody else", f"{run.clients} other users"
    servers = {case: run.serve("--secret-file", file) for case in (alone, among)}
    others = run.audience(servers[among], run.clients, paths=paths_of(secret, [f"idle{n}" for n in range(run.clients)]))
    loads = {case: run.audience(server, 1, paths=paths_of(secret, ["one"])) for case, server in servers.items()}
    taken: Dict[str, List[int]] = {case: [] for case in servers}
    for _, case in itertools.product(range(run.rounds), servers):
        loads[case].expect(run.events, every=1)
        stamps = list(queue_to(servers[case].queue, "user:one", make_events(run.events, 200)))
        taken[case] += [came - stamp for stamp, came in zip(stamps, loads[case].finish())]
    deliver_one(servers[among], others)  # an error if they have got anything before
    rows = []
    for case, values in taken.items():
        ratio = statistics.median(values) / statistics.median(taken[alone])
        rows.append([case, *figures(values, 1e6), f"{ratio:.2f}"])
        if case == among:
            rows[-1] += verdict("≤ 1.2", ratio <= 1.2)
    print_table(
        f"From `queue_event(..., to=\"user:one\")` until that client has it, {run.rounds * run.events} events, "
        "2 to 12 ms apart. Milliseconds.",
        "beside it are connected | median | p99 | ÷ nobody", rows)


# ---- fanout and burst --------------------------------------------------------------------------------------


def check_order(server: Server, load: Load, count: int) -> None:
    """Prove that all clients get the same and what was queued. Hashing takes time, so this is not timed."""
    load.expect(count, check=2)
    server.broadcast(count)
    load.finish()
    check_numbers(load, count)


def check_numbers(load: Load, count: int) -> None:
    if load.numbers() != list(range(count)):
        raise Wrong("the messages are not those that were queued, in their order")


def grow(audiences: Dict[Server, Load], clients: int, check: int) -> List[Server]:
    """So many clients for each server that bears them: those are returned. Prove by so many events that they listen."""
    servers = [server for server in audiences if clients <= server.most]
    for server in servers:
        audiences[server].connect(server, clients - audiences[server].clients)
    time.sleep(0.3)  # the servers' side of the last handshakes
    for server in servers:
        check_order(server, audiences[server], check)
    return servers


def time_event(server: Server, load: Load) -> Tuple[float, int]:
    """Nanoseconds from the first send until the median client and the last one have one event."""
    time.sleep(0.005)
    load.expect(1)
    start, _ = server.broadcast(1)
    times = load.finish()
    return statistics.median(times) - start, max(times) - start


def fanout(run: Run) -> None:
    audiences = {server: run.load() for server in (*map(run.side, SIDES), run.serve("--ping-interval", 0))}
    rows = []
    for clients in run.clients:
        taken: Dict[str, List[Tuple[float, int]]] = {}
        servers = grow(audiences, clients, 2)
        for _, server in itertools.product(range(run.rounds), servers):
            taken.setdefault(server.label, []).append(time_event(server, audiences[server]))
        medians = {label: [statistics.median(column) for column in zip(*rounds)] for label, rounds in taken.items()}
        for label, rounds in taken.items():
            peers = medians[Floor.label], medians[Nchan.label]
            ratios = [mine / its for peer in peers for mine, its in zip(medians[label], peer)]
            cells = [cell for column in zip(*rounds) for cell in figures(column, 1e6)]
            rows.append([str(clients), label, *cells, *(f"{ratio:.2f}" for ratio in ratios)])
            if label == Ours.label:
                rows[-1] += verdict("≤ 0.8", max(ratios) <= 0.8)
    print_table(
        f"One event of 200 bytes, {run.rounds} rounds. Milliseconds until the median client and the last one have it, "
        "from the first `send`, the HTTP request (nchan, two workers) or `queue_event` (serve); side ÷ bare loop and "
        "÷ nchan.",
        "clients | side | median | p99 | last | p99 | ÷ loop: median | last | ÷ nchan: median | last", rows)


def burst(run: Run) -> None:
    ours, produced = run.serve(backlog=True), run.serve()
    ours.label, produced.label = "wsqueue, from the directory", "wsqueue, with the `queue_event` calls"
    audiences = {server: run.load() for server in (ours, produced, *map(run.side, (Nchan, Websockets, Stock, Floor)))}
    rows = []
    for clients in run.clients:
        events = {server: run.events if server in (ours, produced) else run.events // 10
                  for server in grow(audiences, clients, run.events // 10)}
        for server in (ours, produced):
            check_order(server, audiences[server], run.events)
        taken: Dict[Server, List[float]] = {server: [] for server in events}
        for _, server in itertools.product(range(run.rounds), events):
            audiences[server].expect(events[server])
            start, _ = server.broadcast(events[server])
            taken[server].append(max(audiences[server].finish(timeout=600)) - start)
        rates = {server.label: events[server] * clients / statistics.median(taken[server]) for server in events}
        for server, values in taken.items():
            rate = rates[server.label]
            times = [rate / rates[peer.label] for peer in (Websockets, Nchan)]
            rows.append([str(clients), server.label, str(events[server]), *figures(values, 1e9, 3),
                         f"{rate * 1e3:.2f}", *(f"{ratio:.1f}" for ratio in times)])
            if server is ours:
                rows[-1] += verdict("≥ 60, ≥ 30", times[0] >= 60 and times[1] >= 30)
    print_table(
        f"Events of 200 bytes, {run.rounds} rounds. Seconds until the last client has the last byte; million "
        f"deliveries a second, and times the peer's. The peers send a tenth of our {run.events} events.",
        "clients | side | events | median, s | p99, s | million/s | × websockets | × nchan", rows)


# ---- sustained -------------------------------------------------------------------------------------------
# The producers are processes, `bench.py producer QUEUE COUNT PER_SECOND FIRST FILE`, which wait for the time at which
# to begin. FILE then holds the time before each call.


def steadily(count: int, per_second: float, start: float) -> Iterator[int]:
    """Numbers, each when it is due; what is late comes at once."""
    for number in range(count):
        time.sleep(max(0.0, start + number / per_second - time.monotonic()))
        yield number


def run_producer(queue: str, count: str, per_second: str, first: str, file: str) -> None:
    from wsqueue import queue_event
    events, stamps = make_events(int(count), 200, int(first)), array.array("q")
    print("ready", flush=True)
    start = float(sys.stdin.readline())
    for number in steadily(len(events), float(per_second), start):
        stamps.append(now())
        if not queue_event(queue, *events[number]):
            sys.exit("queue_event returned False")
    Path(file).write_bytes(stamps)
    print("done", flush=True)


def queue_from_processes(run: Run, queue: Path) -> "array.array[int]":
    """Queue run.events a second for run.seconds, each process a share of them; return the time of each."""
    each, rate = run.events * run.seconds // run.processes, run.events / run.processes
    files = [run.new_directory() / "stamps" for _ in range(run.processes)]
    producers = [run.keep(Child(sys.executable, __file__, "producer", queue, each, rate, number * each, file))
                 for number, file in enumerate(files)]
    for producer in producers:
        producer.read_line()
    start = time.monotonic() + 0.1
    for number, producer in enumerate(producers):
        producer.tell(start + number / run.events)  # so that no two are due at once
    stamps = array.array("q")
    for producer, file in zip(producers, files):
        producer.read_line(run.seconds + 60)
        stamps.frombytes(file.read_bytes())
    return stamps


def sustain(run: Run, server: DirectoryServer, load: Load) -> Tuple[List[Tuple[int, ...]], float]:
    """For each event, how long after its time each tenth part of the clients had it; and the events a second."""
    count = run.events * run.seconds
    load.expect(count, every=max(1, load.clients // 10), check=1)
    stamps = queue_from_processes(run, server.queue)
    times = load.finish(timeout=300)
    order = load.numbers()
    if sorted(order) != list(range(count)):
        raise Wrong("the messages are not those that were queued")
    columns = [times[first:first + count] for first in range(0, len(times), count)]
    waits = [tuple(came - stamps[number] for came in row) for number, row in zip(order, zip(*columns))]
    return waits, (count - 1) * 1e9 / (max(stamps) - min(stamps))


def sustained(run: Run) -> None:
    servers = {"kernel wake-up": run.serve(), "poll alone": run.serve("--no-wakeup")}
    loads = {how: run.audience(server, run.clients) for how, server in servers.items()}
    rows = []
    for (how, server), most in zip(servers.items(), (20, 150)):
        waits, rate = sustain(run, server, loads[how])
        every = list(itertools.chain.from_iterable(waits))
        columns = (list(map(statistics.median, waits)), list(map(max, waits)), every)
        holds = p99(every) <= most * 1e6 and rate >= 0.95 * run.events
        rows.append([how, f"{rate:.0f}", *(cell for column in columns for cell in figures(column, 1e6)),
                     *verdict(f"p99 ≤ {most}, ≥ {0.95 * run.events:.0f}/s", holds)])
    print_table(
        f"{run.events} events/s of 200 bytes, {run.processes} processes, {run.clients} clients, {run.seconds} s. "
        "Milliseconds from just before `queue_event` until clients have it: ten of them, evenly spread, the last one "
        "included. For each event the median of these and the last; and over all events and clients.",
        "server | events/s | median | p99 | last | p99 | all | p99", rows)


# ---- drain and growth ------------------------------------------------------------------------------------


def serve_full_directory(run: Run) -> Tuple[DirectoryServer, Path]:
    """A server that finds run.events files when it starts, and the oldest of them.

    That one is unfinished: for two ticks the server sends nothing that could overtake it, and a client can connect.
    """
    queue = run.new_directory()
    oldest = queue / event_name()
    oldest.touch()
    fill_directory(str(queue), make_events(run.events - 1, 200, 1))
    return run.keep(DirectoryServer(queue, "--poll-interval", 5)), oldest


def time_drain(run: Run) -> Tuple[int, int]:
    """Nanoseconds until one client has everything, from when the oldest file is finished; and the server's peak."""
    server, oldest = serve_full_directory(run)
    load = run.audience(server, 1)
    load.expect(run.events, check=1)
    finished = run.new_directory() / "finished"
    finished.write_text(text_of(*make_events(1, 200)[0]))
    start = now()
    finished.rename(oldest)
    took = max(load.finish(timeout=300)) - start
    check_numbers(load, run.events)
    peak = status_kb(server.pid, "VmHWM")
    load.end()
    server.end()
    return took, peak


def drain(run: Run) -> None:
    server = run.serve()
    deliver_one(server, run.audience(server, 1))
    idle = server.resident_kb()
    took, peaks = zip(*(time_drain(run) for _ in range(run.rounds)))
    rates, growth_mb = [run.events * 1e9 / each for each in took], (max(peaks) - idle) / 1024
    holds = statistics.median(rates) >= 20_000 and growth_mb <= 50
    print_table(
        f"{run.events} files of 200 bytes are there when `serve` starts, one client, {run.rounds} rounds; until that "
        "has the last one. The peak of the server's memory is over what an idle server has.",
        "median, events/s | least | idle, MB | peak, MB more", [[
        f"{statistics.median(rates):.0f}", f"{min(rates):.0f}", f"{idle / 1024:.1f}", f"{growth_mb:.1f}",
        *verdict("≥ 20000/s, ≤ 50 MB", holds)]])


def flat(least: int, measured: List[Tuple[int, float, List[str]]]) -> List[List[str]]:
    """A row for each size, what one costs there, and more cells. From the size `least` on, it must stay what it is."""
    base = next((each for size, each, _ in measured if size >= least), 0.0)
    return [[str(size), *cells] if size < least else
            [str(size), *cells, f"{each / base:.2f}", *verdict("≤ 1.25", each <= 1.25 * base)]
            for size, each, cells in measured]


def grow_clients(run: Run) -> None:
    server, measured, first = run.serve("--ping-interval", 0), [], 0.0
    audiences = {server: run.load()}
    for clients in run.clients:
        grow(audiences, clients, 2)
        taken = [time_event(server, audiences[server]) for _ in range(10 * run.rounds)]
        last = statistics.median(last for _, last in taken)
        first = first or last
        each = (last - first) / clients
        cells = [cell for column in zip(*taken) for cell in figures(column, 1e6)]
        measured.append((clients, each, [*cells, f"{each / 1e3:.2f}"]))
    print_table(
        f"From `queue_event` until the median client and the last one have it, {10 * run.rounds} rounds. Milliseconds; "
        "microseconds for each client more than the first row has.",
        "clients | median | p99 | last | p99 | each, µs | ÷ 1,000", flat(1_000, measured))


def time_each(server: DirectoryServer, load: Load, count: int, topics: Sequence[Optional[str]] = (None,)) -> float:
    """So many events wait: nanoseconds for one of them, until every client has its share."""
    load.expect(count // len(topics))
    start, _ = server.broadcast(count, topics=topics)
    return (max(load.finish(timeout=300)) - start) / count


def grow_backlog(run: Run) -> None:
    server, measured = run.serve(backlog=True), []
    load = run.audience(server, 1)
    time_each(server, load, 1_000)  # the history is full from now on
    for files in run.backlogs:
        taken = [time_each(server, load, files) for _ in range(run.rounds)]
        measured.append((files, statistics.median(taken), figures(taken, 1e3, 1)))
    print_table(
        f"So many files wait, one client, {run.rounds} rounds. Microseconds for each. Of 1,000, which go out in one"
        " write, the client does not see the removal.",
        "files | median | p99 | ÷ 10,000", flat(10_000, measured))


def grow_topics(run: Run) -> None:
    measured = []
    for count in run.topics:
        server, topics = run.serve("--ping-interval", 0, backlog=True), [f"/topic{n}" for n in range(count)]
        load = run.audience(server, count, paths=topics)
        taken = [time_each(server, load, count, topics) for _ in range(run.rounds)]
        measured.append((count, statistics.median(taken), figures(taken, 1e3, 1)))
        load.end()
        server.end()
    print_table(
        f"One event waits for each of so many topics, and each topic has one client, {run.rounds} rounds. Microseconds "
        "for each event.",
        "topics | median | p99 | ÷ 100", flat(100, measured))


def time_beside_newcomers(run: Run, server: DirectoryServer, load: Load, newcomers: int) -> int:
    load.expect(run.backlog)
    start, _ = server.broadcast(run.backlog, topics=["/busy"])
    arrivals = run.load()
    if newcomers:
        arrivals.connect(server, newcomers, paths=["/quiet"] * newcomers)
    took = max(load.finish(timeout=300)) - start
    arrivals.end()
    return took


def drain_beside_newcomers(run: Run) -> None:
    server = run.serve(backlog=True)
    load = run.audience(server, 1, paths=["/busy"])
    taken: Dict[int, List[int]] = {0: [], run.newcomers: []}
    for _, newcomers in itertools.product(range(run.rounds), taken):
        taken[newcomers].append(time_beside_newcomers(run, server, load, newcomers))
    rates = {newcomers: run.backlog * 1e9 / statistics.median(values) for newcomers, values in taken.items()}
    ratio = rates[run.newcomers] / rates[0]
    rows = [[str(newcomers), f"{rate:.0f}", f"{rate / rates[0]:.2f}"] for newcomers, rate in rates.items()]
    rows[-1] += verdict("≥ 0.9", ratio >= 0.9)
    print_table(
        f"{run.backlog} events for a topic wait, {run.rounds} rounds. Meanwhile so many clients connect, who are not on"
        " it.",
        "connect meanwhile | events/s | ÷ nobody", rows)


def check_urgent(run: Run) -> None:
    """Prove that what is queued while many events wait comes after them."""
    server = run.serve(backlog=True)
    load = run.audience(server, 1)
    load.expect(run.backlog + 1, check=1)
    server.broadcast(run.backlog)
    fill_directory(str(server.queue), make_events(1, 200, run.backlog))
    load.finish(timeout=300)
    check_numbers(load, run.backlog + 1)
    print(f"\nOne event that is queued while {run.backlog} wait comes after them.")


def growth(run: Run) -> None:
    grow_clients(run)
    grow_backlog(run)
    grow_topics(run)
    drain_beside_newcomers(run)
    check_urgent(run)


# ---- stages ----------------------------------------------------------------------------------------------
# The server is in this process, so that its functions can be watched; each takes half a microsecond longer for it.

STAGES = {
    "wait": "`queue_event`, until the queue thread is awake",
    "_reattach_if_replaced": "is the directory still ours?",
    "_scan": "find the file",
    "_read": "open, fstat, read, close",
    "parse_events": "parse, check, encode",
    "write": "append to the history's log",
    "audiences_of": "who gets it",
    "send_to_all": "from the first `send` to the last",
}


class Trace:
    """Notes when functions of the module begin and end."""

    def __init__(self, undo: contextlib.ExitStack) -> None:
        import wsqueue
        self.spans: List[Tuple[str, int, int]] = []
        for owner, name in itertools.product((wsqueue, wsqueue.DirectoryQueue, wsqueue.HistoryFile), STAGES):
            if hasattr(owner, name):
                undo.enter_context(mock.patch.object(owner, name, self._watched(name, getattr(owner, name))))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kw: Any) -> Any:
            start = now()
            try:
                return function(*args, **kw)
            finally:
                self.spans.append((name, start, now()))
        return watched

    def stages(self, start: int, end: int) -> List[int]:
        """Nanoseconds of each, and what is left of them all; where two threads send at once, the time counts once."""
        taken = []
        for stage in STAGES:
            ends = {since: to for name, since, to in list(self.spans) if name == stage and start < to}
            first = min(ends.items())
            taken.append(first[1] - start if stage == "wait" else max(ends.values()) - first[0]
                         if stage == "send_to_all" else first[1] - first[0])
        return [*taken, end - start - sum(taken)]


def trace_event(directory: str, trace: Trace, load: Load) -> List[int]:
    from wsqueue import queue_event
    time.sleep(random.uniform(0.01, 0.03))  # so that nobody is awake
    load.expect(1)
    trace.spans.clear()
    start = now()
    queue_event(directory, *make_events(1, 200)[0])
    end = max(load.finish())
    time.sleep(0.005)  # the sender's last call returns after the client has it
    return trace.stages(start, end)


def stages(run: Run) -> None:
    from wsqueue import WebSocketServer
    columns = []
    with contextlib.ExitStack() as undo:
        trace = Trace(undo)
        for clients in run.clients:
            directory = str(run.new_directory())
            with WebSocketServer(queue=directory, port=0, ping_interval=0) as server:
                port = int(server.url.strip("/").rpartition(":")[2])
                load = run.audience(SimpleNamespace(port=port, label=Ours.label), clients)
                rounds = [trace_event(directory, trace, load) for _ in range(run.rounds)]
                load.end()
            columns.append([figures(values, 1e3, 0) for values in [*zip(*rounds), list(map(sum, rounds))]])
    names = [*STAGES.values(), "the rest, and until the last client has it", "all of it"]
    print_table(
        f"One event of 200 bytes, {run.rounds} times, 10 to 30 ms apart. Microseconds.",
        " | ".join(["stage", *(f"{clients} client{'s' * (clients > 1)} | p99" for clients in run.clients)]),
        [[name, *itertools.chain(*cells)] for name, *cells in zip(names, *columns)])


# ---- resume ----------------------------------------------------------------------------------------------


def position(server: Server) -> str:
    """The id with which a client that leaves now may come back."""
    from websockets.sync.client import connect
    with connect(f"ws://127.0.0.1:{server.port}/?last_event_id=") as client:
        return str(json.loads(client.recv(10))["id"])


def path_after(place: str) -> str:
    return f"/?last_event_id={quote(place, safe='')}"


def check_resumed(run: Run, server: Server, place: str) -> None:
    """Prove that who comes back gets what it missed, in order. It is not timed."""
    load = run.load()
    load.expect(1 + run.events, check=2)
    load.connect(server, 1, paths=[path_after(place)])
    load.finish()
    due = [payload for _, payload in make_events(run.events, 200)]
    if [json.loads(text)["payload"] for text in load.texts()] != [None, *due]:
        raise Wrong("who comes back does not get what it has missed, in its order")
    load.end()


def time_return(run: Run, server: Server, place: str, messages: int, deflate: bool) -> Tuple[float, float]:
    """From the first connection until the last client has the last event; and the server's processor time."""
    load, before = run.load(), server.cpu_seconds()
    load.expect(messages)
    start = now()
    load.connect(server, run.clients, run.clients if deflate else None, [path_after(place)] * run.clients)
    last = max(load.finish())
    cpu = server.cpu_seconds() - before
    load.end()
    return last - start, 1e9 * cpu


def time_live(run: Run, server: Server, load: Load) -> Tuple[float, float]:
    before = server.cpu_seconds()
    load.expect(run.events)
    start, _ = server.broadcast(run.events)
    last = max(load.finish())
    return last - start, 1e9 * (server.cpu_seconds() - before)


def resume(run: Run) -> None:
    live, missed, nothing = "connected all the while", "come back, all missed", "come back, nothing missed"
    browsers = "come back, all missed, deflate"
    server = run.serve("--history-events", 10 * run.events, backlog=True)
    load = run.audience(server, run.clients)
    taken: Dict[str, List[Tuple[float, float]]] = {live: [], missed: [], browsers: [], nothing: []}
    for number in range(run.rounds):
        place = position(server)
        taken[live].append(time_live(run, server, load))
        if number == 0:
            check_resumed(run, server, place)
        taken[missed].append(time_return(run, server, place, 1 + run.events, False))
        taken[browsers].append(time_return(run, server, place, 1 + run.events, True))
        taken[nothing].append(time_return(run, server, position(server), 1, False))
    rows = []
    for case, rounds in taken.items():
        last, cpu = zip(*rounds)
        rows.append([case, *figures(last, 1e9, 3), *figures(cpu, 1e9, 3)])
    print_table(
        f"{run.events} events of 200 bytes, {run.clients} clients, {run.rounds} rounds. Seconds from the first "
        "event or connection until the last client has everything; and the server's processor time.",
        "clients | median | p99 | CPU | p99", rows)


# ---- memory, connect and idle ----------------------------------------------------------------------------


def deliver_one(server: Server, load: Load) -> None:
    """Proves that every client is still there."""
    load.expect(1)
    server.broadcast(1)
    load.finish()


def measure_memory(run: Run, side: Type[Side], clients: int) -> Tuple[int, int]:
    """KB of a fresh server, without clients and with so many."""
    server = run.product(side)
    time.sleep(0.5)
    before = server.resident_kb()
    load = run.audience(server, clients)
    time.sleep(run.seconds)
    after = server.resident_kb()
    deliver_one(server, load)
    load.end()
    server.end()
    return before, after


def memory(run: Run) -> None:
    rows = []
    for side in (Ours, Nchan, Websockets, Stock):
        clients = min(run.clients, side.most)
        before, after = measure_memory(run, side, clients)
        if after <= before:
            raise Wrong(f"{side.label}: its clients take no memory")
        each = (after - before) / clients
        rows.append([side.label, str(clients), str(before), str(after), f"{each:.2f}"])
        if side is Ours:
            rows[-1] += verdict("≤ 1.5", each <= 1.5)
    print_table(
        f"Clients that wait, {run.seconds} s after the last one connected; what the kernel keeps for a socket is not in"
        " it. nginx is all its processes; what they share counts once.",
        "server | idle clients | RSS before, KB | after, KB | per client, KB", rows)


def time_connect(run: Run, side: Type[Side]) -> float:
    """Connections a second, of a fresh server."""
    server, load = run.product(side), run.load()
    rate = run.clients / load.connect(server, run.clients)
    time.sleep(0.3)
    deliver_one(server, load)
    load.end()
    server.end()
    return rate


def connect(run: Run) -> None:
    rates: Dict[Type[Side], List[float]] = {side: [] for side in (Ours, Nchan, Websockets)}
    for _, side in itertools.product(range(run.rounds), rates):
        rates[side].append(time_connect(run, side))
    rows = []
    for side, values in rates.items():
        median = statistics.median(values)
        ratios = [median / statistics.median(rates[peer]) for peer in (Websockets, Nchan)]
        rows.append([side.label, f"{median:.0f}", f"{min(values):.0f}", *(f"{ratio:.2f}" for ratio in ratios)])
        if side is Ours:
            rows[-1] += verdict("≥ 1 × websockets (goal: 0.5 × nchan)", ratios[0] >= 1)
    print_table(
        f"{run.clients} handshakes, 64 at a time, {run.rounds} rounds, each with a fresh server (nginx: two workers).",
        "server | median, connections/s | least | × websockets | × nchan", rows)


def idle(run: Run) -> None:
    servers = [run.product(side) for side in (Ours, Websockets)]
    loads = [run.audience(server, run.clients) for server in servers]
    time.sleep(min(2, run.seconds))
    before = [server.cpu_seconds() for server in servers]
    time.sleep(run.seconds)
    rows = []
    for server, load, earlier in zip(servers, loads, before):
        percent = 100 * (server.cpu_seconds() - earlier) / run.seconds
        rows.append([server.label, f"{percent:.2f}"])
        if server.label == Ours.label:
            rows[-1] += verdict("≤ 0.5", percent <= 0.5)
        deliver_one(server, load)
    print_table(
        f"{run.clients} clients, nothing to send, {run.seconds} s.",
        "server | % of a core", rows)


# ---- publish ---------------------------------------------------------------------------------------------


def publish_bare(queue: str, event: str, payload: Any) -> None:
    """The least that any producer must ask of the kernel."""
    name = f"{queue}/{event_name()}"
    file = os.open(name + ".tmp", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    os.write(file, text_of(event, payload).encode())
    os.close(file)
    os.rename(name + ".tmp", name)


def timed(call: Callable[..., Any], *arguments: Any) -> int:
    start = now()
    call(*arguments)
    return now() - start


def run_python(words: Sequence[str], cache: Path) -> bytes:
    # Bytecode is cached, as where a program runs twice; in our own place, for the checkout may be read-only.
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(cache),
                       WS_QUEUE_PATH=str(cache / "queue"))
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE).stdout


def time_inside(code: str, cache: Path) -> float:
    """Nanoseconds that `code` takes in a fresh interpreter, without the interpreter's own start."""
    program = f"import time; start = time.perf_counter_ns(); {code}; print(time.perf_counter_ns() - start)"
    return float(run_python(["-c", program], cache))


def time_command(words: Sequence[str], cache: Path) -> float:
    """Nanoseconds from before the process is started until it has ended."""
    start = now()
    run_python(words, cache)
    return now() - start


MODULES = "import json, logging, socket"
QUEUE_EVENT, QUEUE_EVENTS, XADD = "`queue_event`", "`queue_events`, for each event", "Redis: XADD by redis-py"
IMPORT, IMPORT_BARE = "`import wsqueue`", f"`{MODULES}`"
BARE = "open, write, close, rename"
COMMANDS_TIMED = {
    "`python wsqueue.py send`": ("wsqueue.py", "send", "bench", "{}"),
    "`python -m wsqueue send`": ("-m", "wsqueue", "send", "bench", "{}"),
    f"`python -c '{MODULES}'`": ("-c", MODULES),
    "`python -c pass`": ("-c", "pass"),
}


def time_publishers(run: Run, client: Any, cache: Path) -> Iterator[Tuple[str, Sequence[float]]]:
    """One round of all of them, in nanoseconds."""
    from wsqueue import queue_event, queue_events
    events, batch = make_events(run.events, 200), make_events(run.batch, 200)
    for name, call in ((QUEUE_EVENT, queue_event), (BARE, publish_bare)):
        queue = str(run.new_directory())
        yield name, [timed(call, queue, *event) for event in events]
    yield XADD, [timed(lambda event: client.xadd("events", {"data": text_of(*event)}), event) for event in events]
    yield QUEUE_EVENTS, [timed(queue_events, str(run.new_directory()), batch) / run.batch]
    for name in (IMPORT, IMPORT_BARE):
        yield name, [time_inside(name.strip("`"), cache)]
    for name, words in COMMANDS_TIMED.items():
        yield name, [time_command(words, cache)]


def publish(run: Run) -> None:
    import redis

    from brokers import redis_server
    taken: Dict[str, List[float]] = {}
    cache = run.new_directory()
    time_inside("import wsqueue", cache)  # fills the cache
    with redis_server(run.new_directory(), "--appendfsync", "everysec") as broker:
        with redis.Redis.from_url(broker.url) as client:
            for _ in range(run.rounds):
                for name, values in time_publishers(run, client, cache):
                    taken.setdefault(name, []).extend(values)
    median = {name: statistics.median(values) for name, values in taken.items()}
    wanted = {
        QUEUE_EVENT: verdict("≤ 45 µs, ≤ XADD", median[QUEUE_EVENT] <= min(45e3, median[XADD])),
        QUEUE_EVENTS: verdict("≥ 200,000/s", median[QUEUE_EVENTS] <= 1e9 / 200_000),
        IMPORT: verdict("≤ 2", median[IMPORT] <= 2 * median[IMPORT_BARE]),
    }
    rows = []
    for *names, bare in ((QUEUE_EVENT, QUEUE_EVENTS, XADD, BARE), (IMPORT, IMPORT_BARE), tuple(COMMANDS_TIMED)):
        rows += [[name, *figures(taken[name], 1e3, 1), f"{median[name] / median[bare]:.2f}", *wanted.get(name, ())]
                 for name in (*names, bare)]
    print_table(
        f"{run.rounds} rounds of {run.events} events of 200 bytes, not durable, and one batch of {run.batch}. Redis has"
        " them in its file before it answers (appendonly yes, appendfsync everysec), so that they survive its end, as a"
        " file does. Commands from the start of their process to its end, with the bytecode of modules in the cache.",
        "what | median, µs | p99, µs | ÷ bare", rows)


# ---- deflate and threshold -------------------------------------------------------------------------------

RECORD_BYTES = (4096, 1024)


def check_inflates(server: Server, side: Type[Side]) -> None:
    """Prove with a client that inflates that the others get the events. Inflating takes time, so this is not timed."""
    from websockets.sync.client import connect
    with connect(f"ws://127.0.0.1:{server.port}") as client:
        if bool(client.protocol.extensions) != side.deflates:
            raise Wrong(f"{server.label}: agreed on the extensions {client.protocol.extensions}")
        time.sleep(0.3)  # the server's side of the handshake
        for size in RECORD_BYTES:
            server.make(2, size, "records")
            server.send()
            messages = [json.loads(client.recv(10)) for _ in range(2)]
            if [(message["event"], message["payload"]) for message in messages] != make_records(2, size):
                raise Wrong(f"{server.label}: what came is not what was sent")


def send_record(server: Server, load: Load, size: int, number: int) -> Tuple[float, float, float]:
    """Send one; return bytes per client, the server's processor time, and when the last client had it."""
    server.make(1, size, "records", number)
    time.sleep(0.005)
    load.expect(1)
    before = server.cpu_seconds()
    start, _ = server.send()
    last = max(load.finish())
    return load.bytes / load.clients, 1e9 * (server.cpu_seconds() - before), last - start


def deflate(run: Run) -> None:
    servers = {side: run.side(side) for side in DEFLATE_SIDES}
    for side, server in servers.items():
        check_inflates(server, side)
    loads = {side: run.audience(server, run.clients, run.clients * side.deflates) for side, server in servers.items()}
    taken: Dict[Any, List[Tuple[float, float, float]]] = {}
    for number, size, side in itertools.product(range(run.rounds), RECORD_BYTES, DEFLATE_SIDES):
        taken.setdefault((size, side), []).append(send_record(servers[side], loads[side], size, number))
    rows = []
    for (size, side), rounds in taken.items():
        each, cpu, last = zip(*rounds)
        plain_each, plain_cpu, _ = map(statistics.median, zip(*taken[size, OursPlain]))
        share, ratio = statistics.median(each) / plain_each, statistics.median(cpu) / plain_cpu
        rows.append([str(size), side.label, f"{statistics.median(each):.0f}", f"{share:.2f}", *figures(cpu, 1e6),
                     f"{ratio:.2f}", *figures(last, 1e6)])
        if size == 1024 and side is OursDeflate:
            rows[-1] += verdict("CPU ≤ 1.3", ratio <= 1.3)
    print_table(
        f"One event of nested JSON records to {run.clients} clients that offer permessage-deflate, {run.rounds} "
        "rounds. Bytes per client, the server's processor time, and when the last client has it. Milliseconds.",
        "JSON | side | bytes | ÷ plain | CPU | p99 | ÷ plain | last | p99", rows)


def open_pair() -> Tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname())
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sender, listener.accept()[0]


def time_send(sender: socket.socket, receiver: socket.socket, data: bytes) -> int:
    """One send, with nobody to wake."""
    taken = timed(sender.sendall, data)
    receiver.recv(len(data), socket.MSG_WAITALL)
    return taken


def time_threshold(sender: socket.socket, receiver: socket.socket, text: bytes) -> Tuple[int, ...]:
    """Bytes of its frame, plain and deflated; nanoseconds to make the latter and to send each."""
    from wsqueue import TEXT, encode_message
    plain, start = encode_message(TEXT, text), now()
    small = encode_message(TEXT, text, 15)
    made = now() - start
    return len(plain), len(small), made, time_send(sender, receiver, plain), time_send(sender, receiver, small)


def threshold(run: Run) -> None:
    from wsqueue import SETTINGS
    default = next(setting.default for setting in SETTINGS if setting.name == "deflate_min_bytes")
    texts = {size: [text_of(*record).encode() for record in make_records(run.events, size)]
             for size in (64, 128, 256, 512, 1024, 4096, 16384)}
    taken: Dict[int, List[Tuple[int, ...]]] = {size: [] for size in texts}
    with contextlib.ExitStack() as stack:
        sender, receiver = map(stack.enter_context, open_pair())
        for _, size, number in itertools.product(range(run.rounds), texts, range(run.events)):
            taken[size].append(time_threshold(sender, receiver, texts[size][number]))
    rows = []
    for size, rounds in taken.items():
        columns = list(zip(*rounds))
        plain, small, made, send, _ = map(statistics.median, columns)
        cells = [cell for column in columns[2:] for cell in figures(column, 1e3, 1)]
        rows.append([str(size), f"{plain:.0f}", f"{small:.0f}", f"{small / plain:.2f}", *cells, f"{made / send:.1f}"])
        if size >= default:
            rows[-1] += verdict("bytes ≤ 2/3", small <= plain * 2 / 3)
    print_table(
        f"{run.events} events of each size, {run.rounds} rounds; each compressed by itself, one `send` of each. "
        f"Bytes of a frame; microseconds. What is smaller than {default} bytes (deflate_min_bytes) is sent as it is.",
        "JSON | plain | deflated | ÷ plain | compress | p99 | send plain | p99 | send deflated | p99 | "
        "compress ÷ send", rows)


# ---- stall -----------------------------------------------------------------------------------------------


def shake_hands(port: int) -> socket.socket:
    """A client that has read no more than that it is welcome."""
    client = socket.create_connection(("127.0.0.1", port), 10)
    client.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                   b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
    if client.recv(12) != b"HTTP/1.1 101":
        raise Wrong("a client that is to do harm could not connect")
    return client


def queue_steadily(server: Server, count: int, size: int) -> Iterator[int]:
    """Queue events, 100 a second; yield the time of each."""
    for _ in steadily(count, 100, time.monotonic()):
        yield server.broadcast(1, size)[0]


def waits_of(load: Load, stamps: List[int]) -> List[int]:
    """How long after its time each event came to each client."""
    return [came - stamps[i % len(stamps)] for i, came in enumerate(load.finish())]


def queue_until_closed(server: Server, count: int, files: int) -> Tuple[List[int], float]:
    """Queue events. Return their times, and after how many seconds the server was down to `files` open files."""
    stamps: List[int] = []
    closed_after = float("inf")
    for stamp in queue_steadily(server, count, 4096):
        stamps.append(stamp)
        if len(stamps) % 10 == 0 and closed_after == float("inf") and server.open_files() <= files:
            closed_after = (stamp - stamps[0]) / 1e9
    return stamps, closed_after


def stall(run: Run) -> None:
    nobody = "nobody stalls"
    # A client that does not read cannot answer a close frame either, and is waited for.
    by_size = ("--outbox-bytes", 2**18, "--send-timeout", 60, "--close-timeout", 1)
    by_time = ("--outbox-bytes", 2**26, "--send-timeout", 2, "--close-timeout", 1)
    servers = {nobody: run.serve(*by_size), f"{run.stalled} stall, outbox 256 KiB, 60 s": run.serve(*by_size),
               f"{run.stalled} stall, outbox 64 MiB, 2 s": run.serve(*by_time)}
    readers = run.clients - run.stalled
    loads = {case: run.audience(server, readers) for case, server in servers.items()}
    taken: Dict[str, List[Tuple[float, float]]] = {case: [] for case in servers}
    for _, (case, server) in itertools.product(range(run.rounds), servers.items()):
        files = server.open_files()
        with contextlib.ExitStack() as stack:
            for _ in range(0 if case == nobody else run.stalled):
                stack.enter_context(shake_hands(server.port))
            loads[case].expect(run.seconds * 100, every=1)
            stamps, closed_after = queue_until_closed(server, run.seconds * 100, files)
            waits = waits_of(loads[case], stamps)
        taken[case].append((p99(waits), closed_after))
    rows = []
    for case, rounds in taken.items():
        median, closed_after = map(statistics.median, zip(*rounds))
        ratio = median / statistics.median(wait for wait, _ in taken[nobody])
        rows.append([case, f"{median / 1e6:.2f}", f"{max(rounds)[0] / 1e6:.2f}", f"{ratio:.2f}"])
        if case != nobody:
            holds = ratio <= 1.5 and closed_after < run.seconds
            rows[-1] += [f"{closed_after:.1f}", *verdict("≤ 1.5, closed", holds)]
    print_table(
        f"100 events/s of 4 KB to {readers} clients that read, {run.seconds} s, {run.rounds} rounds: "
        f"the p99 of those, and when all {run.stalled} that do not read were closed.",
        "case | median p99, ms | worst p99, ms | ÷ nobody | closed after, s", rows)


# ---- flood -----------------------------------------------------------------------------------------------
# The hostile client runs in its own process, `bench.py hostile NAME PORT CONNECTIONS`, until a line on its stdin
# asks what it did.


class Hostile:
    """This one does nothing. It counts frames, and how its connections end: a close code or an HTTP status."""

    label = "nothing"

    def __init__(self, port: int, connections: int) -> None:
        self.port, self.frames = port, 0
        self.ends: Counter[str] = Counter()

    def turn(self) -> None:
        """Do harm for a tenth of a second at most."""
        time.sleep(0.1)


class Flood(Hostile):
    """Sends one frame again and again, as fast as the server lets it, and reads what comes back."""

    frame: bytes

    def __init__(self, port: int, connections: int) -> None:
        super().__init__(port, connections)
        self.batch = memoryview(self.frame * (2**16 // len(self.frame)))
        self._connect()

    def _connect(self) -> None:
        self.socket, self.begun, self.last = shake_hands(self.port), 0, b""
        self.socket.setblocking(False)

    def turn(self) -> None:
        readable, writable, _ = select.select([self.socket], [self.socket], [], 0.1)
        try:
            if writable:
                self._write()
            if readable:
                self._read()
        except OSError:
            self._start_again()

    def _write(self) -> None:
        before = self.begun
        self.begun += self.socket.send(self.batch[before % len(self.frame):])  # from where the last one broke off
        self.frames += self.begun // len(self.frame) - before // len(self.frame)

    def _read(self) -> None:
        data = self.socket.recv(2**16)
        self.last = (self.last + data)[-127:]  # as long as a close frame may be
        if not data:
            self._start_again()

    def _start_again(self) -> None:
        _, close, payload = self.last.rpartition(b"\x88")
        self.ends[str(int.from_bytes(payload[1:3], "big")) if close else "no close frame"] += 1
        self.socket.close()
        self._connect()


class Pings(Flood):
    label, frame = "pings of 0 bytes", b"\x89\x80\0\0\0\0"


class Texts(Flood):
    label, frame = "messages of 1 byte", b"\x81\x81\0\0\0\0x"


class Silent(Hostile):
    """Connects, sends nothing, and connects again where the server closes."""

    label = "silent connections"

    def __init__(self, port: int, connections: int) -> None:
        super().__init__(port, connections)
        self.selector = selectors.DefaultSelector()
        for _ in range(connections):
            self._open()

    def _open(self) -> None:
        self.selector.register(socket.create_connection(("127.0.0.1", self.port), 10), selectors.EVENT_READ)

    def turn(self) -> None:
        for key, _ in self.selector.select(0.1):
            client: Any = key.fileobj
            self.ends[client.recv(4096)[9:12].decode() or "no answer"] += 1
            self.selector.unregister(client)
            client.close()
            self._open()


ATTACKS: Tuple[Type[Hostile], ...] = (Hostile, Pings, Texts, Silent)


def run_hostile(name: str, port: str, connections: str) -> None:
    os.nice(10)  # elsewhere it would not take our cores
    hostile = next(attack for attack in ATTACKS if attack.__name__ == name)(int(port), int(connections))
    print("ready", flush=True)
    start = now()
    while not select.select([sys.stdin], [], [], 0)[0]:
        hostile.turn()
    print(f"{hostile.frames / (now() - start) * 1e9:.0f}", *(f"{end}:{n}" for end, n in hostile.ends.items()))


def wait_until_forgotten(server: Server, files: int) -> None:
    """What is left of one attack must not slow the next down."""
    deadline = time.monotonic() + 30
    while server.open_files() > files:
        if time.monotonic() > deadline:
            raise Wrong(f"{server.open_files() - files} connections are left of an attack after 30 s")
        time.sleep(0.05)


def time_attacked(run: Run, server: Server, load: Load, attack: Type[Hostile]) -> Tuple[List[int], List[str]]:
    """How long events take meanwhile, and what the hostile client tells."""
    files = server.open_files()
    hostile = Child(sys.executable, __file__, "hostile", attack.__name__, server.port, run.silent)
    try:
        hostile.read_line()
        load.expect(run.seconds * 100, every=1)
        waits = waits_of(load, list(queue_steadily(server, run.seconds * 100, 200)))
        told = hostile.ask("stop")
    finally:
        hostile.end()
    wait_until_forgotten(server, files)
    return waits, told


def flood(run: Run) -> None:
    servers = {attack: run.serve() for attack in ATTACKS}
    loads = {attack: run.audience(server, run.clients) for attack, server in servers.items()}
    taken: Dict[Type[Hostile], List[Tuple[float, float]]] = {attack: [] for attack in ATTACKS}
    told: Dict[Type[Hostile], List[str]] = {}
    for _, attack in itertools.product(range(run.rounds), ATTACKS):
        waits, told[attack] = time_attacked(run, servers[attack], loads[attack], attack)
        taken[attack].append((statistics.median(waits), p99(waits)))
    quiet = statistics.median(wait for _, wait in taken[Hostile])
    rows = []
    for attack, rounds in taken.items():
        (median, late), worst = map(statistics.median, zip(*rounds)), max(wait for _, wait in rounds)
        cells = [f"{value / 1e6:.2f}" for value in (median, late, worst)]
        rate, *ends = told[attack]
        rows.append([attack.label, *cells, f"{late / quiet:.1f}", rate, " ".join(ends)])
        if attack is not Hostile:
            rows[-1] += verdict("p99 ≤ 50", late <= 50e6)  # less is not noticed by an eye
    print_table(
        f"100 events/s of 200 bytes to {run.clients} clients that only listen, {run.seconds} s, {run.rounds} rounds, "
        f"while one client sends this, or opens {run.silent} connections. Milliseconds. Of the last round: frames a "
        "second, and the close codes or HTTP statuses that it got, with how often.",
        "it sends | p50 | p99 | worst p99 | ÷ nothing | frames/s | closed", rows)


# ---- queues ----------------------------------------------------------------------------------------------
# Each kind of queue is filled in its own way, which is also what a producer in another language does.


def fill_directory(url: str, events: Events, topics: Sequence[Optional[str]] = (None,)) -> None:
    """One after the other of the topics has an event."""
    from wsqueue import queue_event
    for (event, payload), topic in zip(events, itertools.cycle(topics)):
        if not queue_event(url, event, payload, to=topic):
            raise Wrong("queue_event returned False")


def split_url(url: str) -> Tuple[str, str]:
    """The server's address, and the name of the queue there."""
    address, _, name = url.partition("?queue=")
    return address, name


def fill_sqlite(url: str, events: Events) -> None:
    import sqlite3
    path, name = split_url(url[len("sqlite:///"):])
    with contextlib.closing(sqlite3.connect(path, timeout=0.1)) as connection, connection:
        connection.executemany(f"INSERT INTO {name} (data) VALUES (?)", [(text_of(*event),) for event in events])


def fill_postgresql(url: str, events: Events) -> None:
    import psycopg
    address, name = split_url(url)
    with psycopg.connect(address) as connection, connection.cursor() as cursor:
        cursor.executemany(f"INSERT INTO {name} (data) VALUES (%s)", [(text_of(*event),) for event in events])


def fill_redis(url: str, events: Events) -> None:
    import redis
    address, name = split_url(url)
    with redis.Redis.from_url(address) as client, client.pipeline(transaction=False) as pipeline:
        for event in events:
            pipeline.xadd(name, {"data": text_of(*event)})
        pipeline.execute()


def fill_rabbitmq(url: str, events: Events) -> None:
    import pika
    address, name = split_url(url)
    connection = pika.BlockingConnection(pika.URLParameters(address))
    channel = connection.channel()
    for number, event in enumerate(events):
        properties = pika.BasicProperties(delivery_mode=2, message_id=f"{now()}-{number}")
        channel.basic_publish(name, "", text_of(*event).encode(), properties)
    connection.close()  # answered once all of them are where they belong


class Kind(NamedTuple):
    """A kind of queue."""

    label: str
    new_url: Callable[[], str]
    fill: Callable[[str, Events], None]
    most: float  # milliseconds until a client has an event, the median
    least: int  # events a second, of many that wait


@contextlib.contextmanager
def kinds(run: Run) -> Iterator[List[Kind]]:
    """All of them, with the brokers that they need, which put on the disk what they confirm."""
    from brokers import postgres_server, rabbitmq_server, redis_server
    with contextlib.ExitStack() as stack:
        postgresql = stack.enter_context(postgres_server(run.new_directory(), "-c", "fsync=on"))
        redis = stack.enter_context(redis_server(run.new_directory(), "--appendfsync", "always"))
        rabbitmq = stack.enter_context(rabbitmq_server(run.new_directory()))
        yield [
            Kind("directory", lambda: str(run.new_directory()), fill_directory, 0.7, 10_000),
            Kind("SQLite", lambda: f"sqlite:///{run.new_directory()}/db?queue=events", fill_sqlite, 110, 10_000),
            Kind("PostgreSQL", postgresql.queue_url, fill_postgresql, 3, 10_000),
            Kind("Redis", redis.queue_url, fill_redis, 1.5, 10_000),
            Kind("RabbitMQ", rabbitmq.queue_url, fill_rabbitmq, 3, 0),
        ]


class QueueServer(Server):
    """`wsqueue.py serve`, broadcasting what is in a queue."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.url = kind, kind.new_url()
        environment = {**os.environ, "WS_QUEUE_PATH": self.url, "WS_NODE": "bench"}
        super().__init__(kind.label, *SERVE, env=environment)

    def broadcast(self, count: int, size: int = 200) -> Span:
        """Start the clock when all of them are in the queue."""
        self._fill_unnoticed(make_events(count, size))
        start = now()
        self.process.send_signal(signal.SIGCONT)
        return start, now()

    def _fill_unnoticed(self, events: Events) -> None:
        import sqlite3
        for _ in range(100):
            self.process.send_signal(signal.SIGSTOP)
            try:
                return self.kind.fill(self.url, events)
            except sqlite3.OperationalError:  # it was stopped while it held the lock
                self.process.send_signal(signal.SIGCONT)
                pause()
        raise Wrong("the server holds SQLite's lock all the time")


def put_one_by_one(url: str, events: Events) -> Iterator[Span]:
    """Queue events; yield when each call began and returned."""
    from wsqueue import queue_event
    for event, payload in events:
        pause()
        start = now()
        if not queue_event(url, event, payload):
            raise Wrong(f"{url.partition(':')[0]}: queue_event returned False")
        yield start, now()


def take_all(queue: Any, count: int) -> List[Any]:
    taken: List[Any] = []
    deadline = time.monotonic() + 60
    while len(taken) < count:
        events = queue.take()
        queue.done(events)
        taken += events
        if not events:
            queue.wait(0.1)
        if time.monotonic() > deadline:
            raise Wrong(f"{len(taken)} of {count} events taken within a minute")
    return taken


def time_queue(run: Run, kind: Kind) -> Tuple[int, int]:
    """Taking all that waits; and queueing in batches of 100. Nobody serves meanwhile."""
    from wsqueue import open_queue, queue_events
    url, options = kind.new_url(), {} if kind.label == "directory" else {"node": "bench"}
    with contextlib.closing(open_queue(url, **options)) as queue:
        queue.open()
        queue.take()  # makes what the fillers write to
        kind.fill(url, make_events(run.backlog, 200))
        start = now()
        taken = take_all(queue, run.backlog)
        took = now() - start
        if [json.loads(event.text)["payload"]["n"] for event in taken] != list(range(run.backlog)):
            raise Wrong(f"{kind.label}: what was taken is not what was queued, in its order")
        batch, start = make_events(100, 200), now()
        if not all(queue_events(url, batch) for _ in range(run.batches)):
            raise Wrong(f"{kind.label}: queue_events returned False")
        return took, now() - start


def time_sends(run: Run, server: QueueServer, load: Load) -> Tuple[List[int], List[int]]:
    """From queue_event until the client has the event; and how long the calls took."""
    load.expect(run.events, every=1)
    spans = list(put_one_by_one(server.url, make_events(run.events, 200)))
    times = load.finish()
    return [came - start for (start, _), came in zip(spans, times)], [end - start for start, end in spans]


def time_backlog(run: Run, server: QueueServer, load: Load) -> int:
    """From a full queue to one client."""
    load.expect(run.backlog)
    start, _ = server.broadcast(run.backlog)
    return max(load.finish()) - start


def queues(run: Run) -> None:
    with kinds(run) as all_kinds:
        servers = [run.keep(QueueServer(kind)) for kind in all_kinds]
        loads = [run.audience(server, 1) for server in servers]
        for server, load in zip(servers, loads):
            check_order(server, load, run.events)
        sends: Dict[str, List[Any]] = {kind.label: [] for kind in all_kinds}
        drains: Dict[str, List[Any]] = {kind.label: [] for kind in all_kinds}
        # First all of one, then all of the other: a directory is slower for a while after many files went.
        for _, (server, load) in itertools.product(range(run.rounds), zip(servers, loads)):
            sends[server.label].append(time_sends(run, server, load))
        for _, (server, load) in itertools.product(range(run.rounds), zip(servers, loads)):
            drains[server.label].append((time_backlog(run, server, load), *time_queue(run, server.kind)))
        for server in servers:
            server.end()
    rows = [row_of(run, kind, sends[kind.label], drains[kind.label]) for kind in all_kinds]
    print_table(
        f"{run.rounds} rounds. {run.rounds * run.events} times from `queue_event` in one process until a client of "
        f"`wsqueue serve` has the event, 2 to 12 ms apart; {run.backlog} events of 200 bytes that wait, each an entry "
        f"of its own, until they are taken, or one client has them; {run.batches} batches of 100 events. Redis with "
        "appendfsync always, PostgreSQL with fsync.",
        "queue | to client, ms | p99 | `queue_event`, µs | p99 | taken/s | to one client/s | batched/s", rows)


def row_of(run: Run, kind: Kind, sends: List[Any], drains: List[Any]) -> List[str]:
    waits, calls = ([value for values in column for value in values] for column in zip(*sends))
    sent, took, batched = zip(*drains)
    rates = [run.backlog * 1e9 / statistics.median(took), run.backlog * 1e9 / statistics.median(sent),
             100 * run.batches * 1e9 / statistics.median(batched)]
    wanted = f"≤ {kind.most} ms" + (f", ≥ {kind.least}/s" if kind.least else "")
    holds = statistics.median(waits) <= kind.most * 1e6 and min(rates[:2]) >= kind.least
    return [kind.label, *figures(waits, 1e6), *figures(calls, 1e3, 0), *(f"{rate:.0f}" for rate in rates),
            *verdict(wanted, holds)]


# ---- plot ------------------------------------------------------------------------------------------------
# bench.csv has what bench.png shows, so that it can be drawn again.

PLOTTED: Dict[Type[Side], str] = {Ours: "tab:blue", Nchan: "tab:green", Websockets: "tab:orange"}


def measure_plot(run: Run) -> Iterator[List[Any]]:
    quiet = {run.serve("--ping-interval", 0) if side is Ours else run.side(side): side for side in PLOTTED}
    audiences = {server: run.load() for server in quiet}
    for clients in run.clients:
        grow(audiences, clients, 2)
        taken: Dict[Type[Side], List[Tuple[float, int]]] = {side: [] for side in PLOTTED}
        for _, (server, side) in itertools.product(range(run.rounds), quiet.items()):
            taken[side].append(time_event(server, audiences[server]))
        for side, rounds in taken.items():
            median, last = (statistics.median(column) / 1e6 for column in zip(*rounds))
            resident = measure_memory(run, side, clients)[1] / 1024
            yield [side.label, clients, f"{median:.3f}", f"{last:.3f}", f"{resident:.1f}"]


def draw(directory: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no display
    with open(directory / "bench.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    waits, memories = figure.subplots(1, 2)
    for side, colour in PLOTTED.items():
        mine = [row for row in rows if row["side"] == side.label]
        clients = [int(row["clients"]) for row in mine]
        for axes, column, style in (
                (waits, "median_ms", "o-"), (waits, "last_ms", "o--"), (memories, "resident_mb", "o-")):
            label = None if column == "last_ms" else side.label
            axes.plot(clients, [float(row[column]) for row in mine], style, color=colour, label=label, markersize=3)
    waits.set(yscale="log", ylabel="milliseconds",
              title="One event, until the median client has it\n(dashed: the last client)")
    memories.set(ylim=(0, None), ylabel="MB", title="Resident memory of the server,\nall clients idle")
    for axes in (waits, memories):
        axes.set(xscale="log", xlabel="connected clients")
        axes.title.set_fontsize("medium")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.legend()
    waits.yaxis.set_major_formatter("{x:,g}")
    figure.savefig(directory / "bench.png", dpi=200)


def plot(run: Run) -> None:
    if not importlib.util.find_spec("matplotlib"):
        raise Wrong("matplotlib is missing: pip install matplotlib")
    directory = Path(run.output or run.directory)
    rows = list(measure_plot(run))
    with open(directory / "bench.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["side", "clients", "median_ms", "last_ms", "resident_mb"], *rows])
    draw(directory)
    print_table(
        f"One event of 200 bytes, {run.rounds} rounds: milliseconds until the median client and the last one have it,"
        " from `queue_event`, the HTTP request (nchan) or the first `send` (websockets). Resident memory of the server"
        f" with idle clients, MB. Drawn in {directory / 'bench.png'}.",
        "side | clients | median, ms | last, ms | memory, MB", [list(map(str, row)) for row in rows])


# ---- Command line ----------------------------------------------------------------------------------------

COMMANDS = {command.__name__: command for command in (
    latency, fanout, target, burst, sustained, drain, growth, stages, memory, connect, publish, idle, deflate,
    threshold, stall, flood, resume, queues, plot)}
PROCESSES: Dict[str, Callable[..., None]] = {"side": run_side, "producer": run_producer, "hostile": run_hostile}


def file_system(directory: str) -> str:
    """Its type. On ext4 without a journal a new file takes ten times as long for minutes after many were removed."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    return max((len(point), kind) for point, kind in mounts if f"{directory}/".startswith(f"{point.rstrip('/')}/"))[1]


def print_machine() -> None:
    import wsqueue
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(f"{model.group(1) if model else platform.machine()}, {os.cpu_count()} cores, {platform.system()} "
          f"{platform.release()}, load {os.getloadavg()[0]:.2f}; queues on {file_system(tempfile.gettempdir())}")
    try:
        peers = [f"{name} {importlib.metadata.version(name)}" for name in ("websockets", "websocket-server")]
    except importlib.metadata.PackageNotFoundError as missing:
        raise Wrong(f"{missing.name} is missing: pip install websockets websocket-server") from None
    if NGINX:
        told = subprocess.run([NGINX, "-v"], stderr=subprocess.PIPE, encoding="utf-8", check=True).stderr
        peers.append(told.split()[-1])
    print(f"CPython {platform.python_version()}, wsqueue {wsqueue.__version__}, {', '.join(peers)}")


def check_descriptors(clients: Any) -> None:
    most, limit = max(clients) if isinstance(clients, list) else clients, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most + 100 > limit:
        raise Wrong(f"{most} clients need {most + 100} descriptors in each process; `ulimit -Hn` allows {limit}")


def measure(command: str, options: argparse.Namespace) -> None:
    sizes = {name: pair[options.quick] for name, pair in SIZES[command].items()}
    for name, given in vars(options).items():
        if name in sizes and given:
            sizes[name] = given if isinstance(sizes[name], list) else given[0]
    check_descriptors(sizes.get("clients", 0))
    print(f"\n## {command}", flush=True)
    run = Run({**sizes, "output": options.output or ("" if options.quick else Path(__file__).parent)})
    try:
        COMMANDS[command](run)
    finally:
        delivered = run.end()
    print(f"\n{delivered} messages delivered, none lost, nobody disconnected.", flush=True)


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in PROCESSES:
        PROCESSES[sys.argv[1]](*sys.argv[2:])
        return
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("command", choices=[*COMMANDS, "all"])
    parser.add_argument("--quick", action="store_true")
    for name in sorted({name for sizes in SIZES.values() for name in sizes}):
        parser.add_argument(f"--{name}", type=lambda text: [int(number) for number in text.split(",")])
    parser.add_argument("--output", metavar="DIRECTORY", help="of bench.png and bench.csv (tests)")
    parser.add_argument("--from-csv", action="store_true", help="plot: draw what bench.csv holds, without measuring")
    options = parser.parse_args()
    if options.from_csv:
        draw(Path(options.output or Path(__file__).parent))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that `finally` ends what was started
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # inherited by every process started here
    try:
        print_machine()
        for command in COMMANDS if options.command == "all" else [options.command]:
            measure(command, options)
    except (Wrong, TimeoutError) as problem:
        sys.exit(f"bench.py: {problem}")


if __name__ == "__main__":
    main()
