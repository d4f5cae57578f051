"""The examples as a user runs them: real processes, real calls, real clients, on free ports."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from websockets.sync.client import connect

from helpers import ROOT, TIME_UNIT, eventually, spelled

EXAMPLES = ROOT / "examples"
SERVER, API = "event_queue_websocket_server.py", "api_with_websocket_queue.py"
ROUTES = ("/appointments", "/notifications", "/broadcast")

APPOINTMENT = {"patient_name": "Ada Example", "doctor_name": "Dr. Brown", "time": "2030-01-31 14:00"}
NOTIFICATION = {"type": "info", "title": "Reminder", "message": "Tomorrow at two."}
# What would run, were it shown as HTML, and what breaks naive quoting.
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\\\u2028 {{7*7}} \U0001f441 ../../etc"


# ---- Running an example ------------------------------------------------------------------------------------


class Example:
    """One example in a process of its own; `url` is what it says it listens on."""

    def __init__(self, process, output):
        self.process = process
        self._output = output
        self.url = eventually(self._announced, 30.0, "a line 'listening on URL'")

    def printed(self, stream):
        return (self._output / stream).read_text("utf-8", "replace")

    def _announced(self):
        match = re.search(r"^listening on (\S+:\d+)\b.*\n", self.printed("stdout"), re.MULTILINE)
        if match is None and self.process.poll() is not None:
            raise AssertionError(f"it ended with {self.process.returncode}:\n{self.printed('stderr')}")
        return match and match[1]

    def interrupt(self):
        """Press ctrl-C, and return the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(10 * TIME_UNIT)


# What a developer may have set for a program of his own.
OURS = ("WS_", "API_", "APP_", "PUSH_", "JOB_", "PHP_", "SECRET_KEY", "DATABASE_PATH")


