"""The examples with a page of their own: real processes, and a real browser that loses its push server at times."""

import importlib.util
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from brokers import free_port
from browser import emulate, needs_chromium, save_picture
from clients import CLOSE, RawClient, close_payload, exchange, handshake
from helpers import TIME_UNIT, eventually, spawn_server
from test_examples import EXAMPLES, HOSTILE, call, complaint, pushing
from test_flask_example import text_of
from wsqueue import queue_event, sign_ticket

CHAT, ORDERS, PROGRESS = "chat.py", "order_status.py", "progress_bar.py"
SECRET, KEY, PASSWORD = "a secret that is long enough for a test", "a key for sessions", "open sesame"
NOWHERE = "ws://127.0.0.1:9/"  # where no push server is
JSON = {"Content-Type": "application/json"}


# ---- Running an example, and asking it -------------------------------------------------------------------------


def settings(directory, **variables):
    """Of an example that keeps all it has in the directory."""
    return {"WS_QUEUE_PATH": f"{directory}/ws_queue", "DATABASE_PATH": f"{directory}/database", "SECRET_KEY": KEY,
            "APP_PASSWORD": PASSWORD, "WS_SECRET": SECRET, **variables}


@contextmanager
def run_page(name, directory, **variables):
    """Run an example; it is gone when the block ends."""
    with pushing(name, **settings(directory, **variables)) as example:
        example.database = f"{directory}/database"
        yield example


@contextmanager
def run_push_server(queue, port):
    """A push server that is not the example's own, and may be killed."""
    with spawn_server("--queue", queue, "--port", port, env={**os.environ, "WS_SECRET": SECRET}) as server:
        yield server


def kill(process):
    process.kill()
    process.wait()


def sql(example, statement, *values):
    """Run a statement on the example's database, and return its rows."""
    with closing(sqlite3.connect(example.database)) as connection, connection:
        return connection.execute(statement, values).fetchall()


class Visitor:
    """Calls the API with a cookie, as a page does."""

    def __init__(self, example):
        self.example, self.cookie = example, ""

    def ask(self, method, path, body=None, headers=None):
        response = call(self.example, method, path, body, {"Cookie": self.cookie, **(headers or {})})
        if response.getheader("Set-Cookie"):
            self.cookie = response.getheader("Set-Cookie").partition(";")[0]
        return response

    def listen(self, room=None):
        """Connect to the push server as this visitor's page would."""
        ticket = self.ask("GET", "/ticket" + (f"?room={room}" if room else ""))
        assert (ticket.status, ticket.getheader("Cache-Control")) == (200, "no-store")
        return RawClient(self.example.push_url, f"/?ticket={ticket.content.decode()}")


def assert_refused(response, status, reason):
    """A refusal is JSON with one sentence that says what to change."""
    assert (response.status, response.json["success"]) == (status, False)
    assert reason in response.json["error"]
    assert response.json["error"].endswith(".") and "Traceback" not in response.json["error"]


# ---- In the browser --------------------------------------------------------------------------------------------


def wait_for_text(driver, selector, text):
    eventually(lambda: text_of(driver, selector) == text,
               what=f"{text!r} instead of {text_of(driver, selector)!r} in {selector}")


def texts(driver, selector):
    """In one step, because the page may change between two."""
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(found => found.textContent)", selector)


def open_page(driver, url, cookie=""):
    """With this cookie alone, and nothing remembered."""
    driver.get(url)
    driver.delete_all_cookies()
    driver.execute_script("localStorage.clear()")
    if cookie:
        name, value = cookie.split("=", 1)
        driver.add_cookie({"name": name, "value": value})
    driver.get(url)


@contextmanager
def second_tab(driver):
    """A tab beside the first one; (to the first, to the second), and it is closed when the block ends."""
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    second = driver.current_window_handle
    try:
        yield (lambda: driver.switch_to.window(first)), (lambda: driver.switch_to.window(second))
    finally:
        driver.switch_to.window(second)
        driver.close()
        driver.switch_to.window(first)


@contextmanager
def held_tickets(driver):
    """A page gets no ticket until its `go` is true: so it has loaded, and is not connected."""
    source = """const real = fetch; fetch = async (url, ...more) => {
      while (url.startsWith("/ticket") && !window.go) await new Promise(run => setTimeout(run, 10));
      return real(url, ...more); };"""
    held = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", held)


def assert_it_fits(driver, name, tmp_path):
    """At no width anything sticks out, in light nor in dark; how it looks is kept as pictures."""
    try:
        for width in (360, 1000):
            backgrounds = set()
            for scheme in ("light", "dark"):
                emulate(driver, width, 720, scheme)
                save_picture(driver, f"{name}-{width}-{scheme}", tmp_path)
                backgrounds.add(driver.execute_script("""document.body.style.background = "Canvas";
                    return getComputedStyle(document.body).backgroundColor"""))
                assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            assert len(backgrounds) == 2
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# ---- Chat ------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(tmp_path):
    """The chat with its own push server."""
    with run_page(CHAT, tmp_path) as example:
        yield example


@pytest.fixture(scope="module")
def silent_chat(tmp_path_factory):
    """The chat whose push server is elsewhere, and down."""
    with run_page(CHAT, tmp_path_factory.mktemp("chat"), PUSH_URL=NOWHERE) as example:
        yield example


def enter(example, name):
    visitor = Visitor(example)
    joined = visitor.ask("POST", "/api/chat/users", {"username": name})
    assert (joined.status, joined.json["username"]) == (201, name)
    visitor.user_id = joined.json["user_id"]
    return visitor


def say(visitor, text, room="lobby"):
    response = visitor.ask("POST", "/api/chat/messages", {"room": room, "text": text})
    assert (response.status, response.json["queued"]) == (201, True)
    return {name: value for name, value in response.json.items() if name not in ("success", "queued")}


def messages_on(driver):
    return texts(driver, "#messages > li > p")


def test_a_message_is_saved_and_reaches_its_room(chat):
    """As new_message, with what the answer to the post and the saved row say."""
    ada = enter(chat, "Ada")
    with ada.listen("lobby") as client:
        said = say(ada, f"  {HOSTILE} ")
        [event] = client.events(1)
    assert (event["event"], event["payload"]) == ("new_message", said)
    assert said == {"message_id": 1, "room": "lobby", "user_id": ada.user_id, "username": "Ada", "text": HOSTILE,
                    "sent_at": said["sent_at"]}
    assert ada.ask("GET", "/api/chat/messages?room=lobby").json == [said]


