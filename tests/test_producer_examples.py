"""The examples of producers as users run them: workers of gunicorn, a PHP page, a shell script, cron, and threads."""

import importlib.util
import json
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, quote_from_bytes, urlencode

import pytest
from selenium.webdriver.common.by import By

from brokers import free_port
from browser import needs_chromium
from clients import CLOSE, PATIENCE, Follower, RawClient, close_payload, exchange, handshake, serving
from helpers import TIME_UNIT, consumers, eventually, spawn_server
from test_examples import EXAMPLES, HOSTILE, Example, call, complaint, started
from test_php_producer import needs_php, receive
from test_processes import connected
from test_server import clients_arrived, is_free, port_of
from wsqueue import DirectoryQueue, serving_process

GUNICORN, THREADS = "gunicorn_four_workers.py", "background_thread.py"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture
def queue(tmp_path):
    return tmp_path / "ws_queue"


def files_of(directory):
    """Everything that producers have left in it."""
    return sorted(name for name in os.listdir(str(directory)) if name.endswith((".json", ".tmp")))


def events_in(directory):
    """What waits, by event: its payload."""
    waiting = [json.loads((directory / name).read_text("utf-8")) for name in files_of(directory)]
    return {event["event"]: event["payload"] for event in waiting}


def text_of(driver, selector):
    return driver.execute_script("return document.querySelector(arguments[0])?.textContent", selector)


def items_on(driver):
    return driver.execute_script("return [...document.querySelectorAll('li')].map(li => li.textContent)")


# ---- Four workers of gunicorn ------------------------------------------------------------------------------


class Gunicorn(Example):
    """The example under gunicorn, and where its workers push."""

    port = None  # of the push server

    @property
    def push_url(self):
        return f"ws://127.0.0.1:{self.port}"

    def workers(self):
        pid = self.process.pid
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}

    def serving(self):
        """The workers that listen for clients; all may have ended by now."""
        sockets = {f"socket:[{inode}]" for inode in listening(self.port)}
        return [pid for pid in self.workers() if sockets & held_by(pid)]

    def settled(self, without=frozenset()):
        """Once there are four workers, and none of those: the one that serves, which is one only."""
        def settled():
            workers, serving = self.workers(), self.serving()
            return len(workers) == 4 and not workers & without and len(serving) == 1 and serving

        return eventually(settled, 20, "four workers, of which one serves")[0]

    def note(self, text, by=None):
        """Send one to the application; by: to this worker. Returns the worker that answered."""
        with paused(self.workers() - {by} if by else ()):
            answer = call(self, "POST", "/notes", {"text": text})
        assert answer.status == 202, answer.content
        return answer.json["worker"]


def listening(port):
    """The inodes of the sockets that listen on a port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}


def held_by(pid):
    held = set()
    with suppress(OSError):  # it has ended
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                held.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return held


@contextmanager
def paused(pids):
    """These take no request: it is for the others."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def gunicorn(queue, *options, port=None):
    command = [sys.executable, EXAMPLES / GUNICORN, *options]
    port = port or free_port()
    with started(command, Gunicorn, WS_PORT=port, WS_QUEUE_PATH=queue) as server:
        server.port = port
        yield server


class Returning:
    """A page: it comes back when it is cut off, and names the last event that it has seen."""

    def __init__(self, url):
        self.url, self.last, self.comings = url, "", 0
        self.come()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.follower.client.socket.close()

    def come(self):
        def attempt():
            try:
                return Follower(self.url, last=self.last)
            except (OSError, EOFError):
                return None

        self.follower = eventually(attempt, 20, f"a server at {self.url}")
        self.comings += 1
        if not self.last:
            self.last = self.follower.hello()

    def texts(self, count):
        """Of the next notes, over however many servers."""
        found = []
        while len(found) < count:
            try:
                received = self.follower.recv()
            except (OSError, EOFError, AssertionError) as error:
                if isinstance(error, AssertionError) and not str(error).startswith(f"opcode {CLOSE},"):
                    raise
                self.follower.client.socket.close()
                self.come()
                continue
            self.last = self.follower.last
            assert received.event in ("note", "wsqueue.hello"), received
            found += [received.payload["text"]] if received.event == "note" else []
        return found


PRELOAD = pytest.mark.parametrize("options", [(), ("--preload",)], ids=["import in each worker", "preload"])


@PRELOAD
def test_one_of_four_workers_serves_and_each_reaches_the_clients(queue, options):
    """A request to any of them is an event at a client, once; also where the arbiter has imported the application."""
    with gunicorn(queue, *options) as server:
        serving = server.settled()
        assert str(serving) == serving_process(str(queue))
        with RawClient(server.push_url) as client:
            for worker in server.workers():
                assert server.note(HOSTILE, by=worker) == worker
                assert client.payloads(1) == [{"text": HOSTILE, "worker": worker}]


