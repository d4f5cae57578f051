"""WSQueue in a real browser, against a server that refuses, drops, repeats and stays silent when it is told to.

Chance and time stand still in most pages: a test says what Math.random() returns, reads how long the client wants to
wait, and lets the time pass itself.
"""

import json
import socket
import socketserver
import threading
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

import pytest
from websockets.frames import Opcode
from websockets.server import ServerProtocol

import wsqueue
from browser import needs_chromium
from helpers import TIME_UNIT, eventually

SCRIPT = wsqueue.WSQUEUE_JS

pytestmark = needs_chromium
WEBSOCKET, STREAM = "WebSocket", "EventSource"

PAGE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<script>
const got = [], told = [], complaints = [];
window.onerror = message => complaints.push(message);
console.error = (...what) => complaints.push(what.map(String).join(" "));
</script>
%s
<script src="%s/wsqueue.js"></script>
<script>
function start(url = "/chat", options = {}) {
  const queue = window.queue = new WSQueue(url, options);
  queue.onstatus = status => told.push(status);
  queue.onreset = () => told.push("reset");
  return queue.on("*", message => got.push(message));
}
</script>"""

# Each timer is kept until the test lets it run.
STILL = """<script>
const timers = [];
let chance = 1, clock = 0;
Math.random = () => chance;
performance.now = () => clock;
window.setTimeout = window.setInterval = (run, ms) => timers.push({ run, ms, pending: true });
window.clearTimeout = window.clearInterval = id => { if (timers[id - 1]) timers[id - 1].pending = false; };
const pending = () => timers.filter(timer => timer.pending);
function pass() {
  const [timer, ...more] = pending();
  if (!timer || more.length) throw new Error(`${more.length + !!timer} timers`);
  clock += timer.ms;
  timer.pending = false;
  timer.run();
}
</script>"""


# ---- A server that does what a test says -------------------------------------------------------------------


class Attempt(NamedTuple):
    """What a client asked for."""

    kind: str
    path: str
    query: dict
    headers: dict


class WebSocketLink:
    """The server's end of a WebSocket that was let in."""

    def __init__(self, sock, head):
        self._socket, self._protocol = sock, ServerProtocol()
        self.received = []
        self.gone = threading.Event()  # the client has left, or the server dropped it
        self._protocol.receive_data(head)
        self._protocol.send_response(self._protocol.accept(self._protocol.events_received()[0]))
        self._flush()

    def send(self, message, identity=None):
        """A dict, which gets the id as its last key; or any text."""
        if isinstance(message, dict):
            message = json.dumps({**message, "id": identity} if identity else message)
        self._protocol.send_text(message.encode())
        self._flush()

    def drop(self):
        """Without a goodbye."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def serve(self):
        with suppress(OSError):
            for data in iter(lambda: self._socket.recv(65536), b""):
                self._protocol.receive_data(data)
                frames = self._protocol.events_received()
                self.received += [frame.data.decode() for frame in frames if frame.opcode is Opcode.TEXT]
                self._flush()
                if any(frame.opcode is Opcode.CLOSE for frame in frames):
                    break
        self.gone.set()

    def _flush(self):
        self._socket.sendall(b"".join(self._protocol.data_to_send()))


class StreamLink:
    """The server's end of an event stream."""

    def __init__(self, sock, origin):
        self._socket = sock
        self.gone = threading.Event()
        sock.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
            b"Access-Control-Allow-Credentials: true\r\nAccess-Control-Allow-Origin: " + origin.encode() +
            b"\r\n\r\nretry: 1\n\n"  # what the browser is not to do
        )

    def send(self, message, identity=None):
        text = json.dumps(message) if isinstance(message, dict) else message
        self._socket.sendall(((f"id: {identity}\n" if identity else "") + f"data: {text}\n\n").encode())

    def drop(self):
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def serve(self):
        with suppress(OSError):
            self._socket.recv(1)  # a client says nothing: this is its end
        self.gone.set()


