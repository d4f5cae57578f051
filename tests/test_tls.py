"""Section 9, TLS: wss:// from the ClientHello to close_notify, over real sockets and in real processes."""

import gc
import hashlib
import itertools
import json
import logging
import os
import selectors
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
import urllib.request
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme
import websocket
import websockets.sync.client
from cryptography.hazmat.primitives import serialization

import wsqueue
from clients import (
    CLOSE,
    LIBRARIES,
    PATIENCE,
    TEXT,
    RawClient,
    Reader,
    Wire,
    close_payload,
    everybody_has_left,
    handshake,
    open_socket,
    parse_answer,
    read_to_end,
    serving,
    still_reaches,
    use_websockets,
)
from helpers import TIME_UNIT, eventually, run_cli, settled, spawn_server
from wsqueue import Connection, SettingError, WebSocketServer, encode_frame, queue_event, queue_events, send_to_all

KIB = 1024
RECORD = 16 * KIB  # the most that one TLS record holds
AUTHORITY, STRANGER = trustme.CA(), trustme.CA()


def trusting(authority=AUTHORITY):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


TRUSTING = trusting()


def write_certificate(directory, authority=AUTHORITY):
    """Issue a certificate for this machine; returns the settings that name its files."""
    issued = authority.issue_cert("127.0.0.1", "localhost")
    cert, key = directory / "cert.pem", directory / "key.pem"
    cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    return {"tls_cert": str(cert), "tls_key": str(key)}