@PRELOAD
def test_a_client_misses_nothing_when_the_serving_worker_is_killed(queue, options):
    """Another worker goes on, and sends what the living ones have queued meanwhile: in order, once."""
    with gunicorn(queue, *options) as server, Returning(server.push_url) as page:
        killed = set()
        for _ in range(2):
            serving = server.settled(killed)
            server.note("before")
            assert page.texts(1) == ["before"]
            os.kill(serving, signal.SIGKILL)
            killed.add(serving)
            meanwhile = [f"meanwhile {number}" for number in range(20)]
            for text in meanwhile:
                server.note(text)
            assert page.texts(20) == meanwhile
        server.settled(killed)
        assert page.comings == 3


@PRELOAD
def test_a_client_misses_nothing_over_a_reload(queue, options):
    """kill -HUP replaces all workers: clients are told (1001), and what is sent meanwhile arrives in order, once."""
    with gunicorn(queue, *options) as server, Returning(server.push_url) as page:
        server.settled()
        old = server.workers()
        with RawClient(server.push_url) as client:
            server.process.send_signal(signal.SIGHUP)
            meanwhile = [f"meanwhile {number}" for number in range(50)]
            for text in meanwhile:
                server.note(text)
            assert client.close_code() == 1001
        assert page.texts(50) == meanwhile
        server.settled(without=old)
        server.note("after")
        assert page.texts(1) == ["after"]
        assert "Traceback" not in server.printed("stderr")


def test_a_client_misses_nothing_when_a_worker_has_had_its_requests(queue):
    """--max-requests ends the serving worker in its turn, and the next one after it."""
    with gunicorn(queue, "--max-requests", 3) as server, Returning(server.push_url) as page:
        ended = set()
        for _ in range(2):
            serving = server.settled(ended)
            texts = [f"{serving} {number}" for number in range(3)]
            for text in texts:
                assert server.note(text, by=serving) == serving
            ended.add(serving)
            assert server.settled(ended) != serving
            assert page.texts(3) == texts
        assert page.comings >= 2


@pytest.mark.parametrize("end", [
    lambda process: process.terminate(), lambda process: os.killpg(process.pid, signal.SIGINT)
], ids=["TERM", "ctrl-C"])
def test_gunicorn_ends_with_nothing_left_behind(queue, end):
    """No worker, no lock, no port; clients are told, and its status is what it is without a server in it."""
    with gunicorn(queue) as server:
        server.settled()
        with RawClient(server.push_url) as client:
            end(server.process)
            assert client.close_code() == 1001
            client.send_frame(CLOSE, close_payload(1001))
            assert server.process.wait(PATIENCE) == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(server.process.pid, 0)
        assert serving_process(str(queue)) is None and is_free(server.port)
        assert "Traceback" not in server.printed("stderr")


