"""examples/deploy: each file does what it says, in the program that it is for."""

import http.client
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import trustme
import websocket_server

from brokers import HOST, free_port
from browser import needs_chromium
from clients import PATIENCE, PING, PONG, RawClient, Wire, handshake, request_head, serving
from helpers import ROOT, TIME_UNIT, WSQUEUE, eventually, run_cli, run_server, spawn_server
from test_readme import repack
from test_two_nodes import NGINX, Follower, Refused, accepts, numbers_arrive, replace_once, streamed
from wsqueue import SETTINGS, queue_event, sign_ticket

DEPLOY = ROOT / "examples" / "deploy"
CADDY = shutil.which("caddy")
DEFAULTS = {setting.name: setting.default for setting in SETTINGS}


def text_of(name):
    return (DEPLOY / name).read_text("utf-8")


# ---- nginx.conf and Caddyfile: a proxy in front ------------------------------------------------------------

NAME = "localhost"  # which a browser can find, too
AUTHORITY = trustme.CA()
TRUSTING = ssl.create_default_context()
AUTHORITY.configure_trust(TRUSTING)


def write_certificate(directory):
    """As certbot names its files."""
    certificate = AUTHORITY.issue_cert(NAME)
    certificate.private_key_pem.write_to_path(str(directory / "privkey.pem"))
    for number, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(str(directory / "fullchain.pem"), append=number > 0)


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
    write_certificate(directory)
    command = (nginx_files if kind == "nginx" else caddy_files)(front, server)
    site = directory / ("site.conf" if kind == "nginx" else "Caddyfile")
    for old, new in changes:
        site.write_text(replace_once(site.read_text("utf-8"), old, new), "utf-8")
    variables = {**os.environ, **dict.fromkeys(("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"), str(directory))}
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
    yield from streamed(SecureRequest(front), path, last)


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


PAGE = """
    const [done] = arguments, script = document.createElement("script");
    script.src = "/wsqueue.js";
    script.onload = () => {
        seen = [];
        CODE
        queue.on("*", message => seen.push(message.event));
        queue.onstatus = status => { if (status === "open") done(queue.send("")); };
    };
    document.head.append(script);
"""


@needs_chromium
def test_lines_of_the_comments_work_in_a_browser(front, chromium):
    """A page of the site has the client and is on the topic that the comment names, by WebSocket."""
    code = re.search(r"^#   <script> (.*;) </script>$", text_of("nginx.conf"), re.MULTILINE)[1]
    assert code.replace("const ", "") == 'queue = new WSQueue("/ws/orders");' and code in text_of("Caddyfile")
    chromium.execute_cdp_cmd("Security.setIgnoreCertificateErrors", {"ignore": True})
    try:
        chromium.get(f"https://{NAME}:{front.port}/wsqueue.js")
        assert chromium.execute_async_script(PAGE.replace("CODE", code.replace("const ", ""))) is True
        assert queue_event(front.queue, "for orders", to="/orders")
        eventually(lambda: chromium.execute_script("return seen") == ["for orders"], what="the event")
    finally:
        chromium.execute_cdp_cmd("Security.setIgnoreCertificateErrors", {"ignore": False})
        chromium.get("about:blank")


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
    assert answer == status
    assert not any(word in body for word in ("wsqueue_", "uptime_seconds", "<title>wsqueue"))


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
        seconds = re.search(rf"^ *proxy_{kind}_timeout (\d+)s;", text_of("nginx.conf"), re.MULTILINE)[1]
        assert int(seconds) > 2 * DEFAULTS["ping_interval"]


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


# ---- wsqueue.service ---------------------------------------------------------------------------------------

SYSTEMD = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(SYSTEMD is None, reason="needs Debian's systemd")
SECRET = "0123456789abcdef" * 4
UNIT, TLS = "wsqueue.service", "wsqueue-tls.conf"


def settings_of(*names):
    """What the [Service] sections say, one after the other: name -> values. An empty value begins anew."""
    found = {}
    for name in names:
        text = re.sub(r"\\\n *", "", text_of(name))
        for line in text.split("[Service]")[1].split("[Install]")[0].splitlines():
            key, is_setting, value = line.partition("=")
            if is_setting and not line.startswith("#"):
                found[key] = [*found.get(key, []), value] if value else []
    return found


