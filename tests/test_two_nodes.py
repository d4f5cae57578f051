"""examples/two_nodes: nginx with that very file in front of two real nodes, and what compose.yaml would start."""

import http.client
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import redis
import yaml

from brokers import HOST, PASSWORD, free_port
from clients import PATIENCE, RawClient, exchange, handshake, request_head
from helpers import ROOT, TIME_UNIT, WSQUEUE, eventually, spawn_server
from wsqueue import SETTINGS, queue_event

TWO_NODES = ROOT / "examples" / "two_nodes"
COMPOSE_TEXT = (TWO_NODES / "compose.yaml").read_text("utf-8")
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
SERVICES = COMPOSE["services"]
CONFIGURATION = (TWO_NODES / "nginx.conf").read_text("utf-8")
NODES = ("one", "two")
SECRET = "0123456789abcdef" * 4
NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")  # not on everybody's PATH

needs_nginx = pytest.mark.skipif(NGINX is None, reason="needs Debian's nginx")


# ---- The load balancer -------------------------------------------------------------------------------------


def replace_once(text, old, new):
    assert text.count(old) == 1, old
    return text.replace(old, new)


def configuration(port, nodes, directory):
    """The file, but for addresses, and for where nginx puts what it does not write here."""
    text = replace_once(CONFIGURATION, "listen 80;", f"listen {HOST}:{port};")
    for name, node in zip(NODES, nodes):
        text = replace_once(text, f"server {name}:8081 ", f"server {HOST}:{node} ")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"    {kind}_temp_path {directory};\n" for kind in kinds)
    return replace_once(text, "\nhttp {\n", f"\nhttp {{\n{places}")


@contextmanager
def balanced(nodes, directory):
    """nginx in front of nodes at these ports; yields its own port."""
    port, file = free_port(), directory / "nginx.conf"
    file.write_text(configuration(port, nodes, directory), "utf-8")
    command = [NGINX, "-p", str(directory), "-c", str(file), "-e", str(directory / "first"), "-g"]
    with open(str(directory / "out"), "wb") as out, open(str(directory / "err"), "wb") as err:
        process = subprocess.Popen([*command, f"daemon off; pid {directory}/pid;"], stdout=out, stderr=err)
    try:
        eventually(lambda: accepts(port, process, directory / "err"), what="nginx")
        yield port
    finally:
        process.terminate()
        process.wait(10 * TIME_UNIT)
    assert "[emerg]" not in (directory / "err").read_text("utf-8")


def accepts(port, process, log):
    assert process.poll() is None, log.read_text("utf-8")
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == 0


@contextmanager
def node(name, url, port, *options):
    """A node at a port, which it gets again when it is started again."""
    environment = {**os.environ, "WS_QUEUE_PATH": url, "WS_NODE": name}
    with spawn_server("--port", port, *options, env=environment) as server:
        yield server


@pytest.fixture
def ports():
    return [free_port() for _ in NODES]


# ---- Clients that come back --------------------------------------------------------------------------------


class Refused(Exception):
    """Nobody serves us."""


def websocket_messages(port, last):
    """The messages that a WebSocket client gets which has seen those up to `last`."""
    try:
        client = RawClient(f"ws://{HOST}:{port}", f"/?last_event_id={quote(last, safe='')}")
    except AssertionError as answer:
        raise Refused from answer
    with client:
        while True:
            yield json.loads(client.recv())


def stream_messages(port, last):
    """Likewise for server-sent events."""
    yield from streamed(http.client.HTTPConnection(HOST, port, timeout=PATIENCE), "/", last)


def streamed(connection, path, last):
    """The messages of an event stream behind those up to `last`, over an HTTP connection that is closed at the end."""
    with closing(connection):
        headers = {"Last-Event-ID": last} if last else {}
        connection.request("GET", path, headers={"Accept": "text/event-stream", **headers})
        response = connection.getresponse()
        if response.status != 200:
            raise Refused(response.status)
        fields = {}
        for line in iter(response.readline, b""):
            key, _, value = line.decode().rstrip("\n").partition(": ")
            fields[key] = value
            if key == "data":
                yield {"id": fields["id"], **json.loads(value)}