class Visit(socketserver.BaseRequestHandler):
    """One connection: a page, the script, or a client."""

    def handle(self):
        self.server.fake.connections.append(self.request)
        with suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                data = self.request.recv(65536)
                if not data:  # a browser connects in advance
                    return
                head += data
            self.answer(head)

    def answer(self, head):
        first, *lines = head.decode("latin-1").split("\r\n")
        target = urlsplit(first.split(" ")[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        query = dict(parse_qsl(target.query, keep_blank_values=True))
        if "upgrade" in headers:
            self.link(Attempt(WEBSOCKET, target.path, query, headers), head)
        elif headers.get("accept") == "text/event-stream":
            self.link(Attempt(STREAM, target.path, query, headers), head)
        elif target.path == "/wsqueue.js":
            self.reply("200 OK", "text/javascript", SCRIPT)
        else:
            still = STILL if target.path == "/still" else ""
            self.reply("200 OK", "text/html", PAGE % (still, query.get("from", "")))

    def reply(self, status, kind, text):
        body = text.encode()
        head = (f"HTTP/1.1 {status}\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
                "Access-Control-Allow-Origin: *\r\nConnection: close\r\n\r\n")
        self.request.sendall(head.encode() + body)

    def link(self, attempt, head):
        fake = self.server.fake
        fake.attempts.append(attempt)
        if attempt.kind in fake.refused:
            self.reply("503 Service Unavailable", "text/plain", "no")
            return
        link = (WebSocketLink(self.request, head) if attempt.kind == WEBSOCKET
                else StreamLink(self.request, attempt.headers.get("origin", "*")))
        if not fake.silent:
            link.send({"event": "wsqueue.hello", "payload": None, "timestamp": 1},
                      attempt.query["last_event_id"] or fake.position)
        for message in fake.greeting:
            link.send(*message)
        fake.links.append(link)
        link.serve()


class Fake:
    """The server: what it was asked for, and what it is to do with who comes next."""

    def __init__(self):
        self.attempts, self.links = [], []
        self.refused = set()  # kinds
        self.silent = False  # it says no hello
        self.position = "h0"  # in its hello to who comes without an id
        self.greeting = []  # what it sends at once, after hello
        self.connections = []
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Visit)
        self._server.fake = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def link(self, number=0):
        """A client that was let in, once it is there: the first, the second..."""
        eventually(lambda: len(self.links) > number, what=f"client {number}")
        return self.links[number]

    def attempt(self, number=0):
        eventually(lambda: len(self.attempts) > number, what=f"attempt {number}")
        return self.attempts[number]

    def kinds(self):
        return [attempt.kind for attempt in self.attempts]

    def stop(self):
        self._server.shutdown()
        self._thread.join()
        for sock in self.connections:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._server.server_close()


@pytest.fixture
def fake():
    server = Fake()
    yield server
    server.stop()


# ---- The page ----------------------------------------------------------------------------------------------


class Page:
    """A page with WSQueue in it, which keeps what the client hands out."""

    def __init__(self, driver, url):
        self._driver = driver
        driver.get(url)

    def run(self, code, *args):
        return self._driver.execute_script(code, *args)

    def wait(self, code, what=""):
        """The value of an expression, once it is true."""
        return eventually(lambda: self.run(f"return {code}"), what=what or code)

    def wait_for_status(self, status):
        self.wait(f"queue.status === {status!r}")

    def payloads(self, count):
        """Of the events so far, once there are so many."""
        self.wait(f"got.length >= {count}")
        return self.run("return got.map(message => message.payload)")

    def told(self):
        return self.run("return told")

    def complaints(self):
        return self.run("return complaints")

    # Where time stands still

    def delay(self):
        """How long the client waits before its next attempt, in ms."""
        self.wait_for_status("waiting")
        (delay,) = self.run("return pending().map(timer => timer.ms)")
        return delay

    def next_attempt(self):
        """Let the delay pass."""
        self.wait_for_status("waiting")
        self.run("pass()")


@pytest.fixture
def page(chromium, fake):
    """One where time passes by itself."""
    yield Page(chromium, f"{fake.url}/")
    chromium.get("about:blank")  # nobody tries to come back to the next test's server


@pytest.fixture
def still(chromium, fake):
    """One where time stands still."""
    yield Page(chromium, f"{fake.url}/still")
    chromium.get("about:blank")


def event(payload, name="order_paid"):
    return {"event": name, "payload": payload, "timestamp": 1763890123}


# ---- Where it connects -------------------------------------------------------------------------------------


def test_a_url_is_relative_to_the_script(chromium, fake):
    """A page of another host gets the script from the server, and then connects to that."""
    page = Page(chromium, f"{fake.url.replace('127.0.0.1', 'localhost')}/?from={fake.url}")
    page.run("start('/chat')")
    assert fake.attempt().headers["host"] == urlsplit(fake.url).netloc
    assert fake.attempt().path == "/chat"


@pytest.mark.parametrize("scheme", ["ws", "http"])
def test_a_url_may_be_absolute(page, fake, scheme):
    """In the words of either protocol, and with a query of its own, which stays."""
    page.run("start(arguments[0])", f"{fake.url.replace('http', scheme)}/a/b?x=1#top")
    page.wait_for_status("open")
    attempt = fake.attempt()
    assert (attempt.kind, attempt.path, attempt.query) == (WEBSOCKET, "/a/b", {"x": "1", "last_event_id": ""})


@pytest.mark.parametrize("url", ["wss://h/x", "https://h/x"])
def test_both_protocols_are_as_secure_as_the_url(still, url):
    """A wss: address becomes https: for an event stream, and the other way round."""
    assert [address for address, _ in opened(still, f"start('{url}')")] == [
        "wss://h/x?last_event_id=", "https://h/x?last_event_id="]


def opened(still, code):
    """The arguments of the first two connections that the page makes, neither of which leads anywhere."""
    still.run("""
      window.opened = [];
      window.WebSocket = window.EventSource = class {
        constructor(url, options) { opened.push([url.href, options]); setTimeout(() => this.onerror(), 0); }
        close() {}
      };
    """ + code)
    still.wait("opened.length === 1")
    still.run("pending().find(timer => timer.ms === 0).run()")
    still.wait_for_status("waiting")
    still.run("pending().at(-1).run()")
    return still.wait("opened.length === 2 && opened")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "http://", "mailto:a@b"])