def systemd_analyze(*words, cwd):
    """What it prints, all together; it is not always content."""
    done = subprocess.run([SYSTEMD, *words], cwd=str(cwd), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          encoding="utf-8", check=False, timeout=60 * TIME_UNIT)
    return done.stdout


@pytest.fixture
def installed(tmp_path):
    """The unit, with its drop-in; only what it starts is another program, which is there."""
    for name in (UNIT, TLS):
        assert text_of(name).count("\nExecStart=/opt/wsqueue/bin/wsqueue ") == 1
    (tmp_path / f"{UNIT}.d").mkdir()
    for name, target in ((UNIT, UNIT), (TLS, f"{UNIT}.d/tls.conf")):
        (tmp_path / target).write_text(text_of(name).replace("/opt/wsqueue/bin/wsqueue", "/bin/true"), "utf-8")
    return tmp_path


@needs_systemd
def test_systemd_understands_the_unit_and_its_drop_in(installed):
    """It complains of no line of either; it would."""
    for name in (UNIT, f"{UNIT}.d/tls.conf"):
        assert "wsqueue" not in systemd_analyze("verify", "--man=no", f"./{UNIT}", cwd=installed)
        (installed / name).write_text((installed / name).read_text("utf-8") + "\n[Service]\nNoSuchSetting=1\n", "utf-8")
        assert "NoSuchSetting" in systemd_analyze("verify", "--man=no", f"./{UNIT}", cwd=installed)
        (installed / name).write_text((installed / name).read_text("utf-8").replace("NoSuchSetting=1", ""), "utf-8")


@needs_systemd
def test_unit_is_as_hard_as_it_says(installed):
    """The exposure that systemd finds is at most the one that the comment states."""
    shutil.rmtree(str(installed / f"{UNIT}.d"))
    shown = systemd_analyze("security", "--offline=yes", "--no-pager", f"./{UNIT}", cwd=installed)
    exposure = float(re.search(r"Overall exposure level for wsqueue\.service: ([\d.]+)", shown)[1])
    assert exposure <= float(re.search(r"at ([\d.]+) of 10", text_of(UNIT))[1])


@contextmanager
def unit_runs(directory, *names, wrapper=()):
    """What the unit (with its drop-in) starts, as it is started, with other paths and a free port."""
    settings = settings_of(*names)
    [credential], [command] = settings["LoadCredential"], settings["ExecStart"]
    name, _, source = credential.partition(":")
    assert source == "/etc/wsqueue/secret"
    (directory / name).write_text(f"{SECRET}\n", "utf-8")
    command = replace_once(command, "/var/lib/wsqueue ", f"{directory}/queue ")
    command = replace_once(command, "${CREDENTIALS_DIRECTORY}", str(directory))
    command = re.sub(r"--port \d+", "--port 0", command).replace("/etc/wsqueue/tls", str(directory))
    program, *words = shlex.split(command)
    assert program == "/opt/wsqueue/bin/wsqueue" and SECRET not in command
    with running([*wrapper, sys.executable, WSQUEUE, *words], umask=int(settings["UMask"][0], 8)) as server:
        yield server


def running(command, umask=0o022, **popen):
    """A server that some command starts, with this umask."""
    return run_server(["sh", "-c", f'umask {umask:o}; exec "$@"', "-", *command], **popen)


def first_answer(server, ticket):
    with socket.create_connection((HOST, server.port), PATIENCE) as sock:
        sock.sendall(handshake(f"/?ticket={ticket}"))
        return sock.recv(12)


def test_unit_starts_a_server_that_wants_tickets(tmp_path):
    """Its options are the program's; the secret is that of the credential; it stops when systemd asks it to."""
    with unit_runs(tmp_path, UNIT) as server:
        assert first_answer(server, "none") == b"HTTP/1.1 401"
        with RawClient(server.url, f"/?ticket={sign_ticket(SECRET, user=1)}") as client:
            assert queue_event(str(tmp_path / "queue"), "arrived")
            assert json.loads(client.recv())["event"] == "arrived"
    assert settings_of(UNIT)["KillSignal"] == ["SIGTERM"] and server.process.returncode == 0


