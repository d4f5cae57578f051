"""README.md: every block of code in it is run, its tables are what the program declares, and its links lead somewhere.

A block is preceded by a comment with its role, `<!-- run: ROLE -->`, and each role has a function below which runs such
a block for what it is. Run as a program, this file writes the settings table into README.md anew.
"""

import functools
import http.server
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import zipfile
from contextlib import ExitStack, closing, contextmanager
from importlib import metadata
from pathlib import Path

import psycopg
import pytest
import redis
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import wsqueue
from brokers import PASSWORD
from clients import use_websockets
from helpers import ROOT, TIME_UNIT, WSQUEUE, eventually, run_cli, spawn_server

README = ROOT / "README.md"
TEXT = README.read_text("utf-8")
PORT = "8081"  # what the page says; each test puts one of its own in its place

# ---- The page's parts --------------------------------------------------------------------------------------

FENCE = re.compile(r"(?:^<!-- run: ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block:
    """One block of code: what it is written in, what it is there for, and its text."""

    def __init__(self, match):
        self.role, *self.words = (match[1] or "without a role").split()
        self.language, self.code = match[2], match[3]
        self.line = TEXT.count("\n", 0, match.start()) + 1

    def __repr__(self):
        return f"{self.language}-{self.role}-line-{self.line}"


BLOCKS = [Block(match) for match in FENCE.finditer(TEXT)]
PROSE = FENCE.sub("", TEXT)


def settings_table():
    """The declared settings as the page shows them."""
    rows = ["| Setting | Default | Meaning |", "|---|---|---|"]
    for setting in wsqueue.SETTINGS:
        rows.append(f"| `{setting.name}` | {shown_default(setting)} | {setting.meaning} |")
        if setting.variable:
            rows[-1] = f"{rows[-1][:-2]} `${setting.variable}` |"
    return "\n".join(rows) + "\n"


def shown_default(setting):
    """A value with its unit, where it has one."""
    if setting.default in ("", ()):
        return "none"
    if type(setting.default) is bool:
        return "on" if setting.default else "off"
    value = f"{setting.default:g}" if type(setting.default) is float else str(setting.default)
    return f"{value} {setting.unit}" if setting.unit in ("seconds", "bytes") else value


SETTINGS_TABLE = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)


def test_settings_table_is_the_declared_one():
    """The page and the program say the same about each setting; `python tests/test_readme.py` makes it so."""
    assert SETTINGS_TABLE.search(TEXT)[0] == settings_table()


def test_there_is_no_other_code():
    """Code stands in fenced blocks, because those are run: an indented block would not be."""
    assert PROSE.count("```") == 0
    assert re.findall(r"\n\n(?: {4}|\t)[^\n]*", PROSE) == []


@pytest.mark.parametrize("command", ["serve", "send", "listen", "status", "ticket"])
def test_every_command_is_described(command):
    """The table of commands has a row for each."""
    assert re.search(rf"^\| `{command}\b", PROSE, re.MULTILINE)


# ---- Links -------------------------------------------------------------------------------------------------