def test_a_push_port_that_is_taken_does_not_end_the_site(queue):
    """The log says what to do; once that is done, what was queued is sent."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with gunicorn(queue, port=port) as server:
            assert server.note("kept") in server.workers()
            said = eventually(lambda: re.findall("this worker pushes nothing: .*", server.printed("stderr")))
            assert str(port) in said[0] and f"kill -HUP {server.process.pid}" in said[0]
            assert "Traceback" not in server.printed("stderr")
            taken.close()
            server.process.send_signal(signal.SIGHUP)
            eventually(lambda: not files_of(queue), what="an empty queue")
            server.settled()


@pytest.mark.parametrize("variable, port", [
    ("WS_PORT", "0"), ("WS_PORT", "eighty"), ("WS_PORT", "65536"), ("APP_PORT", "-1"), ("APP_PORT", "99999"),
])
def test_a_port_that_gunicorn_cannot_have_is_named(queue, variable, port):
    """It ends with a sentence. Nor can the workers each choose a port to push from."""
    said = complaint(GUNICORN, **{"WS_PORT": 1, "WS_QUEUE_PATH": queue, variable: port})
    assert f"{variable} is {port}. " in said


@pytest.mark.parametrize("body", [{}, {"text": ""}, {"text": 7}, {"text": "x" * 1001}, b"[]", b"{"], ids=repr)
def test_a_note_that_does_not_fit_is_refused(gunicorn_of_all, body):
    """400, and nothing is queued; a form of another site, 415."""
    server, client = gunicorn_of_all
    json_type = {"Content-Type": "application/json"}
    assert call(server, "POST", "/notes", body, json_type).status == 400
    assert call(server, "POST", "/notes", urlencode({"text": "x"}).encode(), FORM).status == 415
    assert server.note("fits") and client.payloads(1)[0]["text"] == "fits"


@pytest.fixture(scope="module")
def gunicorn_of_all(tmp_path_factory):
    """For tests that end nothing: the example, and a client that reads all."""
    with gunicorn(tmp_path_factory.mktemp("gunicorn") / "ws_queue") as server:
        with connected(server.push_url) as client:
            yield server, client


def test_a_worker_says_whether_it_serves(gunicorn_of_all):
    """GET /worker, of each."""
    server, _ = gunicorn_of_all
    serving, workers = server.settled(), server.workers()
    for worker in workers:
        with paused(workers - {worker}):
            answer = call(server, "GET", "/worker").json
        assert answer == {"worker": worker, "serves": worker == serving}


@needs_chromium
def test_the_page_of_gunicorn_shows_what_it_sends(chromium, gunicorn_of_all):
    """As text, with the worker that it came from."""
    server, client = gunicorn_of_all
    chromium.get(server.url)
    eventually(lambda: text_of(chromium, "#status") == "open", what="a page that is connected")
    chromium.find_element(By.NAME, "text").send_keys("<b>bold</b>")
    chromium.find_element(By.TAG_NAME, "button").click()
    worker = client.payloads(1)[0]["worker"]
    eventually(lambda: items_on(chromium) == [f"worker {worker}: <b>bold</b>"], what="the note")
    eventually(lambda: text_of(chromium, "#answer") == "sent", what="the answer")


# ---- A page in PHP -----------------------------------------------------------------------------------------

PHP_SETTINGS = ("-d", "display_errors=1", "-d", "display_startup_errors=1", "-d", "error_reporting=-1")


class Php(Example):
    """`php -S`, which says on stderr that it listens."""

    def _announced(self):
        match = re.search(r"Development Server \((\S+)\) started", self.printed("stderr"))
        assert match or self.process.poll() is None, self.printed("stderr")
        return match and match[1]


@contextmanager
def php_page(queue, **variables):
    """With four processes, and with settings that would show every warning in the page."""
    command = ["php", *PHP_SETTINGS, "-S", f"127.0.0.1:{free_port()}", EXAMPLES / "publish.php"]
    with started(command, Php, PHP_CLI_SERVER_WORKERS=4, WS_QUEUE_PATH=queue, **variables) as page:
        yield page


def post(page, text, **headers):
    """A form with this text, of str or bytes."""
    body = f"text={quote_from_bytes(text) if isinstance(text, bytes) else quote(text)}"
    return call(page, "POST", "/", body.encode(), {**FORM, **headers})


@pytest.fixture(scope="module")
def php(tmp_path_factory):
    """The page, with no server behind it: what it queues stays where it can be counted."""
    queue = tmp_path_factory.mktemp("php")
    with php_page(queue) as page:
        page.queue = queue
        yield page


@needs_php
def test_concurrent_posts_to_the_php_page_arrive_once_and_each_in_order(queue):
    """Four visitors at a time: a client sees each one's notes as they were sent, and nothing is left over."""
    with spawn_server("--queue", queue) as server, php_page(queue) as page, RawClient(server.url) as client:

        def visit(visitor):
            for number in range(50):
                answer = post(page, f"{visitor} {number}")
                assert (answer.status, answer.json) == (202, {"queued": True}), answer.content

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(visit, "abcd"))
        texts = [payload["text"] for payload in client.payloads(200)]
        for visitor in "abcd":
            assert [text for text in texts if text[0] == visitor] == [f"{visitor} {number}" for number in range(50)]
        eventually(lambda: not files_of(queue), what="an empty queue")


@needs_php
@pytest.mark.parametrize("text", [HOSTILE, "x" * 1000, "\U0001f441" * 1000, "\x00\x01\x1f\x7f\r\n\u2028", "null", "0"])
def test_the_php_page_passes_on_any_text(php, text):
    """Code, control characters and four bytes a character: nothing is changed on the way."""
    assert post(php, text).status == 202
    [name] = files_of(php.queue)
    event = json.loads((php.queue / name).read_text("utf-8"))
    (php.queue / name).unlink()
    assert event == {"event": "note", "payload": {"text": text}}


NO_TEXT = [b"", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"abc\xe2\x82", b"x" * 1001]


@needs_php
@pytest.mark.parametrize("text", NO_TEXT, ids=[repr(text[:9]) for text in NO_TEXT])
def test_the_php_page_refuses_what_is_no_text(php, text):
    """Too much or too little of it, or not UTF-8: 400 with a sentence, and no file, not even an empty one."""
    answer = post(php, text)
    assert (answer.status, files_of(php.queue)) == (400, [])
    assert answer.json == {"error": "Send a form with a text of 1 to 1000 characters in UTF-8."}


@needs_php
@pytest.mark.parametrize("status, method, body, headers", [
    (400, "POST", b"text[]=x", FORM),
    (400, "POST", b"other=x", FORM),
    (400, "POST", b'{"text": "x"}', {"Content-Type": "application/json"}),
    (403, "POST", b"text=x", {**FORM, "Origin": "https://evil.example"}),
    (403, "POST", b"text=x", {**FORM, "Origin": "null"}),
    (405, "PUT", b"text=x", FORM),
    (405, "DELETE", None, {}),
])
def test_the_php_page_refuses_other_requests(php, status, method, body, headers):
    """Each with its status and a sentence, and queues nothing."""
    answer = call(php, method, "/", body, headers)
    assert (answer.status, list(answer.json), files_of(php.queue)) == (status, ["error"], [])
    assert answer.getheader("Allow") == ("GET, HEAD, POST" if status == 405 else None)