def test_drop_in_starts_a_server_that_reads_its_certificate_again(tmp_path):
    """ExecReload, as systemd runs it, has the server take a renewed certificate."""
    write_certificate(tmp_path)
    with unit_runs(tmp_path, UNIT, TLS) as server:
        assert server.url.startswith("wss://")
        write_certificate(tmp_path)
        [reload] = settings_of(UNIT, TLS)["ExecReload"]
        subprocess.run(shlex.split(reload.replace("$MAINPID", str(server.pid))), check=True, timeout=PATIENCE)
        eventually(lambda: "the certificate is now that of" in server.stderr_text(), what="the new certificate")


def test_hangup_ends_a_server_without_certificate(tmp_path):
    """So the unit has no ExecReload: systemd would take it for a clean end, and not start the server again."""
    assert "ExecReload" not in settings_of(UNIT)
    with unit_runs(tmp_path, UNIT) as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(PATIENCE) == -signal.SIGHUP


DENY_WRITE_EXECUTE = """
import ctypes, os, sys
if ctypes.CDLL(None, use_errno=True).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN
    sys.exit(os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])
"""


def kernel():
    return tuple(map(int, re.match(r"(\d+)\.(\d+)", os.uname().release).groups()))


@pytest.mark.skipif(kernel() < (6, 3), reason="needs Linux 6.3")
def test_wakeup_survives_memory_deny_write_execute(tmp_path):
    """ctypes, through which the kernel is asked for inotify, needs no memory that is writable and executable."""
    assert settings_of(UNIT)["MemoryDenyWriteExecute"] == ["yes"]
    with unit_runs(tmp_path, UNIT, wrapper=(sys.executable, "-c", DENY_WRITE_EXECUTE)) as server:
        descriptors = Path(f"/proc/{server.pid}/fd")
        assert any("inotify" in os.readlink(link) for link in descriptors.iterdir())
        assert "no kernel wake-up" not in server.stderr_text()
        with RawClient(server.url, f"/?ticket={sign_ticket(SECRET)}") as client:
            assert queue_event(str(tmp_path / "queue"), "arrived")
            assert json.loads(client.recv())["event"] == "arrived"


def test_times_and_statuses_of_the_unit_are_those_of_the_program(tmp_path):
    """It waits for longer than the server does for its clients; what is not tried again is a wrong command line."""
    settings = settings_of(UNIT)
    assert int(settings["TimeoutStopSec"][0]) >= 2 * DEFAULTS["close_timeout"]
    wrong = run_cli("serve", "--no-such-option", cwd=str(tmp_path)).returncode
    assert settings["RestartPreventExitStatus"] == [str(wrong)]


def test_history_finds_the_boot_id_that_it_needs():
    """ProcSubset=pid would hide it, and clients would start anew after each crash of the server."""
    assert "/proc/sys/kernel/random/boot_id" in Path(WSQUEUE).read_text("utf-8")
    assert "ProcSubset" not in settings_of(UNIT)


def test_files_that_the_comments_name_are_there():
    """What is to be copied, or read, lies where it is said to lie."""
    for name in os.listdir(str(DEPLOY)):
        for path in re.findall(r"examples/[\w./-]+\w", text_of(name)):
            assert (ROOT / path).exists(), f"{name}: {path}"


# ---- wsqueue.tmpfiles: two users ---------------------------------------------------------------------------

PYTHON = "/usr/bin/python3"  # one that all users may run
IS_ROOT = os.geteuid() == 0
SETFACL, TMPFILES, PHP = map(shutil.which, ("setfacl", "systemd-tmpfiles", "php"))
needs_users = pytest.mark.skipif(not (IS_ROOT and SETFACL and TMPFILES and PHP and os.path.exists(PYTHON)),
                                 reason="needs root, and Debian's acl, systemd, php-cli and python3")


def command_of(name, start):
    """The command of a comment that begins so."""
    return re.search(rf"\b{start}[^\n&]*[^\n& ]", text_of(name))[0]


