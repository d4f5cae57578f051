"""The whole way in a real browser: producers, `wsqueue serve`, the script that it hands out, and what a page shows.

Servers are killed with -9 and started again on the same port. Pictures of the monitor page are kept in the directory
that the environment variable WSQUEUE_ARTEFACTS names, else in pytest's tmp_path.
"""

import json
import os
import re
import threading
import time
from collections import Counter
from contextlib import ExitStack
from socketserver import ThreadingMixIn
from urllib.parse import parse_qs
from urllib.request import urlopen
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pytest
from prometheus_client.parser import text_string_to_metric_families
from selenium.webdriver.common.by import By

import wsqueue
from browser import emulate, needs_chromium, save_picture
from clients import RawClient, exchange, handshake
from helpers import TIME_UNIT, eventually, put_in_the_way_of, spawn_server

pytestmark = needs_chromium


# ---- The server, and the site whose pages use it -----------------------------------------------------------


class Service:
    """A queue directory and its server, which can be killed and started again on the same port."""

    def __init__(self, stack, directory, *options, secret=None):
        self.directory, self._stack, self._options = directory, stack, options
        self.secret, self.port = secret, 0
        self.start()

    def start(self):
        env = {**os.environ, **({"WS_SECRET": self.secret} if self.secret else {})}
        command = ("--queue", self.directory, "--port", self.port, *self._options)
        self._server = self._stack.enter_context(spawn_server(*command, env=env))
        self.url, self.port = self._server.url.replace("ws://", "http://"), self._server.port

    def kill(self):
        self._server.process.kill()
        self._server.process.wait()

    def client(self, target="/"):
        return self._stack.enter_context(RawClient(self._server.url, target))

    def queue(self, *payloads, event="order_paid", to=None):
        """An event for each, one after the other."""
        for payload in payloads:
            assert wsqueue.queue_event(str(self.directory), event, payload, to=to)

    def counts(self):
        """What /metrics says, by name: the sum where there are labels."""
        found = Counter()
        for family in text_string_to_metric_families(self.page("/metrics")):
            for sample in family.samples:
                found[sample.name] += sample.value
        return found

    def page(self, path):
        with urlopen(f"{self.url}{path}", timeout=10 * TIME_UNIT) as answer:
            return answer.read().decode()


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        pass


class _Threaded(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a browser connects in advance, and says nothing


class Site:
    """An old-fashioned web application on a port of its own; its pages are those of the dict, by path."""

    def __init__(self, stack):
        self.pages = {}
        self.ticket = None  # makes one for a user
        self.tickets = []  # handed out: (user, ticket)
        server = make_server("127.0.0.1", 0, self._answer, _Threaded, _Quiet)
        self.port = server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="test-site")
        thread.start()
        for undo in (server.server_close, thread.join, server.shutdown):
            stack.callback(undo)

    def _answer(self, environ, start_response):
        path = environ["PATH_INFO"]
        kind, body = ("text/plain", self._sign(environ)) if path == "/ticket" else (
            "text/javascript" if path.endswith(".js") else "text/html", self.pages[path])
        start_response("200 OK", [("Content-Type", f"{kind}; charset=utf-8"), ("Cache-Control", "no-store")])
        return [body.encode()]

    def _sign(self, environ):
        user = parse_qs(environ["QUERY_STRING"])["user"][0]
        self.tickets.append((user, self.ticket(user)))
        return self.tickets[-1][1]


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def site(stack):
    return Site(stack)


@pytest.fixture
def service(stack, tmp_path):
    return Service(stack, tmp_path / "queue")


# ---- Pages -------------------------------------------------------------------------------------------------