def environment(**variables):
    """The environment of an example: free ports, and nothing of a developer's own, but these variables."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    given = {name: str(value) for name, value in variables.items()}
    return {**inherited, "WS_PORT": "0", "API_PORT": "0", "APP_PORT": "0", **given}


@contextmanager
def started(command, kind=Example, **variables):
    """A program in a session of its own, with all that it starts; gone when the block ends."""
    with tempfile.TemporaryDirectory(prefix="wsqueue-example-") as output:
        with open(f"{output}/stdout", "wb") as out, open(f"{output}/stderr", "wb") as err:
            # From another directory than the checkout: what an example needs, it must find by itself. What it keeps
            # in temporary files goes with it, although it is killed.
            process = subprocess.Popen(
                list(map(str, command)), cwd=output, env=environment(**{"TMPDIR": output, **variables}),
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        try:
            yield kind(process, Path(output))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the group is the session that it leads, and no other
            process.wait()


@contextmanager
def pushing(name, **variables):
    """An example that has a push server, inside or elsewhere; its `push_url` is what it says of that."""
    with started([sys.executable, EXAMPLES / name], **variables) as example:
        pushed = eventually(lambda: re.search(r"^push server: ([^\s;]+)", example.printed("stdout"), re.MULTILINE),
                            what="a line 'push server: URL'")
        example.push_url = pushed[1].rstrip("/")
        yield example


def complaint(name, **variables):
    """What is said by an example that cannot start."""
    done = subprocess.run([sys.executable, str(EXAMPLES / name)], env=environment(**variables), check=False,
                          capture_output=True, encoding="utf-8", timeout=30 * TIME_UNIT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr


@contextmanager
def run_example(name, queue, examples=EXAMPLES):
    """Run an example on the queue, or on the one that it finds by itself."""
    with started([sys.executable, examples / name], **({"WS_QUEUE_PATH": queue} if queue else {})) as example:
        yield example


@contextmanager
def run_both(queue, examples=EXAMPLES):
    """Run the WebSocket server and the API on the same queue directory."""
    with ExitStack() as stack:
        yield tuple(stack.enter_context(run_example(name, queue, examples)) for name in (SERVER, API))


def call(api, method, path, body=None, headers=None):
    """Make a call, with a dict as JSON and bytes as they are; return the response, its JSON in `json`."""
    headers = dict(headers or {})
    if isinstance(body, dict):
        body = json.dumps(body).encode()
        headers.setdefault("Content-Type", "application/json")
    connection = http.client.HTTPConnection(api.url.split("//")[1], timeout=10 * TIME_UNIT)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        response.content = response.read()
    finally:
        connection.close()
    is_json = response.getheader("Content-Type") == "application/json"
    response.json = json.loads(response.content) if is_json and method != "HEAD" else None
    return response


def next_event(client):
    return json.loads(client.recv(timeout=10 * TIME_UNIT))


@contextmanager
def connected(server, routes=ROUTES):
    """Connect a client to each route, and read its welcome."""
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(server.url + route)) for route in routes]
        for client in clients:
            assert next_event(client)["event"] == "connected"
        yield clients


@pytest.fixture
def queue(tmp_path):
    return tmp_path / "ws_queue"


@pytest.fixture
def both(queue):
    with run_both(queue) as examples:
        yield examples


@pytest.fixture(scope="module")
def lone_queue(tmp_path_factory):
    return tmp_path_factory.mktemp("examples") / "ws_queue"


@pytest.fixture(scope="module")
def api(lone_queue):
    """The API with no server behind it: what it queues stays where it can be counted."""
    with run_example(API, lone_queue) as example:
        yield example


# ---- From the call to the client ---------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_each_route_greets_with_a_message_of_the_shape_of_an_event(both, route):
    """A client that connects gets `connected`, with the keys that every event has."""
    with connect(both[0].url + route) as client:
        welcome = next_event(client)
    assert welcome == {"event": "connected", "payload": {"message": f"Welcome to {route}"},
                       "timestamp": welcome["timestamp"]}
    assert isinstance(welcome["timestamp"], int) and abs(welcome["timestamp"] - time.time()) < 60


def test_a_new_appointment_reaches_the_clients_of_every_route(both):
    """POST /api/appointments is `appointment_created`, with the payload and its own timestamp."""
    server, api = both
    with connected(server) as clients:
        assert call(api, "POST", "/api/appointments", APPOINTMENT).status == 201
        events = [next_event(client) for client in clients]
    created = {"appointment_id": 1, **APPOINTMENT, "time": "2030-01-31 14:00:00", "status": "scheduled"}
    assert events == [
        {"event": "appointment_created", "payload": created, "timestamp": events[0]["timestamp"]}
    ] * len(ROUTES)


def test_the_life_of_an_appointment_arrives_in_order(both):
    """Create, confirm, cancel: three events, in the order of the calls."""
    server, api = both
    with connected(server, ["/appointments"]) as [client]:
        number = call(api, "POST", "/api/appointments", APPOINTMENT).json["appointment_id"]
        assert call(api, "PUT", f"/api/appointments/{number}/status", {"status": "confirmed"}).status == 200
        assert call(api, "DELETE", f"/api/appointments/{number}").status == 200
        events = [next_event(client) for _ in range(3)]
    assert [event["event"] for event in events] == [
        "appointment_created", "appointment_status_changed", "appointment_cancelled"
    ]
    assert {event["payload"]["appointment_id"] for event in events} == {number}
    assert events[1]["payload"]["status"] == "confirmed"


def test_a_notification_reaches_the_clients(both):
    """POST /api/notifications is `notification`, with what was posted."""
    server, api = both
    with connected(server, ["/notifications"]) as [client]:
        assert call(api, "POST", "/api/notifications", NOTIFICATION).status == 202
        event = next_event(client)
    assert (event["event"], event["payload"]) == ("notification", NOTIFICATION)


@pytest.mark.parametrize("payload", [None, False, 0, "text", [1, [2]], {"a": {"b": [None, 1.5]}}], ids=spelled)
def test_a_broadcast_carries_any_json(both, payload):
    """POST /api/broadcast takes the event's name and payload from the caller."""
    server, api = both
    with connected(server, ["/broadcast"]) as [client]:
        assert call(api, "POST", "/api/broadcast", {"event": "door_opened", "payload": payload}).status == 202
        event = next_event(client)
    assert (event["event"], event["payload"]) == ("door_opened", payload)


def test_a_broadcast_needs_no_payload(both):
    """An event may say all it has to say with its name."""
    server, api = both
    with connected(server, ["/broadcast"]) as [client]:
        assert call(api, "POST", "/api/broadcast", {"event": "ping"}).json["queued"] is True
        assert next_event(client)["payload"] is None