def anchors():
    """The anchor of each heading, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links():
    return [link for link in re.findall(r"\]\(([^)]*)\)", PROSE) if not re.match(r"https?://", link)]


@pytest.mark.parametrize("link", sorted(set(links())))
def test_links_lead_somewhere(link):
    """A link within the repository names a file that is there, and a heading that is there."""
    path, _, anchor = link.partition("#")
    assert not path or (ROOT / path).exists()
    assert not anchor or anchor in anchors()


@pytest.mark.parametrize("name, path", re.findall(r"\[`(test_\w+)`\]\(([^)]*)\)", PROSE))
def test_a_proof_exists(name, path):
    """A test that a guarantee names is in the file that it names."""
    assert f"\ndef {name}(" in (ROOT / path).read_text("utf-8")


def test_every_guarantee_is_proved():
    """Each row of the table names a test."""
    table = re.search(r"^## Guarantees\n\n.*?\n\n", PROSE, re.MULTILINE | re.DOTALL)[0]
    rows = re.findall(r"^\| .*", table, re.MULTILINE)[1:]
    assert len(rows) >= 10
    assert [row for row in rows if "[`test_" not in row] == []


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|examples)/[\w./-]+)", TEXT))))
def test_files_that_are_named_exist(path):
    """A file of the repository that the page names is there; but for what only a run of the tests makes."""
    assert (ROOT / path).exists() or path.startswith("tests/.venv") or path.endswith(".php")


# ---- A place to run a block in -----------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty directory; `wsqueue` is a command and a module there, and nothing of ours is in the environment."""
    for name in [name for name in os.environ if name.startswith("WS_")]:
        monkeypatch.delenv(name)
    programs, modules, here = tmp_path / "bin", tmp_path / "lib", tmp_path / "here"
    for directory in (programs, modules, here):
        directory.mkdir()
    shutil.copy(WSQUEUE, str(modules))
    script(programs / "wsqueue", f'exec "{sys.executable}" "{modules}/wsqueue.py" "$@"')
    script(programs / "python3", f'exec "{sys.executable}" "$@"')
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(modules))
    monkeypatch.chdir(here)
    return here


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def interpreter(block):
    """The command that runs a block's file."""
    # Python 3.8's libraries complain of its age. With the category, which changes nothing, it is not the option that
    # PYTHONWARNINGS has already (see conftest.py): of equal ones the first counts, and the error would come after it.
    python = [sys.executable, "-W", "error", "-W", "ignore:Python 3.8 is no longer supported:Warning"]
    commands = {"python": python, "php": [shutil.which("php")], "sh": ["bash", "-eu"],
                "sql": ["psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--file"]}
    command = commands[block.language]
    if command[0] is None:
        pytest.skip("needs Debian's php-cli")
    return command


def run(block, code=None, **more):
    """Run a block to its end; it must succeed and complain of nothing."""
    Path("block").write_text(code or block.code, "utf-8")
    command = [*interpreter(block), "block"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=60 * TIME_UNIT, **more)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@contextmanager
def started(block, code=None, **more):
    """Run a block that does not end by itself; its whole group is ended when the Python block ends."""
    Path("block").write_text(code or block.code, "utf-8")
    with open("out", "wb") as out, open("err", "wb") as err:
        process = subprocess.Popen([*interpreter(block), "block"], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                   start_new_session=True, **more)
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(10 * TIME_UNIT)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
        process.wait()
    assert "Traceback" not in Path("err").read_text("utf-8")