def test_nobody_hears_another_room(chat):
    """The ticket says which room is heard, and only that."""
    ada, grace = enter(chat, "Ada"), enter(chat, "Grace")
    with ada.listen("lobby") as lobby, grace.listen("kitchen") as kitchen:
        said = [say(visitor, room, room) for visitor, room in ((ada, "kitchen"), (grace, "lobby"), (ada, "kitchen"))]
        assert kitchen.payloads(2) == [said[0], said[2]] and lobby.payloads(1) == [said[1]]
        assert [m["text"] for m in ada.ask("GET", "/api/chat/messages?room=lobby").json] == ["lobby"]


def test_nobody_hears_a_room_without_a_ticket(chat):
    """The push server wants one of this very secret."""
    for target in ("/", "/lobby", f"/?ticket={sign_ticket('a guess', user=1, topics=['room:lobby'])}"):
        assert exchange(chat.push_url, handshake(target)).status == 401


def test_the_monitor_page_is_not_for_who_has_a_ticket(chat):
    """It would show, and send, what is in all rooms."""
    ticket = enter(chat, "Ada").ask("GET", "/ticket?room=lobby").content.decode()
    for path in ("/", "/metrics"):
        request = f"GET {path}?ticket={ticket} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        assert exchange(chat.push_url, request).status in (404, 426)


MESSAGE = b'{"room": "lobby", "text": "hello"}'
BAD_CHATS = [
    (400, "POST", "/api/chat/messages", b"", JSON, "must be JSON"),
    (400, "POST", "/api/chat/messages", b"{", JSON, "must be JSON"),
    (400, "POST", "/api/chat/messages", b"[" * 9999, JSON, "must be JSON"),
    (400, "POST", "/api/chat/messages", b'{"room": "lobby", "text": "\\ud800"}', JSON, "must be JSON in UTF-8"),
    (400, "POST", "/api/chat/messages", b'["lobby"]', JSON, "the texts room and text"),
    (400, "POST", "/api/chat/messages", b'{"room": "lobby", "text": ["x"]}', JSON, "the texts room and text"),
    (400, "POST", "/api/chat/messages", b'{"room": "lobby", "text": " "}', JSON, "1 to 1000 characters"),
    (400, "POST", "/api/chat/messages", b'{"room": "lobby", "text": "%s"}' % (b"x" * 1001), JSON, "1 to 1000"),
    (404, "POST", "/api/chat/messages", b'{"room": "cellar", "text": "x"}', JSON, "the rooms are lobby, kitchen"),
    (415, "POST", "/api/chat/messages", MESSAGE, {"Content-Type": "text/plain"}, "must be application/json"),
    (413, "POST", "/api/chat/messages", b" " * 20000, JSON, ""),
    (405, "DELETE", "/api/chat/messages", None, {}, ""),
    (404, "GET", "/api/chat/messages?room=cellar", None, {}, "the rooms are"),
    (404, "GET", "/ticket", None, {}, "the rooms are"),
    (404, "GET", "/rooms/cellar", None, {}, "the rooms are"),
    (400, "POST", "/api/chat/users", b'{"username": ""}', JSON, "A name has 1 to 40 characters"),
    (400, "POST", "/api/chat/users", b'{"username": "two\\nlines"}', JSON, "all in one line"),
    (400, "POST", "/api/chat/users", b'{"username": "%s"}' % (b"x" * 41), JSON, "A name has 1 to 40 characters"),
]


@pytest.mark.parametrize("status, method, path, body, headers, reason", BAD_CHATS)
def test_what_the_chat_refuses(silent_chat, status, method, path, body, headers, reason):
    """Each misfit has its status and its sentence, and nothing is saved or queued."""
    visitor = Visitor(silent_chat)
    visitor.cookie = the_one_who_is_refused(silent_chat).cookie
    assert_refused(visitor.ask(method, path, body, headers), status, reason)
    assert sql(silent_chat, "SELECT * FROM messages") == []
    assert list(Path(silent_chat.database).parent.glob("ws_queue/*.json")) == []


def the_one_who_is_refused(example):
    if not hasattr(example, "visitor"):
        example.visitor = enter(example, "Mallory")
    return example.visitor


@pytest.mark.parametrize("method, path", [
    ("POST", "/api/chat/messages"), ("GET", "/api/chat/messages?room=lobby"), ("GET", "/ticket?room=lobby")])
def test_the_chat_is_for_those_who_have_entered(silent_chat, method, path):
    """401 for the others, and for a session that was made up."""
    for cookie in ("", "chat_session=eyJ1c2VyX2lkIjoxfQ.x.y"):
        headers = {"Cookie": cookie, **JSON}
        assert_refused(call(silent_chat, method, path, MESSAGE, headers), 401, "Say your name first")


def test_a_user_posts_ten_messages_within_ten_seconds_and_no_more(chat):
    """429 for the next one, which is not saved; others may still post, and so may the user a while later."""
    ada, grace = enter(chat, "Ada"), enter(chat, "Grace")
    for number in range(10):
        say(ada, str(number))
    sql(chat, "UPDATE messages SET sent_at = '9999'")  # however slow this machine is: just now
    refused = ada.ask("POST", "/api/chat/messages", {"room": "kitchen", "text": "one more"})
    assert_refused(refused, 429, "10 within 10 seconds")
    assert refused.getheader("Retry-After") == "10"
    say(grace, "and I?")
    assert sql(chat, "SELECT count(*) FROM messages") == [(11,)]
    sql(chat, "UPDATE messages SET sent_at = '2020'")
    say(ada, "later")


def test_an_address_takes_twenty_names_in_a_minute_and_no_more(chat):
    """Else whoever may not post any more would come again as somebody else."""
    for number in range(20):
        enter(chat, str(number))
    sql(chat, "UPDATE users SET joined_at = '9999'")
    assert_refused(Visitor(chat).ask("POST", "/api/chat/users", {"username": "x"}), 429, "20 within 60 seconds")
    sql(chat, "UPDATE users SET joined_at = '2020'")
    enter(chat, "later")


def test_a_message_is_kept_when_it_cannot_be_queued(tmp_path):
    """The answer says that the others were not told."""
    (tmp_path / "ws_queue").write_text("")
    with run_page(CHAT, tmp_path, PUSH_URL=NOWHERE) as example:
        ada = enter(example, "Ada")
        answer = ada.ask("POST", "/api/chat/messages", {"room": "lobby", "text": "hello"})
        assert (answer.status, answer.json["queued"]) == (201, False)
        assert [m["text"] for m in ada.ask("GET", "/api/chat/messages?room=lobby").json] == ["hello"]