def test_what_is_no_servers_url_is_refused_at_once(page, url):
    """A slip is an exception where it was made, and no connection that never comes."""
    assert page.run("try { new WSQueue(arguments[0]); } catch (error) { return error.name; }", url) == "TypeError"


def test_the_script_may_be_loaded_twice_as_a_script_and_as_a_module(page):
    """Each time it sets the global, and where there is a CommonJS module, its exports."""
    assert page.run("""
      for (const type of ["text/javascript", "module"]) {
        const script = document.createElement("script");
        Object.assign(script, { type, src: "/wsqueue.js?again", onload: () => told.push(type) });
        document.head.append(script);
      }
      const module = {};
      new Function("module", arguments[0])(module);
      return module.exports.WSQueue === WSQueue;
    """, SCRIPT)
    page.wait("told.length === 2")
    assert page.complaints() == []


# ---- What listeners hear -----------------------------------------------------------------------------------


def test_listeners_that_are_there_at_once_miss_nothing(page, fake):
    """The first event may come with the server's hello."""
    fake.greeting = [(event(1), "a"), (event(2), "b")]
    page.run("start()")
    assert page.payloads(2) == [1, 2]


def test_listeners_get_payload_and_message_and_those_of_all_events_come_after(page, fake):
    """In the order in which they were added; hello is for nobody."""
    page.run("""
      const log = window.log = [];
      start().on("*", ({ event }) => log.push(["all", event]))
        .on("order_paid", (payload, message) => log.push(["first", payload, message]))
        .on("order_paid", payload => log.push(["second", payload]));
    """)
    fake.link().send(event({"n": 1}), "a")
    page.wait("log.length === 3")
    message = {**event({"n": 1}), "id": "a"}
    assert page.run("return log") == [["first", {"n": 1}, message], ["second", {"n": 1}], ["all", "order_paid"]]
    assert page.run("return got") == [message]


def test_an_event_may_have_any_name(page, fake):
    """Names of what every object has are no exception."""
    page.run("start().on('__proto__', payload => told.push(payload))")
    fake.link().send(event("x", "__proto__"), "a")
    fake.link().send(event("y", "constructor"), "b")
    assert page.payloads(2) == ["x", "y"]
    assert page.told()[-1] == "x"


def test_a_listener_that_throws_stops_no_other(page, fake):
    """It is reported as any error of the page is; the event and the next one reach the others."""
    page.run("start().on('order_paid', () => { throw new Error('oops'); })"
             ".on('order_paid', payload => told.push(payload))")
    for number in (1, 2):
        fake.link().send(event(number), str(number))
    assert page.payloads(2) == [1, 2]
    assert page.told() == ["connecting", "open", 1, 2]
    assert len(page.complaints()) == 2