@contextmanager
def reserved_port():
    """A port that nobody else is given, and that a server may still take: bound, but not listening."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", 0))
        yield str(sock.getsockname()[1])


@contextmanager
def client(port, path, process=None, **options):
    """A client of a server that is about to listen. Nothing else knocks: some programs count who does."""

    def connected():
        assert process is None or process.poll() is None, Path("err").read_text("utf-8")
        try:
            return connect(f"ws://127.0.0.1:{port}{path}", **options)
        except ConnectionRefusedError:
            return None

    with eventually(connected, 30.0, f"a server at port {port}") as connection:
        yield connection


def receive(connection):
    """The next event, as (name, payload)."""
    message = json.loads(connection.recv(timeout=10 * TIME_UNIT))
    assert set(message) == {"event", "payload", "timestamp"}
    return message["event"], message["payload"]


# ---- The roles ---------------------------------------------------------------------------------------------

ROLES = {}


def role(function):
    """Register a function that runs the blocks of the role it is named after."""
    ROLES[function.__name__] = function
    return function


@pytest.mark.parametrize("block", BLOCKS, ids=repr)
def test_block(block, place, request):
    """It does what the page says that it does; a block that says nothing of its role is not run, and so it fails."""
    assert block.role in ROLES, f"line {block.line}: say what it is for: <!-- run: ROLE -->, with one of {list(ROLES)}"
    ROLES[block.role](block, request)


@role
def way(block, request):
    """A file that queue_event() makes has a name as the picture shows it."""
    wsqueue.queue_event("ws_queue", "order_paid")
    name, shown = os.listdir("ws_queue")[0], re.search(r"\S+\.json", block.code)[0]
    shape = re.compile(r"\d{10}\.\d+_[0-9a-f]{13,}\.json")
    assert shape.fullmatch(name) and shape.fullmatch(shown)


def block_of(role):
    return next(block for block in BLOCKS if block.role == role)


@role
def first(block, request):
    """What it sends is seen by who looks at the server that was just set up: see setup()."""
    assert block.code.startswith(".venv/bin/wsqueue send ")


@role
def setup(block, request):
    """In a fresh copy of the checkout, with an index of packages that has what this environment has.

    Then the first event, as the monitor page shows it.
    """
    for name in ("setup.py", "wsqueue.py", "README.md", "LICENSE"):
        shutil.copy(str(ROOT / name), name)
    Path("wheels").mkdir()
    for name in ("websocket-server", "setuptools"):
        repack(name, Path("wheels"))
    with zipfile.ZipFile("wheels/wheel-1-py3-none-any.whl", "w") as empty:  # older pips ask for it and do not use it
        for name, text in (("METADATA", "Metadata-Version: 2.1\nName: wheel\nVersion: 1\n"), ("RECORD", ""),
                           ("WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")):
            empty.writestr(f"wheel-1.dist-info/{name}", text)
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": os.path.abspath("wheels"),
                   "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "WS_PORT": "0"}
    del environment["PYTHONPATH"]  # the package that was installed must do
    with started(block, env=environment) as process:
        def port():
            assert process.poll() is None, Path("err").read_text("utf-8")
            return re.search(r"^listening on ws://127\.0\.0\.1:(\d+)$", Path("out").read_text("utf-8"), re.MULTILINE)

        driver = request.getfixturevalue("chromium")
        driver.get(f"http://127.0.0.1:{eventually(port, 50.0, 'the server')[1]}/")
        eventually(lambda: seen(driver, "state") == "OK", 20.0, "a page that says that all is well")
        done = subprocess.run(block_of("first").code, shell=True, env=environment, capture_output=True, check=True)
        assert done.stderr == b""
        eventually(lambda: re.search(r'\bhello\b.*"from": "a shell"', seen(driver, "events"), re.DOTALL), 20.0,
                   "the event on the page")
        driver.get("about:blank")


def seen(driver, name):
    """What an element of the page shows."""
    return driver.execute_script("return document.getElementById(arguments[0]).innerText", name)


def repack(name, directory):
    """Make a wheel of a package that is installed."""
    package = metadata.distribution(name)
    with zipfile.ZipFile(str(directory / f"{name.replace('-', '_')}-{package.version}-py3-none-any.whl"), "w") as wheel:
        for file in package.files:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                wheel.write(str(package.locate_file(file)), str(file))


@role
def suite(block, request):
    """This is what runs these tests; run from here, it would do so for ever."""
    command = block.code.strip()
    assert command == "tests/run" and os.access(str(ROOT / command), os.X_OK)


@role
def producer(block, request):
    """The events that its role lists arrive at a client, in that order, and no other."""
    with spawn_server("--queue", "ws_queue") as server, client(server.port, "/") as connection:
        run(block)
        for name in block.words:
            assert receive(connection)[0] == name
        wsqueue.queue_event("ws_queue", "the last one")
        assert receive(connection)[0] == "the last one"
        eventually(lambda: sorted(os.listdir("ws_queue")) == [".wsqueue.lock", "history"], what="no events left")


@role
def event(block, request):
    """It is what an event file may hold; its topics and its timestamp count."""
    with spawn_server("--queue", "ws_queue") as server, client(server.port, "/orders") as connection:
        Path("ws_queue/.x.tmp").write_text(block.code, "utf-8")
        os.rename("ws_queue/.x.tmp", "ws_queue/x.json")
        expected = {key: json.loads(block.code)[key] for key in ("event", "payload", "timestamp")}
        assert json.loads(connection.recv(timeout=10 * TIME_UNIT)) == expected


@role
def layout(block, request):
    """A directory that is served has what it shows, once a file was broken and a producer was killed."""
    names = re.findall(r"^  (\S+)", block.code, re.MULTILINE)
    assert names == ["NAME.json", ".NAME.json.tmp", ".wsqueue.lock", "failed/", "history/"]
    with spawn_server("--queue", "ws_queue"):
        Path("ws_queue/.a.json.tmp").write_text("{", "utf-8")
        Path("ws_queue/b.json").write_text("1", "utf-8")
        eventually(lambda: os.path.exists("ws_queue/failed/b.json.reason"), what="a reason")
        assert sorted(os.listdir("ws_queue")) == [".a.json.tmp", ".wsqueue.lock", "failed", "history"]
        assert sorted(os.listdir("ws_queue/failed")) == ["b.json", "b.json.reason"]


@role
def server(block, request):
    """Each route does what its comment says, and queued events arrive."""
    assert block.code.count(PORT) == 1
    with reserved_port() as port, started(block, block.code.replace(PORT, port)) as process:
        with client(port, "/notifications?name=Ada", process) as connection:
            welcome = {"event": "connected", "payload": {"name": "Ada", "from": f"127.0.0.1:{port}"}}
            assert json.loads(connection.recv(timeout=10 * TIME_UNIT)) == welcome
            assert wsqueue.queue_event("logs/ws_queue", "order_paid")
            assert receive(connection) == ("order_paid", None)
        with client(port, "/echo") as connection:
            for message in ("one", b"two"):
                connection.send(message)
                assert connection.recv(timeout=10 * TIME_UNIT) == message
        with client(port, "/chat") as one, client(port, "/chat") as two:
            one.send("hello")
            assert receive(one) == receive(two) == ("said", {"text": "hello"})


@role
def topics(block, request):
    """Who is on a topic gets its events, and nobody else; what is sent is the block of the role `to`."""
    with reserved_port() as port, started(block, block.code.replace(PORT, port)) as process, ExitStack() as stack:
        paths = ("/orders?customer=7", "/orders?customer=8", "/news", "/")
        connections = [stack.enter_context(client(port, path, process)) for path in paths]
        joined(connections[0], "customer:7")
        joined(connections[1], "customer:8")
        run(block_of("to"))
        wanted = [["order_paid", "shop_closes"], ["shop_closes"], ["shop_closes"], []]
        for connection, names in zip(connections, wanted):
            assert [receive(connection)[0] for _ in names] == names
        wsqueue.queue_event("ws_queue", "the last one")
        for connection in connections:
            assert receive(connection)[0] == "the last one"


@role
def to(block, request):
    """What it sends is told apart by who gets it: see topics()."""
    assert "topics" in [other.role for other in BLOCKS]
    run(block)
    assert len(list(Path("ws_queue").glob("*.json"))) == block.code.count("queue_event(")


def joined(connection, topic):
    """A handler runs after its client is connected: send to the topic until something arrives, and take it all."""

    def arrived():
        wsqueue.queue_event("ws_queue", "probe", to=topic)
        try:
            return connection.recv(timeout=0.1)
        except TimeoutError:
            return None

    eventually(arrived, what=f"an event to {topic}")
    wsqueue.queue_event("ws_queue", "end of probes", to=topic)
    while receive(connection)[0] != "end of probes":
        pass


@role
def embedded(block, request):
    """It serves until it is stopped, and is gone then; here it waits for a line before that."""
    assert block.code.endswith("\nserver.stop()\n")
    with reserved_port() as port:
        code = block.code.replace(PORT, port).replace("\nserver.stop()\n", "\ninput()\nserver.stop()\n")
        Path("block").write_text(code, "utf-8")
        process = subprocess.Popen([*interpreter(block), "-u", "block"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, encoding="utf-8")
        try:
            assert process.stdout.readline() == f"ws://127.0.0.1:{port} 0 True\n"
            with client(port, "/") as connection:
                wsqueue.queue_event("ws_queue", "order_paid")
                assert receive(connection) == ("order_paid", None)
                output, errors = process.communicate("\n", timeout=20 * TIME_UNIT)
                assert (process.returncode, output, errors) == (0, "", "")
                with pytest.raises(ConnectionClosed, match="1001"):
                    connection.recv(timeout=10 * TIME_UNIT)
        finally:
            process.kill()
            process.communicate()


@role
def preforked(block, request):
    """Under gunicorn, as its comment says, a request to any worker reaches a client, also when the server has died."""
    command = re.search(r"# app\.py, run by: gunicorn (.*)\n", block.code)[1].split()
    program = f"import sys\nfrom gunicorn.app.wsgiapp import run\nsys.argv[1:] = {['-b', 'unix:http.sock', *command]}\n"
    with reserved_port() as port:
        Path("app.py").write_text(block.code.replace(PORT, port), "utf-8")
        with started(block, program + "run()\n") as process:
            with client(port, "/", process) as connection:
                assert visit("/one") == {"queued": True}
                assert receive(connection) == ("page_visited", {"path": "/one"})
                serving = int(wsqueue.serving_process("ws_queue"))
                os.kill(serving, signal.SIGKILL)
                with pytest.raises(ConnectionClosed):
                    connection.recv(timeout=10 * TIME_UNIT)
                # Its port may still accept for a moment: the kernel closes what it had one by one.
                eventually(lambda: is_gone(serving), what="the end of the killed process")
            with client(port, "/", process) as connection:
                assert visit("/two") == {"queued": True}
                assert receive(connection) == ("page_visited", {"path": "/two"})


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def visit(path):
    """GET a path of the application; its socket is a file, so that no port has to be free."""
    done = subprocess.run(["curl", "-s", "--unix-socket", "http.sock", f"http://localhost{path}"], check=True,
                          capture_output=True, timeout=30 * TIME_UNIT)
    return json.loads(done.stdout)


@role
def tls(block, request):
    """The commands make a certificate and serve with it; a client that trusts it gets events."""
    with reserved_port() as port, started(block, block.code.replace(PORT, port)):
        eventually(lambda: "listening on wss://" in Path("out").read_text("utf-8"), 30.0, "the server")
        trusting = ssl.create_default_context(cafile="cert.pem")
        with use_websockets(f"wss://127.0.0.1:{port}/", ssl=trusting) as connection:
            wsqueue.queue_event("ws_queue", "hello")
            assert json.loads(connection.recv())["event"] == "hello"


@role
def stream(block, request):
    """curl shows events as they come."""
    with spawn_server("--queue", "ws_queue") as server, started(block, block.code.replace(PORT, str(server.port))):
        eventually(lambda: "wsqueue.hello" in Path("out").read_text("utf-8"), what="the hello")
        wsqueue.queue_event("ws_queue", "order_paid", {"id": 42}, to="/orders")
        shown = re.compile(r'^id: \S+\ndata: \{"event":"order_paid","payload":\{"id":42\},', re.MULTILINE)
        eventually(lambda: shown.search(Path("out").read_text("utf-8")), what="the event")


@role
def secret(block, request):
    """The server wants tickets, and takes those that are signed with the secret that the command made."""
    with reserved_port() as port, started(block, block.code.replace(PORT, port)) as process:
        with pytest.raises(InvalidStatus, match="401"), client(port, "/", process):
            pass
        assert stat.S_IMODE(os.stat("secret").st_mode) == 0o600
        with client(port, f"/?ticket={wsqueue.sign_ticket(Path('secret').read_text().strip())}") as connection:
            wsqueue.queue_event("ws_queue", "hello")
            assert receive(connection) == ("hello", None)


@role
def ticket(block, request):
    """What it prints lets in user 42, who is also in room 5."""
    secret = {**os.environ, "WS_SECRET": "0123456789abcdef" * 4}
    ticket = run(block, env=secret).strip()
    with spawn_server("--queue", "ws_queue", env=secret) as server:
        with client(server.port, f"/?ticket={ticket}") as connection:
            for topic in ("user:42", "room:5", "user:43", ["user:43", "/"]):
                wsqueue.queue_event("ws_queue", str(topic), to=topic)
            assert [receive(connection)[0] for _ in range(3)] == ["user:42", "room:5", "['user:43', '/']"]


@role
def authenticate(block, request):
    """A session's cookie lets its user in, on the topics that the code says; nobody else is let in."""
    with reserved_port() as port, started(block, block.code.replace(PORT, port)) as process:
        with pytest.raises(InvalidStatus, match="401"), client(port, "/", process):
            pass
        with client(port, "/", additional_headers={"Cookie": "theme=dark; session=k7Qx2mZ"}) as connection:
            for topic in ("user:43", "user:42", "staff"):
                wsqueue.queue_event("ws_queue", topic, to=topic)
            assert [receive(connection)[0] for _ in range(2)] == ["user:42", "staff"]