def test_markup_passes_through_as_data(both):
    """Nothing on the way changes, escapes or drops what looks like code; to escape is the page's work."""
    server, api = both
    with connected(server, ["/notifications"]) as [client]:
        call(api, "POST", "/api/notifications", {**NOTIFICATION, "message": HOSTILE})
        assert next_event(client)["payload"]["message"] == HOSTILE


# ---- Bad input ---------------------------------------------------------------------------------------------


def without(fields, name):
    return {key: value for key, value in fields.items() if key != name}


NEW = ("POST", "/api/appointments")
STATUS = ("PUT", "/api/appointments/1/status")
NOTIFY = ("POST", "/api/notifications")
BROADCAST = ("POST", "/api/broadcast")
JSON = {"Content-Type": "application/json"}

BAD_FIELDS = [
    (NEW, without(APPOINTMENT, "time"), "time is missing: send patient_name, doctor_name, time"),
    (NEW, {**APPOINTMENT, "color": "red"}, "'color' is not known here"),
    (NEW, {**APPOINTMENT, "patient_name": 7}, "patient_name must be text"),
    (NEW, {**APPOINTMENT, "patient_name": None}, "patient_name must be text"),
    (NEW, {**APPOINTMENT, "patient_name": ["Ada"]}, "patient_name must be text"),
    (NEW, {**APPOINTMENT, "patient_name": " \t "}, "patient_name must be text of 1 to 100 characters"),
    (NEW, {**APPOINTMENT, "doctor_name": "x" * 101}, "doctor_name must be text of 1 to 100 characters"),
    (NEW, {**APPOINTMENT, "time": "tomorrow"}, "time must be a date and time such as"),
    (NEW, {**APPOINTMENT, "time": "2030-02-30 10:00"}, "time must be a date and time such as"),
    (NEW, {**APPOINTMENT, "time": "2030-1-1 9:5"}, "time must be a date and time such as"),
    (NEW, {**APPOINTMENT, "time": 1729000000}, "time must be a date and time such as"),
    (STATUS, {"status": "cancelled"}, "status must be one of scheduled, confirmed"),
    (STATUS, {"status": {"$ne": None}}, "status must be one of scheduled, confirmed"),
    (STATUS, {}, "status is missing"),
    (NOTIFY, {**NOTIFICATION, "type": "shout"}, "type must be one of info, success, warning, error"),
    (NOTIFY, {**NOTIFICATION, "message": "x" * 1001}, "message must be text of 1 to 1000 characters"),
    (BROADCAST, {"payload": 1}, "event is missing"),
    (BROADCAST, {"event": ""}, "event must be 1 to 100 letters"),
    (BROADCAST, {"event": "<b>"}, "event must be 1 to 100 letters"),
    (BROADCAST, {"event": "x" * 101}, "event must be 1 to 100 letters"),
    (BROADCAST, {"event": ["x"]}, "event must be 1 to 100 letters"),
    (BROADCAST, {"event": "wsqueue.reset"}, "event must not begin with wsqueue."),
]

BAD_BODIES = [
    (b"", "the body must be JSON in UTF-8: Expecting value"),
    (b"{", "the body must be JSON in UTF-8"),
    (b"\xff\xfe{}", "the body must be JSON in UTF-8"),
    (b"[" * 30000, "the body must be JSON in UTF-8"),
    (b'{"event": "x", "payload": NaN}', "the body must be JSON in UTF-8"),
    (b'{"event": "x", "payload": 1e999}', "the body must be JSON in UTF-8"),
    (b'{"event": "x", "payload": "\\ud800"}', "the body must be JSON in UTF-8"),
    (b'["event"]', "the body must be a JSON object"),
    (b"null", "the body must be a JSON object"),
]

