"""Section 9, monitoring: what GET /healthz and GET /metrics say, to whom, and at what cost to the clients."""

import http.client
import json
import re
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

import wsqueue
from clients import (
    PATIENCE,
    TEXT,
    RawClient,
    everybody_has_left,
    handshake,
    open_socket,
    parse_answer,
    read_to_end,
    serving,
    still_reaches,
)
from helpers import eventually, put_in_the_way_of, run_cli
from test_server import has_ipv6
from wsqueue import DirectoryQueue, SettingError, WebSocketServer, make_event, queue_event, queue_events

KIB = 1024
HEALTHY = {"status": "ok", "clients": 0, "backlog": 0, "oldest_seconds": 0.0, "failed": 0, "trouble": None}
FAMILIES = {  # as the parser names them: without the _total of a counter
    "wsqueue_clients": "gauge",
    "wsqueue_backlog_events": "gauge",
    "wsqueue_backlog_oldest_seconds": "gauge",
    "wsqueue_failed_files": "gauge",
    "wsqueue_events": "counter",
    "wsqueue_deliveries": "counter",
    "wsqueue_connections": "counter",
    "wsqueue_refused": "counter",
    "wsqueue_closed": "counter",
}


@pytest.fixture
def directory(tmp_path):
    """A queue directory that does not exist yet."""
    return tmp_path / "queue"


def ask(server, path, method="GET", headers=None):
    """The answer to an HTTP request, read, and its body as text."""
    target = urlsplit(server.url)
    connection = http.client.HTTPConnection(target.hostname, target.port, timeout=PATIENCE)
    try:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer, answer.read().decode()
    finally:
        connection.close()


def health(server):
    answer, body = ask(server, "/healthz")
    assert answer.headers["Content-Type"] == "application/json"
    facts = json.loads(body)
    assert answer.status == (200 if facts["status"] == "ok" else 503)
    return facts


def families(server):
    answer, body = ask(server, "/metrics")
    assert answer.status == 200
    return list(text_string_to_metric_families(body))


def samples(server):
    """Values by name; of those with a label by name and label."""
    found = [sample for family in families(server) for sample in family.samples]
    return {" ".join((sample.name, *sample.labels.values())): sample.value for sample in found}


def eventually_says(server, **expected):
    """Wait until /healthz says it, and return all that it says."""
    def found():
        facts = health(server)
        return facts if facts.items() >= expected.items() else None

    return eventually(found, what=str(expected))


def eventually_counts(server, expected):
    """Wait until /metrics has these samples; counters follow what they count."""
    def found():
        now = samples(server)
        return {name: now.get(name) for name in expected} == expected

    eventually(found, what=str(expected))


# ---- /send -------------------------------------------------------------------------------------------------


def send_event(server):
    """What the form of the monitor page sends; the page knows the token."""
    token = re.search(re.escape(server._token), ask(server, "/")[1])[0]
    return ask(server, "/send?event=e", "POST", {"X-Wsqueue-Token": token})


def test_the_form_queues_an_event(directory):
    """204, and whoever is connected gets it."""
    with serving(queue=str(directory)) as server, RawClient(server.url) as client:
        assert send_event(server)[0].status == 204
        assert client.events(1)[0]["event"] == "e"


def test_the_form_without_a_queue():
    """409, and a sentence: there is nothing that could take the event."""
    with serving() as server:
        answer, sentence = send_event(server)
        assert answer.status == 409 and "no queue" in sentence


def test_the_form_of_a_queue_that_cannot_be_written(directory):
    """503, and the reason; the event is not taken for queued."""
    with serving(queue=str(directory)) as server:
        put_in_the_way_of(directory)
        answer, sentence = send_event(server)
        assert answer.status == 503 and str(directory) in sentence


# ---- /healthz ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queue", [True, False])
def test_health_of_a_server_that_idles(directory, queue):
    """Every field is there, with or without a queue."""
    with serving(queue=str(directory) if queue else "") as server:
        assert health(server) == HEALTHY


def test_health_counts_clients(directory):
    """Those of WebSocket: who asks for the page is none."""
    with serving(queue=str(directory)) as server:
        with RawClient(server.url), RawClient(server.url, "/chat"):
            eventually_says(server, clients=2)
        assert eventually_says(server, clients=0) == HEALTHY


def test_health_shows_what_waits_and_for_how_long(directory):
    """A file that its producer has not finished is backlog, from its stamp on."""
    directory.mkdir()
    unfinished = directory / f"{int(time.time()) - 3600}.json"
    with serving(queue=str(directory)) as server:

        def waits():
            with unfinished.open("a") as file:
                file.write(" ")  # who goes on writing is waited for
            return [facts for facts in [health(server)] if facts["backlog"]]

        facts = eventually(waits, what="a backlog")[0]
        assert facts == {**HEALTHY, "backlog": 1, "oldest_seconds": facts["oldest_seconds"]}
        assert 3600 <= facts["oldest_seconds"] < 7200
        unfinished.write_text('{"event": "done"}')
        assert eventually_says(server, backlog=0) == HEALTHY