@role
def monitoring(block, request):
    """Both requests are answered; the fields and the metrics are those that the page names."""
    with spawn_server("--queue", "ws_queue") as server:
        health, _, metrics = run(block, block.code.replace(PORT, str(server.port))).partition("\n")
    assert json.loads(health)["status"] == "ok"
    described = re.search(r"^`/healthz` is JSON: (.*?)\. `/metrics`", PROSE, re.MULTILINE | re.DOTALL)[1]
    assert set(json.loads(health)) == set(re.findall(r"`(\w+)`", described)) - {"ok"}
    types = re.findall(r"^# TYPE (\w+) (\w+)$", metrics, re.MULTILINE)
    assert types == re.findall(r"^\| `(wsqueue_\w+)` \| (\w+) \|", PROSE, re.MULTILINE)


@role
def serve(block, request):
    """The command as it stands, but for the port, brings events to a client."""
    with reserved_port() as port, started(block, block.code.replace(PORT, port)) as process:
        with client(port, "/", process) as connection:
            assert run_cli("send", "hello", "--queue", "ws_queue").returncode == 0
            assert receive(connection) == ("hello", None)


@role
def commands(block, request):
    """All of them succeed, while a server runs and somebody sends what is listened for."""
    with spawn_server("--queue", "ws_queue") as server, client(server.port, "/reports") as witness:
        stop = threading.Event()

        def send():
            while not stop.wait(0.05):
                wsqueue.queue_event("ws_queue", "report_ready", {"rows": 7}, to="/reports")

        sender = threading.Thread(target=send)
        sender.start()
        try:
            output = run(block, block.code.replace(PORT, str(server.port)))
        finally:
            stop.set()
            sender.join()
        assert re.search(rf"process {server.pid}\b", output)
        assert json.loads(output.splitlines()[-1])["event"] == "report_ready"
        heard = [receive(witness)]
        while heard[-1] != ("report_ready", {"rows": 1200}):
            heard.append(receive(witness))
        assert ("order_paid", {"id": 42}) in heard