@pytest.fixture(scope="module")
def users():
    """Three users, made as the comments say; of the names of these tests, and gone afterwards."""
    names = SimpleNamespace(**{role: f"wsq{os.getpid()}{role[0]}" for role in ("server", "producer", "outsider")})
    useradd = replace_once(command_of(UNIT, "useradd "), "nologin wsqueue", "nologin {}")
    usermod = replace_once(command_of("wsqueue.tmpfiles", "usermod "), "wsqueue www-data", "{} {}")
    try:
        for name in vars(names).values():
            subprocess.run(shlex.split(useradd.format(name)), check=True)
        subprocess.run(shlex.split(usermod.format(names.server, names.producer)), check=True)
        yield names
    finally:
        for name in (names.producer, names.server, names.outsider):  # a group that has members stays
            subprocess.run(["userdel", name], check=False, stderr=subprocess.DEVNULL)


def as_user(name, *command):
    """The command that runs this one as the user, with its groups and nothing of root's."""
    return ["setpriv", "--reuid", name, "--regid", name, "--init-groups", "--inh-caps=-all", *command]


def try_as(name, script, umask="022", **variables):
    """Run a shell script as the user."""
    command = as_user(name, "sh", "-c", f"umask {umask}; {script}")
    return subprocess.run(command, cwd="/", env={"PATH": os.environ["PATH"], **variables}, capture_output=True,
                          encoding="utf-8", check=False, timeout=30 * TIME_UNIT)


BY_TMPFILES, BY_HAND, WITHOUT_ACL = "tmpfiles", "by hand", "without ACLs"


@pytest.fixture
def place(users):
    """A directory that all can reach, with the program in it; pytest's own are closed by the next one that starts."""
    with tempfile.TemporaryDirectory(prefix="wsqueue-test-") as name:
        os.chmod(name, 0o755)
        shutil.copy(WSQUEUE, name)
        shutil.copytree(os.path.dirname(websocket_server.__file__), f"{name}/websocket_server")
        yield Path(name)


def make_queue(place, users, way):
    """The queue directory, with its rights, as wsqueue.tmpfiles has it."""
    queue, text = place / "queue", text_of("wsqueue.tmpfiles").replace("/var/lib/wsqueue", str(place / "queue"))
    if way == BY_HAND:
        commands = [re.sub(r"-([og]) wsqueue", rf"-\1 {users.server}", line)
                    for line in re.findall(r"^#   ((?:install|setfacl) .*)", text, re.MULTILINE)]
        assert len(commands) == 3
        subprocess.run(["sh", "-euc", "\n".join(commands)], check=True, timeout=PATIENCE)
        return queue
    lines = [line.replace(" wsqueue wsqueue", f" {users.server} {users.server}") for line in text.splitlines()
             if way != WITHOUT_ACL or not line.startswith("a+")]
    (place / "tmpfiles.conf").write_text("\n".join([*lines, ""]), "utf-8")
    subprocess.run([TMPFILES, "--create", str(place / "tmpfiles.conf")], check=True, timeout=PATIENCE)
    return queue


def server_of(users, place, queue, umask=None):
    """The server, as its user, with the unit's umask unless another one is given."""
    command = as_user(users.server, PYTHON, str(place / "wsqueue.py"), "serve", "--port", "0", "--queue", str(queue))
    return running(command, umask=int(settings_of(UNIT)["UMask"][0], 8) if umask is None else umask, cwd="/")


PHP_CODE = """file_put_contents(getenv("WS_QUEUE_PATH") . "/" . microtime(true) . "_" . uniqid("", true) . ".json",
                                json_encode(["event" => getenv("EVENT")]));"""
PRODUCERS = {
    "php": f"{PHP} -r '{PHP_CODE}'",
    "python": f'{PYTHON} "$PLACE/wsqueue.py" send "$EVENT"',
    "shell": """name=$(date +%s.%N)-$$.json; cd "$WS_QUEUE_PATH"
                printf '{"event": "%s"}' "$EVENT" > ".$name.tmp" && mv ".$name.tmp" "$name" """,
}


def produce(users, place, queue, how, umask, event="x"):
    variables = {"WS_QUEUE_PATH": str(queue), "PLACE": str(place), "EVENT": event}
    return try_as(users.producer, PRODUCERS[how], umask, **variables)