def test_health_counts_what_failed(directory):
    """A file that is no event is set aside, and counted once: its .reason is not another."""
    directory.mkdir()
    (directory / "1.json").write_text("42")
    with serving(queue=str(directory)) as server:
        assert eventually_says(server, failed=1) == {**HEALTHY, "failed": 1}


def test_health_tells_a_queue_that_cannot_be_read(directory):
    """503 with the reason, for load balancers and people; 200 once it is over, and clients stay all the while."""
    with serving(queue=str(directory), poll_interval=0.01) as server, RawClient(server.url) as client:
        eventually_says(server, status="ok")
        put_in_the_way_of(directory)
        facts = eventually_says(server, status="trouble", clients=1)
        assert str(directory) in facts["trouble"]
        directory.unlink()
        assert eventually_says(server, status="ok") == {**HEALTHY, "clients": 1}
        assert queue_event(str(directory), "e", 1)
        assert client.payloads(1) == [1]


class Recovered(DirectoryQueue):
    """Fails once, and has something to send from then on."""

    failed = False

    def take(self, max_bytes=0):
        if not self.failed:
            self.failed = True
            raise wsqueue.QueueError("gone for a moment")
        time.sleep(0.001)
        return [make_event("e", None, None, 0.0)]

    def done(self, events):
        """Nothing has to be removed."""


def test_trouble_is_over_once_events_flow(directory):
    """A queue that is never empty again is well all the same."""
    with serving(queue=Recovered(str(directory))) as server:
        eventually_counts(server, {"wsqueue_clients": 0.0})
        assert eventually_says(server, status="ok")["trouble"] is None


# ---- /metrics ----------------------------------------------------------------------------------------------


def test_metrics_are_what_prometheus_reads(directory):
    """Each family once, with its type and a sentence of help, in the text format that the header names."""
    with serving(queue=str(directory)) as server:
        answer, body = ask(server, "/metrics")
        found = list(text_string_to_metric_families(body))
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert [family.name for family in found] == list(FAMILIES)
    assert {family.name: family.type for family in found} == FAMILIES
    assert all(family.documentation.endswith(".") for family in found)


def test_counters_without_labels_begin_at_zero(directory):
    """rate() sees a first event only as the step from what was there before."""
    with serving(queue=str(directory)) as server:
        assert samples(server) == {
            "wsqueue_clients": 0, "wsqueue_backlog_events": 0, "wsqueue_backlog_oldest_seconds": 0,
            "wsqueue_failed_files": 0, "wsqueue_events_total": 0, "wsqueue_deliveries_total": 0,
            "wsqueue_connections_total": 0,
        }


def test_events_deliveries_and_connections_are_counted(directory):
    """An event counts once, and is delivered as often as it has addressees; who has left still has been here."""
    with serving(queue=str(directory)) as server, RawClient(server.url, "/a") as client:
        with RawClient(server.url, "/b"):
            eventually_counts(server, {"wsqueue_clients": 2, "wsqueue_connections_total": 2})
            assert queue_events(str(directory), [("all", number) for number in range(10)])
            assert queue_event(str(directory), "few", to="/a")
            assert queue_event(str(directory), "nobody", to="/c")
            server.broadcast("from inside")
            eventually_counts(server, {"wsqueue_events_total": 13, "wsqueue_deliveries_total": 2 * 10 + 1 + 0 + 2})
        eventually_counts(server, {"wsqueue_clients": 1, "wsqueue_connections_total": 2})
        assert len(client.events(12)) == 12


def test_the_gauges_are_those_of_healthz(directory):
    """Backlog, its age and what failed."""
    directory.mkdir()
    (directory / "1.json").write_text("42")
    unfinished = directory / f"{int(time.time()) - 3600}.json"
    with serving(queue=str(directory)) as server:

        def wait_together():
            with unfinished.open("a") as file:
                file.write(" ")
            found = samples(server)
            return found if found["wsqueue_backlog_events"] == 1 and found["wsqueue_failed_files"] == 1 else None

        assert 3600 <= eventually(wait_together)["wsqueue_backlog_oldest_seconds"] < 7200


def test_figures_of_many_digits_keep_them(directory):
    """A counter is exact: an increase of one does not vanish in an exponent."""
    with serving(queue=str(directory)) as server:
        server._totals.add("events_total", 123_456_789_012)
        assert samples(server)["wsqueue_events_total"] == 123_456_789_012