# ---- Queues at URLs ----------------------------------------------------------------------------------------


@role
def picture(block, request):
    """It shows nodes as they are started, and the brokers that there are."""
    for name in ("one", "two"):
        assert f"wsqueue serve --node {name}" in block.code
    assert "Redis, PostgreSQL, RabbitMQ or SQLite" in block.code


def arrives(block, url, code=None, ticket="", output="", **variables):
    """The events that the block's role lists come from the queue to a client, in that order, and no other."""
    environment = {**os.environ, "WS_QUEUE_PATH": url, "WS_NODE": "one", **variables}
    with spawn_server(env=environment) as server, client(server.port, f"/?ticket={ticket}") as connection:
        run_cli("status", env=environment)  # makes the table, should the server not have come to it yet
        assert run(block, code, env=environment) == output
        assert wsqueue.queue_event(url, "the last one")
        wsqueue.close_queues()  # the next relative path is another file
        for name in (*block.words, "the last one"):
            assert receive(connection)[0] == name


@role
def moved(block, request):
    """The commands serve a queue in Redis, once they know where that is."""
    url, shown = request.getfixturevalue("redis_broker").queue_url(), "redis://:PASSWORD@127.0.0.1:6379/0"
    assert block.code.count(shown) == block.code.count("pip install redis ") == 1
    code = block.code.replace(shown, url).replace("pip install redis ", "true ")
    with reserved_port() as port, started(block, code.replace(PORT, port)) as process:
        with client(port, "/", process) as connection:
            assert wsqueue.queue_event(url, "order_paid")
            assert receive(connection) == ("order_paid", None)