class Follower(threading.Thread):
    """A client that comes back whenever it is cut off, and names what it saw last."""

    def __init__(self, messages, port):
        super().__init__(name="follower", daemon=True)
        self._messages, self._port = messages, port
        self._ended = threading.Event()
        self._last = ""
        self.connections = 0
        self.refusals = []
        self.events = []
        self.start()

    def run(self):
        while not self._ended.is_set():
            try:
                for message in self._messages(self._port, self._last):
                    self._note(message)
                    if self._ended.is_set():
                        return
            except Refused as refusal:
                self.refusals.append(refusal)
            except (OSError, EOFError, AssertionError, http.client.HTTPException):
                pass
            self._ended.wait(0.02)

    def _note(self, message):
        self._last = message["id"]
        if message["event"] == "wsqueue.hello":
            self.connections += 1
        else:
            self.events.append((message["event"], message["payload"]))

    def end(self):
        """With the next message."""
        self._ended.set()


def numbers_arrive(url, followers, numbers):
    """Queue events, and wait until everyone has the last of them."""
    for number in numbers:
        assert queue_event(url, "n", number)
    last = ("n", numbers[-1])
    eventually(lambda: all(last in follower.events[-1:] for follower in followers), 30.0,
               f"{last} in {[follower.events[-3:] for follower in followers]}")


@needs_nginx
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_clients_of_a_lost_node_go_on_at_the_other(redis_broker, ports, tmp_path, number):
    """While one node is there, a client that comes back is served at once, and has every event once and in order."""
    url = redis_broker.queue_url()
    with ExitStack() as stack:
        nodes = [stack.enter_context(node(name, url, port)) for name, port in zip(NODES, ports)]
        port = stack.enter_context(balanced(ports, tmp_path))
        followers = [Follower(messages, port) for messages in (websocket_messages, stream_messages) * 2]
        eventually(lambda: all(follower.connections for follower in followers), what="everyone's hello")
        assert [clients_of(server.port) for server in nodes] == [2, 2]
        numbers_arrive(url, followers, range(100))
        lose(nodes[0], number)
        numbers_arrive(url, followers, range(100, 200))
        stack.enter_context(node(NODES[0], url, ports[0]))
        numbers_arrive(url, followers, range(200, 300))
        lose(nodes[1], number)
        numbers_arrive(url, followers, range(300, 400))
        for follower in followers:
            follower.end()
        queue_event(url, "end")
        for follower in followers:
            follower.join(PATIENCE)
            assert follower.events == [*(("n", number) for number in range(400)), ("end", None)]
            assert follower.refusals == []
        assert sum(follower.connections for follower in followers) >= 4 + 2 + 4


def lose(server, number):
    server.process.send_signal(number)
    server.process.wait(PATIENCE)


def clients_of(port):
    request = request_head("/healthz", {"Host": HOST})
    return json.loads(exchange(f"http://{HOST}:{port}", request.encode()).body)["clients"]


# ---- What passes, and what does not ------------------------------------------------------------------------


def ask(port, method, path, fields):
    """The status and the body of an answer."""
    with closing(http.client.HTTPConnection(HOST, port, timeout=PATIENCE)) as connection:
        connection.request(method, path, headers=fields)
        response = connection.getresponse()
        return response.status, response.read().decode()


@needs_nginx
def test_node_that_is_full_is_passed_over(redis_broker, ports, tmp_path):
    """While one node has room, nobody is refused; when none has, the next one is."""
    url = redis_broker.queue_url()
    with ExitStack() as stack:
        for name, port, most in zip(NODES, ports, (1, 3)):
            stack.enter_context(node(name, url, port, "--max-clients", most))
        port = stack.enter_context(balanced(ports, tmp_path))
        for _ in range(4):
            stack.enter_context(RawClient(f"ws://{HOST}:{port}"))
        assert ask(port, "GET", "/", {"Accept": "text/event-stream"})[0] == 503