def test_refusals_are_counted_by_status():
    """Pages that are answered are none."""
    with serving() as server:
        for request in (b"POST / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                        b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n", handshake(Origin="http://evil.example"), b"\0\0"):
            with open_socket(server.url) as sock:
                sock.sendall(request)
                read_to_end(sock)
        assert {name: value for name, value in samples(server).items() if "refused" in name} == {
            "wsqueue_refused_total 405": 1, "wsqueue_refused_total 426": 2, "wsqueue_refused_total 403": 1,
            "wsqueue_refused_total 400": 1,
        }


def test_a_request_that_does_not_come_is_a_refusal():
    """408, and what max_clients turns away is 503."""
    with serving(handshake_timeout=0.2, max_clients=1) as server, open_socket(server.url), RawClient(server.url):
        with open_socket(server.url) as sock:
            sock.sendall(handshake())
            assert parse_answer(read_to_end(sock)).status == 503
        eventually_counts(server, {"wsqueue_refused_total 408": 1, "wsqueue_refused_total 503": 1})


def break_the_protocol(client, server):
    client.send_frame(0x3, b"")


def send_too_much(client, server):
    client.send_frame(TEXT, b"x" * 2 * KIB)


def send_what_is_no_text(client, server):
    client.send_frame(TEXT, b"\xff")


def stop_reading(client, server):
    eventually(lambda: server.broadcast("e", "x" * 64 * KIB) or server.get_connection_count() == 0)


def stay_silent(client, server):
    everybody_has_left(server)


@pytest.mark.parametrize("reason, provoke, settings", [
    ("1002", break_the_protocol, {}),
    ("1009", send_too_much, {"max_message_bytes": KIB}),
    ("1007", send_what_is_no_text, {}),
    ("outbox", stop_reading, {"outbox_bytes": KIB}),
    ("send_timeout", stop_reading, {"outbox_bytes": KIB * KIB * KIB, "send_timeout": 0.1}),
    ("ping_timeout", stay_silent, {"ping_interval": 0.1, "ping_timeout": 0.1}),
])
def test_closed_connections_are_counted_by_reason(reason, provoke, settings):
    """By close code where the protocol was broken, else by the setting that set the limit; one each."""
    with serving(**settings) as server, RawClient(server.url, receive_buffer=4 * KIB) as client:
        eventually_counts(server, {"wsqueue_clients": 1})
        provoke(client, server)
        eventually_counts(server, {f"wsqueue_closed_total {reason}": 1, "wsqueue_clients": 0})
        assert sum("closed_total" in name for name in samples(server)) == 1


def test_clients_that_leave_are_not_counted_as_closed():
    """Nor is a goodbye, or a stream that ends without one."""
    with serving() as server:
        with RawClient(server.url) as polite, RawClient(server.url):
            polite.close()
        everybody_has_left(server)
        assert not any("closed_total" in name for name in samples(server))


# ---- Who may ask -------------------------------------------------------------------------------------------


WHO_MAY_ASK = [
    ("auto", "127.0.0.1", True),
    ("auto", "localhost", True),
    ("auto", "0.0.0.0", False),
    ("on", "0.0.0.0", True),
    ("on", "127.0.0.1", True),
    ("off", "127.0.0.1", False),
]
if has_ipv6():
    WHO_MAY_ASK += [("auto", "::1", True), ("auto", "::", False)]


@pytest.mark.parametrize("monitoring, host, answered", WHO_MAY_ASK)
@pytest.mark.parametrize("path", ["/healthz", "/metrics"])
def test_pages_are_for_this_machine_unless_told_otherwise(monitoring, host, answered, path):
    """Where they are off, they are answered as every request that is no handshake."""
    with serving(monitoring=monitoring, host=host) as server:
        answer, body = ask(server, path)
        assert answer.status == (200 if answered else 426)
        assert answered or (answer.status, body) == (426, ask(server, "/")[1])


def test_another_word_for_monitoring_is_refused(tmp_path):
    """As a keyword argument and as an option, with the words that there are."""
    with pytest.raises(SettingError, match=r"auto.*on.*off"):
        WebSocketServer(monitoring="yes")
    done = run_cli("serve", "--port", 0, "--queue", tmp_path / "q", "--monitoring", "yes")
    assert (done.returncode, done.stdout) == (2, "")
    assert "auto or on or off" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize("path", ["/healthz", "/metrics"])
@pytest.mark.parametrize("method", ["POST", "HEAD", "DELETE"])
def test_pages_can_only_be_got(method, path):
    """405, which names GET."""
    with serving() as server:
        answer, _ = ask(server, path, method)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize("path", ["/healthz", "/metrics"])
def test_a_client_may_connect_to_the_path_of_a_page(path):
    """A handshake is one on every path: its route's handler runs, and its topic is served."""
    with serving({path: lambda conn: conn.send("welcome")}) as server, RawClient(server.url, path) as client:
        assert client.recv() == "welcome"
        server.broadcast("e", 1, to=path)
        assert client.payloads(1) == [1]