@role
def producer_of_environment(block, request):
    """The same lines do for a directory and for a broker."""
    for url in ("ws_queue", request.getfixturevalue("redis_broker").queue_url()):
        arrives(block, url)


@role
def outbox(block, request):
    """What was committed arrives, what was rolled back does not."""
    arrives(block, "sqlite:///shop.db", output="UNIQUE constraint failed: orders.id\n")


@contextmanager
def shop(broker):
    """A schema with a table of orders, which is removed again; yields the address of its database."""
    with psycopg.connect(broker.url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA shop")
        try:
            connection.execute("CREATE TABLE shop.orders (id INTEGER, customer INTEGER, paid INTEGER)")
            connection.execute("INSERT INTO shop.orders VALUES (42, 6, 0), (43, 7, 0)")
            yield f"{broker.url}?options=-csearch_path%3Dshop"
        finally:
            connection.execute("DROP SCHEMA shop CASCADE")


@role
def outbox_postgresql(block, request):
    """What the transaction did is there, and its event arrives."""
    with shop(request.getfixturevalue("postgres_broker")) as url:
        arrives(block, url, DATABASE_URL=url)
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT id FROM orders WHERE paid = 1").fetchall() == [(42,)]


@role
def sql(block, request):
    """Its rows are events; the second one is for a customer, who is connected."""
    secret, broker = "0123456789abcdef" * 4, request.getfixturevalue("postgres_broker")
    database = {"PGHOST": "127.0.0.1", "PGPORT": str(broker.port), "PGDATABASE": "events", "PGUSER": "events",
                "PGPASSWORD": PASSWORD, "PGOPTIONS": "-csearch_path=shop"}
    with shop(broker) as url:
        ticket = wsqueue.sign_ticket(secret, topics=["customer:7"])
        arrives(block, url, ticket=ticket, WS_SECRET=secret, **database)


def of_redis(block, broker):
    """The block with the broker's port and a queue of its own, and that queue's address."""
    url = broker.queue_url()
    assert block.code.count("6379") == 1
    return block.code.replace("6379", str(broker.port)).replace("wsqueue", url.rpartition("=")[2]), url


@role
def redis_cli(block, request):
    """The entry is an event."""
    broker = request.getfixturevalue("redis_broker")
    code, url = of_redis(block, broker)
    name = url.rpartition("=")[2]
    with spawn_server(env={**os.environ, "WS_QUEUE_PATH": url}) as server, client(server.port, "/") as connection:
        assert re.fullmatch(r"\d+-\d+\n", run(block, code, env={**os.environ, "REDISCLI_AUTH": PASSWORD})), name
        assert receive(connection) == ("order_paid", {"id": 42})


def needs_php(extension, package):
    php = shutil.which("php")
    if not php or extension not in subprocess.run([php, "-m"], capture_output=True, text=True, check=True).stdout:
        pytest.skip(f"needs Debian's {package}")


@role
def php_database(block, request):
    """Its transaction queues an event, in SQLite and in PostgreSQL."""
    needs_php("pdo_sqlite", "php-sqlite3")
    needs_php("pdo_pgsql", "php-pgsql")
    with closing(sqlite3.connect("shop.db")) as connection, connection:
        connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, paid INTEGER)")
    arrives(block, "sqlite:///shop.db", DATABASE="sqlite:shop.db")
    broker = request.getfixturevalue("postgres_broker")
    with shop(broker) as url:
        place = f"host=127.0.0.1;port={broker.port};dbname=events;user=events;password={PASSWORD}"
        arrives(block, url, DATABASE=f"pgsql:{place};options='-csearch_path=shop'")


