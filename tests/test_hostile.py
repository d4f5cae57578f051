"""No client can hurt another: what strangers may try, and that a client next to them does not notice."""

import itertools
import os
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from clients import (
    BINARY,
    CLOSE,
    PATIENCE,
    PING,
    PONG,
    TEXT,
    RawClient,
    client_frame,
    close_payload,
    enter,
    everybody_has_left,
    exchange,
    frame_head,
    handshake,
    in_threads,
    open_socket,
    parse_answer,
    read_to_end,
    serving,
    still_reaches,
)
from helpers import ROOT, eventually, spawn_server
from test_processes import connected, many_descriptors, reading  # noqa: F401 - one is a fixture
from wsqueue import CALLBACK_THREADS, HALF_OPEN, HEAD_BYTES, INBOX_MESSAGES, SPARE_FILES, queue_event

KIB = 1024
CONTINUATION = 0x0
RSV1, RSV2, RSV3 = 0x40, 0x20, 0x10
FOR_EVER = ("--handshake-timeout", 3600)  # what makes room is not the clock


@pytest.fixture
def directory(tmp_path):
    """A queue directory that does not exist yet."""
    return str(tmp_path / "queue")


# ---- What it costs the server, as the kernel sees it -------------------------------------------------------


def count(pid, what):
    """How many threads ("task") or descriptors ("fd") a process has."""
    return len(os.listdir(f"/proc/{pid}/{what}"))


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory(pid):
    """The most that was ever resident, in bytes."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * KIB


NUMBERS = itertools.count()


def all_get_the_next_event(directory, *clients):
    """An event that is queued now is the next message of each of them."""
    number = next(NUMBERS)
    assert queue_event(directory, "e", number)
    for client in clients:
        assert client.payloads(1) == [number]


def few_descriptors(number):
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))}


@contextmanager
def silent_connections(url, number):
    """Connections that never say a word, or only half a request."""
    with ExitStack() as stack:
        for index in range(number):
            sock = stack.enter_context(open_socket(url))
            if index % 2:
                try:
                    sock.sendall(handshake()[:40])
                except OSError:
                    continue  # it had to make room already
        yield


THREADS = 8  # what a server without handlers and callbacks may have; it has four or five


# ---- Silent and slow connections ---------------------------------------------------------------------------


@pytest.mark.usefixtures("many_descriptors")
def test_five_thousand_silent_connections_stop_nobody(directory):
    """A client gets in and gets its event, no thread is spent on the silent, and their descriptors come back."""
    with spawn_server("--queue", directory, *FOR_EVER) as server, RawClient(server.url) as witness:
        before = count(server.pid, "fd")
        with silent_connections(server.url, 5000):
            eventually(lambda: count(server.pid, "fd") > HALF_OPEN // 2, what="the silent to be accepted")
            with connected(server.url) as client:
                all_get_the_next_event(directory, witness, client)
            assert count(server.pid, "task") <= THREADS
            eventually(lambda: count(server.pid, "fd") <= before + HALF_OPEN + 100, what="the oldest to make room")
        eventually(lambda: count(server.pid, "fd") <= before + 1, what="the descriptors of the silent to be free")
        all_get_the_next_event(directory, witness)


@pytest.mark.parametrize("number", [300, 1000])
def test_the_silent_make_room_where_descriptors_are_few(directory, number):
    """Of 256 a quarter is for handshakes: however many come at once, the next clients get in."""
    with spawn_server("--queue", directory, *FOR_EVER, **few_descriptors(256)) as server:
        with silent_connections(server.url, number), ExitStack() as stack:
            clients = [stack.enter_context(connected(server.url)) for _ in range(20)]
            all_get_the_next_event(directory, *clients)
            eventually(lambda: count(server.pid, "fd") <= 256 // 4 + 40, what="no more than a quarter of the silent")
        assert count(server.pid, "task") <= THREADS


def drip(sockets):
    """Send a byte to each, for as long as it is taken; returns what has been answered."""
    answers = []
    while sockets:
        for sock in list(sockets):
            try:
                sock.sendall(b"x")
                sock.settimeout(0.001)
                answers.append(parse_answer(sock.recv(4096)))
            except socket.timeout:
                continue
            except OSError:
                answers.append(None)  # a byte that crossed the answer can turn it into a reset
            sockets.remove(sock)
    return answers


def test_requests_that_drip_stop_nobody(directory):
    """A hundred that send a byte now and then: all are ended at their deadline, and meanwhile others come and go."""
    with spawn_server("--queue", directory, "--handshake-timeout", 1) as server, ExitStack() as stack:
        witness = stack.enter_context(RawClient(server.url))
        sockets = [stack.enter_context(open_socket(server.url)) for _ in range(100)]
        for sock in sockets:
            sock.sendall(b"GET / HTTP/1.1\r\nX: ")
        with ThreadPoolExecutor(1) as pool:
            dripping = pool.submit(drip, sockets)
            while not dripping.done():
                all_get_the_next_event(directory, witness)
                with RawClient(server.url) as client:
                    assert client.close() == 1000
            answers = dripping.result()
        assert len(answers) == 100 and {answer.status for answer in answers if answer} == {408}
        assert count(server.pid, "task") <= THREADS


# ---- As many clients as may --------------------------------------------------------------------------------


def test_one_client_too_many_is_told_so():
    """503 with Retry-After, and a sentence that names the setting; when a client leaves, the next one gets in."""
    with serving(max_clients=2) as server, RawClient(server.url) as first:
        with RawClient(server.url):
            answer = exchange(server.url, handshake())
            assert answer.status == 503 and int(answer.headers["retry-after"]) > 0
            assert "max_clients" in answer.body and "2 clients" in answer.body
        with connected_when_let_in(server.url) as second:
            assert still_reaches(server, first) and still_reaches(server, second)


def connected_when_let_in(url):
    """A client that tries again until it is not refused."""

    def attempt():
        try:
            return RawClient(url)
        except AssertionError:
            return None

    return eventually(attempt, what="a place")


def test_a_rush_does_not_exceed_the_limit():
    """Of 200 that come at the same time, in 20 threads, exactly as many get in as may."""
    most = 30
    with serving(max_clients=most) as server, ExitStack() as stack:
        start = threading.Barrier(20)

        def come(_):
            start.wait(PATIENCE)
            sockets = [stack.enter_context(open_socket(server.url)) for _ in range(10)]
            for sock in sockets:
                sock.sendall(handshake())
            return [sock.recv(KIB)[:12] for sock in sockets]

        with ThreadPoolExecutor(20) as pool:
            answers = [answer for answers in pool.map(come, range(20)) for answer in answers]
        assert server.get_connection_count() == most
        assert answers.count(b"HTTP/1.1 101") == most
        assert answers.count(b"HTTP/1.1 503") == 200 - most


# ---- No descriptor left ------------------------------------------------------------------------------------


def knock(url, over):
    """Try to connect, and once connected leave, again and again."""
    while not over.is_set():
        try:
            with open_socket(url) as sock:
                sock.sendall(handshake())
                sock.recv(1)
        except OSError:
            continue


def test_want_of_descriptors_costs_neither_cpu_nor_log_and_ends(directory):
    """Who comes is turned away while there are none, said once; who is there is served; then others get in again."""
    with spawn_server("--queue", directory, **few_descriptors(64)) as server, RawClient(server.url) as witness:
        with ExitStack() as stack:
            for _ in range(64):
                stack.enter_context(open_socket(server.url)).sendall(handshake())
            eventually(lambda: "too many clients" in server.stderr_text(), what="somebody to be turned away")
            with in_threads(knock, server.url):
                begun, since = cpu_seconds(server.pid), time.monotonic()
                while time.monotonic() < since + 1:
                    all_get_the_next_event(directory, witness)
                    time.sleep(0.05)  # the events are not to be what costs
                assert cpu_seconds(server.pid) - begun < 0.5 * (time.monotonic() - since)
        with connected(server.url) as client:
            all_get_the_next_event(directory, witness, client)
        assert server.stderr_text().count("cannot accept") == 1


def test_a_server_at_its_limit_does_not_fill_the_log(directory):
    """Clients that come and go there find now a place and now none; that is one line, and not one for each."""
    with spawn_server("--queue", directory, **few_descriptors(64)) as server, ExitStack() as stack:
        for _ in range(64 - SPARE_FILES - count(server.pid, "fd") - 2):
            stack.enter_context(RawClient(server.url))
        with in_threads(knock, server.url):
            for _ in range(10):
                with connected(server.url):
                    pass
        assert server.stderr_text().count("cannot accept") == 1


# ---- What a client may say, and what it gets for it ----------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """One server for all attacks, which soon asks the silent whether they live."""
    with serving(ping_interval=0.3, ping_timeout=0.5) as server:
        yield server


@pytest.fixture
def witness(server):
    """A client that is there while others attack; at the end it has missed nothing, and the next one is let in."""
    with reading(server.url, "/witness") as reader:
        yield reader
        server.broadcast("after", "the attack")
        eventually(lambda: reader.messages, what="an event for the witness")
        assert reader.error is None
        with RawClient(server.url) as newcomer:
            assert still_reaches(server, newcomer)
    everybody_has_left(server)


def deflate(data):
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]


BOMB = deflate(bytes(32 * KIB * KIB))  # 32 MiB in 32 KiB
WITH_DEFLATE = {"Sec_WebSocket_Extensions": "permessage-deflate"}


def fragments(payload, size, first=BINARY):
    """A message in frames of `size` bytes, the last of them still to come."""
    pieces = [payload[start : start + size] for start in range(0, len(payload), size)]
    opcodes = [first, *[CONTINUATION] * len(pieces)]
    return b"".join(client_frame(opcode, piece, fin=False) for opcode, piece in zip(opcodes, pieces))


# name: what is sent behind the handshake, and the close code that answers it. Some more are in test_connection.py: the
# first frame of each kind that the protocol does not know, and plain floods.
BEGUN = client_frame(TEXT, b"a", fin=False)
BAD_CODES = (0, 999, 1004, 1006, 1015, 1016, 2999, 5000, 65535)
PLAIN_ATTACKS = {
    "fragments without end": (fragments(bytes(80 * KIB), KIB), 1009),
    "a fragment that is more than was left": (fragments(bytes(60 * KIB), 60 * KIB) + frame_head(0, 2**40), 1009),
    "fragments without a byte": (BEGUN + client_frame(CONTINUATION, fin=False) * 5000, 1008),
    "fragments of a byte": (fragments(bytes(5000), 1), 1008),
    "a message inside another": (BEGUN + client_frame(TEXT, b"b"), 1002),
    "pings between fragments": (BEGUN + client_frame(PING, b"b") * 3000, 1008),
    "pings of the largest size": (client_frame(PING, bytes(125)) * 3000, 1008),
    "a ping in fragments": (client_frame(PING, b"a", fin=False), 1002),
    "a close frame of one byte": (client_frame(CLOSE, b"\x03"), 1002),
    "a close frame whose reason is not UTF-8": (client_frame(CLOSE, close_payload(1000) + b"\xff"), 1007),
    **{f"close code {code}": (client_frame(CLOSE, close_payload(code)), 1002) for code in BAD_CODES},
    "RSV2": (client_frame(TEXT | RSV2, b"a"), 1002),
    "RSV3": (client_frame(TEXT | RSV3, b"a"), 1002),
    "compressed and not agreed on": (client_frame(TEXT | RSV1, deflate(b"a")), 1002),
}
COMPRESSED_BEGUN = client_frame(TEXT | RSV1, deflate(b"a"), fin=False)
COMPRESSED_ATTACKS = {
    "RSV2 with compression": (client_frame(TEXT | RSV1 | RSV2, deflate(b"a")), 1002),
    "a compressed ping": (client_frame(PING | RSV1, deflate(b"a")), 1002),
    "a continuation that says it is compressed": (COMPRESSED_BEGUN + client_frame(CONTINUATION | RSV1, b"b"), 1002),
    "compressed garbage": (client_frame(BINARY | RSV1, b"\xff" * 100), 1007),
    "compressed text that is not UTF-8": (client_frame(TEXT | RSV1, deflate(b"\xff" * 100)), 1007),
    "a bomb": (client_frame(BINARY | RSV1, BOMB), 1009),
    "a bomb of text": (client_frame(TEXT | RSV1, BOMB), 1009),
    "a bomb in fragments": (fragments(BOMB, 100, BINARY | RSV1), 1009),
    "a bomb that announces 2^40 bytes": (frame_head(0xC2, 2**40) + bytes(KIB), 1009),
    "small compressed messages without end": (client_frame(TEXT | RSV1, deflate(b"a" * 100)) * 3000, 1008),
}
ATTACKS = {
    **{name: (*attack, {}) for name, attack in PLAIN_ATTACKS.items()},
    **{name: (*attack, WITH_DEFLATE) for name, attack in COMPRESSED_ATTACKS.items()},
}


def closing_code(client):
    """The code of the close frame; pongs and what is broadcast come before it."""
    while True:
        opcode, payload = client.read_frame()
        if opcode == CLOSE:
            return struct.unpack("!H", payload[:2])[0]
        assert opcode in (PING, PONG, TEXT)


@pytest.mark.usefixtures("witness")
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_answered_with_its_close_code(server, name):
    """The attacker learns why, then its stream ends; the witness and the next client are served."""
    data, code, headers = ATTACKS[name]
    with RawClient(server.url, **headers) as attacker:
        attacker.socket.sendall(data)
        assert closing_code(attacker) == code
        assert attacker.ended()


STALLS = {
    "in a frame's head": frame_head(0x82, 100)[:1],
    "in a frame that announced more": frame_head(0x82, 100) + bytes(14),
    "between fragments": client_frame(TEXT, b"a", fin=False),
    "in a compressed frame": client_frame(BINARY | RSV1, deflate(bytes(range(256))))[:100],
}


@pytest.mark.usefixtures("witness")
def test_who_stalls_is_pinged_and_closed(server):
    """Half a message, wherever it ends, does not keep a connection alive."""
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(server.url, **WITH_DEFLATE)) for _ in STALLS]
        for client, data in zip(clients, STALLS.values()):
            client.socket.sendall(data)
        for client in clients:
            assert client.read_frame() == (PING, b"")
            assert client.ended()


def heads_that_grow():
    yield "in one line", [handshake()[:-2] + b"X-Filler: ", *[b"x" * 100] * (HEAD_BYTES // 100)]
    yield "in many lines", [handshake()[:-2], *[b"X-Filler: x\r\n"] * (HEAD_BYTES // 10)]
    yield "before the first line ends", [b"GET /", *[b"x" * 100] * (HEAD_BYTES // 100 + 1)]


HEADS = dict(heads_that_grow())


@pytest.mark.usefixtures("witness")
@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_grows_beyond_the_limit_is_refused(server, name):
    """In whatever pieces it comes; one byte less than the limit is a request like any other."""
    with open_socket(server.url) as sock:
        for piece in HEADS[name]:
            sock.sendall(piece)
        assert parse_answer(read_to_end(sock)).status == 431


@pytest.mark.parametrize("more, status", [(0, 101), (1, 431)])
def test_the_limit_of_a_head_is_exact(server, more, status):
    """HEAD_BYTES without the blank line are taken, and no more."""
    request = handshake(X_Filler="")[:-4]
    with open_socket(server.url) as sock:
        sock.sendall(request + b"x" * (HEAD_BYTES + more - len(request)) + b"\r\n\r\n")
        assert sock.recv(KIB).startswith(b"HTTP/1.1 %d " % status)


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.usefixtures("witness")
def test_resets_at_any_moment_are_no_matter(server):
    """Before the request, within it, behind it, amid a frame: nothing of the connection stays."""
    stream = handshake("/echo") + client_frame(TEXT, bytes(1000))
    for size in range(0, len(stream), 7):
        sock = open_socket(server.url)
        sock.sendall(stream[:size])
        reset(sock)
    eventually(lambda: server.get_connection_count() == 1, what="only the witness to be there")


# ---- Floods where somebody listens -------------------------------------------------------------------------


def push(client, data, over):
    """Send the same again and again, until the socket takes no more or the event is set; returns how often it did."""
    client.socket.settimeout(0.3)
    sent = 0
    try:
        while not over.is_set():
            client.socket.sendall(data)
            sent += 1
    except OSError:  # a timeout: the server reads no more
        return sent
    return sent


@pytest.mark.parametrize("kind", ["handlers", "callbacks"])
def test_the_messages_that_wait_are_bounded(kind):
    """However small they are: INBOX_MESSAGES, and then the connection is not even parsed; all arrive, in order."""
    release, seen = threading.Event(), []

    def consume(conn, message=None):
        release.wait(3 * PATIENCE)
        seen.extend([message] if message else conn)

    texts = [f"{number:06}" for number in range(20_000)]
    with serving(**{kind: {"/": consume}}) as server:
        client, conn = enter(server)
        with client, RawClient(server.url, "/other") as other:
            client.socket.sendall(b"".join(client_frame(TEXT, text.encode()) for text in texts))
            eventually(lambda: conn._inbox and conn._inbox.full, what="a full inbox")
            assert still_reaches(server, other)
            assert len(conn._inbox._messages) == INBOX_MESSAGES
            release.set()
            eventually(lambda: len(seen) == len(texts), what="all messages")
    assert seen == texts


FLOODERS = CALLBACK_THREADS + 8


def test_floods_do_not_keep_another_clients_callback_from_running():
    """With more floods than threads for callbacks, each client still has its turn."""
    over = threading.Event()
    callbacks = {"/echo": lambda conn, message: conn.send(message), "/slow": lambda *_: over.wait(0.01)}
    with serving(callbacks=callbacks) as server, ExitStack() as stack, ThreadPoolExecutor(FLOODERS) as pool:
        flooders = [stack.enter_context(RawClient(server.url, "/slow")) for _ in range(FLOODERS)]
        floods = [pool.submit(push, flooder, client_frame(TEXT, b"x") * 100, over) for flooder in flooders]
        try:
            with RawClient(server.url, "/echo") as client:
                for number in range(10):
                    client.send(str(number))
                    assert client.recv() == str(number)
        finally:
            over.set()
        assert all(flood.result(PATIENCE) for flood in floods)


def test_bombs_cost_the_server_no_memory(directory):
    """Twenty of them at a time inflate to 640 MiB, and the server never holds but a fraction of one."""
    with spawn_server("--queue", directory) as server, RawClient(server.url) as witness, ExitStack() as stack:
        before = peak_memory(server.pid)
        bombers = [stack.enter_context(RawClient(server.url, **WITH_DEFLATE)) for _ in range(20)]
        for bomber in bombers:
            bomber.socket.sendall(client_frame(BINARY | RSV1, BOMB))
        for bomber in bombers:
            assert closing_code(bomber) == 1009
        assert peak_memory(server.pid) - before < 16 * KIB * KIB
        all_get_the_next_event(directory, witness)


# ---- A machine that vanishes -------------------------------------------------------------------------------

REMOTE = """
import sys
from clients import RawClient