def test_callbacks_that_throw_stop_nothing(page, fake):
    """onstatus and onreset are the user's code, too."""
    page.run("start(); queue.onstatus = queue.onreset = () => { throw new Error('oops'); };")
    fake.link().send({"event": "wsqueue.reset", "payload": None, "timestamp": 1}, "r")
    fake.link().send(event(1), "a")
    assert page.payloads(1) == [1]
    page.wait("complaints.length === 3")  # connecting, open, reset


def test_what_is_no_event_goes_to_onmessage(page, fake):
    """A handler may send any text."""
    page.run("start(); queue.onmessage = data => told.push(data);")
    for text in ("hello", "{", "[1]", "null", '{"event": 1}'):
        fake.link().send(text)
    page.wait("told.length === 7")
    assert page.told()[2:] == ["hello", "{", "[1]", "null", '{"event": 1}']
    assert page.run("return got") == [] and page.complaints() == []


# ---- Where it goes on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [WEBSOCKET, STREAM])
def test_it_comes_back_with_the_last_id(still, fake, kind):
    """At first with none, then with that of hello, and of the newest event; that of a message without one stays."""
    use(kind, still, fake)
    assert still.run("return queue.lastEventId") == "h0"
    for number in (1, 2):
        fake.link(number - 1).send(event(number), f"e{number}~:%")
        fake.link(number - 1).send(event(0))
        still.payloads(2 * number)
        fake.link(number - 1).drop()
        still.next_attempt()
        fake.link(number)
        assert fake.attempts[-1].query["last_event_id"] == f"e{number}~:%"
    asked = [attempt.query["last_event_id"] for attempt in fake.attempts]
    assert asked == [""] * (len(asked) - 2) + ["e1~:%", "e2~:%"]
    assert all("last-event-id" not in attempt.headers for attempt in fake.attempts)  # no EventSource came by itself


def use(kind, still, fake, code="start()"):
    """Have a client connected, over an event stream if it is to be."""
    if kind == STREAM:
        fake.refused = {WEBSOCKET}
    still.run(code)
    if kind == STREAM:
        still.next_attempt()
    fake.link()
    still.wait_for_status("open")


def test_a_reset_says_so_and_moves_on(still, fake):
    """What was missed is lost; the next connection goes on at the new place."""
    still.run("start()")
    fake.link().send({"event": "wsqueue.reset", "payload": None, "timestamp": 1}, "r7")
    still.wait("told.length === 3")
    fake.link().drop()
    still.next_attempt()
    assert fake.attempt(1).query["last_event_id"] == "r7"
    assert still.told()[:3] == ["connecting", "open", "reset"] and still.run("return got") == []


def test_after_a_reset_no_id_is_known(still, fake):
    """A queue that was made anew may count from the beginning again."""
    still.run("start()")
    fake.link().send(event(1), "a")
    fake.link().send({"event": "wsqueue.reset", "payload": None, "timestamp": 1}, "r")
    fake.link().send(event(2), "a")
    assert still.payloads(2) == [1, 2]


def test_an_id_is_a_text(still, fake):
    """A number under that name is what a handler put into a message of its own."""
    still.run("start()")
    for _ in range(2):
        fake.link().send({**event(1), "id": 7})
    assert still.payloads(2) == [1, 1]
    assert still.run("return queue.lastEventId") == "h0"


def test_an_earlier_pages_id_can_be_given(page, fake):
    """Set before the connection is made, it is what the client comes with."""
    page.run("start(); queue.lastEventId = 'saved';")
    assert fake.attempt().query["last_event_id"] == "saved"


@pytest.mark.parametrize("kind", [WEBSOCKET, STREAM])
def test_repeats_are_dropped_and_messages_without_an_id_are_not(still, fake, kind):
    """Also over an event stream, where a message without an id seems to have that of the one before."""
    use(kind, still, fake)
    for number, identity in ((1, "a"), (2, "b"), (1, "a"), (3, None), (3, None), (2, "b"), (3, None), (4, "c")):
        fake.link().send(event(number), identity)
    assert still.payloads(6) == [1, 2, 3, 3, 3, 4]
    assert still.run("return got.map(message => message.id)") == ["a", "b", None, None, None, "c"]


