"""examples/deploy: each file does what it says, in the program that it is for."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
import trustme

from brokers import HOST, free_port
from clients import PATIENCE, PING, PONG, RawClient, Wire, handshake, request_head, serving
from helpers import ROOT, eventually, spawn_server
from test_two_nodes import NGINX, Follower, Refused, accepts, numbers_arrive, replace_once
from wsqueue import queue_event

DEPLOY = ROOT / "examples" / "deploy"
CADDY = shutil.which("caddy")


def text_of(name):
    return (DEPLOY / name).read_text("utf-8")


# ---- nginx.conf and Caddyfile: a proxy in front ------------------------------------------------------------

NAME = "localhost"  # which a browser can find, too
AUTHORITY = trustme.CA()
TRUSTING = ssl.create_default_context()
AUTHORITY.configure_trust(TRUSTING)
PROXIES = {"nginx": NGINX, "caddy": CADDY}


def nginx_files(front, server):
    """The file, but for the name, the ports and the paths; and a minimal nginx.conf that includes it."""
    text = text_of("nginx.conf").replace("listen 443 ", f"listen {HOST}:{front.port} ")
    text = text.replace("/etc/ssl/push.example.com/", f"{front.directory}/")
    text = replace_once(text, "server_name push.example.com;", f"server_name {NAME};")
    text = replace_once(text, "server 127.0.0.1:8081;", f"server {HOST}:{server};")
    text = text.replace("/var/log/nginx/", f"{front.directory}/log-")
    (front.directory / "site.conf").write_text(text, "utf-8")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {front.directory};\n" for kind in kinds)
    (front.directory / "nginx.conf").write_text(f"""
        daemon off; pid {front.directory}/pid; worker_processes 1; error_log {front.directory}/log-error.log;
        events {{ }}
        http {{ {places} include site.conf; }}
    """, "utf-8")
    return [NGINX, "-p", str(front.directory), "-c", "nginx.conf", "-e", str(front.directory / "log-first")]


def caddy_files(front, server):
    """The file, but for the name and the ports; with a certificate of ours, and Caddy's own files in our directory."""
    text = replace_once(text_of("Caddyfile"), "\n{\n", f"""
        {{
            admin unix/{front.directory}/admin
            auto_https disable_redirects
            servers {{
                protocols h1 h2
            }}
    """)
    text = replace_once(text, "\npush.example.com {\n", f"""
        https://{NAME}:{front.port} {{
            bind {HOST}
            tls {front.directory}/fullchain.pem {front.directory}/privkey.pem
    """)
    assert text.count("reverse_proxy 127.0.0.1:8081") == 2
    text = text.replace("reverse_proxy 127.0.0.1:8081", f"reverse_proxy {HOST}:{server}")
    (front.directory / "Caddyfile").write_text(text, "utf-8")
    return [CADDY, "run", "--config", "Caddyfile"]


class Front:
    """A proxy that runs; its log is all that it writes."""

    def __init__(self, kind, directory):
        self.kind, self.directory, self.port = kind, directory, free_port()

    def connect(self, name=NAME):
        """A TLS connection to it, under that name."""
        sock = socket.create_connection((HOST, self.port), PATIENCE)
        try:
            return TRUSTING.wrap_socket(sock, server_hostname=name)
        except BaseException:
            sock.close()
            raise

    def log(self):
        return "".join(path.read_text("utf-8") for path in self.directory.glob("log-*"))

    def reload(self):
        """Have it read its files again, and wait until it has."""
        if self.kind == "nginx":
            workers = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            before = workers.read_text("ascii").split()
            self.process.send_signal(signal.SIGHUP)
            eventually(lambda: set(workers.read_text("ascii").split()) - set(before), what="a new worker")
        else:
            command = [CADDY, "reload", "--config", "Caddyfile", "--address", f"unix/{self.directory}/admin", "--force"]
            subprocess.run(command, cwd=str(self.directory), check=True, capture_output=True, timeout=PATIENCE)