HEAD = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><title>Orders</title>
<ol id="events"></ol>
<script>
const told = [];
function show(text) {
  document.querySelector("#events").append(Object.assign(document.createElement("li"), { textContent: text }));
}
function watch(queue) {
  window.queue = queue;
  queue.onstatus = status => told.push(status);
  queue.onreset = () => show("reset");
  queue.on("order_paid", show);
}
</script>
"""
SCRIPT = HEAD + """<script src="{url}/wsqueue.js"></script><script>watch(new WSQueue("/shop"));</script>"""
MODULE = HEAD + """<script type="module">
import { WSQueue } from "{url}/wsqueue.mjs";
watch(new WSQueue("{url}/shop"));
</script>"""
# What a proxy that knows no WebSocket does to a page.
WITHOUT_WEBSOCKETS = """<script>
window.WebSocket = class { constructor() { setTimeout(() => this.onerror(), 1); } close() {} };
</script>""" + SCRIPT


class Tab:
    """One tab of the browser."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.switch_to.new_window("tab")
        self._handle = driver.current_window_handle
        driver.get(url)

    def run(self, code, *args):
        self.enter()
        return self.driver.execute_script(code, *args)

    def enter(self):
        self.driver.switch_to.window(self._handle)

    def value(self, expression):
        return self.run(f"return {expression}")

    def wait(self, expression, timeout=30):
        """The value of an expression, once it is true."""
        return eventually(lambda: self.value(expression), timeout, what=expression)

    def shown(self):
        """The events on the page, from top to bottom."""
        return self.value("[...document.querySelectorAll('#events > li')].map(li => li.textContent)")

    def shows(self, *payloads):
        """Whether these are all, once the last of them is there."""
        last = str(payloads[-1])
        eventually(lambda: self.shown()[-1:] == [last], timeout=30, what=f"{last} on the page")
        return self.shown() == [str(payload) for payload in payloads]

    def wait_for_refused_attempts(self):
        """The server is gone, and the page has found that out more than once."""
        self.wait("told.slice(told.lastIndexOf('open')).filter(status => status === 'waiting').length > 1")


@pytest.fixture
def open_tab(chromium, stack):
    """Opens pages, each in a tab of its own; all are gone before the servers are that they are connected to."""
    first = chromium.current_window_handle
    chromium.get_log("browser")  # what earlier pages complained about
    yield lambda url: Tab(chromium, url)
    for handle in chromium.window_handles:
        if handle != first:
            chromium.switch_to.window(handle)
            chromium.close()
    chromium.switch_to.window(first)


@pytest.fixture
def visit(open_tab, site):
    """Has the site serve a page, which uses a service, and opens it under a host name of this machine."""
    def visit(page, service, host="127.0.0.1"):
        site.pages["/"] = page.replace("{url}", service.url)
        return open_tab(f"http://{host}:{site.port}/")

    return visit


def complaints(driver, *services):
    """What the console shows, but for what the browser itself says of each connection that is refused."""
    port = f"(?:{'|'.join(str(service.port) for service in services)})"
    by_itself = re.compile(
        rf"\S+ \d+ WebSocket connection to 'ws://127\.0\.0\.1:{port}/\S*' failed: "
        r"Error in connection establishment: net::ERR_CONNECTION_REFUSED"
        rf"|http://127\.0\.0\.1:{port}/\S* - Failed to load resource: net::ERR_CONNECTION_REFUSED"
    )
    messages = [entry["message"] for entry in driver.get_log("browser")]
    return [message for message in messages if not by_itself.fullmatch(message)]


# ---- A page that comes back --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [SCRIPT, WITHOUT_WEBSOCKETS], ids=["websocket", "stream"])
def test_a_page_shows_what_was_queued_while_the_server_was_down(visit, service, page):
    """Nobody touches it; each event appears once, in order, and nothing else is said in the console."""
    tab = visit(page, service)
    tab.wait("queue.status === 'open'")
    service.queue(1, 2)
    assert tab.shows(1, 2)
    service.kill()
    service.queue(*range(3, 10))
    tab.wait_for_refused_attempts()
    service.start()
    tab.wait("queue.status === 'open'")
    service.queue(10)
    assert tab.shows(*range(1, 11))
    assert complaints(tab.driver, service) == []


def test_a_module_of_another_host_name_is_let_in_where_it_is_allowed(visit, site, stack, tmp_path):
    """The module may be imported from anywhere; who may connect is said at the server, and stays said."""
    allowed = ("--allowed-origins", f"http://localhost:{site.port}")
    service = Service(stack, tmp_path / "allowed", *allowed)
    tab = visit(MODULE, service, "localhost")
    tab.wait("window.queue?.status === 'open'")
    service.kill()
    service.queue(1, 2, 3)
    tab.wait_for_refused_attempts()
    service.start()
    assert tab.shows(1, 2, 3)
    assert complaints(tab.driver, service) == []