def test_repeats_are_known_over_connections(still, fake):
    """A server that was killed sends again what it may not have sent."""
    still.run("start()")
    fake.link().send(event(1), "a")
    still.payloads(1)
    fake.link().drop()
    still.next_attempt()
    for number, identity in ((1, "a"), (2, "b")):
        fake.link(1).send(event(number), identity)
    assert still.payloads(2) == [1, 2]


def test_a_bounded_number_of_ids_is_remembered(still, fake):
    """The newest 1,000: an older one is new again, and the page's memory does not grow."""
    still.run("start()")
    for number in range(1001):
        fake.link().send(event(number), f"id{number}")
    for number in (1, 0):
        fake.link().send(event(number), f"id{number}")
    assert still.payloads(1002)[-2:] == [1000, 0]


# ---- When it comes back ------------------------------------------------------------------------------------


def test_the_status_is_told_when_it_changes(page, fake):
    """And time passes by itself: the client comes back with nobody's help."""
    page.run("Math.random = () => 0; start()")
    fake.link().drop()
    fake.link(1)
    page.wait_for_status("open")
    page.run("queue.close()")
    assert page.told() == ["connecting", "open", "waiting", "connecting", "open", "closed"]


@pytest.mark.parametrize("chance", [1, 0.5, 0])
def test_delays_double_up_to_half_a_minute_with_full_jitter(still, fake, chance):
    """From nothing to all of it: clients that were dropped together do not come back together."""
    fake.refused = {WEBSOCKET, STREAM}
    still.run("chance = arguments[0]; start()", chance)
    delays = []
    for _ in range(7):
        delays.append(still.delay())
        still.next_attempt()
    assert delays == [chance * delay for delay in (1000, 2000, 4000, 8000, 16000, 30000, 30000)]


def test_a_server_that_accepts_and_drops_is_not_hammered(still, fake):
    """A connection that was good for a moment only does not make the next delay short."""
    delays = []
    still.run("start()")
    for number in range(4):
        fake.link(number)
        still.wait_for_status("open")
        fake.link(number).drop()
        delays.append(still.delay())
        still.next_attempt()
    assert delays == [1000, 2000, 4000, 8000]


def test_a_connection_that_lasted_makes_the_next_delay_short(still, fake):
    """After five seconds the server counts as well again."""
    delays = []
    still.run("start()")
    for number in range(4):
        fake.link(number)
        still.wait_for_status("open")
        still.run("clock += arguments[0]", 5000 if number == 2 else 4999)
        fake.link(number).drop()
        delays.append(still.delay())
        still.next_attempt()
    assert delays == [1000, 2000, 1000, 2000]


def test_it_tries_at_once_when_the_browser_is_online_again(still, fake):
    """Whatever is left of the delay; and once, not again when the delay would have ended."""
    fake.refused = {WEBSOCKET, STREAM}
    still.run("start()")
    still.wait_for_status("waiting")
    fake.refused = set()
    still.run("window.dispatchEvent(new Event('online'))")
    fake.link()
    still.wait_for_status("open")
    still.run("window.dispatchEvent(new Event('online'))")
    looks = still.run("return pending().map(timer => timer.ms)")
    assert looks == [600000] and len(fake.attempts) == 2


# ---- What it connects with ---------------------------------------------------------------------------------


def test_it_falls_back_to_an_event_stream(still, fake):
    """Where no WebSocket gets through, events do; nothing can be sent."""
    use(STREAM, still, fake)
    fake.link().send(event(1), "a")
    assert still.payloads(1) == [1]
    assert fake.kinds() == [WEBSOCKET, STREAM]
    assert still.run("return queue.send('x')") is False


def test_a_websocket_that_never_says_hello_has_failed(still, fake):
    """A proxy may let the handshake through, and nothing after it."""
    fake.silent = True
    still.run("start()")
    fake.link()
    assert still.run("return pending().map(timer => timer.ms)") == [20000]
    still.run("pass()")
    still.next_attempt()
    assert fake.attempt(1).kind == STREAM
    assert fake.link().gone.wait(10 * TIME_UNIT)


def test_it_alternates_until_something_works(still, fake):
    """A server that is down says nothing about what gets through to it."""
    fake.refused = {WEBSOCKET, STREAM}
    still.run("start()")
    for number in range(4):
        fake.attempt(number)
        still.next_attempt()
    fake.attempt(4)
    assert fake.kinds() == [WEBSOCKET, STREAM, WEBSOCKET, STREAM, WEBSOCKET]