BAD_REQUESTS = [
    (404, "GET", "/api/nothing", None, {}, "there is nothing at this path"),
    (404, "GET", "/../examples/api_with_websocket_queue.py", None, {}, "there is nothing at this path"),
    (404, "DELETE", "/api/appointments/99", None, {}, "there is no such appointment"),
    (404, "DELETE", "/api/appointments/%00%ff", None, {}, "there is no such appointment"),
    (404, "PUT", "/api/appointments/99/status", b'{"status": "confirmed"}', JSON, "no such appointment"),
    (413, "POST", "/api/broadcast", b" " * 65537, JSON, "the body has 65537 bytes: send 65536 at most"),
    (413, "POST", "/nowhere", b" " * 1000000, JSON, "send 65536 at most"),
    (415, "POST", "/api/broadcast", b"event=x", {"Content-Type": "application/x-www-form-urlencoded"},
     "the Content-Type must be application/json"),
    (415, "POST", "/api/broadcast", b'{"event": "x"}', {"Content-Type": "text/plain"},
     "the Content-Type must be application/json"),
    (415, "POST", "/api/broadcast", b'{"event": "x"}', {}, "the Content-Type must be application/json"),
    (400, "POST", "/api/broadcast", b"{}", {**JSON, "Content-Length": "many"}, "Content-Length must be"),
    (400, "POST", "/api/broadcast", b"{}", {**JSON, "Content-Length": "-1"}, "Content-Length must be"),
]


def assert_refused(response, status, reason, queue):
    """A refusal is JSON with a reason that says what to change, and queues nothing."""
    assert (response.status, response.json["success"]) == (status, False)
    assert reason in response.json["error"]
    assert "Traceback" not in response.json["error"]
    assert list(queue.glob("*.json")) == []


@pytest.mark.parametrize("where, body, reason", BAD_FIELDS)
def test_a_field_that_does_not_fit_is_named(api, lone_queue, where, body, reason):
    """400 names the field and says what it must be."""
    assert_refused(call(api, *where, body), 400, reason, lone_queue)


@pytest.mark.parametrize("body, reason", BAD_BODIES, ids=[repr(body[:20]) for body, _ in BAD_BODIES])
def test_a_body_that_is_no_json_object_is_refused(api, lone_queue, body, reason):
    """400 says that it must be one."""
    assert_refused(call(api, *BROADCAST, body, JSON), 400, reason, lone_queue)


@pytest.mark.parametrize("status, method, path, body, headers, reason", BAD_REQUESTS)
def test_a_request_that_does_not_fit_is_refused(api, lone_queue, status, method, path, body, headers, reason):
    """Each kind of misfit has its own status and a reason that says what to change."""
    assert_refused(call(api, method, path, body, headers), status, reason, lone_queue)


@pytest.mark.parametrize("method, path, allowed", [
    ("GET", "/api/appointments", "POST"),
    ("POST", "/api/appointments/1", "DELETE"),
    ("DELETE", "/api/appointments/1/status", "PUT"),
    ("OPTIONS", "/api/broadcast", "POST"),
    ("PATCH", "/api/health", "GET"),
    ("DELETE", "/", "GET"),
])
def test_a_wrong_method_is_told_the_right_one(api, lone_queue, method, path, allowed):
    """405 comes with Allow."""
    response = call(api, method, path)
    assert_refused(response, 405, f"use {allowed}", lone_queue)
    assert response.getheader("Allow") == allowed


def raw_exchange(api, request):
    """Send bytes that no HTTP library would, and return all that comes back."""
    host, port = api.url.split("//")[1].split(":")
    with socket.create_connection((host, int(port)), timeout=10 * TIME_UNIT) as sock:
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def test_a_body_without_a_length_is_refused(api):
    """411 for a body whose end nobody knows."""
    answer = raw_exchange(api, b"POST /api/broadcast HTTP/1.0\r\nContent-Type: application/json\r\n\r\n{}")
    assert answer.startswith(b"HTTP/1.0 411 ") and b"Content-Length is missing" in answer


def test_a_body_that_ends_early_is_refused(api):
    """400 tells half a body from a whole one."""
    head = b"POST /api/broadcast HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    answer = raw_exchange(api, head + b'{"event": "x"}')
    assert answer.startswith(b"HTTP/1.0 400 ") and b"the body ended after 14 of the 99 bytes" in answer


def test_a_client_that_stalls_delays_nobody(api):
    """While one client is stuck in the middle of its request, others are answered."""
    host, port = api.url.split("//")[1].split(":")
    with socket.create_connection((host, int(port))) as stalled:
        stalled.sendall(b"POST /api/broadcast HTTP/1.0\r\nContent-Length: 9\r\n\r\n{")
        assert call(api, "GET", "/api/health").status == 200