@pytest.fixture(scope="module")
def front(redis_broker, tmp_path_factory):
    """The port of nginx in front of two nodes that show their pages; what it writes is in front.directory."""
    if NGINX is None:
        pytest.skip("needs Debian's nginx")
    url, ports = redis_broker.queue_url(), [free_port() for _ in NODES]
    with ExitStack() as stack:
        for name, port in zip(NODES, ports):
            stack.enter_context(node(name, url, port, "--monitoring", "on"))
        directory = tmp_path_factory.mktemp("nginx")
        yield SimpleNamespace(port=stack.enter_context(balanced(ports, directory)), directory=directory)


@pytest.mark.parametrize("request_line, fields, status", [
    ("GET /", {}, 404),
    ("GET /healthz", {}, 404),
    ("GET /metrics", {}, 404),
    ("GET /metrics", {"Accept": "text/html"}, 404),
    ("GET /metrics", {"Upgrade": "x", "Connection": "upgrade"}, 426),
    ("GET /monitor.json", {}, 404),
    ("POST /send?event=x", {}, 404),
    ("POST /send?event=x", {"Accept": "text/event-stream"}, 404),
    ("POST /send?event=x", {"Upgrade": "websocket", "Connection": "upgrade"}, 404),
    ("GET /wsqueue.js", {}, 200),
    ("GET /wsqueue.mjs", {}, 200),
])
def test_pages_of_a_node_are_not_for_strangers(front, request_line, fields, status):
    """A node with monitoring on shows nothing of it through nginx, however it is asked; the client is served."""
    answer, body = ask(front.port, *request_line.split(), fields)
    assert answer == status
    assert "wsqueue_" not in body and "uptime_seconds" not in body


@pytest.mark.parametrize("origin, status", [
    ("https://push.example", 101), ("http://push.example:8080", 101), ("https://other.example", 403)])
def test_origin_is_that_of_the_name_in_front(front, origin, status):
    """The nodes hear which name the page has connected to, and let its own pages in and no others."""
    with socket.create_connection((HOST, front.port), PATIENCE) as sock:
        sock.sendall(handshake(Host="push.example:8080", Origin=origin))
        assert sock.recv(12) == f"HTTP/1.1 {status}".encode()


def test_log_holds_no_ticket(front):
    """What nginx writes about a client leaves out what may be a ticket."""
    with RawClient(f"ws://{HOST}:{front.port}", "/chat?ticket=confidential"):
        pass
    eventually(lambda: '"GET /chat" 101' in (front.directory / "out").read_text("utf-8"), what="a line of the log")
    assert not any("confidential" in (front.directory / name).read_text("utf-8") for name in ("out", "err", "first"))


def test_log_holds_no_ticket_when_the_nodes_are_down(tmp_path):
    """nginx would write the whole request beside what went wrong with it."""
    with balanced((free_port(), free_port()), tmp_path) as port:
        with socket.create_connection((HOST, port), PATIENCE) as sock:
            sock.sendall(handshake("/?ticket=a.very.secret"))
            assert sock.recv(12) == b"HTTP/1.1 502"
    for name in ("out", "err", "first"):
        assert "very.secret" not in (tmp_path / name).read_text("utf-8")


def test_proxy_waits_longer_than_a_node_is_silent():
    """A connection on which nothing happens is pinged before nginx takes it for dead."""
    ping_interval = next(setting.default for setting in SETTINGS if setting.name == "ping_interval")
    for kind in ("read", "send"):
        assert int(re.search(rf"^ *proxy_{kind}_timeout (\d+)s;", CONFIGURATION, re.MULTILINE)[1]) > 2 * ping_interval


# ---- compose.yaml ------------------------------------------------------------------------------------------


def interpolate(text, names):
    """As Compose does it: ${NAME:?else this is said} is required, and $$ is a $."""
    text = re.sub(r"(?<!\$)\$\{(\w+):\?[^}]*\}", lambda match: names[match[1]], text)
    assert re.search(r"(?<!\$)\$(?!\$)", text.replace("$$", "")) is None, text
    return text.replace("$$", "$")