def test_a_module_connects_to_where_it_came_from(visit, service):
    """As the script does: a URL without a host means the host that the client was loaded from."""
    tab = visit(MODULE.replace('"{url}/shop"', '"/shop"'), service)
    tab.wait("window.queue?.status === 'open'")
    service.queue(1)
    assert tab.shows(1)


def test_after_an_outage_websockets_are_websockets_again(visit, service):
    """Not event streams, of which a browser has six for a host, over all tabs, before it has others wait."""
    tab = visit(HEAD + """<script src="{url}/wsqueue.js"></script><script>
      const queues = Array.from({ length: 8 }, () => new WSQueue("/shop"));
      for (const queue of queues) {
        queue.waits = 0;
        queue.onstatus = status => { if (status === "waiting") queue.waits++; };
      }
    </script>""", service)
    tab.wait("queues.every(queue => queue.status === 'open')")
    service.kill()
    tab.wait("queues.every(queue => queue.waits > 1)")
    service.start()

    def all_are_back():
        facts = json.loads(service.page("/monitor.json"))
        return (facts["clients"], facts["streams"]) == (8, 0)

    eventually(all_are_back, timeout=30, what="8 WebSockets")


@pytest.mark.parametrize("page", [SCRIPT, WITHOUT_WEBSOCKETS], ids=["websocket", "stream"])
def test_a_server_that_is_killed_in_the_midst_of_a_burst_repeats_nothing_on_the_page(visit, service, page):
    """Whatever of it was sent, and whatever was not."""
    tab = visit(page, service)
    tab.wait("queue.status === 'open'")
    service.queue(*range(150))
    service.kill()
    service.queue(*range(150, 300))
    service.start()
    assert tab.shows(*range(300))


def test_an_event_source_of_the_page_itself_misses_nothing(visit, service):
    """Without our script, the browser comes back by itself and says which event it has seen last."""
    tab = visit(HEAD + """<script>
      window.source = new EventSource("{url}/shop");
      source.onmessage = ({ data }) => {
        const { event, payload } = JSON.parse(data);
        if (event !== "wsqueue.hello") show(payload);
      };
    </script>""", service)
    tab.wait("source.readyState === 1")
    service.queue(1)
    assert tab.shows(1)
    service.kill()
    service.queue(2, 3)
    tab.wait("source.readyState === 0")
    service.start()
    tab.wait("source.readyState === 1")
    service.queue(4)
    assert tab.shows(1, 2, 3, 4)


# ---- Tickets -----------------------------------------------------------------------------------------------

ACCOUNT = HEAD + """<script src="{url}/wsqueue.js"></script><script>
watch(new WSQueue("/shop", { ticket: async () => (await fetch("/ticket?user=%s")).text() }));
</script>"""


@pytest.fixture
def guarded(stack, site, tmp_path):
    """A server that asks for tickets, and the site that makes them, for a user and a topic."""
    service = Service(stack, tmp_path / "guarded", secret="of both")
    site.ticket = lambda user: wsqueue.sign_ticket(service.secret, user=user, topics=[f"team:{user[0]}"], ttl=5)
    return service


def test_what_is_for_one_user_reaches_the_pages_of_that_user_alone(visit, guarded):
    """By user and by topic, what is queued now and what is queued while the server is down."""
    ada, grace = visit(ACCOUNT % "ada", guarded), visit(ACCOUNT % "grace", guarded)
    for tab in (ada, grace):
        tab.wait("queue.status === 'open'")
    queue_for_both(guarded, 10)
    assert ada.shows(11, 13, 15)
    guarded.kill()
    queue_for_both(guarded, 20)
    guarded.start()
    assert ada.shows(11, 13, 15, 21, 23, 25)
    assert grace.shows(12, 14, 15, 22, 24, 25)


def queue_for_both(service, start):
    service.queue(start + 1, to="user:ada")
    service.queue(start + 2, to="user:grace")
    service.queue(start + 3, to=["team:a", "user:nobody"])
    service.queue(start + 4, to="team:g")
    service.queue(start + 5)