@role
def php_redis(block, request):
    """Its entry is an event."""
    needs_php("redis", "php-redis")
    code, url = of_redis(block, request.getfixturevalue("redis_broker"))
    arrives(block, url, code, REDIS_PASSWORD=PASSWORD)


# ---- Coming from something else ----------------------------------------------------------------------------


@role
def websocket_server(block, request):
    """Both programs have the same conversation with their clients."""
    assert [other.words for other in BLOCKS if other.role == block.role] == [["before"], ["after"]]
    with reserved_port() as port, started(block, block.code.replace(PORT, port)) as process:
        with client(port, "/", process) as one:
            assert heard_by(one, 2) == ["welcome", "somebody came"]
            with client(port, "/", process) as two:
                assert heard_by(two, 2) == ["welcome", "somebody came"]
                two.send("hello")
                assert heard_by(two, 1) == ["hello"]
            assert heard_by(one, 3) == ["somebody came", "hello", "somebody left"]


def heard_by(connection, count):
    return [connection.recv(timeout=10 * TIME_UNIT) for _ in range(count)]


LEAVES_ITS_SOCKET = "import warnings\nwarnings.simplefilter('ignore', ResourceWarning)\n"


@role
def flask_socketio(block, request):
    """It publishes what it says, as its servers take it from Redis."""
    url, shown = request.getfixturevalue("redis_broker").url, "redis://127.0.0.1:6379/0"
    assert block.code.count(shown) == 1
    with closing(redis.Redis.from_url(url)) as connection, closing(connection.pubsub()) as channel:
        channel.subscribe("flask-socketio")
        assert channel.get_message(timeout=10 * TIME_UNIT)["type"] == "subscribe"
        run(block, LEAVES_ITS_SOCKET + block.code.replace(shown, url))
        message = channel.get_message(timeout=10 * TIME_UNIT)["data"]
    assert b"order_paid" in message and b"customer:7" in message