def environment(service, **changes):
    """What a container of the service has in its environment, and what it needs here to find its programs."""
    names = {"REDIS_PASSWORD": PASSWORD, "WS_SECRET": SECRET}
    ours = {name: interpolate(str(value), names) for name, value in SERVICES[service]["environment"].items()}
    return {"PATH": os.environ["PATH"], **ours, **changes}


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def image(tmp_path, monkeypatch):
    """What the image brings: python, and a pip that writes down what it is asked for. /app is the working directory."""
    programs, here = tmp_path / "bin", tmp_path / "app"
    programs.mkdir()
    here.mkdir()
    script(programs / "python", f'exec "{sys.executable}" "$@"')
    script(programs / "pip", f'printf "%s\\n" "$@" > "{tmp_path}/pip"')
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    shutil.copy(WSQUEUE, str(here))
    return here


@contextmanager
def container(service, image, broker_port, port, queue):
    """Run a node's command with its environment, but for the addresses; yields its environment when it listens."""
    variables = environment(service, HOME=str(image), WS_PORT=str(port))
    url = replace_once(variables["WS_QUEUE_PATH"], "@redis:6379/", f"@{HOST}:{broker_port}/")
    variables["WS_QUEUE_PATH"] = f"{url}?queue={queue}"
    command = [interpolate(word, {}) for word in SERVICES[service]["command"]]
    with open(str(image / f"{service}.log"), "wb") as log:
        process = subprocess.Popen(command, cwd=str(image), env=variables, stdout=log, stderr=log)
    try:
        eventually(lambda: listens(process, image / f"{service}.log"), 30.0, service)
        yield variables
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert PASSWORD not in (image / f"{service}.log").read_text("utf-8")


def listens(process, log):
    assert process.poll() is None, log.read_text("utf-8")
    return "listening on " in log.read_text("utf-8")


def is_healthy(service, image, variables, shown, port):
    """Run the health check, with a port in place of the one shown in it."""
    kind, *words = SERVICES[service]["healthcheck"]["test"]
    assert sum(word.count(shown) for word in words) == 1
    command = [interpolate(word.replace(shown, f"{shown[0]}{port}"), {}) for word in words]
    command = ["sh", "-c", *command] if kind == "CMD-SHELL" else command
    done = subprocess.run(command, cwd=str(image), env=variables, capture_output=True, check=False,
                          timeout=30 * TIME_UNIT)
    return done.returncode == 0


def test_node_starts_and_is_healthy_until_redis_goes(redis_broker, image):
    """The command, the environment and the health check do together what they are there for."""
    port, queue = free_port(), redis_broker.queue_url().rpartition("=")[2]
    for service in NODES:
        with container(service, image, redis_broker.port, port, queue) as variables:
            eventually(lambda v=variables, s=service: is_healthy(s, image, v, ":8081", port), what="health")
        with container(service, image, free_port(), port, queue) as variables:
            eventually(lambda v=variables, s=service: not is_healthy(s, image, v, ":8081", port), what="trouble")


def test_packages_that_a_node_installs_are_ours(redis_broker, image):
    """The node's command asks pip for what the server and its queue need: what these tests run with."""
    with container("one", image, redis_broker.port, free_port(), "packages"):
        words = (image.parent / "pip").read_text("utf-8").split()
    packages = [word for word in words[1:] if not word.startswith("-")]
    assert words[0] == "install" and packages == ["websocket-server", "redis"]
    assert all(map(importlib.metadata.version, packages))