client = RawClient(sys.argv[1])
while True:
    print(client.recv(), flush=True)
"""


def run(*command):
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=PATIENCE)


class Machine:
    """Another machine, as far as the network goes: a namespace with a cable to this one, whose end here is `host`."""

    def __init__(self):
        number = os.getpid() % 2**15  # of the subnets of four addresses in 198.18.0.0/15, which is for such tests
        net = (198 << 24 | 18 << 16) + 4 * number
        self.host, self.address = (socket.inet_ntoa(struct.pack("!I", net + last)) for last in (1, 2))
        self.name, self.cable, self.far_end = (f"wsq{kind}{os.getpid()}" for kind in "mab")

    def build(self):
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", self.cable, "type", "veth", "peer", "name", self.far_end, "netns", self.name)
        run("ip", "address", "add", f"{self.host}/30", "dev", self.cable)
        run("ip", "link", "set", self.cable, "up")
        run("ip", "-n", self.name, "address", "add", f"{self.address}/30", "dev", self.far_end)
        run("ip", "-n", self.name, "link", "set", self.far_end, "up")

    def vanish(self):
        """Whoever runs there goes on running, and no packet comes or goes."""
        run("ip", "-n", self.name, "link", "set", self.far_end, "down")

    def remove(self):
        for command in (("link", "delete", self.cable), ("netns", "delete", self.name)):
            subprocess.run(["ip", *command], check=False, capture_output=True, timeout=PATIENCE)

    @contextmanager
    def client(self, url, output):
        """A client that runs there, answers pings and prints what it gets; it is killed when the block ends."""
        command = ["ip", "netns", "exec", self.name, sys.executable, "-c", REMOTE, url]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        with open(output, "wb") as out:
            process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)  # ip becomes python
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def machine():
    """A second machine; it takes root, the ip command, and a kernel that lets us."""
    if not shutil.which("ip"):
        pytest.skip("there is no ip command (iproute2)")
    machine = Machine()
    try:
        try:
            machine.build()
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"cannot make a network namespace: {error} {getattr(error, 'stderr', b'')!r}")
        yield machine
    finally:
        machine.remove()


def queue(directory, number, size):
    return all(queue_event(directory, "e", "x" * size) for _ in range(number))


def metrics(url):
    """The samples of GET /metrics, by name and label."""
    lines = exchange(url, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").body.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


# Not so patient as a server usually is, but for what may wait for a client.
SETTINGS = {"ping-interval": 0.5, "ping-timeout": 0.5, "send-timeout": 1, "outbox-bytes": 2**30, "close-timeout": 0.5}
IMPATIENT = [text for name, value in SETTINGS.items() for text in (f"--{name}", value)]


@contextmanager
def far_away(machine, directory, output):
    """The server, a client on the other machine that gets events, and a witness on this one."""
    with spawn_server("--queue", directory, "--host", machine.host, "--monitoring", "on", *IMPATIENT) as server:
        with reading(server.url) as witness, machine.client(server.url, output):
            eventually(lambda: metrics(server.url)["wsqueue_clients"] == 2, what="the client from far away")
            assert queue(directory, 1, 10)
            eventually(lambda: output.read_bytes().count(b"\n") == 1, what="an event that went far")
            yield server, witness


@pytest.mark.parametrize("size, events, why", [(10, 3, "ping_timeout"), (100 * KIB, 100, "send_timeout")])
def test_a_client_whose_machine_vanishes_is_gone_and_counted(directory, machine, tmp_path, size, events, why):
    """Silent or in the middle of a broadcast: no packet says that it has left, the others get everything meanwhile."""
    with far_away(machine, directory, tmp_path / "output") as (server, witness):
        machine.vanish()
        assert queue(directory, events, size)
        eventually(lambda: metrics(server.url)["wsqueue_clients"] == 1, what="the server to notice")
        assert metrics(server.url)[f'wsqueue_closed_total{{reason="{why}"}}'] == 1
        assert queue(directory, 1, size)
        eventually(lambda: len(witness.messages) == 1 + events + 1, what="all events at the witness")
        assert witness.error is None