def test_a_page_fetches_a_new_ticket_to_come_back_with(visit, guarded, site):
    """Its first one is not good any more, because the server has another secret now; the page shows events alone."""
    tab = visit(ACCOUNT % "ada", guarded)
    tab.wait("queue.status === 'open'")
    ((_, first),) = site.tickets
    guarded.kill()
    guarded.queue(1)
    guarded.secret = "changed"
    guarded.start()
    guarded.queue(2)
    assert tab.shows(1, 2)
    assert "signature" in exchange(guarded.url, handshake(f"/shop?ticket={first}")).body
    assert site.tickets[-1][1] != first


def test_a_ticket_that_came_too_late_is_followed_by_a_good_one(visit, guarded, site):
    """The server refuses it; the page asks for another, and is let in."""
    good = site.ticket
    site.ticket = lambda user: wsqueue.sign_ticket("of both", user=user, ttl=-3600) if not site.tickets else good(user)
    tab = visit(ACCOUNT % "ada", guarded)
    tab.wait("queue.status === 'open'")
    guarded.queue(1, to="user:ada")
    assert tab.shows(1)
    assert guarded.counts()["wsqueue_refused_total"] == 1


# ---- The monitor page --------------------------------------------------------------------------------------


class Monitor(Tab):
    """The server's own page: what a user does with it, and what it shows."""

    def __init__(self, driver, service, query=""):
        super().__init__(driver, f"{service.url}/{query}")
        self.emulate(1280)

    def text(self, name):
        return self.value(f"document.getElementById('{name}').innerText")

    def wait_for(self, **texts):
        """Elements, by id, to contain the texts."""
        for name, text in texts.items():
            eventually(lambda: text in self.text(name), timeout=30, what=f"{text!r} in #{name}")  # noqa: B023

    def shown(self):
        """The events of the list, the newest first: (name, payload as one line)."""
        return [tuple(pair) for pair in self.value(
            "[...document.querySelectorAll('#events summary')].map(line => [line.children[1], line.children[2]]"
            ".map(part => part.textContent))")]

    def wait_until_live(self):
        self.wait("queue.status === 'open'")

    def send(self, **fields):
        self.enter()
        for name, value in fields.items():
            field = self.driver.find_element(By.NAME, name)
            field.clear()
            field.send_keys(value)
        self.driver.find_element(By.CSS_SELECTOR, "#send button").click()

    def emulate(self, width, height=900, scheme="light"):
        self.enter()
        emulate(self.driver, width, height, scheme)

    def save_picture(self, name, otherwise):
        self.enter()
        save_picture(self.driver, f"reach-{name}", otherwise)


@pytest.fixture
def monitor(chromium, open_tab, service):
    """The page of the service, live."""
    monitor = Monitor(chromium, service)
    monitor.wait_until_live()
    return monitor


def test_the_monitor_page_shows_what_there_is(monitor, service, tmp_path):
    """Clients and their topics, what waits, what failed and why, and events as they come; and the console is empty."""
    service.client("/shop"), service.client("/shop")
    (service.directory / "broken.json").write_text('["no event"]')
    service.queue({"id": 42})
    monitor.wait_for(state="OK", clients="3", topics="/shop\n2", failed="1", failures="broken.json",
                     events="order_paid")
    assert monitor.shown() == [("order_paid", '{ "id": 42 }')]
    (reason,) = json.loads(service.page("/monitor.json"))["failures"]
    assert reason["reason"] in monitor.text("failures")
    monitor.save_picture("all", tmp_path)
    assert complaints(monitor.driver, service) == []


def test_the_monitor_page_shows_what_waits(monitor, service, tmp_path):
    """A file that its producer has begun an hour ago, and goes on writing."""
    unfinished = service.directory / f"{int(time.time()) - 3600}.json"

    def waits():
        with unfinished.open("a") as file:
            file.write(" ")
        return monitor.text("backlog") == "1"

    eventually(waits, timeout=30, what="a backlog")
    assert "the oldest for 60" in monitor.text("backlog-more")
    monitor.save_picture("waiting", tmp_path)
    unfinished.write_text('{"event": "done"}')
    monitor.wait_for(backlog="0", events="done")