@needs_php
@pytest.mark.parametrize("place", ["missing", "file/in/the/way", "/proc"])
def test_the_php_page_says_503_when_it_cannot_write(tmp_path, place):
    """With a sentence, and no warning of PHP's; the error log has the directory and the reason."""
    (tmp_path / "file").touch()
    with php_page(tmp_path / place) as page:
        answer = post(page, "x")
        assert answer.status == 503
        assert answer.content == b'{"error":"The note could not be queued; the error log says why."}'
        [line] = [line for line in page.printed("stderr").splitlines() if "not queued" in line]
    assert str(tmp_path / place) in line and re.search("No such file|Not a directory|Permission denied", line)


@needs_php
def test_the_php_page_takes_what_its_own_form_sends(php):
    """Which comes with the page's origin; and GET is the page."""
    assert post(php, "x", Origin=php.url).status == 202
    (php.queue / files_of(php.queue)[0]).unlink()
    page = call(php, "GET", "/")
    assert (page.status, page.getheader("Content-Type")) == (200, "text/html; charset=utf-8")
    assert page.content.startswith(b"<!doctype html>") and b"Warning" not in page.content


PHP_FUNCTION = re.search(r"^function queue_event\b.*?^\{\n(.*?)^\}\n", (EXAMPLES / "publish.php").read_text("utf-8"),
                         re.MULTILINE | re.DOTALL)


def call_php_function(queue, payload, **popen):
    """Call queue_event of the page with a payload that PHP evaluates."""
    code = f"{PHP_FUNCTION[0]} var_dump(queue_event($argv[1], 'e', {payload}));"
    return subprocess.run(["php", *PHP_SETTINGS, "-d", "error_log=", "-r", code, "--", str(queue)], check=True,
                          capture_output=True, encoding="utf-8", timeout=30 * TIME_UNIT, **popen)


def test_the_php_function_is_ten_lines():
    """For whoever copies it."""
    assert len(PHP_FUNCTION[1].splitlines()) == 10


@needs_php
@pytest.mark.parametrize("payload, reason", [
    (r'"\xff"', "Malformed UTF-8"), ("NAN", "Inf and NaN"), ("fopen('php://memory', 'r')", "not supported"),
])
def test_the_php_function_refuses_what_is_no_json(tmp_path, payload, reason):
    """False and a line in the log; there is no file."""
    done = call_php_function(tmp_path, payload)
    assert done.stdout == "bool(false)\n" and reason in done.stderr and files_of(tmp_path) == []


def full_disk():
    """In a child: every write past ten bytes fails, as it would on a full disk, and ends nobody."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))


@needs_php
def test_the_php_function_leaves_no_half_of_an_event(tmp_path):
    """False on a full disk, and no temporary file."""
    done = call_php_function(tmp_path, "1", preexec_fn=full_disk)
    assert done.stdout == "bool(false)\n" and "not queued" in done.stderr and files_of(tmp_path) == []


@needs_php
@needs_chromium
def test_the_php_page_shows_what_it_sends(chromium, queue):
    """As text, once the server has sent it."""
    with serving(queue=str(queue)) as server, php_page(queue, WS_PORT=port_of(server)) as page:
        chromium.get(page.url)
        clients_arrived(server, 1)
        chromium.find_element(By.NAME, "text").send_keys("<b>bold</b>")
        chromium.find_element(By.TAG_NAME, "button").click()
        eventually(lambda: items_on(chromium) == ["<b>bold</b>"], what="the note")
        eventually(lambda: text_of(chromium, "#answer") == "sent", what="the answer")


# ---- A shell script ----------------------------------------------------------------------------------------

SCRIPT = EXAMPLES / "publish.sh"
SHELLS = [shell for shell in ("dash", "bash", "busybox sh") if shutil.which(shell.split()[0])]
of_each_shell = pytest.mark.parametrize("shell", SHELLS)


def publish(shell, queue, *args, path=None, **popen):
    """Run the script to its end; path: a directory whose programs it finds first."""
    env = {"PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"], "WS_QUEUE_PATH": str(queue)}
    popen = {"input": "", "capture_output": True, "encoding": "utf-8", "timeout": 30 * TIME_UNIT, **popen}
    return subprocess.run([*shell.split(), str(SCRIPT), *args], env=env, check=False, **popen)


def assert_script_fails(done, status, reason, queue=None):
    assert (done.returncode, done.stdout) == (status, "")
    assert reason in done.stderr and "publish.sh: " in done.stderr
    assert queue is None or files_of(queue) == []


def fake(directory, name, source):
    """A program of this name, for the script to find."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{source}\n")
    (directory / name).chmod(0o755)
    return directory