@needs_nginx
def test_commands_of_the_comment_work(redis_broker, image, tmp_path, ports):
    """Who does what the head of compose.yaml says sees an event come through nginx."""
    queue = redis_broker.queue_url().rpartition("=")[2]
    send, listen = re.findall(r"^#   docker compose exec \w+ (.*)$", COMPOSE_TEXT, re.MULTILINE)
    with ExitStack() as stack:
        one, two = [stack.enter_context(container(name, image, redis_broker.port, port, queue))
                    for name, port in zip(NODES, ports)]
        port = stack.enter_context(balanced(ports, tmp_path))
        listen = replace_once(listen, "ws://nginx/", f"ws://{HOST}:{port}/ --count 1 --timeout {PATIENCE}")
        settings = {"cwd": str(image), "encoding": "utf-8"}
        listener = subprocess.Popen(["sh", "-c", listen], env=two, stdout=subprocess.PIPE, **settings)
        eventually(lambda: clients_of(ports[0]) + clients_of(ports[1]) == 1, what="the listener")
        subprocess.run(["sh", "-c", send], env=one, check=True, timeout=30 * TIME_UNIT, **settings)
        message = json.loads(listener.communicate(timeout=PATIENCE)[0])
        assert (message["event"], message["payload"]) == ("hello", {"n": 1})
        assert is_healthy("nginx", image, one, ":80", port)


def test_comment_makes_what_is_asked_for(tmp_path):
    """The command of the comment writes every variable that is required, to a file that is its owner's alone."""
    command = re.search(r"^#   (\(umask .*)$", COMPOSE_TEXT, re.MULTILINE)[1]
    subprocess.run(["bash", "-euc", command], cwd=str(tmp_path), check=True, timeout=30 * TIME_UNIT)
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    made = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text("utf-8").splitlines())
    assert set(made) == set(re.findall(r"(?<!\$)\$\{(\w+):\?", COMPOSE_TEXT))
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in made.values())


def test_variables_of_a_node_are_those_of_the_program():
    """Each WS_ variable is one that the command line reads, and each node has a name of its own."""
    known = {setting.variable for setting in SETTINGS}
    for service in NODES:
        assert {name for name in SERVICES[service]["environment"] if name != "HOME"} <= known
        assert SERVICES[service]["environment"]["WS_NODE"] == service


def test_what_is_mounted_is_there():
    """Each file that a container sees is one of the checkout, read-only; each volume is declared."""
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source, target, *mode = volume.split(":")
            if source.startswith("."):
                assert (TWO_NODES / source).is_file() and mode == ["ro"] and Path(target).name == Path(source).name
            else:
                assert source in COMPOSE["volumes"]


def test_services_come_back_and_only_the_balancer_is_reached():
    """Each service is started again and looked after; nginx alone has a port outside."""
    for service in SERVICES.values():
        assert service["restart"] == "unless-stopped" and service["healthcheck"]["test"]
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["nginx"]


def test_balancer_knows_the_nodes_by_their_addresses():
    """What nginx.conf names are the nodes, with their port, and the addresses that those have."""
    servers = re.findall(r"^ *server ([\w.]+):(\d+) ", CONFIGURATION, re.MULTILINE)
    assert servers == [(name, SERVICES[name]["environment"]["WS_PORT"]) for name in NODES]
    addresses = {name: SERVICES[name]["networks"]["default"]["ipv4_address"] for name in NODES}
    assert SERVICES["nginx"]["extra_hosts"] == addresses


def test_redis_wants_its_password_and_writes_to_disk(tmp_path):
    """Its command starts a Redis as the comment says: with a password that no command line shows, and appendonly."""
    redis_server = shutil.which("redis-server")
    if redis_server is None:
        pytest.skip("needs Debian's redis-server")
    port = free_port()
    *command, text = [interpolate(word, {}) for word in SERVICES["redis"]["command"]]
    text = replace_once(text, "appendonly yes\n", f"appendonly yes\nport {port}\nbind {HOST}\n")
    variables = environment("redis")
    process = subprocess.Popen([*command, text], cwd=str(tmp_path), env=variables, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: is_healthy("redis", tmp_path, variables, " 6379", port), what="Redis")
        with redis.Redis(HOST, port, password=PASSWORD) as client:
            assert client.config_get("appendonly") == {"appendonly": "yes"}
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        with redis.Redis(HOST, port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        assert PASSWORD.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    finally:
        process.terminate()
        process.wait(PATIENCE)