@needs_users
@pytest.mark.parametrize("way", [BY_TMPFILES, BY_HAND])
def test_what_one_user_queues_the_other_sends_and_removes(users, place, way):
    """Whatever the producer is written in, and whatever its umask."""
    queue = make_queue(place, users, way)
    with server_of(users, place, queue) as server, RawClient(server.url) as client:
        for how, umask in itertools.product(PRODUCERS, ("022", "077")):
            done = produce(users, place, queue, how, umask, f"{how} {umask}")
            assert (done.returncode, done.stderr) == (0, "")
            assert json.loads(client.recv())["event"] == f"{how} {umask}"
        eventually(lambda: sorted(os.listdir(str(queue))) == [".wsqueue.lock", "failed", "history"], what="no events")
        assert os.listdir(str(queue / "failed")) == []
        assert "ERROR" not in server.stderr_text()


@needs_users
def test_outsider_neither_reads_nor_publishes(users, place):
    """A user who is not in the group finds nothing, writes nothing, and is told why."""
    queue = make_queue(place, users, BY_TMPFILES)
    produce(users, place, queue, "php", "022")
    [file] = queue.glob("*.json")
    done = try_as(users.outsider, f'{PYTHON} {place}/wsqueue.py send x --queue {queue}')
    assert done.returncode == 1 and "Permission denied" in done.stderr
    for attempt in (f"ls {queue}", f"cat {file}", f"echo > {queue}/x.json", f"mv {file} {place}"):
        assert try_as(users.outsider, attempt).returncode != 0, attempt
    assert list(queue.glob("*.json")) == [file]


@needs_users
def test_producer_sees_who_serves_and_changes_nothing(users, place):
    """What failed and the history are the server's alone; lock, directories and others' events stay where they are."""
    queue = make_queue(place, users, BY_TMPFILES)
    (queue / "failed" / "x.json").write_text("{", "utf-8")
    with server_of(users, place, queue) as server, RawClient(server.url) as client:
        produce(users, place, queue, "php", "022")
        client.recv()
        assert (queue / "history" / "events.log").stat().st_size
        status = try_as(users.producer, f"{PYTHON} {place}/wsqueue.py status --queue {queue}")
        assert status.returncode == 0 and f"process {server.pid}" in status.stdout
        for attempt in ("ls failed", "cat failed/x.json", "ls history", "cat history/events.log",
                        "mv failed away", "mv history away", "rm -f .wsqueue.lock", "mv .wsqueue.lock away"):
            assert try_as(users.producer, f"cd {queue} && {attempt}").returncode != 0, attempt
    assert stat.S_IMODE((queue / "history").stat().st_mode) & 0o777 == 0o700


@needs_users
def test_file_that_the_server_may_not_read_is_kept_and_can_be_mended(users, place):
    """Without ACLs, a umask of 077 is too strict: the event waits in failed/, and the log names it and the reason."""
    queue = make_queue(place, users, WITHOUT_ACL)
    with server_of(users, place, queue) as server, RawClient(server.url) as client:
        for umask in ("077", "027"):
            assert produce(users, place, queue, "python", umask, umask).returncode == 0
        assert json.loads(client.recv())["event"] == "027"
        failed = eventually(lambda: list((queue / "failed").glob("*.json")), what="a file in failed/")
        eventually(lambda: str(failed[0]) in server.stderr_text(), what="a line of the log")
        assert "cannot open it: Permission denied (a umask of 027" in server.stderr_text()
        failed[0].chmod(0o640)
        shutil.move(str(failed[0]), str(queue))
        assert json.loads(client.recv())["event"] == "077"


def test_unit_and_tmpfiles_agree():
    """They make the same directory, which is the one that is served."""
    settings = settings_of(UNIT)
    [line] = re.findall(r"^d +(/var/lib/wsqueue) +(\d+) +(\w+) +(\w+)$", text_of("wsqueue.tmpfiles"), re.MULTILINE)
    assert line == (f"/var/lib/{settings['StateDirectory'][0]}", settings["StateDirectoryMode"][0],
                    settings["User"][0], settings["Group"][0])
    for name in (UNIT, TLS):
        assert f"--queue {line[0]} " in settings_of(name)["ExecStart"][0]


# ---- serve_with_log_files.py -------------------------------------------------------------------------------

LOG_FILES = "serve_with_log_files.py"