@of_each_shell
def test_the_script_publishes(queue, shell):
    """A payload, none, and one from stdin; exactly as it was given, although printf knows % and backslashes."""
    payload = r'{"share": "100 %s %d", "path": "C:\\new\t\u00e9", "quote": "\"'"'"'$HOME`id`"}'
    with spawn_server("--queue", queue) as server, RawClient(server.url) as client:
        for args, given in [(["a.b:c-d_E9", payload], ""), (["nothing"], ""), (["piped", "-"], f"\n{payload}\n")]:
            done = publish(shell, queue, *args, input=given)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        events = client.events(3)
    assert [event["event"] for event in events] == ["a.b:c-d_E9", "nothing", "piped"]
    assert [event["payload"] for event in events] == [json.loads(payload), None, json.loads(payload)]
    assert abs(events[0]["timestamp"] - time.time()) < 60


@of_each_shell
def test_what_scripts_publish_keeps_its_order(queue, shell):
    """Each client sees the events of one loop in their order, of however many loops at a time."""
    with spawn_server("--queue", queue) as server, RawClient(server.url) as client:

        def loop(name):
            for number in range(20):
                assert publish(shell, queue, name, str(number)).returncode == 0

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(loop, "ab"))
        events = client.events(40)
    for name in "ab":
        assert [event["payload"] for event in events if event["event"] == name] == list(range(20))


@of_each_shell
def test_the_script_does_without_nanoseconds(tmp_path, queue, shell):
    """A date that knows no %N, as on macOS: the files' own times are their order."""
    queue.mkdir()
    path = fake(tmp_path / "bin", "date", 'case $1 in *%N) echo 1763890123.N ;; *) echo 1763890123 ;; esac')
    known = set()
    for number in range(3):
        assert publish(shell, queue, "e", str(number), path=path).returncode == 0
        [new] = set(queue.iterdir()) - known
        os.utime(str(new), (9 - number, 9 - number))  # the other way round, and further apart than any clock's grain
        known.add(new)
    assert not any(name[0].isdigit() for name in files_of(queue))
    with consumers(DirectoryQueue) as opened:
        server, sent = opened(str(queue)), []
        eventually(lambda: sent.extend(event["payload"] for event in receive(server)) or len(sent) == 3)
    assert sent == [2, 1, 0]


EVIL = ['a"b', "a\\b", "a b", "", "é", "a\nb", "a\n", "%s", "$(id)", "a/b", "'", "\x7f"]


@of_each_shell
@pytest.mark.parametrize("event", EVIL, ids=repr)
def test_the_script_refuses_an_event_that_would_need_escaping(tmp_path, shell, event):
    """Status 2; nothing of it reaches the file."""
    assert_script_fails(publish(shell, tmp_path, event), 2, "EVENT must be letters, digits", tmp_path)


@of_each_shell
@pytest.mark.parametrize("args", [(), ("a", "1", "2")])
def test_the_script_shows_how_it_is_called(tmp_path, shell, args):
    """Status 2, with too few words or too many."""
    assert_script_fails(publish(shell, tmp_path, *args), 2, "usage: publish.sh EVENT [JSON | -]", tmp_path)


@of_each_shell
def test_the_script_says_what_is_wrong_with_the_directory(tmp_path, shell):
    """One that is missing, one that is none, and one that cannot be written."""
    (tmp_path / "file").touch()
    for place in (tmp_path / "missing", tmp_path / "file", "redis://127.0.0.1/"):
        assert_script_fails(publish(shell, place, "e"), 1, f"there is no directory {place}: ")
    assert_script_fails(publish(shell, "/proc", "e"), 1, "/proc")
    assert_script_fails(publish(shell, tmp_path, "e", "-"), 1, "there was no JSON on stdin", tmp_path)


@of_each_shell
def test_the_script_leaves_nothing_on_a_full_disk(tmp_path, shell):
    """Status 1, a sentence, and no temporary file."""
    done = publish(shell, tmp_path, "e", preexec_fn=full_disk)
    assert_script_fails(done, 1, f"could not write to {tmp_path}: see whether its disk is full", tmp_path)


@of_each_shell
def test_the_script_leaves_nothing_when_it_cannot_rename(tmp_path, queue, shell):
    """As on a file system that has become read-only in between."""
    queue.mkdir()
    path = fake(tmp_path / "bin", "mv", "exit 1")
    assert_script_fails(publish(shell, queue, "e", path=path), 1, "could not rename", queue)


@of_each_shell
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_script_leaves_nothing_when_it_is_ended(tmp_path, queue, shell, number):
    """By ctrl-C, between writing and renaming."""
    queue.mkdir()
    path = fake(tmp_path / "bin", "mv", f"touch {tmp_path}/entered; exec sleep 60")
    env = {"PATH": f"{path}:{os.environ['PATH']}", "WS_QUEUE_PATH": str(queue)}
    with subprocess.Popen([*shell.split(), str(SCRIPT), "e"], env=env, start_new_session=True,
                          stderr=subprocess.PIPE) as process:
        eventually((tmp_path / "entered").exists, what="the renaming")
        assert len(files_of(queue)) == 1
        os.killpg(process.pid, number)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number and files_of(queue) == []