def test_the_fifty_last_messages_are_loaded(silent_chat, tmp_path):
    """In the order in which they were sent."""
    with run_page(CHAT, tmp_path, PUSH_URL=NOWHERE) as example:
        ada = enter(example, "Ada")
        for number in range(60):
            sql(example, "INSERT INTO messages (room, user_id, username, text, sent_at) VALUES"
                " ('lobby', 1, 'Ada', ?, '2020')", str(number))
        loaded = ada.ask("GET", "/api/chat/messages?room=lobby").json
        assert [m["text"] for m in loaded] == [str(number) for number in range(10, 60)]


@needs_chromium
def test_a_user_enters_and_talks_in_the_browser(chromium, chat, tmp_path):
    """With names and texts that would run, were they shown as HTML."""
    name = "<img src=x onerror=alert(1)>"
    other = enter(chat, "<b>Grace</b>")
    say(other, "before the page was there")
    say(other, "not here", "kitchen")
    open_page(chromium, chat.url)
    chromium.find_element(By.NAME, "username").send_keys(name)
    chromium.find_element(By.CSS_SELECTOR, "#join button").click()
    wait_for_text(chromium, "#status", "connected")
    say(other, HOSTILE)
    eventually(lambda: len(messages_on(chromium)) == 2, what="the other's message")
    chromium.find_element(By.NAME, "text").send_keys("mine")
    chromium.find_element(By.CSS_SELECTOR, "#send button").click()
    eventually(lambda: len(messages_on(chromium)) == 3, what="my message")
    assert messages_on(chromium) == ["before the page was there", HOSTILE, "mine"]
    assert texts(chromium, "#messages bdi") == ["<b>Grace</b>", "<b>Grace</b>", name]
    assert texts(chromium, "#messages .mine p") == ["mine"]
    assert chromium.find_elements(By.CSS_SELECTOR, "#messages :is(script, img, b)") == []
    eventually(lambda: chromium.find_element(By.NAME, "text").get_property("value") == "", what="an empty field")
    assert_it_fits(chromium, "chat", tmp_path)


@needs_chromium
def test_two_tabs_show_each_message_of_their_rooms_once(chromium, chat):
    """The one who posts gets it twice, as the answer and as an event, and shows one."""
    ada = enter(chat, "Ada")
    open_page(chromium, chat.url, ada.cookie)
    wait_for_text(chromium, "#status", "connected")
    with second_tab(chromium) as (first, second):
        chromium.get(f"{chat.url}/rooms/garden")
        wait_for_text(chromium, "#status", "connected")
        for text, room in (("1", "garden"), ("2", "lobby"), ("3", "garden"), ("4", "lobby")):
            say(ada, text, room)
        eventually(lambda: messages_on(chromium) == ["1", "3"], what="what was said in the garden")
        first()
        eventually(lambda: messages_on(chromium) == ["2", "4"], what="what was said in the lobby")
        second()
    with chat_heard(chromium) as heard:
        chromium.find_element(By.NAME, "text").send_keys("5")
        chromium.find_element(By.CSS_SELECTOR, "#send button").click()
        eventually(lambda: heard() == ["5"], what="the event")
    assert messages_on(chromium) == ["2", "4", "5"]


@contextmanager
def chat_heard(driver):
    """What comes as events from now on."""
    driver.execute_script("window.heard = []; queue.on('new_message', message => heard.push(message.text))")
    yield lambda: driver.execute_script("return heard")


@needs_chromium
def test_the_chat_misses_and_doubles_nothing_while_its_push_server_is_dead(chromium, tmp_path):
    """kill -9, and what is said meanwhile comes when there is a server again, in its order."""
    queue, port = tmp_path / "ws_queue", free_port()
    with run_page(CHAT, tmp_path, PUSH_URL=f"ws://127.0.0.1:{port}/") as chat:
        ada = enter(chat, "Ada")
        with run_push_server(queue, port) as server:
            open_page(chromium, chat.url, ada.cookie)
            wait_for_text(chromium, "#status", "connected")
            with chat_heard(chromium) as heard:
                say(ada, "1")
                eventually(lambda: messages_on(chromium) == ["1"], what="the first message")
                kill(server.process)
                eventually(lambda: text_of(chromium, "#status") != "connected", what="a page that noticed")
                say(ada, "2")
                say(ada, "3")
                with run_push_server(queue, port):
                    say(ada, "4")
                    eventually(lambda: messages_on(chromium) == ["1", "2", "3", "4"], 60, what="all messages")
                    assert heard() == ["1", "2", "3", "4"]


@needs_chromium
def test_the_chat_loads_what_the_history_does_not_reach(chromium, tmp_path):
    """After a reset: the events are gone, and the messages are in the database."""
    queue, port = tmp_path / "ws_queue", free_port()
    with run_page(CHAT, tmp_path, PUSH_URL=f"ws://127.0.0.1:{port}/") as chat:
        ada = enter(chat, "Ada")
        with run_push_server(queue, port) as server:
            open_page(chromium, chat.url, ada.cookie)
            wait_for_text(chromium, "#status", "connected")
            say(ada, "1")
            eventually(lambda: messages_on(chromium) == ["1"], what="the first message")
            kill(server.process)
        for number in range(2, 5):
            say(ada, str(number))
        sql(chat, "INSERT INTO messages (room, user_id, username, text, sent_at) WITH RECURSIVE n(i) AS"
            " (SELECT 5 UNION ALL SELECT i + 1 FROM n WHERE i < 60) SELECT 'lobby', 1, 'Ada', i, '2020' FROM n")
        shutil.rmtree(queue)
        with run_push_server(queue, port):
            # The first one goes, too: between it and the fifty that are loaded, there is a hole.
            wanted = [str(number) for number in range(11, 61)]
            eventually(lambda: messages_on(chromium) == wanted, 60, what="the last fifty messages")


@needs_chromium
def test_what_is_said_while_the_chat_page_opens_is_shown(chromium, chat):
    """After it has loaded the last messages, and before it is connected."""
    ada = enter(chat, "Ada")
    say(ada, "before")
    with held_tickets(chromium):
        open_page(chromium, chat.url, ada.cookie)
        eventually(lambda: messages_on(chromium) == ["before"], what="the page")
        with ada.listen("lobby") as client:
            say(ada, "between")
            client.events(1)  # it has been sent, and the page was not there
        chromium.execute_script("window.go = true")
        eventually(lambda: messages_on(chromium) == ["before", "between"], what="what was said in between")