@contextmanager
def logging_server(place, old, new):
    """The example, copied, with one change; and that it says nothing on stderr."""
    program = place / LOG_FILES
    program.write_text(replace_once(text_of(LOG_FILES), old, new), "utf-8")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "WS_LOG": str(place / "wsqueue.log")}
    command = [sys.executable, str(program), "--queue", str(place / "queue"), "--port", "0"]
    with running(command, env=variables, cwd=str(place)) as server:
        yield server
        assert server.stderr_text() == ""
    assert server.process.returncode == 0


def log_something(place, numbers):
    """One line for each number: a file that is no event."""
    names = [f"{number}.json" for number in numbers]
    for name in names:
        (place / "queue" / f".{name}.tmp").write_text("{}", "utf-8")
        os.rename(str(place / "queue" / f".{name}.tmp"), str(place / "queue" / name))
    eventually(lambda: not list((place / "queue").glob("*.json")), what="all set aside")


def logged_names(place):
    lines = [line for path in place.glob("wsqueue.log*") for line in path.read_text("utf-8").splitlines()]
    return sorted(int(found[1]) for found in (re.search(r"ERROR '(\d+)\.json' is not an event", line) for line in lines)
                  if found)


def test_log_is_turned_over_and_no_line_is_lost(tmp_path):
    """A file that is full makes room for the next one; together they have every line, once."""
    with logging_server(tmp_path, "maxBytes=10_000_000, backupCount=5", "maxBytes=2_000, backupCount=1_000"):
        log_something(tmp_path, range(200))
    files = list(tmp_path.glob("wsqueue.log*"))
    assert len(files) > 10 and all(path.stat().st_size <= 2_000 for path in files)
    assert logged_names(tmp_path) == list(range(200))


def test_log_that_is_moved_away_is_opened_anew(tmp_path):
    """With the other handler that the comment names, for a program that moves it."""
    rotating = 'RotatingFileHandler(path, maxBytes=10_000_000, backupCount=5, encoding="utf-8")'
    with logging_server(tmp_path, rotating, "WatchedFileHandler(path)"):
        log_something(tmp_path, range(20))
        os.rename(str(tmp_path / "wsqueue.log"), str(tmp_path / "wsqueue.log.1"))
        log_something(tmp_path, range(20, 40))
    assert (tmp_path / "wsqueue.log").stat().st_size
    assert logged_names(tmp_path) == list(range(40))


# ---- Dockerfile --------------------------------------------------------------------------------------------


def instructions():
    """(INSTRUCTION, the rest) of the Dockerfile, in order."""
    lines = [line for line in text_of("Dockerfile").splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n *", "", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines()]


class Image:
    """What the Dockerfile makes, in a directory that stands for /, with a virtual environment for the base image."""

    def __init__(self, root):
        self.root, self.cwd = root, root
        self.environment = {"PATH": f"{root}/venv/bin{os.pathsep}{os.environ['PATH']}"}
        self.values = {}
        subprocess.run([sys.executable, "-m", "venv", str(root / "venv")], check=True, timeout=60 * TIME_UNIT)
        for instruction, value in instructions():
            getattr(self, f"_{instruction.lower()}", self._keep(instruction))(value)

    def _keep(self, instruction):
        return lambda value: self.values.setdefault(instruction, value)

    def path(self, path):
        return self.root / path.lstrip("/")

    def _run(self, command):
        """/queue is in the image; its owner is who runs the tests."""
        command = command.replace("/queue", f"{self.root}/queue")
        command = command.replace("-o 10001 -g 10001", f"-o {os.getuid()} -g {os.getgid()}")
        wheels = self.root / "wheels"
        wheels.mkdir(exist_ok=True)
        repack("websocket-server", wheels)
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), **self.environment}
        subprocess.run(["sh", "-euc", command], cwd=str(self.cwd), env=offline, check=True, timeout=60 * TIME_UNIT)

    def _copy(self, words):
        """From the checkout, of which the build gets what the ignore file lets through."""
        source, target = words.split()
        assert source in re.findall(r"^!(.*)", text_of("Dockerfile.dockerignore"), re.MULTILINE)
        self.path(target).mkdir(parents=True, exist_ok=True)
        shutil.copy(str(ROOT / source), str(self.path(target)))

    def _workdir(self, path):
        self.cwd = self.path(path)

    def _env(self, words):
        self.environment.update(word.split("=", 1) for word in shlex.split(words))

    def command(self):
        return json.loads(self.values["ENTRYPOINT"]) + json.loads(self.values["CMD"])

    def is_healthy(self, port):
        check = json.loads(self.values["HEALTHCHECK"].partition(" CMD ")[2])
        check = [word.replace(f":{self.environment['WS_PORT']}/", f":{port}/") for word in check]
        assert any(f":{port}/" in word for word in check)
        done = subprocess.run(check, env=self.environment, cwd=str(self.cwd), capture_output=True, check=False,
                              timeout=30 * TIME_UNIT)
        return done.returncode == 0


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return Image(tmp_path_factory.mktemp("image"))