def test_the_monitor_page_sends_events(monitor, service, tmp_path):
    """To everyone, or to a topic; the page says that it is queued, and lists it like any other."""
    everyone, shop = service.client(), service.client("/shop")
    monitor.send(event="for_shop", payload="[1]", to="/shop")
    monitor.wait_for(sent="Queued at")
    monitor.send(event="for_all", payload='{"text": "<b>ü & ö</b>"}', to="")
    monitor.wait_for(events="for_all")
    assert monitor.shown() == [("for_all", '{ "text": "<b>ü & ö</b>" }')]
    assert [event["event"] for event in shop.events(2)] == ["for_shop", "for_all"]
    assert everyone.events(1)[0]["payload"] == {"text": "<b>ü & ö</b>"}
    monitor.save_picture("sent", tmp_path)
    assert complaints(monitor.driver, service) == []


def test_the_monitor_page_can_be_held(monitor, service):
    """Then the list stands still, to be read; what came meanwhile is shown after that."""
    service.queue(1)
    monitor.wait_for(events="order_paid")
    monitor.run("document.getElementById('hold').click()")
    service.queue(2)
    monitor.wait("fresh.length")
    assert [payload for _, payload in monitor.shown()] == ["1"]
    monitor.run("document.getElementById('hold').click()")
    eventually(lambda: [payload for _, payload in monitor.shown()] == ["2", "1"], what="both")


@pytest.mark.parametrize("fields, reason", [
    ({"event": "x", "payload": "{oops"}, "The payload is not JSON"),
    ({"event": "x", "payload": "1e999"}, "This is not an event"),
])
def test_the_monitor_page_says_why_it_does_not_send(monitor, fields, reason):
    """What it can know by itself, and what the server says."""
    monitor.send(**fields)
    monitor.wait_for(sent=reason)


def test_the_monitor_page_outlives_its_server(monitor, service, tmp_path):
    """It says that nobody answers, recovers by itself, and has to be loaded anew only in order to send."""
    monitor.wait_for(state="OK")
    service.kill()
    monitor.wait_for(state="Unreachable", sentence="the figures are old", live="lost")
    monitor.save_picture("unreachable", tmp_path)
    service.queue(1)
    service.start()
    monitor.wait_for(state="OK", events="order_paid")
    monitor.wait_for(live="")
    monitor.send(event="stale")
    monitor.wait_for(sent="started anew: reload the page")
    monitor.save_picture("stale", tmp_path)
    monitor.run("location.reload()")
    monitor.wait_until_live()
    monitor.send(event="fresh")
    monitor.wait_for(events="fresh", sent="Queued at")


def test_the_monitor_page_tells_trouble(monitor, service, tmp_path):
    """With the reason; and when it is over, it is over on the page, too."""
    monitor.wait_for(state="OK")
    put_in_the_way_of(service.directory)
    monitor.wait_for(state="Trouble", sentence=str(service.directory))
    monitor.save_picture("trouble", tmp_path)
    service.directory.unlink()
    monitor.wait_for(state="OK")


def test_with_a_secret_the_monitor_page_says_what_it_needs(chromium, open_tab, guarded, tmp_path):
    """Figures need no ticket, events do; and with one in its address it shows them."""
    monitor = Monitor(chromium, guarded)
    monitor.wait_for(state="OK", live="put ?ticket= into this page's address")
    monitor.save_picture("no-ticket", tmp_path)
    ticket = wsqueue.sign_ticket(guarded.secret, user="ada")
    monitor.run("location.search = arguments[0]", f"?ticket={ticket}")
    monitor.wait_until_live()
    guarded.queue("hello", to="user:ada")
    monitor.wait_for(events="hello")
    assert monitor.text("live") == ""
    monitor.save_picture("ticket", tmp_path)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_monitor_page_fits_every_width(monitor, service, tmp_path, width):
    """Nothing sticks out sideways, whatever a name, a reason, a topic or an event carries."""
    (service.directory / ("unbroken" * 20 + ".json")).write_text('["unbroken"]')
    service.client("/" + "unbroken" * 20)
    service.queue({"text": "unbroken" * 100}, event="unbroken" * 20)
    service.queue({"id": 42, "total": "9.99"}, event="invoice_sent")
    monitor.wait_for(state="OK", failures="unbroken", topics="unbroken", events="invoice_sent")
    monitor.run("document.querySelectorAll('#events details').forEach(details => details.open = true)")
    for scheme in ("light", "dark"):
        monitor.emulate(width, 1800, scheme)
        monitor.save_picture(f"{width}-{scheme}", tmp_path)
        assert monitor.value("document.documentElement.scrollWidth") == width