def options(certificate):
    """The same for the command line."""
    return ["--tls-cert", certificate["tls_cert"], "--tls-key", certificate["tls_key"]]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Settings of a server whose certificate TRUSTING clients accept."""
    return write_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def authority_file(tmp_path_factory):
    """What SSL_CERT_FILE should name."""
    path = tmp_path_factory.mktemp("authority") / "ca.pem"
    AUTHORITY.cert_pem.write_to_path(path)
    return str(path)


@pytest.fixture(scope="module")
def server(certificate):
    """One server for all that need no settings of their own."""
    with serving(**certificate) as server:
        yield server


@pytest.fixture
def directory(tmp_path):
    """A queue directory that does not exist yet."""
    return str(tmp_path / "queue")


@pytest.fixture
def witness(server):
    """A client that is there while somebody else misbehaves, and is served afterwards, like everyone who comes."""
    with SecureClient(server.url) as client:
        yield client
        assert still_reaches(server, client)
        with SecureClient(server.url) as newcomer:
            assert still_reaches(server, newcomer)


def open_tls(url, context=TRUSTING, receive_buffer=None):
    """A connected TLS socket; an end without close_notify raises ssl.SSLEOFError instead of looking like one with."""
    sock = open_socket(url, receive_buffer)
    return context.wrap_socket(sock, server_hostname=urlsplit(url).hostname, suppress_ragged_eofs=False)


class SecureClient(RawClient):
    """A client that does nothing by itself, over TLS."""

    def __init__(self, url, target="/", *, context=TRUSTING, receive_buffer=None, **headers):
        Wire.__init__(self, open_tls(url, context, receive_buffer), handshake(target, **headers), 101)


def clients_arrived(server, count):
    eventually(lambda: server.get_connection_count() == count, what=f"{count} clients")


def louder_than_info(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]


def texts(caplog):
    return [record.getMessage() for record in caplog.records]


# ---- What works without TLS works with it ------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
def test_clients_of_other_libraries_talk_over_tls(certificate, authority_file, library, monkeypatch):
    """Whoever verifies the certificate can talk: text and binary of every length class, to 60 records and more."""
    monkeypatch.setenv("SSL_CERT_FILE", authority_file)
    settings = {"max_message_bytes": 1_000_000, **certificate}
    with serving(callbacks={"/": lambda conn, message: conn.send(message)}, **settings) as server:
        assert server.url.startswith("wss://127.0.0.1:")
        with LIBRARIES[library](server.url) as client:
            for size in (0, 1, 125, 126, RECORD - 1, RECORD, RECORD + 1, 65535, 65536, 1_000_000):
                client.send("ä" * (size // 2))
                assert client.recv() == "ä" * (size // 2)
                client.send(os.urandom(size))
                assert len(client.recv()) == size
        everybody_has_left(server)


# Not asyncio's TLS, which keeps its alert to itself: it looks like any client that goes away.
@pytest.mark.parametrize("connect", [websockets.sync.client.connect, websocket.create_connection])
def test_a_client_that_does_not_trust_the_certificate_does_not_get_in(server, tmp_path, connect, monkeypatch, caplog):
    """It is the client that refuses; the server's log has a line, at INFO."""
    caplog.set_level(logging.INFO, "wsqueue")
    STRANGER.cert_pem.write_to_path(tmp_path / "stranger.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "stranger.pem"))
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(server.url)
    eventually(lambda: [text for text in texts(caplog) if "left during the handshake" in text], what="a log line")
    assert louder_than_info(caplog) == []


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_events_larger_than_a_record_arrive_whole(certificate, directory, compression):
    """Compressed or not, of one record or of many, in order."""
    payloads = [os.urandom(size).hex() for size in (100, RECORD // 2, RECORD, 5 * RECORD, 200_000, 100)]
    with serving(queue=directory, **certificate) as server:
        with use_websockets(server.url, ssl=TRUSTING, compression=compression, max_size=None) as client:
            agreed = client.response.headers.get("Sec-WebSocket-Extensions", "")
            assert agreed.startswith("permessage-deflate") == (compression is not None)
            clients_arrived(server, 1)
            assert queue_events(directory, [("large", payload) for payload in payloads])
            assert [json.loads(client.recv())["payload"] for _ in payloads] == payloads


def test_a_request_in_pieces_is_taken(server):
    """One byte of it in each record."""
    with open_tls(server.url) as sock:
        for byte in handshake():
            sock.sendall(bytes((byte,)))
        assert sock.recv(100).startswith(b"HTTP/1.1 101 ")


def test_a_handler_talks_over_tls(certificate):
    """A handler in recv() gets what comes in one record with the request, and what comes later."""
    heard = []
    with serving({"/": heard.extend}, **certificate) as server, SecureClient(server.url) as client:
        for number in range(3):
            client.send(str(number))
        eventually(lambda: heard == ["0", "1", "2"])
        assert client.close() == 1000


def test_pages_are_served_over_https(server):
    """A monitoring page is https:// on a port that speaks TLS."""
    url = server.url.replace("wss://", "https://")
    with urllib.request.urlopen(url + "/healthz", timeout=PATIENCE, context=TRUSTING) as answer:
        assert json.load(answer)["status"] == "ok"


# ---- Versions ----------------------------------------------------------------------------------------------


def speaking(version):
    """A context of one version of TLS, and no other; the old ones OpenSSL has only on the lowest security level."""
    context = trusting()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    if version < ssl.TLSVersion.TLSv1_2:
        context.set_ciphers("ALL:@SECLEVEL=0")
    return context


@pytest.mark.parametrize("version, name", [(ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")])
def test_both_versions_in_use_are_spoken(server, version, name):
    """Clients of TLS 1.2 and of TLS 1.3 are served."""
    with SecureClient(server.url, context=speaking(version)) as client:
        assert client.socket.version() == name
        assert still_reaches(server, client)


@pytest.mark.usefixtures("witness")
def test_an_old_version_is_refused(server, caplog):
    """A client that has nothing later than TLS 1.1 is told that it is the version (RFC 8996)."""
    with pytest.raises(ssl.SSLError) as refusal:
        open_tls(server.url, speaking(ssl.TLSVersion.TLSv1_1))
    assert refusal.value.reason == "TLSV1_ALERT_PROTOCOL_VERSION"
    assert louder_than_info(caplog) == []


@pytest.mark.usefixtures("witness")
def test_a_client_may_not_renegotiate(server, authority_file):
    """A handshake costs the server more than the client: one is all that a connection has."""
    command = ["openssl", "s_client", "-tls1_2", "-CAfile", authority_file, "-connect", server.url[len("wss://"):]]
    done = subprocess.run(command, input=b"R\n", capture_output=True, timeout=30 * TIME_UNIT, check=False)
    assert b"RENEGOTIATING" in done.stdout + done.stderr
    assert b"no renegotiation" in done.stderr


# ---- The handshake's deadline ------------------------------------------------------------------------------


def client_hello():
    """The first flight of a TLS client."""
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        TRUSTING.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1").do_handshake()
    return outgoing.read()


HELLO = client_hello()
BEGUN = {"nothing": b"", "part of a record's head": HELLO[:3], "half a ClientHello": HELLO[:len(HELLO) // 2]}


@pytest.mark.parametrize("begun", BEGUN)
def test_a_handshake_that_does_not_go_on_is_ended(certificate, begun, caplog):
    """After handshake_timeout it is cut off; others connect meanwhile and stay."""
    with serving(handshake_timeout=0.3, **certificate) as server, open_socket(server.url) as silent:
        silent.sendall(BEGUN[begun])
        with SecureClient(server.url) as client:
            assert still_reaches(server, client)
            assert read_to_end(silent) == b""
            assert still_reaches(server, client)
    assert louder_than_info(caplog) == []


def test_a_client_hello_without_the_rest_is_ended(certificate):
    """The server's own flight is out then, and the deadline is still that of the whole."""
    with serving(handshake_timeout=0.3, **certificate) as server, open_socket(server.url) as silent:
        silent.sendall(HELLO)
        assert read_to_end(silent)[:1] == b"\x16"  # a handshake record, the ServerHello


def test_a_tls_client_that_sends_no_request_is_told(certificate):
    """Who has shaken hands gets the 408 over TLS, and a close_notify."""
    with serving(handshake_timeout=0.3, **certificate) as server, open_tls(server.url) as silent:
        assert parse_answer(read_to_end(silent)).status == 408


def test_a_handshake_that_drips_ends_at_its_deadline(certificate):
    """However often a byte of it comes."""
    with serving(handshake_timeout=0.5, **certificate) as server, open_socket(server.url) as slow:
        slow.settimeout(0.02)
        deadline = time.monotonic() + PATIENCE
        for byte in itertools.chain(HELLO, itertools.repeat(0)):
            assert time.monotonic() < deadline, "it may drip for ever"
            try:
                slow.sendall(bytes((byte,)))
                if slow.recv(1000) == b"":
                    break
            except socket.timeout:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break


def test_200_handshakes_that_do_not_go_on_cost_no_thread(certificate):
    """They wait in a selector: the threads are as many as before, clients come and go, and at the end all are cut."""
    with serving(handshake_timeout=3.0, **certificate) as server, ExitStack() as stack:
        threads = threading.active_count()
        silent = [stack.enter_context(open_socket(server.url)) for _ in range(200)]
        for sock, begun in zip(silent, itertools.cycle(BEGUN.values())):
            sock.sendall(begun)
        with SecureClient(server.url) as client:  # accepted after them
            assert still_reaches(server, client)
            assert threading.active_count() == threads
        assert [read_to_end(sock) for sock in silent] == [b""] * 200


def test_the_end_of_a_silent_handshake_is_tried_once(certificate, monkeypatch):
    """No answer can be sent without keys; a server that waited until it can would be busy with nothing else."""
    flushed, flush = [], Connection.flush
    monkeypatch.setattr(Connection, "flush", lambda conn: flushed.append(conn) or flush(conn))
    with serving(handshake_timeout=0.2, **certificate) as server, ExitStack() as stack:
        silent = [stack.enter_context(open_socket(server.url)) for _ in range(10)]
        assert [read_to_end(sock) for sock in silent] == [b""] * 10
    assert len(flushed) <= 20


# ---- Strangers ---------------------------------------------------------------------------------------------


def whatever_comes(sock):
    """To the end of the stream, or to its reset."""
    with suppress(ConnectionResetError):
        read_to_end(sock)


PLAIN = {
    "ws://": handshake(),
    "http://": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    "a form": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n1",
}


@pytest.mark.usefixtures("witness")
@pytest.mark.parametrize("name", PLAIN)
def test_plain_http_is_named_in_the_log(server, name, caplog):
    """It ends, and the log says in a user's words what came, and what to use instead; at INFO."""
    caplog.set_level(logging.INFO, "wsqueue")
    with open_socket(server.url) as sock:
        sock.sendall(PLAIN[name])
        whatever_comes(sock)
    said = eventually(lambda: [text for text in texts(caplog) if "plain HTTP" in text], what="a log line")
    assert len(said) == 1 and "wss://" in said[0] and "SSL" not in said[0]
    assert louder_than_info(caplog) == []


@pytest.mark.usefixtures("witness")
@pytest.mark.parametrize("data", [b"\x16\x03\x01", b"SSH-2.0-OpenSSH_9\r\n", bytes(range(256)) * 1000],
                         ids=["the beginning of a record", "words", "binary"])
def test_what_is_no_handshake_is_ended(server, data, caplog):
    """No trace above INFO, nor of OpenSSL's in the stream of the next."""
    with open_socket(server.url) as sock:
        with suppress(OSError):  # it may be over before all is sent
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        whatever_comes(sock)
    assert louder_than_info(caplog) == []


def beneath(sock):
    """The TCP socket under a TLS socket."""
    return socket.socket(fileno=os.dup(sock.fileno()))


def send_garbage(sock):
    """A record that no key has made; the server says so and ends."""
    with beneath(sock) as tcp:
        tcp.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(OSError):  # an alert or a reset
        read_to_end(sock)


def send_half_a_record(sock):
    """An end in the middle of a record."""
    with beneath(sock) as tcp:
        tcp.sendall(b"\x17\x03\x03\x00\x20" + bytes(5))


def vanish(sock):
    """No close_notify, no close frame: FIN."""


def reset(sock):
    """Not even that."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def close_properly(sock):
    """close_notify, which the server has to answer (RFC 8446, section 6.1)."""
    assert sock.unwrap().recv(1) == b""


DEPARTURES = (send_garbage, send_half_a_record, vanish, reset, close_properly)


def held():
    """Descriptors and threads of this process."""
    return len(os.listdir("/dev/fd")), threading.active_count()


def held_to_stay():
    """The same, without what an earlier test has left to the collector, or to a thread that is about to end."""
    gc.collect()
    return settled(held)


def nothing_is_left(before):
    eventually(lambda: held() == before, what="descriptors and threads")


@pytest.mark.usefixtures("witness")
@pytest.mark.parametrize("leave", DEPARTURES)
def test_a_client_that_leaves_its_own_way_leaves_nothing_behind(server, leave, caplog):
    """The client is forgotten, and its descriptor and whatever ran for it are free."""
    clients_arrived(server, 1)
    before = held_to_stay()

    def enter():
        client = SecureClient(server.url)
        clients_arrived(server, 2)
        return client.socket

    for _ in range(20):
        with enter() as sock:
            leave(sock)
        clients_arrived(server, 1)
    nothing_is_left(before)
    assert louder_than_info(caplog) == []


@pytest.mark.usefixtures("witness")
@pytest.mark.parametrize("leave", DEPARTURES)
def test_who_leaves_before_the_request_leaves_nothing_behind(server, leave, caplog):
    """The same, of connections that have shaken hands and said nothing."""
    clients_arrived(server, 1)
    before = held_to_stay()
    for _ in range(20):
        with open_tls(server.url) as sock:
            leave(sock)
    nothing_is_left(before)
    assert louder_than_info(caplog) == []


@pytest.mark.usefixtures("witness")
def test_who_leaves_before_the_handshake_leaves_nothing_behind(server, caplog):
    """Also who is gone before the server has accepted it."""
    clients_arrived(server, 1)
    before = held_to_stay()
    for number in range(60):
        with open_socket(server.url) as sock:
            sock.sendall(HELLO[:number * 5])
            if number % 2:
                reset(sock)
    nothing_is_left(before)
    assert louder_than_info(caplog) == []


# ---- Broadcasts --------------------------------------------------------------------------------------------


class Digest:
    """Of what a client has received: enough to compare it with another's, without the memory that it takes."""

    def __init__(self, client, keep):
        self.client, self.keep = client, keep  # keep: all of it is left for the client to read
        self.hash, self.tail = hashlib.sha256(), b""

    def read(self):
        data = self.client.read_more()
        self.hash.update(data)
        self.tail = (self.tail + data)[-200:]
        if not self.keep:
            self.client._data.clear()


def read_until(clients, end):
    """Let all clients receive, side by side, until the last that each has got is `end`; returns their digests."""
    digests = [Digest(client, keep=client is clients[0]) for client in clients]
    deadline = time.monotonic() + 3 * PATIENCE
    with selectors.DefaultSelector() as selector:
        for digest in digests:
            selector.register(digest.client.socket, selectors.EVENT_READ, digest)
        while selector.get_map():
            assert time.monotonic() < deadline, f"{len(selector.get_map())} clients lack the end"
            for key, _ in selector.select(1.0):
                key.data.read()
                if end in key.data.tail:
                    selector.unregister(key.fileobj)
    return digests


@pytest.mark.timeout(120 * TIME_UNIT)
def test_a_burst_reaches_200_clients(certificate, directory):
    """500 events of 2 KB: complete, in order, the same bytes for each, and nobody is disconnected."""
    count, readers = 500, 200
    with spawn_server("--queue", directory, "--ping-interval", 0, *options(certificate)) as server:
        with ExitStack() as stack:
            clients = [stack.enter_context(SecureClient(server.url)) for _ in range(readers)]
            for number in range(count):
                assert queue_event(directory, "burst", [number, "x" * 2 * KIB])
            assert queue_event(directory, "burst", ["the end"])
            digests = read_until(clients, b'"the end"')
            assert [payload[0] for payload in clients[0].payloads(count)] == list(range(count))
            assert len({digest.hash.digest() for digest in digests}) == 1
            assert queue_event(directory, "still", 1)
            assert all(client.payloads(1) == [1] for client in clients[1:])
        log = server.stderr_text()
    assert "closed " not in log and "Traceback" not in log


def test_a_slow_client_is_closed_and_the_others_get_everything(certificate, directory, caplog):
    """Who reads nothing goes, with one log line; who reads gets the whole burst in order."""
    count = 2000
    with serving(queue=directory, outbox_bytes=256 * KIB, send_timeout=60.0, **certificate) as server:
        with SecureClient(server.url, receive_buffer=4 * KIB), SecureClient(server.url) as other:
            clients_arrived(server, 2)
            reader = Reader(other, count)
            for start in range(0, count, 100):
                events = [("burst", [number, "x" * 3 * KIB]) for number in range(start, start + 100)]
                assert queue_events(directory, events)
            assert [number for number, _ in reader.payloads()] == list(range(count))
            clients_arrived(server, 1)
            assert still_reaches(server, other)
    assert len(louder_than_info(caplog)) == 1
    assert "outbox_bytes" in caplog.text


def test_small_messages_to_a_client_that_stalls_arrive_whole(server):
    """A record that the kernel does not take at once counts as not sent, and is gone on with all the same."""
    with SecureClient(server.url, receive_buffer=4 * KIB) as client:
        (conn,) = eventually(server.get_connections, what="the client")
        sent = []
        while not conn._pending:
            sent.append(f"{len(sent):01000}")
            assert conn.send(sent[-1])
        assert [client.recv() for _ in sent] == sent
    everybody_has_left(server)


def test_a_client_that_reads_slowly_is_not_taken_for_one_that_stalls(certificate):
    """Its progress shows record by record, as that of a plain one does: send_timeout is for who takes nothing."""
    with serving(send_timeout=1.0, outbox_bytes=4 * KIB * KIB, deflate=False, **certificate) as server:
        with SecureClient(server.url, receive_buffer=64 * KIB) as client:
            clients_arrived(server, 1)
            server.broadcast("big", "x" * 1600 * KIB)
            for _ in range(100):  # records of 16 KiB: it takes longer than send_timeout
                client.read_more()
                time.sleep(0.03)
            assert client.payloads(1) == ["x" * 1600 * KIB]
            assert still_reaches(server, client)


def broadcast_in_turns(conn, other):
    """Until `conn` can take no more, broadcasts and a message of its own in turns; returns what it is to receive."""
    expected, late = [], []

    def audience():
        yield conn
        yield other
        conn.send(expected[-1])  # as another thread may: the broadcast has let go of its lock, and is not yet done

    while conn not in late:
        expected += [f"broadcast {len(expected)} ".ljust(RECORD - 100, "x"), f"message {len(expected)}"]
        late = send_to_all(audience(), encode_frame(TEXT, expected[-2].encode()))
    return expected


def test_bytes_of_another_thread_do_not_get_into_a_record(certificate, monkeypatch):
    """What OpenSSL has begun to send has to be sent before anything else, whichever thread comes next."""
    monkeypatch.setattr(wsqueue, "SHARED_LOCK", 1)
    with serving(outbox_bytes=64 * KIB * KIB, **certificate) as server, SecureClient(server.url):
        with SecureClient(server.url, receive_buffer=4 * KIB) as client:
            clients_arrived(server, 2)
            other, conn = server.get_connections()
            for _ in range(3):
                expected = broadcast_in_turns(conn, other)
                assert [client.recv() for _ in expected] == expected


# ---- The end -----------------------------------------------------------------------------------------------


def test_a_closing_handshake_ends_with_close_notify(server):
    """Without it a client could not tell the end from one that somebody on the way has forged."""
    with SecureClient(server.url) as client:
        assert client.close() == 1000  # and the end of the stream, which without close_notify is an error


def test_stop_says_goodbye_over_tls(certificate):
    """1001, the client's answer, close_notify."""
    with serving(**certificate) as server, SecureClient(server.url) as client:
        clients_arrived(server, 1)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert client.close_code() == 1001
        client.send_frame(CLOSE, close_payload(1001))
        assert client.ended()
        stopping.join(PATIENCE)
        assert not stopping.is_alive()


def test_stop_does_not_wait_for_a_handshake(certificate):
    """One that has not begun, or is half done, is broken off, long before handshake_timeout."""
    with serving(handshake_timeout=3600.0, **certificate) as server:
        with open_socket(server.url) as silent, open_socket(server.url) as half:
            half.sendall(HELLO[:100])
            with SecureClient(server.url) as client:  # accepted after them
                assert client.close() == 1000
            server.stop()
            whatever_comes(silent)
            whatever_comes(half)


# ---- Certificates ------------------------------------------------------------------------------------------


def shown_to_newcomers(server):
    """The certificate that the server identifies itself with."""
    with open_tls(server.url) as sock:
        return sock.getpeercert(binary_form=True)


def test_sighup_reads_the_certificate_again(tmp_path, directory):
    """Who connects afterwards sees the new one; who is connected goes on receiving events."""
    old = write_certificate(tmp_path)
    with spawn_server("--queue", directory, *options(old)) as server, SecureClient(server.url) as client:
        before = shown_to_newcomers(server)
        write_certificate(tmp_path)
        assert shown_to_newcomers(server) == before
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: shown_to_newcomers(server) != before, what="the new certificate")
        assert queue_event(directory, "e", 1)
        assert client.payloads(1) == [1]


def test_sighup_with_broken_files_changes_nothing(tmp_path, directory):
    """An ERROR in the log that names the file; the old certificate stays in use, and so does the next SIGHUP."""
    files = write_certificate(tmp_path)
    with spawn_server("--queue", directory, *options(files)) as server, SecureClient(server.url) as client:
        before = shown_to_newcomers(server)
        Path(files["tls_key"]).write_text("not a key")
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: " ERROR " in server.stderr_text(), what="the error")
        assert files["tls_key"] in server.stderr_text() and "Traceback" not in server.stderr_text()
        assert shown_to_newcomers(server) == before
        assert queue_event(directory, "e", 1)
        assert client.payloads(1) == [1]
        write_certificate(tmp_path)
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: shown_to_newcomers(server) != before, what="the new certificate")


def test_an_embedded_server_reads_its_certificate_again_when_told(tmp_path, caplog):
    """reload_certificates() does what SIGHUP does, also with files that are broken."""
    files = write_certificate(tmp_path)
    with serving(**files) as server, SecureClient(server.url) as client:
        before = shown_to_newcomers(server)
        write_certificate(tmp_path)
        server.reload_certificates()
        renewed = shown_to_newcomers(server)
        assert renewed != before and louder_than_info(caplog) == []
        os.unlink(files["tls_cert"])
        server.reload_certificates()
        assert shown_to_newcomers(server) == renewed and len(louder_than_info(caplog)) == 1
        assert files["tls_cert"] in caplog.text
        assert still_reaches(server, client)


def locked_key(directory):
    """A key that needs a passphrase."""
    path = directory / "key.pem"
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                       serialization.BestAvailableEncryption(b"secret")))


def foreign_key(directory):
    """A key of another certificate."""
    path = directory / "cert.pem"
    kept = path.read_bytes()
    write_certificate(directory)
    path.write_bytes(kept)


BREAK = {
    "no certificate": lambda directory: (directory / "cert.pem").unlink(),
    "no key": lambda directory: (directory / "key.pem").unlink(),
    "an empty certificate": lambda directory: (directory / "cert.pem").write_text(""),
    "no PEM": lambda directory: (directory / "cert.pem").write_bytes(bytes(range(256))),
    "half a key": lambda directory: (directory / "key.pem").write_bytes((directory / "key.pem").read_bytes()[:90]),
    "a key of another certificate": foreign_key,
    "a key with a passphrase": locked_key,
}


@pytest.mark.parametrize("name", BREAK)
def test_files_that_cannot_be_used_are_named_at_the_start(tmp_path, name):
    """One sentence and status 2; the terminal is not asked for anything."""
    files = write_certificate(tmp_path)
    BREAK[name](tmp_path)
    # Without a terminal OpenSSL would ask on stderr, which is to hold the sentence alone.
    done = run_cli("serve", "--port", 0, "--queue", tmp_path / "q", *options(files), start_new_session=True)
    said = sentence(done, 2)
    assert files["tls_cert"] in said and files["tls_key"] in said


def sentence(done, status):
    """What a command says that could not do its work: nothing on stdout, one plain sentence on stderr."""
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert [line.startswith("wsqueue: ") for line in done.stderr.splitlines()] == [True], done.stderr
    return done.stderr


def test_one_file_may_hold_both(tmp_path):
    """The chain and the key, as some issuers deliver them."""
    both = tmp_path / "both.pem"
    AUTHORITY.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(both)
    with serving(tls_cert=str(both)) as server, SecureClient(server.url) as client:
        assert still_reaches(server, client)


def test_a_key_without_a_certificate_is_refused(tmp_path):
    """Somebody wanted encryption: a server that starts without would be worse than one that does not."""
    with pytest.raises(SettingError, match="tls_cert"):
        WebSocketServer(tls_key="key.pem")
    assert "tls_cert" in sentence(run_cli("serve", "--port", 0, "--queue", tmp_path / "q", "--tls-key", "key.pem"), 2)


@pytest.mark.parametrize("option", ["--tls-cert", "--tls-key"])
def test_an_option_whose_variable_was_not_set_is_refused(tmp_path, option):
    """`--tls-cert "$CERT"` in a script must never start a server that speaks in the clear."""
    done = run_cli("serve", "--port", 0, "--queue", tmp_path / "q", option, "")
    assert (done.returncode, done.stdout) == (2, "")
    assert option in done.stderr.splitlines()[-1] and "empty" in done.stderr.splitlines()[-1]


def test_a_server_with_broken_files_has_not_taken_the_queue(tmp_path, directory):
    """What did not start holds nothing: the same server starts once the files are mended."""
    server = WebSocketServer(port=0, queue=directory, tls_cert=str(tmp_path / "cert.pem"),
                             tls_key=str(tmp_path / "key.pem"), close_timeout=1.0)
    with pytest.raises(SettingError):
        server.start(background=True)
    write_certificate(tmp_path)
    with server, SecureClient(server.url) as client:
        assert still_reaches(server, client)


# ---- wsqueue listen ----------------------------------------------------------------------------------------


def environment(**more):
    return {**os.environ, **more}


def test_listen_trusts_the_authority_that_is_named(certificate, authority_file):
    """`wsqueue listen wss://...` prints the messages of a server whose CA is in SSL_CERT_FILE."""
    with serving({"/": lambda conn: conn.send({"event": "welcome"})}, **certificate) as server:
        done = run_cli("listen", server.url, "--count", 1, env=environment(SSL_CERT_FILE=authority_file))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"event": "welcome"}


def test_listen_says_what_to_do_about_a_certificate_it_does_not_trust(server, tmp_path):
    """Status 1, and a sentence that names the reason and SSL_CERT_FILE, and no line of a C program."""
    STRANGER.cert_pem.write_to_path(tmp_path / "stranger.pem")
    done = run_cli("listen", server.url, env=environment(SSL_CERT_FILE=str(tmp_path / "stranger.pem")))
    said = sentence(done, 1)
    assert server.url in said and "certificate" in said and "SSL_CERT_FILE" in said
    assert "_ssl.c" not in said


def test_listen_checks_the_name_in_the_certificate(tmp_path, authority_file):
    """A certificate of a trusted authority for somebody else is none."""
    somebody = AUTHORITY.issue_cert("shop.example")
    somebody.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    with serving(tls_cert=str(tmp_path / "both.pem")) as server:
        said = sentence(run_cli("listen", server.url, env=environment(SSL_CERT_FILE=authority_file)), 1)
    assert "127.0.0.1" in said and "not valid for" in said


def test_listen_says_that_a_port_does_not_speak_tls():
    """wss:// to a server without a certificate: status 1, and a sentence that names ws://."""
    with serving() as server:
        said = sentence(run_cli("listen", server.url.replace("ws://", "wss://")), 1)
    assert "ws://" in said.replace("wss://", "") and "_ssl.c" not in said