@pytest.mark.parametrize("kind", [WEBSOCKET, STREAM])
def test_it_prefers_what_worked(still, fake, kind):
    """After a loss it comes back the same way."""
    use(kind, still, fake)
    fake.link().drop()
    still.next_attempt()
    fake.link(1)
    assert fake.attempts[-1].kind == kind


@pytest.mark.parametrize("chance, minutes", [(0, 5), (1, 10)])
def test_with_a_stream_it_looks_now_and_then_whether_a_websocket_works(still, fake, chance, minutes):
    """Then the WebSocket takes over: the page notices nothing, and the stream ends."""
    use(STREAM, still, fake, f"chance = {chance}; start()")
    fake.link().send(event(1), "a")
    still.payloads(1)
    assert still.run("return pending().map(timer => timer.ms)") == [minutes * 60000]
    fake.refused = set()
    fake.greeting = [(event(1), "a"), (event(2), "b")]  # what came over the stream meanwhile is no news
    still.run("pass()")
    fake.link(1).send(event(3), "c")
    assert still.payloads(3) == [1, 2, 3]
    assert fake.kinds()[2:] == [WEBSOCKET] and fake.attempts[2].query["last_event_id"] == "a"
    assert fake.link(0).gone.wait(10 * TIME_UNIT)
    assert still.told() == ["connecting", "waiting", "connecting", "open"]
    assert still.run("return queue.send('x')") is True
    fake.link(1).drop()
    still.next_attempt()
    assert fake.attempt(3).kind == WEBSOCKET


def test_a_stream_stays_while_no_websocket_works(still, fake):
    """A look that fails costs nothing; the next one comes."""
    use(STREAM, still, fake)
    look = "pending().find(timer => timer.ms > 60000)"
    for number in (2, 3):
        still.run(f"{look}.run()")
        assert fake.attempt(number).kind == WEBSOCKET
        still.wait("pending().length === 1", "the end of the look")
    fake.link().send(event(1), "a")
    assert still.payloads(1) == [1]
    assert still.run("return queue.status") == "open" and len(fake.links) == 1


def test_a_stream_that_is_lost_during_a_look_leaves_it_the_rest(still, fake):
    """The WebSocket that was only a look is then the attempt."""
    use(STREAM, still, fake)
    fake.refused, fake.silent = set(), True
    still.run("pending()[0].run()")
    fake.link(1)
    fake.link(0).drop()
    still.wait_for_status("connecting")
    fake.link(1).send({"event": "wsqueue.hello", "payload": None, "timestamp": 1}, "h1")
    still.wait_for_status("open")
    assert len(fake.attempts) == 3


def test_where_there_are_no_streams_it_stays_with_websockets(still, fake):
    """Node has none, for one."""
    fake.refused = {WEBSOCKET}
    still.run("delete window.EventSource; start()")
    still.next_attempt()
    still.wait_for_status("waiting")
    assert fake.kinds() == [WEBSOCKET, WEBSOCKET] and still.complaints() == []


@pytest.mark.parametrize("options, credentials", [("{}", True), ("{ credentials: false }", False)])
def test_streams_bring_cookies_unless_they_are_not_to(still, options, credentials):
    """As WebSockets do; a server that lets every origin in cannot have them."""
    _, (_, given) = opened(still, f"start('/chat', {options})")
    assert given["withCredentials"] is credentials


# ---- Tickets -----------------------------------------------------------------------------------------------


def test_a_ticket_is_asked_for_before_each_attempt(still, fake):
    """It may have expired since the last one; white space around it is no part of it."""
    fake.refused = {STREAM}
    still.run("let n = 0; start('/chat', { ticket: async () => ` t${++n}${String.fromCharCode(10)}` })")
    for number in range(2):
        fake.link(number)
        still.wait_for_status("open")
        fake.link(number).drop()
        still.next_attempt()
    fake.attempt(2)
    assert [attempt.query["ticket"] for attempt in fake.attempts] == ["t1", "t2", "t3"]


@pytest.mark.parametrize("ticket, query", [
    ("'abc.def'", {"last_event_id": "", "ticket": "abc.def"}),
    ("() => 'abc'", {"last_event_id": "", "ticket": "abc"}),
    ("''", {"last_event_id": ""}),
    ("async () => null", {"last_event_id": ""}),
])
def test_a_ticket_may_be_a_text_or_a_callback_and_may_be_none(page, fake, ticket, query):
    """A page that only some visitors have tickets for is one page."""
    page.run(f"start('/chat', {{ ticket: {ticket} }})")
    assert fake.attempt().query == query