@needs_chromium
def test_messages_stand_in_the_order_of_their_ids(chromium, chat):
    """However they come; and what comes again replaces itself."""
    ada = enter(chat, "Ada")
    open_page(chromium, chat.url, ada.cookie)
    wait_for_text(chromium, "#status", "connected")
    for number, text in ((7, "seven"), (5, "five"), (6, "six"), (5, "five again"), (10, "ten")):
        chromium.execute_script("put({ message_id: arguments[0], text: arguments[1], username: '', sent_at: '2020' })",
                                number, text)
    assert messages_on(chromium) == ["five again", "six", "seven", "ten"]


# ---- Orders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path):
    """The shop with its own push server."""
    with run_page(ORDERS, tmp_path) as example:
        yield example


@pytest.fixture(scope="module")
def resting_shop(tmp_path_factory):
    """The shop of which nothing changes."""
    with run_page(ORDERS, tmp_path_factory.mktemp("shop")) as example:
        yield example


def log_in(example, user):
    visitor = Visitor(example)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    body = f"user={user}&password={PASSWORD}".encode()
    assert visitor.ask("POST", "/login", body, form).status == 303 and visitor.cookie
    return visitor


def set_status(staff, order_id, status):
    return staff.ask("PUT", f"/api/orders/{order_id}/status", {"status": status})


def change(staff, order_id, status):
    """Change an order's status, and return what its event must say."""
    answer = set_status(staff, order_id, status)
    assert answer.status == 200, answer.content
    return {name: value for name, value in answer.json.items() if name != "success"}


def states_of(visitor):
    return {order["order_id"]: order["status"] for order in visitor.ask("GET", "/api/orders").json}


def states_on(driver):
    return dict(zip(texts(driver, "#orders small"), texts(driver, "#orders .state")))


def state_on(driver, order_id):
    return text_of(driver, f'#orders [data-id="{order_id}"] .state')


def test_a_customer_hears_of_her_own_orders_and_staff_of_all(shop):
    """order_status_changed, with what the answer says."""
    ada, grace, staff = (log_in(shop, user) for user in ("ada", "grace", "staff"))
    with ada.listen() as adas, grace.listen() as graces, staff.listen() as everything:
        changes = [change(staff, *what) for what in ((1, "paid"), (4, "paid"), (1, "shipped"))]
        assert everything.payloads(3) == changes
        assert graces.payloads(1) == [changes[1]]
        events = adas.events(2)
    assert [event["event"] for event in events] == ["order_status_changed"] * 2
    assert [event["payload"] for event in events] == [changes[0], changes[2]]
    assert changes[0] == {"order_id": 1, "status": "paid", "updated_at": changes[0]["updated_at"]}


def test_a_customer_sees_her_own_orders_alone(resting_shop):
    """Staff sees all."""
    assert [list(states_of(log_in(resting_shop, user))) for user in ("ada", "grace", "staff")] == [
        [1, 2], [3, 4], [1, 2, 3, 4]]


def test_a_change_that_is_rolled_back_is_told_to_nobody(shop):
    """The last teapot is gone when the second one is to be shipped: order, event and stock are as they were."""
    grace, staff = log_in(shop, "grace"), log_in(shop, "staff")
    with grace.listen() as graces, staff.listen() as everything:
        shipped = change(staff, 2, "shipped")
        assert_refused(set_status(staff, 3, "shipped"), 409, "no such piece left in stock")
        assert states_of(staff)[3] == "paid"
        paid = change(staff, 4, "paid")
        assert everything.payloads(2) == [shipped, paid] and graces.payloads(1) == [paid]
    assert sql(shop, "SELECT pieces FROM stock WHERE item = 'Blue teapot'") == [(0,)]
    assert [json.loads(data)["payload"]["order_id"] for [data] in sql(shop, "SELECT data FROM wsqueue")] == [2, 4]


def test_an_event_waits_for_its_push_server(tmp_path):
    """None has been there yet when the order changes; the first one sends it."""
    port = free_port()
    with run_page(ORDERS, tmp_path, PUSH_URL=f"ws://127.0.0.1:{port}/") as shop:
        change(log_in(shop, "staff"), 1, "paid")
        with run_push_server(f"sqlite:///{tmp_path}/database", port) as server:
            eventually(lambda: server_sent(server, 1), what="the event that waited")