# ---- A crontab ---------------------------------------------------------------------------------------------


def as_cron_reads_it(text):
    """The settings, and of each line its fields, its command, and what that reads from stdin."""
    settings, entries = {}, []
    for line in map(str.strip, text.splitlines()):
        setting = re.fullmatch(r"([A-Za-z_]+)\s*=\s*(.*)", line)
        if setting:
            settings[setting[1]] = setting[2]
        elif line and not line.startswith("#"):
            *fields, command = line.split(None, 5)
            # An unescaped % ends the command; what follows it is its stdin, in which % is the end of a line.
            command, *stdin = re.split(r"(?<!\\)%", command)
            entries.append(SimpleNamespace(
                fields=fields, command=command.replace(r"\%", "%"), stdin="\n".join(stdin).replace(r"\%", "%")))
    return settings, entries


@pytest.fixture
def crontab(tmp_path):
    """The example, with its application in a directory of the test."""
    app = tmp_path / "app"
    app.mkdir()
    (app / "examples").symlink_to(EXAMPLES)
    text = (EXAMPLES / "crontab").read_text("utf-8").replace("/srv/app", str(app))
    settings, entries = as_cron_reads_it(text)
    queue = app / "ws_queue"
    queue.mkdir()
    assert settings["WS_QUEUE_PATH"] == str(queue)
    return SimpleNamespace(app=app, queue=queue, settings=settings, entries=entries)


def run_by_cron(crontab, entry):
    """With the environment that cron gives, and no more; what is printed would be mailed."""
    env = {"HOME": "/", "LOGNAME": "root", "PATH": "/usr/bin:/bin", **crontab.settings}
    done = subprocess.run([crontab.settings["SHELL"], "-c", entry.command], input=entry.stdin, env=env, cwd="/",
                          check=False, capture_output=True, encoding="utf-8", timeout=30 * TIME_UNIT)
    assert (done.stdout, done.stderr) == ("", "")
    return done.returncode


def test_each_line_of_the_crontab_publishes(crontab):
    """As cron reads and runs it, under Debian's /bin/sh; nothing is mailed."""
    fake(crontab.app, "backup", "exit 0")
    with spawn_server("--queue", crontab.queue) as server, RawClient(server.url) as client:
        assert [run_by_cron(crontab, entry) for entry in crontab.entries] == [0, 0, 0]
        backup, disk, tick = client.events(3)
    assert backup["event"] == "backup_done" and abs(backup["payload"]["at"] - time.time()) < 60
    assert disk["event"] == "disk_used_percent" and 0 <= disk["payload"] <= 100
    assert tick["event"] == "tick" and tick["payload"]["load"] >= 0


def test_the_crontab_says_when_a_job_has_failed(crontab):
    """One event for it, and none of a success."""
    fake(crontab.app, "backup", "exit 3")
    assert run_by_cron(crontab, crontab.entries[0]) == 0
    assert events_in(crontab.queue) == {"backup_failed": None}


def test_the_crontab_is_one_that_cron_takes(crontab):
    """Five fields in their ranges, every % escaped, and no other escape, which some crons would undo as well."""
    for entry in crontab.entries:
        for field, most in zip(entry.fields, (59, 23, 31, 12, 7)):
            assert re.fullmatch(r"\*(/\d+)?|\d+", field) and int(re.sub(r"\D", "", field) or 0) <= most
        assert entry.stdin == "" and r"\\" not in entry.command
    assert all(not value or (value[0] not in "\"'" and "$" not in value) for value in crontab.settings.values())


# ---- Threads of the application ----------------------------------------------------------------------------

FAST, SLOW = 0.001, 3600  # seconds a step of a job takes
KEY = secrets.token_hex(32)


class Threads(Example):
    """The example, and where it pushes."""

    @property
    def push_url(self):
        return re.search(r"^push server: (\S+);", self.printed("stdout"), re.MULTILINE)[1].rstrip("/")


@contextmanager
def threads(queue, **variables):
    settings = {"APP_PORT": 0, "WS_PORT": 0, "SECRET_KEY": KEY, "JOB_STEP": FAST, **variables}
    with started([sys.executable, EXAMPLES / THREADS], Threads, WS_QUEUE_PATH=queue, **settings) as example:
        eventually(lambda: "push server: " in example.printed("stdout"))
        yield example


class Visitor:
    """Somebody with a cookie of the page."""

    def __init__(self, example):
        self.example = example
        self.cookie = call(example, "GET", "/").getheader("Set-Cookie").partition(";")[0]

    def ask(self, method, path, body=None):
        return call(self.example, method, path, body, {"Cookie": self.cookie})

    def start(self, numbers):
        """The id of a job that was taken."""
        answer = self.ask("POST", "/jobs", {"numbers": numbers})
        assert answer.status == 202 and answer.getheader("Location") == f"/jobs/{answer.json['job']}", answer.content
        return answer.json["job"]

    def status(self, job):
        return self.ask("GET", f"/jobs/{job}").json["status"]

    def listen(self):
        return RawClient(self.example.push_url, Cookie=self.cookie)