def test_the_monitor_page_is_dark_where_that_is_preferred(monitor):
    """As the system says, and at once when it changes."""
    brightness = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).reduce((a, b) => a + +b, 0)"
    monitor.emulate(1280, scheme="light")
    assert monitor.value(brightness) > 600
    monitor.emulate(1280, scheme="dark")
    assert monitor.value(brightness) < 150


# ---- Many clients ------------------------------------------------------------------------------------------

THREADS, EACH = 20, 10
# Each client keeps what it got, how long it has waited before each attempt, and how many attempts it has made.
CLIENTS = """
importScripts("{url}/wsqueue.js");
const clients = {}, startTimer = self.setTimeout;
let delay;
self.setTimeout = (run, ms) => startTimer(run, delay = ms);
for (const kind of ["WebSocket", "EventSource"]) {
  self[kind] = class extends self[kind] {
    constructor(url, ...more) {
      super(url, ...more);
      clients[url.searchParams.get("client")].attempts.push(kind);
    }
  };
}
for (let n = 0; n < {each}; n++) {
  const client = clients[n] = { got: [], delays: [], attempts: [], status: "" };
  const queue = new WSQueue("{url}/shop?client=" + n);
  queue.onstatus = status => {
    client.status = status;
    if (status === "waiting") client.delays.push(delay);
  };
  queue.onreset = () => client.got.push("reset");
  queue.on("order_paid", payload => client.got.push(payload));
}
self.onmessage = () => postMessage(Object.values(clients));
""".replace("{each}", str(EACH))
MANY = HEAD + """<script>
const threads = Array.from({ length: {threads} }, () => new Worker("/clients.js"));
const ask = thread => new Promise(answer => { thread.onmessage = ({ data }) => answer(data); thread.postMessage(0); });
const report = async () => (await Promise.all(threads.map(ask))).flat();
</script>""".replace("{threads}", str(THREADS))


@pytest.fixture
def crowd(visit, site, service):
    """A page with 200 clients that are connected; returns what each has to report."""
    site.pages["/clients.js"] = CLIENTS.replace("{url}", service.url)
    tab = visit(MANY, service)

    def report(complete):
        """Once it is complete for each."""
        found = []

        def all_complete():
            found[:] = tab.value("report()")
            return all(map(complete, found))

        eventually(all_complete, timeout=60, what="a complete report")
        return found

    report(lambda client: client["status"] == "open")
    return report


def test_200_clients_come_back_without_a_storm(crowd, service):
    """At random times, with few attempts, and to exactly what each has missed."""
    service.kill()
    service.queue(1, 2, 3)
    crowd(lambda client: client["delays"])
    service.start()
    service.queue(4)
    clients = crowd(lambda client: client["got"][-1:] == [4])
    assert [client["got"] for client in clients] == [[1, 2, 3, 4]] * THREADS * EACH
    assert_full_jitter([client["delays"] for client in clients])
    # One attempt after each delay; and who came back as a stream may have looked whether a WebSocket works.
    assert all(len(client["attempts"]) <= 1 + 2 * len(client["delays"]) for client in clients)
    counts = service.counts()
    assert THREADS * EACH <= counts["wsqueue_connections_total"] <= 2 * THREADS * EACH
    assert counts["wsqueue_refused_total"] == 0


def assert_full_jitter(delays):
    """Each is anything from nothing to what doubles with each failure, and the first are spread over all of that."""
    assert all(0 <= ms < 1000 * 2 ** nth for client in delays for nth, ms in enumerate(client))
    quarters = Counter(int(first // 250) for first, *_ in delays)
    # A quarter with fewer than 20 of 200 would be chance once in a million runs.
    assert min(quarters[n] for n in range(4)) >= 20, quarters