@contextmanager
def front_of(server, kind, directory, *changes):
    """A proxy in front of the server at this port; changes: (old, new) of its file."""
    if PROXIES[kind] is None:
        pytest.skip(f"needs Debian's {kind}")
    front = Front(kind, directory)
    certificate = AUTHORITY.issue_cert(NAME)
    certificate.private_key_pem.write_to_path(str(directory / "privkey.pem"))
    for number, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(str(directory / "fullchain.pem"), append=number > 0)
    command = (nginx_files if kind == "nginx" else caddy_files)(front, server)
    site = directory / ("site.conf" if kind == "nginx" else "Caddyfile")
    for old, new in changes:
        site.write_text(replace_once(site.read_text("utf-8"), old, new), "utf-8")
    variables = {**os.environ, "HOME": str(directory), "XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
    with open(str(directory / "log-out"), "wb") as out:
        front.process = subprocess.Popen(command, cwd=str(directory), env=variables, stdout=out, stderr=out)
    try:
        eventually(lambda: accepts(front.port, front.process, directory / "log-out"), what=kind)
        yield front
    finally:
        front.process.terminate()
        front.process.wait(PATIENCE)


class SecureClient(RawClient):
    """A WebSocket client through a front."""

    def __init__(self, front, target, **headers):
        Wire.__init__(self, front.connect(), handshake(target, **{"Host": NAME, **headers}), 101)


class SecureRequest(http.client.HTTPConnection):
    """HTTP through a front."""

    def __init__(self, front):
        super().__init__(NAME)
        self.sock = front.connect()


def websocket_messages(front, last, path="/ws/orders"):
    """The messages that a WebSocket client gets which has seen those up to `last`."""
    try:
        client = SecureClient(front, f"{path}?last_event_id={quote(last, safe='')}")
    except AssertionError as answer:
        raise Refused from answer
    with client:
        while True:
            yield json.loads(client.recv())


def stream_messages(front, last, path="/ws/orders"):
    """Likewise for server-sent events."""
    with closing(SecureRequest(front)) as connection:
        resumed = {"Last-Event-ID": last} if last else {}
        connection.request("GET", path, headers={"Accept": "text/event-stream", **resumed})
        response = connection.getresponse()
        if response.status != 200:
            raise Refused(response.status)
        fields = {}
        for line in iter(response.readline, b""):
            key, _, value = line.decode().rstrip("\n").partition(": ")
            fields[key] = value
            if key == "data":
                yield {"id": fields["id"], **json.loads(value)}


KINDS = {"websocket": websocket_messages, "stream": stream_messages}
each_kind = pytest.mark.parametrize("messages", KINDS.values(), ids=KINDS.keys())
each_proxy = pytest.mark.parametrize("kind", PROXIES)


def ask(front, method, path, fields=()):
    """The status, the headers and the body of an answer."""
    with closing(SecureRequest(front)) as connection:
        connection.request(method, path, headers=dict(fields))
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()


@pytest.fixture(scope="module", params=PROXIES)
def front(request, tmp_path_factory):
    """A proxy before a server that would show its pages to everyone; front.queue is the server's directory."""
    directory = tmp_path_factory.mktemp(request.param)
    queue = str(directory / "queue")
    with spawn_server("--queue", queue, "--monitoring", "on") as server:
        with front_of(server.port, request.param, directory) as front:
            front.queue = queue
            yield front


@each_kind
def test_event_arrives_through_the_proxy_and_who_comes_back_misses_nothing(front, messages):
    """One event comes when it is sent, and not when a buffer is full; the id of the last one leads on to the next."""
    with closing(messages(front, "")) as connection:
        assert next(connection)["event"] == "wsqueue.hello"
        assert queue_event(front.queue, "seen", 1)
        seen = next(connection)
        assert (seen["event"], seen["payload"]) == ("seen", 1)
    assert queue_event(front.queue, "missed", 2)
    with closing(messages(front, seen["id"])) as connection:
        assert [next(connection)["event"] for _ in range(2)] == ["wsqueue.hello", "missed"]


@each_kind
def test_prefix_is_no_part_of_the_topic(front, messages):
    """A client of /ws/orders is on the topic /orders, and on no other."""
    with closing(messages(front, "")) as connection:
        next(connection)
        for to in ("/ws/orders", "/ws/", "orders", "/orders"):
            assert queue_event(front.queue, f"to {to}", to=to)
        assert next(connection)["event"] == "to /orders"


@pytest.mark.parametrize("request_line, fields, status", [
    ("GET /", {}, 404),
    ("GET /healthz", {}, 404),
    ("GET /metrics", {"Accept": "text/event-stream"}, 404),
    ("GET /ws", {}, 404),
    ("GET /ws/", {}, 404),
    ("GET /wsmetrics", {"Accept": "text/event-stream"}, 404),
    ("GET /ws/", {"Accept": "text/html"}, 404),
    ("GET /ws/healthz", {}, 404),
    ("GET /ws/metrics", {"Accept": "text/html"}, 404),
    ("GET /ws//metrics", {}, 404),
    ("GET /ws/monitor.json", {}, 404),
    ("GET /ws/healthz", {"Upgrade": "x", "Connection": "upgrade"}, 404),
    ("GET /ws/healthz", {"Upgrade": "websocket", "Connection": "upgrade"}, 426),
    ("POST /ws/send?event=x", {}, 404),
    ("POST /ws/send?event=x", {"Accept": "text/event-stream"}, 404),
    ("POST /ws/send?event=x", {"Upgrade": "websocket", "Connection": "upgrade"}, 404),
    ("GET /wsqueue.js", {}, 200),
    ("GET /wsqueue.mjs", {}, 200),
])
def test_pages_of_the_server_are_not_for_strangers(front, request_line, fields, status):
    """A server with monitoring on shows nothing of it through the proxy, however it is asked; the client is served."""
    answer, _, body = ask(front, *request_line.split(), fields)
    assert "wsqueue_" not in body and "uptime_seconds" not in body and "<html" not in body.replace("<html>\r\n<head>", "")
    assert answer == status


@pytest.mark.parametrize("origin, status", [
    (f"https://{NAME}", 101), (f"https://{NAME}:8443", 101), ("https://other.example", 403), ("null", 403)])
def test_page_must_be_of_the_name_in_front(front, origin, status):
    """The server hears which name the page has connected to, and lets its own pages in and no others."""
    with front.connect() as sock:
        sock.sendall(handshake("/ws/orders", Host=f"{NAME}:{front.port}", Origin=origin))
        assert sock.recv(12) == f"HTTP/1.1 {status}".encode()
    answer, headers, _ = ask_for_stream(front, Origin=origin)
    assert (answer, headers["Access-Control-Allow-Origin"]) == ((200, origin) if status == 101 else (403, None))


def ask_for_stream(front, **fields):
    with front.connect() as sock:
        sock.sendall(request_head("/ws/orders", {"Host": NAME, "Accept": "text/event-stream", **fields}).encode())
        response = http.client.HTTPResponse(sock)
        response.begin()
        with closing(response):
            return response.status, response.headers, response


@pytest.mark.parametrize("host", [HOST, "rebound.example"])
def test_nobody_is_served_under_another_name(front, host):
    """A page whose name was made to lead here agrees with its Host header; the proxy does not know the name."""
    with front.connect() as sock:
        sock.sendall(handshake("/ws/orders", Host=host, Origin=f"https://{host}"))
        assert not sock.recv(12).startswith(b"HTTP/1.1 101")
    with pytest.raises(OSError):
        front.connect("rebound.example")


@each_proxy
def test_server_hears_the_true_name_scheme_and_address(kind, tmp_path):
    """Host is what the client has asked for; what it says of proxies before this one is not passed on."""
    def tell(conn):
        conn.send({name: conn.headers.get(name) for name in expected})

    expected = {"host": NAME, "x-forwarded-for": HOST, "x-forwarded-proto": "https", "x-forwarded-host": NAME}
    forged = {"X_Forwarded_For": "203.0.113.9", "X_Forwarded_Proto": "http", "X_Forwarded_Host": "other.example"}
    with serving({"/orders": tell}) as server, front_of(int(server.url.rpartition(":")[2]), kind, tmp_path) as front:
        with SecureClient(front, "/ws/orders", **forged) as client:
            assert json.loads(client.recv()) == expected


@each_proxy
def test_no_log_holds_a_ticket(kind, tmp_path):
    """What the proxy writes about a client leaves out what may be a ticket, also when the server is down."""
    with spawn_server("--queue", tmp_path / "queue") as server, front_of(server.port, kind, tmp_path) as front:
        with SecureClient(front, "/ws/up?ticket=confidential"):
            pass
        server.end()
        with pytest.raises(AssertionError, match="502"):
            SecureClient(front, "/ws/down?ticket=confidential")
        eventually(lambda: all(path in front.log() for path in ("/ws/up", "/ws/down")), what="both in the log")
    assert "confidential" not in front.log()


@each_proxy
@pytest.mark.parametrize("stream", [False, True], ids=["websocket", "stream"])
def test_silent_client_stays(kind, stream, tmp_path):
    """The server's pings keep a connection up for longer than the proxy waits for one of which nothing is heard."""
    change = [("proxy_read_timeout 75s;", "proxy_read_timeout 2s;")] if kind == "nginx" else []
    queue = str(tmp_path / "queue")
    with spawn_server("--queue", queue, "--ping-interval", "0.2") as server:
        with front_of(server.port, kind, tmp_path, *change) as front:
            (stream_stays if stream else websocket_stays)(front, queue, time.monotonic() + 3.0)


def websocket_stays(front, queue, until):
    with SecureClient(front, "/ws/orders") as client:
        while time.monotonic() < until:
            assert client.read_frame() == (PING, b"")
            client.send_frame(PONG)
        assert queue_event(queue, "after the silence")
        assert json.loads(client.recv())["event"] == "after the silence"


def stream_stays(front, queue, until):
    with closing(SecureRequest(front)) as connection:
        connection.request("GET", "/ws/orders", headers={"Accept": "text/event-stream"})
        response = connection.getresponse()
        while b"wsqueue.hello" not in response.readline():
            pass
        while time.monotonic() < until:
            assert response.readline() in (b"\n", b":\n")
        assert queue_event(queue, "after the silence")
        while b"after the silence" not in response.readline():
            assert not response.isclosed()


def test_nginx_waits_longer_than_a_server_is_silent():
    """Twice as long as the default ping_interval, and more."""
    for kind in ("read", "send"):
        assert int(re.search(rf"^ *proxy_{kind}_timeout (\d+)s;", text_of("nginx.conf"), re.MULTILINE)[1]) > 2 * 20


@each_proxy
def test_reload_of_the_proxy_loses_nothing(kind, tmp_path):
    """Clients that are connected have every event, in order and once; nginx does not even cut them off."""
    queue = str(tmp_path / "queue")
    with spawn_server("--queue", queue) as server, front_of(server.port, kind, tmp_path) as front:
        followers = [Follower(messages, front) for messages in KINDS.values()]
        eventually(lambda: all(follower.connections for follower in followers), what="everyone's hello")
        numbers_arrive(queue, followers, range(5))
        front.reload()
        numbers_arrive(queue, followers, range(5, 10))
        with SecureClient(front, "/ws/new"):
            pass
        for follower in followers:
            follower.end()
        queue_event(queue, "end")
        for follower in followers:
            follower.join(PATIENCE)
            assert follower.events == [*(("n", number) for number in range(10)), ("end", None)]
            assert follower.refusals == []
            assert follower.connections == 1 or kind == "caddy"