def ends(client, count=1):
    """How the next jobs end, by their ids; the progress before that is skipped."""
    found = {}
    while len(found) < count:
        event = client.events(1)[0]
        if event["event"] != "job_progress":
            found[event["payload"].pop("job")] = event["event"], event["payload"]
    return found


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    with threads(tmp_path_factory.mktemp("threads") / "ws_queue") as example:
        yield example


def test_a_result_is_pushed_to_who_asked_and_to_nobody_else(example):
    """And it is there for that visitor to ask for: nobody else, whatever id they give."""
    ada, grace = Visitor(example), Visitor(example)
    with ada.listen() as adas, grace.listen() as graces:
        job = ada.start([1, 2, 6])
        assert ends(adas) == {job: ("job_done", {"result": 3.0})}
        others = grace.start([5])
        assert graces.events(1)[0]["payload"]["job"] == others
        assert ends(graces) == {others: ("job_done", {"result": 5.0})}
    assert ada.ask("GET", f"/jobs/{job}").json == {"job": job, "status": "done", "result": 3.0}
    for visitor, unknown in ((grace, job), (ada, others), (ada, job[:-1]), (ada, "x")):
        assert visitor.ask("GET", f"/jobs/{unknown}").status == 404
    assert len(job) >= 20 and len({job, others}) == 2


def test_a_job_shows_its_progress(example):
    """An event for each step, in order, and then the end."""
    visitor = Visitor(example)
    with visitor.listen() as client:
        visitor.start([0] * 4)
        assert [event["payload"].get("percent") for event in client.events(5)] == [0, 25, 50, 75, None]


def test_a_job_that_fails_says_so_and_no_more(example):
    """Who asked is told that it failed; the exception is in the log, under the job's id, and nowhere else."""
    visitor = Visitor(example)
    with visitor.listen() as client:
        job = visitor.start([])
        [(event, payload)] = ends(client).values()
    told = json.dumps([payload, visitor.ask("GET", f"/jobs/{job}").json])
    assert event == "job_failed" and visitor.status(job) == "failed"
    assert not re.search("Traceback|Zero|division|.py", told.replace("under its id.", ""))
    assert re.search(rf"ERROR jobs: job {re.escape(job)} failed\nTraceback", example.printed("stderr"))


def test_nobody_is_served_without_a_cookie(example):
    """The page gives one, and the push server knows it: without it, or with another, 401."""
    numbers = {"numbers": [1]}
    assert call(example, "POST", "/jobs", numbers).status == 401
    assert call(example, "GET", "/jobs/x").status == 401
    for cookie in (None, "example_jobs=x", Visitor(example).cookie[:-1]):
        assert exchange(example.push_url, handshake(Cookie=cookie)).status == 401


BAD_JOBS = [{}, {"numbers": 1}, {"numbers": ["1"]}, {"numbers": [True]}, {"numbers": [None]}, {"numbers": [1e15]},
            {"numbers": [float("nan")]}, {"numbers": [0] * 101}, {"numbers": [10 ** 400]}, b"[1]", b"{"]


@pytest.mark.parametrize("body", BAD_JOBS, ids=[repr(body)[:30] for body in BAD_JOBS])
def test_a_job_that_makes_no_sense_is_refused(example, body):
    """400; a form, which any site could send, is 415."""
    visitor = Visitor(example)
    json_type = {"Cookie": visitor.cookie, "Content-Type": "application/json"}
    assert call(example, "POST", "/jobs", body, json_type).status == 400
    assert call(example, "POST", "/jobs", b"numbers=1", {**json_type, **FORM}).status == 415


def test_a_full_pool_answers_503_until_there_is_room(queue):
    """Two run and three wait, and are answered at once; the next is refused, with the time to try again."""
    with threads(queue, JOB_WORKERS=2, JOB_WAITING=3, JOB_STEP=SLOW) as example:
        visitor = Visitor(example)
        jobs = [visitor.start([1]) for _ in range(5)]
        eventually(lambda: [visitor.status(job) for job in jobs] == ["progress"] * 2 + ["waiting"] * 3)
        for _ in range(3):
            refused = visitor.ask("POST", "/jobs", {"numbers": [1]})
            assert (refused.status, refused.getheader("Retry-After")) == (503, "5")
            assert list(refused.json) == ["error"]


def test_room_is_given_back(queue):
    """By jobs that succeed and by those that fail: ten after one another where there is room for one."""
    with threads(queue, JOB_WORKERS=1, JOB_WAITING=0) as example:
        visitor = Visitor(example)
        with visitor.listen() as client:
            for numbers in [[1], []] * 5:
                job = eventually(lambda: visitor.ask("POST", "/jobs", {"numbers": numbers}).json.get("job"))  # noqa: B023
                assert list(ends(client)) == [job]