def test_container_serves_its_volume_is_healthy_and_ends(image):
    """What is installed, copied and started is what the server needs; SIGTERM ends it, and the check notices."""
    port = free_port()
    assert image.environment["WS_QUEUE_PATH"] == image.values["VOLUME"] == "/queue"
    assert image.values["EXPOSE"] == image.environment["WS_PORT"]
    variables = {**image.environment, "WS_PORT": str(port), "WS_QUEUE_PATH": f"{image.root}/queue"}
    [send] = re.findall(r"^#   docker exec wsqueue (.*)", text_of("Dockerfile"), re.MULTILINE)
    with running(image.command(), env=variables, cwd=str(image.cwd)) as server:
        with RawClient(f"ws://{HOST}:{port}") as client:
            subprocess.run(shlex.split(send), env=variables, cwd=str(image.cwd), check=True, timeout=30 * TIME_UNIT)
            message = json.loads(client.recv())
            assert (message["event"], message["payload"]) == ("hello", {"n": 1})
        eventually(lambda: image.is_healthy(port), what="health")
    assert server.process.returncode == 0
    assert not image.is_healthy(port)


def test_container_is_heard_from_outside_and_runs_as_nobody_special(image):
    """It listens on all addresses, for which 0.0.0.0 stands, and its user is a number that is not root's."""
    assert image.environment["WS_HOST"] == "0.0.0.0"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", image.values["USER"])
    assert re.fullmatch(r"python:3\.\d+-slim", image.values["FROM"])


def test_volume_begins_with_the_rights_of_two_users(image):
    """As wsqueue.tmpfiles has them; the directories are the user's who serves."""
    assert stat.S_IMODE((image.root / "queue").stat().st_mode) == 0o3770
    assert stat.S_IMODE((image.root / "queue" / "failed").stat().st_mode) & 0o777 == 0o700
    assert len(re.findall(rf"-o {image.values['USER'].replace(':', ' -g ')} ", text_of("Dockerfile"))) == 2


def test_container_has_nothing_but_the_server(image):
    """One file of ours, and the one package that a server needs."""
    assert os.listdir(str(image.root / "app")) == ["wsqueue.py"] or sorted(os.listdir(str(image.root / "app"))) == [
        "__pycache__", "wsqueue.py"]
    listed = subprocess.run(["pip", "list", "--format=json"], env=image.environment, cwd=str(image.root), check=True,
                            capture_output=True, timeout=60 * TIME_UNIT).stdout
    assert {package["name"] for package in json.loads(listed)} - {"pip", "setuptools", "wheel"} == {"websocket-server"}


def test_build_gets_one_file_of_the_checkout():
    """Neither .git nor anybody's secrets go to the builder."""
    lines = [line for line in text_of("Dockerfile.dockerignore").splitlines() if not line.startswith("#")]
    assert lines == ["*", "!wsqueue.py"]


@needs_users
def test_status_does_not_deny_a_server_whose_lock_it_may_not_open(users, place):
    """A producer may list the directory and not read the lock (a server with umask 077): who serves is unknown then."""
    queue = make_queue(place, users, WITHOUT_ACL)
    with server_of(users, place, queue, umask=0o077):
        status = try_as(users.producer, f"{PYTHON} {place}/wsqueue.py status --queue {queue}")
        assert status.returncode == 1 and "server   unknown: user id" in status.stdout