def server_sent(server, count):
    text = exchange(server.url, b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").body
    return re.search(rf"^wsqueue_events_total {count}$", text, re.MULTILINE)


def test_a_change_that_cannot_be_announced_is_not_made(tmp_path):
    """503 where the queue's table is gone, and no push server makes it anew."""
    with run_page(ORDERS, tmp_path, PUSH_URL=NOWHERE) as shop:
        staff = log_in(shop, "staff")
        sql(shop, "DROP TABLE wsqueue")
        assert_refused(set_status(staff, 1, "paid"), 503, "was not made")
        assert states_of(staff)[1] == "placed"


def test_of_two_changes_at_the_same_time_one_is_made(shop):
    """The second one finds that it is not possible any more."""
    staff, answers = log_in(shop, "staff"), []
    both = [threading.Thread(target=lambda to: answers.append(set_status(staff, 1, to).status), args=[status])
            for status in ("paid", "cancelled", "paid", "cancelled")]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert answers.count(200) == len(sql(shop, "SELECT data FROM wsqueue"))
    assert set(answers) == {200, 409} and answers.count(200) <= 2  # paid may become cancelled


def test_the_time_of_a_change_never_goes_back(shop):
    """Also if the clock does: the page takes the later one for the newer."""
    sql(shop, "UPDATE orders SET updated_at = '9999-01-31T14:00:00.000000Z'")
    assert change(log_in(shop, "staff"), 1, "paid")["updated_at"] == "9999-01-31T14:00:00.000000Z"


ORDER = "/api/orders/1/status"
PAID = b'{"status": "paid"}'
BAD_CHANGES = [
    (409, "staff", "PUT", ORDER, b'{"status": "delivered"}', JSON, "is placed and can become paid or cancelled"),
    (409, "staff", "PUT", ORDER, b'{"status": "placed"}', JSON, "is placed and can become paid or cancelled"),
    (404, "staff", "PUT", "/api/orders/99/status", PAID, JSON, "no such order"),
    (404, "staff", "PUT", f"/api/orders/{10 ** 30}/status", PAID, JSON, "no such order"),
    (404, "staff", "PUT", "/api/orders/x/status", PAID, JSON, ""),
    (400, "staff", "PUT", ORDER, b'{"status": "lost"}', JSON, "one of placed, paid"),
    (400, "staff", "PUT", ORDER, b'{"status": ["paid"]}', JSON, "one of placed, paid"),
    (400, "staff", "PUT", ORDER, b'["paid"]', JSON, "one of placed, paid"),
    (400, "staff", "PUT", ORDER, b"\xff", JSON, "must be JSON"),
    (400, "staff", "PUT", ORDER, b"[" * 4000, JSON, "must be JSON"),
    (413, "staff", "PUT", ORDER, b" " * 5000, JSON, ""),
    (415, "staff", "PUT", ORDER, PAID, {"Content-Type": "text/plain"}, "must be application/json"),
    (405, "staff", "POST", ORDER, PAID, JSON, ""),
    (403, "ada", "PUT", ORDER, PAID, JSON, "Only staff"),
    (401, None, "PUT", ORDER, PAID, JSON, "Log in first"),
    (401, None, "GET", "/api/orders", None, {}, "Log in first"),
    (401, None, "GET", "/ticket", None, {}, "Log in first"),
]


@pytest.mark.parametrize("status, user, method, path, body, headers, reason", BAD_CHANGES)
def test_what_the_shop_refuses(resting_shop, status, user, method, path, body, headers, reason):
    """Each misfit has its status and its sentence, changes nothing, and is told to nobody."""
    visitor = log_in(resting_shop, user) if user else Visitor(resting_shop)
    assert_refused(visitor.ask(method, path, body, headers), status, reason)
    assert states_of(log_in(resting_shop, "staff")) == {1: "placed", 2: "paid", 3: "paid", 4: "placed"}
    assert sql(resting_shop, "SELECT * FROM wsqueue") == []


def test_a_delivered_order_can_only_come_back(shop):
    """The refusal names what is possible, also where nothing is."""
    staff = log_in(shop, "staff")
    for status in ("paid", "shipped", "delivered"):
        change(staff, 1, status)
    assert_refused(set_status(staff, 1, "paid"), 409, "is delivered and can become returned")
    change(staff, 1, "returned")
    assert_refused(set_status(staff, 1, "paid"), 409, "is returned and can become nothing else")


def test_the_shop_opens_to_the_password_alone(resting_shop):
    """403, and no session."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for body in (b"user=ada&password=", b"user=mallory&password=" + PASSWORD.encode(), b"password=%C3%A9"):
        answer = Visitor(resting_shop).ask("POST", "/login", body, form)
        assert_refused(answer, 403, "no such user with this password")
        assert answer.getheader("Set-Cookie") is None


def test_logging_out_of_the_shop_ends_the_connection(shop):
    """And nobody else's."""
    ada, grace, staff = log_in(shop, "ada"), log_in(shop, "grace"), log_in(shop, "staff")
    with ada.listen() as adas, grace.listen() as graces:
        assert ada.ask("POST", "/logout").status == 303
        assert adas.read_close() == (4001, "logged out")
        assert graces_hear(graces, change(staff, 4, "paid"))


def graces_hear(client, payload):
    return client.payloads(1) == [payload]


@needs_chromium
def test_a_customer_sees_the_status_change(chromium, shop, tmp_path):
    """What staff presses in one tab shows in the customer's, whose item would run, were it shown as HTML."""
    sql(shop, "UPDATE orders SET item = ? WHERE order_id = 1", HOSTILE)
    open_page(chromium, shop.url)
    log_in_with_the_form(chromium, "ada")
    assert list(states_on(chromium).values()) == ["placed", "paid"]
    assert texts(chromium, "#orders li > div > span") == [HOSTILE, "Blue teapot"]
    assert chromium.find_elements(By.CSS_SELECTOR, "#orders :is(script, img, button)") == []
    with second_tab(chromium) as (customers, staffs):
        # Cookies are for a name of the host: so one browser is two users.
        open_page(chromium, shop.url.replace("127.0.0.1", "localhost"))
        log_in_with_the_form(chromium, "staff")
        chromium.find_element(By.CSS_SELECTOR, "[aria-label='Order 1: paid']").click()
        eventually(lambda: state_on(chromium, 1) == "paid", what="the new status")
        assert chromium.switch_to.active_element.text == "shipped"  # the focus is not lost
        assert_it_fits(chromium, "orders-staff", tmp_path)
        customers()
        eventually(lambda: state_on(chromium, 1) == "paid", what="the new status")
        assert text_of(chromium, "#news") == "Order 1: paid"
        staffs()
        for order_id in (2, 3):
            chromium.find_element(By.CSS_SELECTOR, f"[aria-label='Order {order_id}: shipped']").click()
        wait_for_text(chromium, "#answer", "There is no such piece left in stock.")
        assert state_on(chromium, 3) == "paid"
    eventually(lambda: state_on(chromium, 2) == "shipped", what="the new status")
    assert_it_fits(chromium, "orders", tmp_path)


def log_in_with_the_form(driver, user):
    Select(driver.find_element(By.NAME, "user")).select_by_visible_text(user)
    driver.find_element(By.NAME, "password").send_keys(PASSWORD)
    driver.find_element(By.TAG_NAME, "button").click()
    eventually(lambda: text_of(driver, "#status") == "connected", what="a page that is connected")


@needs_chromium
def test_the_shop_misses_and_doubles_nothing_while_its_push_server_is_dead(chromium, tmp_path):
    """kill -9, and what changes meanwhile comes when there is a server again, in its order."""
    port, queue = free_port(), f"sqlite:///{tmp_path}/database"
    with run_push_server(queue, port) as server, run_page(ORDERS, tmp_path, PUSH_URL=f"ws://127.0.0.1:{port}/") as shop:
        ada, staff = log_in(shop, "ada"), log_in(shop, "staff")
        open_page(chromium, shop.url, ada.cookie)
        wait_for_text(chromium, "#status", "connected")
        chromium.execute_script(
            "window.heard = []; queue.on('*', ({ payload }) => heard.push([payload.order_id, payload.status]))")
        change(staff, 1, "paid")
        eventually(lambda: state_on(chromium, 1) == "paid", what="the first change")
        kill(server.process)
        eventually(lambda: text_of(chromium, "#status") != "connected", what="a page that noticed")
        for order_id, status in ((1, "shipped"), (3, "cancelled"), (1, "delivered")):
            change(staff, order_id, status)
        with run_push_server(queue, port):
            change(staff, 2, "shipped")
            eventually(lambda: state_on(chromium, 2) == "shipped", 60, what="the last change")
            assert state_on(chromium, 1) == "delivered"
            assert chromium.execute_script("return heard") == [
                [1, "paid"], [1, "shipped"], [1, "delivered"], [2, "shipped"]]


@needs_chromium
def test_what_changes_while_the_page_of_orders_opens_is_shown(chromium, shop):
    """After it has loaded the orders, and before it is connected."""
    ada, staff = log_in(shop, "ada"), log_in(shop, "staff")
    with held_tickets(chromium):
        open_page(chromium, shop.url, ada.cookie)
        eventually(lambda: state_on(chromium, 1) == "placed", what="the page")
        with ada.listen() as client:
            change(staff, 1, "paid")
            client.events(1)  # it has been sent, and the page was not there
        chromium.execute_script("window.go = true")
        eventually(lambda: state_on(chromium, 1) == "paid", what="what changed in between")


@needs_chromium
def test_an_order_that_is_made_while_the_page_is_open_is_shown(chromium, shop):
    """The event for it has less than the page shows, so the page loads the rest."""
    open_page(chromium, shop.url, log_in(shop, "ada").cookie)
    eventually(lambda: state_on(chromium, 1) == "placed", what="the page")
    wait_for_text(chromium, "#status", "connected")
    sql(shop, "INSERT INTO orders VALUES (5, 1, 'Two cups', 'placed', '2025-01-31T14:00:00.000000Z')")
    change(log_in(shop, "staff"), 5, "paid")
    eventually(lambda: state_on(chromium, 5) == "paid", what="the new order")


@needs_chromium
def test_a_repeat_leaves_the_page_as_it_is(chromium, shop):
    """A button that is replaced while it is pressed would do nothing."""
    open_page(chromium, shop.url, log_in(shop, "staff").cookie)
    wait_for_text(chromium, "#status", "connected")
    button = chromium.find_element(By.CSS_SELECTOR, "[aria-label='Order 1: paid']")
    chromium.execute_async_script("load().then(arguments[0])")
    assert button.is_enabled()


@needs_chromium
def test_an_older_status_does_not_replace_a_newer_one(chromium, resting_shop):
    """What is loaded and what is heard come in any order."""
    open_page(chromium, resting_shop.url, log_in(resting_shop, "ada").cookie)
    eventually(lambda: state_on(chromium, 1) == "placed", what="the page")
    put = "put({ order_id: 1, status: arguments[0], updated_at: arguments[1] })"
    for status, at in (("shipped", "2030-01-31T14:00:00.000002Z"), ("paid", "2030-01-31T14:00:00.000001Z")):
        chromium.execute_script(put, status, at)
    assert state_on(chromium, 1) == "shipped"


# ---- Progress --------------------------------------------------------------------------------------------------


@pytest.fixture
def jobs(tmp_path):
    """A function that runs the example; the workers, which outlive it, are gone when the test ends."""
    ours = []

    @contextmanager
    def run(**variables):
        with run_page(PROGRESS, tmp_path, **variables) as example:
            ours.append(example)
            yield example

    yield run
    for [job] in sql(ours[0], "SELECT job_id FROM jobs") if ours else []:
        for pid in workers(job):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def workers(job):
    """The processes that work on a job; their command lines tell."""
    found, command = [], f"{EXAMPLES / PROGRESS}\0work\0{job}\0"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # one that has ended meanwhile
            found += [int(path.parent.name)] if path.read_text().endswith(command) else []
    return found


def post_job(example, numbers):
    response = call(example, "POST", "/api/jobs", {"numbers": numbers})
    assert response.status == 202, response.content
    return response.json["job_id"]


def count_to(number):
    return "\n".join(str(n + 1) for n in range(number))


class Listener:
    """Hears a job from its beginning, though its id is known only later: by what the history has of it."""

    def __init__(self, example):
        self._example = example
        with RawClient(example.push_url, "/?last_event_id=") as client:
            self._start = client.events(1)[0]["id"]

    def until_the_end(self, job):
        events = []
        with RawClient(self._example.push_url, f"/jobs/{job}?last_event_id={self._start}") as client:
            assert client.events(1)[0]["event"] == "wsqueue.hello"
            while not events or events[-1]["event"] == "job_progressed":
                events += client.events(1)
        return events


def test_a_job_tells_its_progress_and_its_end(jobs):
    """Each event has the whole state; progress goes forward alone, and the state that is kept is the last."""
    with jobs(STEP_SECONDS="0.01") as example:
        listener = Listener(example)
        job = post_job(example, count_to(100))
        events = listener.until_the_end(job)
        kept = call(example, "GET", f"/api/jobs/{job}").json
    done = [event["payload"]["done"] for event in events]
    assert done[0] == 1 and done[-1] == 100 and all(one <= other for one, other in zip(done, done[1:]))
    assert events[-1]["event"] == "job_finished"
    assert events[-1]["payload"] == kept == {
        "job_id": job, "state": "finished", "done": 100, "total": 100, "text": "The sum is 5050."}


def test_a_job_sends_no_more_than_ten_events_a_second(jobs):
    """However many steps it takes in one, besides its end."""
    with jobs(STEP_SECONDS="0.001") as example:
        listener, started = Listener(example), time.monotonic()
        events = listener.until_the_end(post_job(example, count_to(1000)))
        assert 3 <= len(events) <= 10 * (time.monotonic() - started) + 2


def test_the_throttle_lets_the_first_through_and_then_one_for_each_interval():
    """Ten in the first second, which begins with one, and one more for the last."""
    at = importlib.util.spec_from_file_location("progress_bar_example", str(EXAMPLES / PROGRESS))
    module = importlib.util.module_from_spec(at)
    at.loader.exec_module(module)
    clock = [0.0]
    throttle = module.Throttle(module.INTERVAL, lambda: clock[0])
    passed = []
    for step in range(1001):
        clock[0] = step / 1000
        passed += [step] if throttle.lets_through() else []
    assert passed[0] == 0 and 10 <= len(passed) <= 11
    assert all(later - earlier >= 100 for earlier, later in zip(passed, passed[1:]))


def test_nobody_hears_of_the_jobs_of_others(jobs):
    """Neither who listens to all paths' events, nor who has another job."""
    with jobs(STEP_SECONDS="0") as example:
        listener = Listener(example)
        with RawClient(example.push_url) as anybody, RawClient(example.push_url, "/jobs/another") as guess:
            mine, yours = post_job(example, "1\n2"), post_job(example, "3\n4")
            for job in (mine, yours):
                assert {event["payload"]["job_id"] for event in listener.until_the_end(job)} == {job}
            queue = Path(example.database).parent / "ws_queue"
            assert queue_event(str(queue), "last")
            assert [client.events(1)[0]["event"] for client in (anybody, guess)] == ["last", "last"]


def test_a_failed_job_says_so(jobs):
    """With the reason, and the state that is kept says the same."""
    with jobs(STEP_SECONDS="0") as example:
        listener = Listener(example)
        job = post_job(example, f"1\n{HOSTILE}\n3")
        last = listener.until_the_end(job)[-1]
        assert call(example, "GET", f"/api/jobs/{job}").json == last["payload"]
    assert (last["event"], last["payload"]["state"]) == ("job_failed", "failed")
    assert last["payload"]["text"] == f"Line 2 is not a whole number: {HOSTILE[:100]}"


def test_a_worker_that_dies_while_nobody_watches_is_missed_at_the_next_start(jobs):
    """And its page is told."""
    with jobs(STEP_SECONDS="3600") as example:
        listener, job = Listener(example), post_job(example, "1\n2")
        [worker] = eventually(lambda: workers(job), what="a worker")
        kill(example.process)
    os.kill(worker, signal.SIGKILL)
    with jobs() as example:
        listener._example = example
        assert "died" in listener.until_the_end(job)[-1]["payload"]["text"]


BAD_JOBS = [
    (400, "POST", "/api/jobs", b"", JSON, "must be JSON"),
    (400, "POST", "/api/jobs", b"[" * 60000, JSON, "must be JSON"),
    (400, "POST", "/api/jobs", b'["1"]', JSON, "must be JSON"),
    (400, "POST", "/api/jobs", b'{"numbers": 1}', JSON, "must be JSON"),
    (400, "POST", "/api/jobs", b'{"numbers": "\\ud800"}', JSON, "in UTF-8"),
    (400, "POST", "/api/jobs", b"{}", {**JSON, "Content-Length": "many"}, "Content-Length must be"),
    (413, "POST", "/api/jobs", b" " * 65537, JSON, "65536 bytes at most"),
    (415, "POST", "/api/jobs", b'{"numbers": "1"}', {"Content-Type": "text/plain"}, "must be application/json"),
    (405, "PUT", "/api/jobs", b"{}", JSON, "use POST"),
    (405, "POST", "/", b"{}", JSON, "use GET"),
    (405, "DELETE", "/api/jobs/x", None, {}, "use GET"),
    (404, "GET", "/api/jobs/none", None, {}, "no such job"),
    (404, "GET", "/api/jobs/../../etc", None, {}, "nothing at this path"),
]


@pytest.fixture(scope="module")
def idle_jobs(tmp_path_factory):
    with run_page(PROGRESS, tmp_path_factory.mktemp("jobs")) as example:
        yield example


@pytest.mark.parametrize("status, method, path, body, headers, reason", BAD_JOBS)
def test_what_the_server_of_jobs_refuses(idle_jobs, status, method, path, body, headers, reason):
    """Each misfit has its status and its sentence, and starts nothing."""
    assert_refused(call(idle_jobs, method, path, body, headers), status, reason)
    assert sql(idle_jobs, "SELECT * FROM jobs") == []


def test_no_more_than_eight_jobs_run_at_a_time(jobs):
    """503, until one of them has ended."""
    with jobs() as example:
        for number in range(8):
            sql(example, "INSERT INTO jobs VALUES (?, '1', 'running', 0, 1, '')", str(number))
        refused = call(example, "POST", "/api/jobs", {"numbers": "1"})
        assert_refused(refused, 503, "8 jobs are running")
        assert refused.getheader("Retry-After") == "10"
        sql(example, "UPDATE jobs SET state = 'finished' WHERE job_id = '3'")
        post_job(example, "1")


def test_a_worker_without_a_job_says_so(tmp_path):
    """In a sentence; and so does a command line that makes no sense."""
    for arguments, reason in ((["work", "none"], "there is no job 'none'"), (["rest"], "usage:")):
        with run_page(PROGRESS, tmp_path):
            done = subprocess.run([sys.executable, str(EXAMPLES / PROGRESS), *arguments], check=False,
                                  env={**os.environ, "DATABASE_PATH": f"{tmp_path}/database"},
                                  stderr=subprocess.PIPE, encoding="utf-8", timeout=30 * TIME_UNIT)
        assert done.returncode == 1 and reason in done.stderr and "Traceback" not in done.stderr


def start_in_the_page(driver, numbers):
    driver.execute_script("document.getElementById('numbers').value = arguments[0]", numbers)
    driver.find_element(By.CSS_SELECTOR, "#start button").click()


def bar_on(driver):
    return driver.execute_script("return [document.getElementById('bar').value, document.getElementById('bar').max]")


@needs_chromium
def test_the_bar_moves_to_its_end(chromium, jobs, tmp_path):
    """It is labelled, and those who hear the page are told of each quarter and of the end, no more."""
    with jobs(STEP_SECONDS="0.02") as example:
        open_page(chromium, example.url)
        chromium.execute_script("""
            window.bars = []; window.told = []; const bar = document.getElementById("bar"), news = $("news");
            new MutationObserver(() => bars.push(bar.value)).observe(bar, { attributes: true });
            new MutationObserver(() => told.push(news.textContent)).observe(news, { childList: true });""")
        start_in_the_page(chromium, count_to(100))
        wait_for_text(chromium, "#news", "Finished. The sum is 5050.")
        assert_it_fits(chromium, "progress-finished", tmp_path)
        bars, told = chromium.execute_script("return [bars, told]")
        bar = chromium.find_element(By.TAG_NAME, "progress")
        assert (bar.accessible_name, bar_on(chromium)) == ("Progress", [100, 100])
    assert len(set(bars)) > 3 and bars == sorted(bars)
    assert told[-1] == "Finished. The sum is 5050." and len(told) == len(set(told)) <= 5
    assert text_of(chromium, "#count") == "100 of 100"


@needs_chromium
def test_the_page_says_why_a_job_failed(chromium, jobs, tmp_path):
    """As text, whatever it holds."""
    with jobs(STEP_SECONDS="0.02") as example:
        open_page(chromium, example.url)
        start_in_the_page(chromium, f"1\n{HOSTILE}")
        wait_for_text(chromium, "#news", f"Failed. Line 2 is not a whole number: {HOSTILE[:100]}")
        assert chromium.find_elements(By.CSS_SELECTOR, "#job :is(script, img)") == []
        assert_it_fits(chromium, "progress-failed", tmp_path)


@needs_chromium
def test_a_page_that_comes_back_shows_the_present_state_at_once(chromium, jobs, tmp_path):
    """No event is needed for it; and then it is told that the worker has died."""
    with jobs(STEP_SECONDS="3600") as example:
        open_page(chromium, example.url)
        start_in_the_page(chromium, count_to(3))
        wait_for_text(chromium, "#count", "1 of 3")
        chromium.get("about:blank")
        chromium.get(example.url)
        wait_for_text(chromium, "#count", "1 of 3")
        assert_it_fits(chromium, "progress-running", tmp_path)
        for pid in workers(chromium.execute_script("return localStorage.getItem('job')")):
            os.kill(pid, signal.SIGKILL)
        wait_for_text(chromium, "#news", "Failed. The worker has died before it was done.")
        assert text_of(chromium, "#count") == "1 of 3"


@needs_chromium
def test_a_job_goes_on_while_its_server_is_dead(chromium, jobs):
    """kill -9: the worker outlives it, and the page goes on where it was once there is a server again."""
    ports = {"APP_PORT": str(free_port()), "WS_PORT": str(free_port())}
    with jobs(STEP_SECONDS="0.05", **ports) as example:
        open_page(chromium, example.url)
        start_in_the_page(chromium, count_to(100))
        eventually(lambda: bar_on(chromium)[0] > 1, what="some progress")
        chromium.execute_script("window.heard = []; queue.on('*', message => heard.push(message.payload.done))")
        eventually(lambda: chromium.execute_script("return heard.length"), what="an event")
        kill(example.process)
    with jobs(**ports):
        eventually(lambda: text_of(chromium, "#news") == "Finished. The sum is 5050.", 60, what="the end")
    heard = chromium.execute_script("return heard")
    # Each event once, but for the last step and the end, which have the same number; and with no hole.
    assert heard == sorted(heard) and len(set(heard[:-1])) == len(heard[:-1]) and heard[-1] == 100


@needs_chromium
def test_a_job_that_is_not_known_any_more_is_forgotten(chromium, idle_jobs):
    """The page says so, once."""
    open_page(chromium, idle_jobs.url)
    chromium.execute_script("localStorage.setItem('job', 'gone')")
    chromium.get(idle_jobs.url)
    wait_for_text(chromium, "#problem", "There is no such job.")
    assert chromium.execute_script("return localStorage.getItem('job')") is None


@needs_chromium
def test_the_pages_show_what_there_is_while_no_push_server_is_there(chromium, jobs, tmp_path):
    """Its script is missing, too; and they say that they are not connected."""
    for name in (CHAT, ORDERS):
        (tmp_path / name).mkdir()
    with run_page(CHAT, tmp_path / CHAT, PUSH_URL=NOWHERE) as chat:
        ada = enter(chat, "Ada")
        say(ada, "hello")
        open_page(chromium, chat.url, ada.cookie)
        eventually(lambda: messages_on(chromium) == ["hello"], what="the message")
        assert text_of(chromium, "#status") == "not connected"
    with run_page(ORDERS, tmp_path / ORDERS, PUSH_URL=NOWHERE) as shop:
        open_page(chromium, shop.url, log_in(shop, "ada").cookie)
        eventually(lambda: state_on(chromium, 1) == "placed", what="the order")
        assert text_of(chromium, "#status") == "not connected"
    with jobs(STEP_SECONDS="3600") as example, blocked(chromium, "*/wsqueue.js"):
        open_page(chromium, example.url)
        start_in_the_page(chromium, "1\n2")
        eventually(lambda: text_of(chromium, "#count") in ("0 of 2", "1 of 2"), what="the job")
        eventually(lambda: reloaded(chromium, "#count") == "1 of 2", what="the present state")
        assert text_of(chromium, "#status") == "not connected"


@contextmanager
def blocked(driver, pattern):
    """The browser gets nothing from such URLs."""
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": [pattern]})
    try:
        yield
    finally:
        driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
        driver.execute_cdp_cmd("Network.disable", {})


def reloaded(driver, selector):
    """What stands there once a new page has loaded its state."""
    driver.refresh()
    eventually(lambda: text_of(driver, selector), what="a state")
    return text_of(driver, selector)


# ---- Starting and stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CHAT, ORDERS, PROGRESS])
def test_ctrl_c_ends_a_page_example_cleanly(tmp_path, name):
    """Exit status 0, and no traceback, also while a client is connected."""
    target = "/" if name == PROGRESS else f"/?ticket={sign_ticket(SECRET, user=1)}"
    with run_page(name, tmp_path) as example, RawClient(example.push_url, target) as client:
        example.process.send_signal(signal.SIGINT)
        assert client.close_code() == 1001
        client.send_frame(CLOSE, close_payload(1001))
        assert example.process.wait(10 * TIME_UNIT) == 0
        assert example.printed("stdout").endswith("stopped\n") and "Traceback" not in example.printed("stderr")


@pytest.mark.parametrize("name", [CHAT, ORDERS, PROGRESS])
@pytest.mark.parametrize("variable", ["APP_PORT", "WS_PORT"])
@pytest.mark.parametrize("port", ["eighty", "99999"])
def test_a_port_that_a_page_example_cannot_have_is_named(tmp_path, name, variable, port):
    """It ends with a sentence."""
    said = complaint(name, **settings(tmp_path, **{variable: port}))
    assert port in said and variable in said


@pytest.mark.parametrize("name", [CHAT, ORDERS, PROGRESS])
def test_a_database_that_a_page_example_cannot_have_is_named(tmp_path, name):
    """A directory is none."""
    assert "DATABASE_PATH" in complaint(name, **settings(tmp_path, DATABASE_PATH=tmp_path))


@pytest.mark.parametrize("name", [CHAT, PROGRESS])
def test_a_page_example_does_not_stand_by_for_another(tmp_path, name):
    """Its page would not know where to connect to."""
    with spawn_server("--queue", settings(tmp_path)["WS_QUEUE_PATH"]) as server:
        said = complaint(name, **settings(tmp_path))
        assert f"process {server.pid} serves the queue" in said and "WS_QUEUE_PATH" in said


@pytest.mark.parametrize("name", [CHAT, ORDERS])
def test_a_push_server_elsewhere_needs_the_secret(tmp_path, name):
    """Without it, nobody could connect."""
    assert "WS_SECRET" in complaint(name, **settings(tmp_path, PUSH_URL=NOWHERE, WS_SECRET=""))


@pytest.mark.parametrize("name", [CHAT, ORDERS])
def test_no_confidence_of_a_page_example_is_printed(tmp_path, name):
    """Neither secret, key nor password that came by the environment."""
    with run_page(name, tmp_path) as example:
        page = call(example, "GET", "/rooms/lobby" if name == CHAT else "/").content.decode()
        for confidence in (SECRET, KEY, PASSWORD):
            assert confidence not in example.printed("stdout") + example.printed("stderr") + page