def test_jobs_are_forgotten_once_they_have_ended_long_ago(queue):
    """So many that have ended are known, the latest; and every job that has not."""
    module = load_threads(KEPT=3, QUEUE=str(queue))
    jobs = module.Jobs(workers=2, waiting=100, step=SLOW)
    try:
        runs = jobs.start("ada", [1])
        ended = [jobs.start("ada", []) for _ in range(8)]
        for job in ended:
            job.future.result(PATIENCE)
        latest = jobs.start("ada", [])
        known = [job for job in [runs, *ended, latest] if jobs.find(job.id, "ada")]
        assert known == [runs, ended[-1], latest]
    finally:
        jobs.stop(0)


def load_threads(**changes):
    """The example as a module, with other constants."""
    spec = importlib.util.spec_from_file_location("background_thread", str(EXAMPLES / THREADS))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(changes)
    return module


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_runs_is_finished_at_the_end_and_what_waits_is_cancelled(queue, number):
    """Status 0, no traceback; who comes back after the next start has missed neither."""
    found = {}
    with threads(queue, JOB_WORKERS=1, JOB_STEP=0.2, JOB_GRACE=60) as example:
        visitor = Visitor(example)
        with Follower(example.push_url, Cookie=visitor.cookie) as follower:
            follower.hello()
            running, waiting = visitor.start([4] * 5), visitor.start([1])
            assert follower.recv().payload == {"job": running, "percent": 0}
            example.process.send_signal(number)
            with pytest.raises(AssertionError, match=f"opcode {CLOSE},"):  # it is told to leave
                read_ends(follower, found)
        assert example.process.wait(2 * PATIENCE) == 0
        assert example.printed("stdout").endswith("stopped\n") and "Traceback" not in example.printed("stderr")
    with threads(queue) as example, Follower(example.push_url, last=follower.last, Cookie=visitor.cookie) as follower:
        while len(found) < 2:
            read_ends(follower, found, 1)
    assert found == {running: ["job_done"], waiting: ["job_cancelled"]}


def read_ends(follower, found, count=1000):
    """Note the next events by their jobs; progress is left out."""
    for _ in range(count):
        received = follower.recv()
        if received.event.startswith("job_") and received.event != "job_progress":
            found.setdefault(received.payload["job"], []).append(received.event)


def test_ctrl_c_again_ends_what_runs(queue):
    """It need not be waited for: it is cancelled, too, and that is told."""
    with threads(queue, JOB_WORKERS=1, JOB_STEP=SLOW, JOB_GRACE=SLOW) as example:
        visitor = Visitor(example)
        job = visitor.start([1])
        eventually(lambda: visitor.status(job) == "progress")
        example.process.send_signal(signal.SIGINT)
        eventually(lambda: "ctrl-C again" in example.printed("stdout"), what="a line that says so")
        assert example.process.poll() is None
        assert example.interrupt() == 0 and "Traceback" not in example.printed("stderr")
    with threads(queue) as example, Visitor(example).listen():
        eventually(lambda: not files_of(queue), what="an empty queue")


def test_without_grace_what_runs_is_cancelled_at_once(queue):
    """Where it next looks, and it is told."""
    with threads(queue, JOB_WORKERS=1, JOB_STEP=SLOW, JOB_GRACE=0) as example:
        visitor = Visitor(example)
        job = visitor.start([1])
        eventually(lambda: visitor.status(job) == "progress")
        assert example.interrupt() == 0


@pytest.mark.parametrize("variable, value", [
    ("APP_PORT", "eighty"), ("APP_PORT", "99999"), ("WS_PORT", "99999"), ("JOB_WORKERS", "0"), ("JOB_GRACE", "-1"),
    ("JOB_STEP", "nan"),
])
def test_a_setting_of_the_threads_that_cannot_be_is_named(queue, variable, value):
    """It ends with a sentence."""
    said = complaint(THREADS, **{"WS_QUEUE_PATH": queue, variable: value})
    assert said.startswith("cannot start: ") and value in said and variable.partition("_")[0] in said


def test_the_threads_do_not_stand_by_for_another_server(queue):
    """Their page would not know where to connect to."""
    with spawn_server("--queue", queue) as server:
        said = complaint(THREADS, WS_QUEUE_PATH=queue)
        assert f"process {server.pid} serves the queue" in said and "WS_QUEUE_PATH" in said


@needs_chromium
def test_the_page_of_the_threads_shows_how_jobs_end(chromium, example):
    """What was done, and what has failed."""
    chromium.get(example.url)
    eventually(lambda: text_of(chromium, "#status") == "open", what="a page that is connected")
    for numbers, shown in (("1 2 6", "done: 3"), ("", "The job failed.")):
        field = chromium.find_element(By.NAME, "numbers")
        field.clear()
        field.send_keys(numbers)
        chromium.find_element(By.TAG_NAME, "button").click()
        eventually(lambda: (items_on(chromium) or [""])[0].startswith(shown), what=shown)  # noqa: B023