# ---- In the browser ----------------------------------------------------------------------------------------


@contextmanager
def page(code):
    """A page with the code in it, which hands what it shows to `shown`; yields its address."""
    Path("site").mkdir(exist_ok=True)
    Path("site/index.html").write_text(
        "<!doctype html><meta charset=utf-8><script>const shown = [];"
        "console.log = show = message => shown.push(message); Math.random = () => 0;"
        "refresh = () => shown.push({event: 'refresh'});</script>"
        f"<script>{code}</script>", "utf-8")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory="site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{site.server_address[1]}/"
        finally:
            site.shutdown()
            thread.join()


def wait_for_shown(driver, name):
    """The payload of the newest event that the page has shown, once it has the given name."""

    def found():
        shown = driver.execute_script("return shown")
        return shown and shown[-1]["event"] == name and shown[-1]

    return eventually(found, 20.0, f"{name} in the browser")


@role
def browser(block, request):
    """The page logs an event of the shape that its comment shows."""
    driver = request.getfixturevalue("chromium")
    with spawn_server("--queue", "ws_queue") as server, page(block.code.replace(PORT, str(server.port))) as url:
        driver.get(url)
        eventually(lambda: driver.execute_script("return socket.readyState === WebSocket.OPEN"), what="a connection")
        wsqueue.queue_event("ws_queue", "order_paid", {"id": 42})
        message = wait_for_shown(driver, "order_paid")
        assert sorted(message) == ["event", "payload", "timestamp"] and message["payload"] == {"id": 42}
        driver.get("about:blank")


@role
def wsqueue_js(block, request):
    """The page shows an event, and what is queued while the server is gone, and refreshes once that is not known."""
    driver = request.getfixturevalue("chromium")
    with reserved_port() as port, page("</script>" + block.code.replace(PORT, port) + "<script>") as url:
        for name in ("one", "two", "three"):
            if name != "one":
                wsqueue.queue_event("ws_queue", "order_paid", name, to="/orders")
            if name == "three":
                shutil.rmtree("ws_queue/history")
            with spawn_server("--queue", "ws_queue", "--port", port):
                if name == "one":
                    driver.get(url.replace("127.0.0.1", "localhost"))
                eventually(lambda: driver.title == "open", 20.0, "a connection")
                if name == "one":
                    wsqueue.queue_event("ws_queue", "order_paid", name, to="/orders")
                wait_for_shown(driver, "refresh" if name == "three" else "order_paid")
            eventually(lambda: driver.title != "open", 20.0, "a lost connection")
        shown = driver.execute_script("return shown")
        # Each twice, because two listeners show it.
        assert [message.get("payload") for message in shown[:4]] == ["one", "one", "two", "two"]
        driver.get("about:blank")


# ---- As a program ------------------------------------------------------------------------------------------

if __name__ == "__main__":
    README.write_text(SETTINGS_TABLE.sub(lambda _: settings_table(), TEXT), "utf-8")