# ---- Health, and a queue that cannot be written ------------------------------------------------------------


def test_health_counts_what_waits_in_the_queue(queue):
    """The backlog is the files that are ready; those that begin with a dot are not."""
    with run_example(API, queue) as api:
        call(api, *NEW, APPOINTMENT)
        call(api, *NOTIFY, NOTIFICATION)
        (queue / ".being-written.json").write_text("{")
        health = call(api, "GET", "/api/health").json
    assert health == {"status": "ok", "queue_path": str(queue), "queue_writable": True, "backlog": 2,
                      "events_not_queued": 0}


def test_health_of_an_api_whose_events_are_taken_shows_no_backlog(both):
    """A server behind the queue empties it."""
    call(both[1], *NOTIFY, NOTIFICATION)
    eventually(lambda: call(both[1], "GET", "/api/health").json["backlog"] == 0, what="an empty queue")


@pytest.fixture
def cut_off(tmp_path):
    """The API with a queue directory that cannot be made, not even by root: its parent is a file."""
    (tmp_path / "file").write_text("")
    with run_example(API, tmp_path / "file" / "ws_queue") as example:
        yield example


def test_an_appointment_is_kept_when_its_event_cannot_be_queued(cut_off):
    """The call succeeds, and says that nobody was told."""
    created = call(cut_off, *NEW, APPOINTMENT)
    changed = call(cut_off, "PUT", "/api/appointments/1/status", {"status": "confirmed"})
    assert [(r.status, r.json["success"], r.json["queued"]) for r in (created, changed)] == [
        (201, True, False), (200, True, False)
    ]


def test_health_shows_a_queue_that_cannot_be_written(cut_off):
    """It is degraded, and the events that were not queued are counted."""
    call(cut_off, *NEW, APPOINTMENT)
    health = call(cut_off, "GET", "/api/health").json
    assert (health["status"], health["queue_writable"], health["events_not_queued"]) == ("degraded", False, 1)


# ---- Starting, stopping, the page --------------------------------------------------------------------------


def test_the_api_serves_the_page(api):
    """GET / is the test client, as HTML that nobody may keep or guess about."""
    response = call(api, "GET", "/")
    assert response.content == (EXAMPLES / "websocket_client_test.html").read_bytes()
    assert response.getheader("Content-Type") == "text/html; charset=utf-8"
    assert response.getheader("X-Content-Type-Options") == "nosniff"


def test_head_is_get_without_the_body(api):
    """`curl -I` works."""
    response = call(api, "HEAD", "/api/health")
    assert (response.status, response.content) == (200, b"") and int(response.getheader("Content-Length")) > 2


@pytest.mark.parametrize("name", [SERVER, API])
def test_ctrl_c_ends_an_example_cleanly(queue, name):
    """Exit status 0, and no traceback."""
    with run_example(name, queue) as example:
        status = example.interrupt()
        assert (status, "Traceback" in example.printed("stderr")) == (0, False)


@pytest.mark.parametrize("name, variable", [(SERVER, "WS_PORT"), (API, "API_PORT")])
@pytest.mark.parametrize("port", ["taken", "eighty", "99999"])
def test_a_port_that_cannot_be_had_is_named(queue, name, variable, port):
    """The example ends with a sentence that names the port, not with a traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1]) if port == "taken" else port
        assert port in complaint(name, WS_QUEUE_PATH=queue, **{variable: port})


def test_started_with_no_settings_both_meet_beside_the_examples(tmp_path):
    """A copied checkout works by itself, and its queue is examples/logs/ws_queue."""
    shutil.copy(ROOT / "wsqueue.py", tmp_path)
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("logs"))
    with run_both(None, tmp_path / "examples") as (server, api):
        with connected(server, ["/broadcast"]) as [client]:
            assert call(api, *BROADCAST, {"event": "hello"}).json["queued"] is True
            assert next_event(client)["event"] == "hello"
        queue = call(api, "GET", "/api/health").json["queue_path"]
    assert queue == str(tmp_path / "examples" / "logs" / "ws_queue")