@pytest.mark.parametrize("failing", ["() => { throw new Error('no ticket'); }", "async () => { throw 'no ticket'; }"])
def test_without_its_ticket_an_attempt_has_failed(still, fake, failing):
    """It is reported once, the delay grows, and what it connects with stays: that was not at fault."""
    still.run(f"window.ask = {failing}; start('/chat', {{ ticket: () => ask() }})")
    for delay in (1000, 2000):
        assert still.delay() == delay
        still.next_attempt()
    assert still.delay() == 4000
    assert ["no ticket" in complaint for complaint in still.complaints()] == [True, True, True]
    still.run("ask = () => 'good'")
    still.next_attempt()
    assert fake.attempt().kind == WEBSOCKET and fake.attempt().query["ticket"] == "good"


def test_a_ticket_that_never_comes_is_not_waited_for_for_ever(still, fake):
    """A login page that hangs must not hang the client; what comes too late is not used."""
    still.run("start('/chat', { ticket: () => new Promise(give => { window.give = give; }) })")
    still.wait("!!window.give", "the ticket to be asked for")
    still.run("window.late = give; pass()")
    assert still.delay() == 1000
    still.run("late('late')")
    still.next_attempt()
    still.run("give('good')")
    assert fake.attempt().query["ticket"] == "good" and len(fake.attempts) == 1


# ---- Sending and closing -----------------------------------------------------------------------------------


def test_send_says_whether_there_is_a_websocket(still, fake):
    """Not before, not between two, not after."""
    assert still.run("return start().send('early')") is False
    fake.link()
    still.wait_for_status("open")
    assert still.run("return [queue.send('one'), queue.send('two')]") == [True, True]
    eventually(lambda: fake.link().received == ["one", "two"], what="what was sent")
    fake.link().drop()
    still.wait_for_status("waiting")
    assert still.run("return queue.send('lost')") is False
    still.next_attempt()
    fake.link(1)
    still.wait_for_status("open")
    assert still.run("queue.close(); return queue.send('late')") is False


@pytest.mark.parametrize("kind", [WEBSOCKET, STREAM])
def test_close_ends_a_connection_for_good(still, fake, kind):
    """The server sees it, no timer is left, and being online again changes nothing."""
    use(kind, still, fake)
    still.run("queue.close(); queue.close(); window.dispatchEvent(new Event('online'))")
    assert fake.link().gone.wait(10 * TIME_UNIT)
    assert still.run("return pending().length") == 0
    assert still.told()[-2:] == ["open", "closed"]


def test_close_ends_the_waiting_for_good(still, fake):
    """No attempt follows."""
    fake.refused = {WEBSOCKET, STREAM}
    still.run("start()")
    still.wait_for_status("waiting")
    still.run("queue.close(); window.dispatchEvent(new Event('online'))")
    assert still.run("return pending().length") == 0 and still.told()[-1] == "closed"
    assert len(fake.attempts) == 1


def test_close_before_the_first_attempt_prevents_it(still, fake):
    """And a ticket that comes later is not used."""
    still.run("start().close(); start('/chat', { ticket: () => new Promise(give => { window.give = give; }) })")
    still.wait("!!window.give", "the ticket to be asked for")
    still.run("queue.close(); give('late')")
    assert still.run("return pending().length") == 0 and still.told() == ["closed", "connecting", "closed"]
    assert fake.attempts == []


@pytest.mark.parametrize("status", ["connecting", "open", "waiting"])
def test_close_may_come_from_a_callback(still, fake, status):
    """Whatever the client was about to do next, it does not."""
    still.run("start(); queue.onstatus = status => { if (status === arguments[0]) queue.close(); };", status)
    if status == "waiting":
        fake.link().drop()
    still.wait_for_status("closed")
    assert still.run("return pending().length") == 0


def test_nothing_is_heard_after_close(still, fake):
    """A message that is on its way when the page closes the client does not reach it."""
    fake.greeting = [(event(1), "a"), (event(2), "b")]
    still.run("start().on('*', () => queue.close())")
    assert fake.link().gone.wait(10 * TIME_UNIT)
    assert still.payloads(1) == [1]