@pytest.mark.parametrize("path, status", [("/healthz?verbose=1", 200), ("/healthz/", 426), ("/Metrics", 426)])
def test_a_page_has_one_path(path, status):
    """A query is no matter; another path is another."""
    with serving() as server:
        assert ask(server, path)[0].status == status


def test_a_page_is_the_last_of_its_connection():
    """Who sends two requests at once gets one answer, whole, and the end."""
    request = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with serving() as server, open_socket(server.url) as sock:
        sock.sendall(request + request)
        answer = parse_answer(read_to_end(sock))
    assert answer.headers["connection"] == "close"
    assert len(answer.body) == int(answer.headers["content-length"])
    assert json.loads(answer.body) == HEALTHY


def test_a_request_for_a_page_may_come_in_pieces():
    """It is answered once it is whole."""
    with serving() as server, open_socket(server.url) as sock:
        for byte in b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n":
            sock.sendall(bytes((byte,)))
        assert parse_answer(read_to_end(sock)).status == 200


# ---- At what cost ------------------------------------------------------------------------------------------


class Hanging(DirectoryQueue):
    """A queue that hangs until told otherwise, as a directory on a file server that is gone does."""

    def __init__(self, path):
        super().__init__(str(path))
        self.go_on = threading.Event()

    def take(self, max_bytes=0):
        assert self.go_on.wait(3 * PATIENCE)
        return super().take()


def test_a_queue_that_hangs_is_trouble_and_holds_up_no_page(directory, monkeypatch):
    """The pages say for how long nobody has looked at it; clients are served; once it goes on, all is well."""
    monkeypatch.setattr(wsqueue, "STALE_SECONDS", 0.2)
    queue = Hanging(directory)
    with serving(queue=queue) as server, RawClient(server.url) as client:
        try:
            facts = eventually_says(server, status="trouble")
            assert "has not been looked at for" in facts["trouble"]
            assert samples(server)["wsqueue_clients"] == 1
            assert still_reaches(server, client)
        finally:
            queue.go_on.set()
        eventually_says(server, status="ok")


@contextmanager
def asking(server, count):
    """Sockets that have asked for a page, side by side."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(open_socket(server.url)) for _ in range(count)]
        for sock in sockets:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        yield sockets


@pytest.fixture
def started(monkeypatch):
    """The names of the threads that are started from now on."""
    names, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: names.append(thread.name) or start(thread))
    return names


def test_many_requests_are_all_answered_and_start_no_thread(directory, started):
    """100 at once: each gets the page, and clients do not notice."""
    with serving(queue=str(directory)) as server, RawClient(server.url) as client:
        started.clear()
        with asking(server, 100) as sockets:
            assert {parse_answer(read_to_end(sock)).status for sock in sockets} == {200}
        assert started == []
        assert still_reaches(server, client)


class Counting(DirectoryQueue):
    """A queue that counts how often its backlog was asked for."""

    asked = 0

    def backlog(self):
        self.asked += 1
        return super().backlog()


def test_requests_do_not_list_the_directory(directory):
    """Thousands of files in it cost a page nothing: the queue thread notes what waits, once a second at most."""
    queue = Counting(str(directory))
    with serving(queue=queue) as server:
        eventually(lambda: queue.asked, what="a first note")
        before, started = queue.asked, time.monotonic()
        for _ in range(50):
            health(server)
        assert queue.asked - before <= time.monotonic() - started + 1


class Broken(DirectoryQueue):
    """A queue whose backlog fails in a way that nobody has thought of."""

    def backlog(self):
        raise RuntimeError("a bug")


def test_a_backlog_that_fails_is_trouble_and_in_the_log(directory, caplog):
    """Events go out all the same."""
    with serving(queue=Broken(str(directory))) as server, RawClient(server.url) as client:
        assert eventually_says(server, status="trouble")["trouble"] == "a bug"
        assert queue_event(str(directory), "e", 1)
        assert client.payloads(1) == [1]
    assert "a bug" in caplog.text


def test_requests_and_stop_at_the_same_time(directory):
    """Whoever asks meanwhile gets the page or the end of the stream; the server can be started again."""
    server = WebSocketServer(port=0, queue=str(directory), close_timeout=0.2)
    for _ in range(5):
        with server, asking(server, 50) as sockets:
            server.stop()
            for sock in sockets:
                assert whatever_comes(sock) in (None, 200)
    assert not list(Path(directory).glob("*.json"))


def whatever_comes(sock):
    """The status of the answer, None if there is none."""
    try:
        data = read_to_end(sock)
    except ConnectionResetError:
        return None
    return parse_answer(data).status if data else None
