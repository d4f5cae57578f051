"""The example with Flask as a user runs it: real processes, real cookies, and a real browser where there is one."""

import http.client
import os
import re
import secrets
import signal
from contextlib import contextmanager
from urllib.parse import urlencode, urlsplit

import flask
import jwt
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from brokers import free_port
from browser import needs_chromium
from clients import CLOSE, PATIENCE, RawClient, close_payload, exchange, handshake
from helpers import TIME_UNIT, eventually, spawn_server
from test_examples import HOSTILE, complaint, pushing
from wsqueue import sign_ticket

NAME = "flask_session_and_tickets.py"
PASSWORD, SECRET, KEY = (secrets.token_hex(32) for _ in range(3))


@contextmanager
def run_example(queue, **variables):
    """Run the example; it is gone when the block ends."""
    with pushing(NAME, **{"WS_QUEUE_PATH": queue, "APP_PASSWORD": PASSWORD, "SECRET_KEY": KEY, **variables}) as example:
        yield example


def said_by(example):
    return example.printed("stdout") + example.printed("stderr")


class Visitor:
    """What a browser does without a window: it keeps a cookie, and sends forms."""

    def __init__(self, example, user=None, password=PASSWORD):
        self.address = urlsplit(example.url).netloc
        self.cookie = ""
        if user:
            assert self.post("/login", user=user, password=password).status == 303
            assert self.cookie

    def ask(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
        try:
            connection.request(method, path, body, {"Cookie": self.cookie, **(headers or {})})
            response = connection.getresponse()
            response.text = response.read().decode()
        finally:
            connection.close()
        if response.getheader("Set-Cookie"):
            self.cookie = response.getheader("Set-Cookie").partition(";")[0]
        return response

    def get(self, path, **headers):
        return self.ask("GET", path, headers=headers)

    def post(self, path, **fields):
        return self.ask("POST", path, urlencode(fields), {"Content-Type": "application/x-www-form-urlencoded"})

    def listen(self, example):
        """Connect to the push server as this visitor's browser would."""
        return RawClient(example.push_url, Cookie=self.cookie)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The application with its own push server."""
    with run_example(tmp_path_factory.mktemp("flask") / "ws_queue") as example:
        yield example


@pytest.fixture(scope="module")
def with_tickets(tmp_path_factory):
    """The application that hands out tickets for a push server on another host."""
    queue, port = tmp_path_factory.mktemp("tickets") / "ws_queue", free_port()
    options = ("--queue", queue, "--host", "localhost", "--allowed-origins", f"http://127.0.0.1:{port}")
    with spawn_server(*options, env={**os.environ, "WS_SECRET": SECRET}) as server:
        push_url = f"ws://localhost:{server.port}/"
        with run_example(queue, PUSH_URL=push_url, WS_SECRET=f"{SECRET}\nan older one", APP_PORT=str(port)) as example:
            yield example


# ---- The push server inside the application --------------------------------------------------------------------


def test_a_message_reaches_its_user_and_nobody_else(example):
    """Whose session a client comes with, that user's messages it gets."""
    ada, grace = Visitor(example, "ada"), Visitor(example, "grace")
    with ada.listen(example) as adas, grace.listen(example) as graces, ada.listen(example) as adas_phone:
        for number, to in enumerate(["ada", "grace", "ada"]):
            assert grace.post("/messages", to=to, text=str(number)).status == 204
        message = {"from": "grace", "text": "0"}
        assert adas.payloads(2) == adas_phone.payloads(2) == [message, {**message, "text": "2"}]
        assert graces.payloads(1) == [{**message, "text": "1"}]


def test_a_message_is_passed_on_as_it_was_typed(example):
    """It is for the page to show it as text."""
    ada = Visitor(example, "ada")
    with ada.listen(example) as client:
        assert ada.post("/messages", to="ada", text=HOSTILE).status == 204
        assert client.payloads(1)[0]["text"] == HOSTILE


def test_nobody_listens_without_a_session(example):
    """Not without a cookie, nor with one that Flask has not signed with this very key."""
    forger = flask.Flask("forger")
    forger.secret_key = "another key"
    forged = forger.session_interface.get_signing_serializer(forger).dumps({"user": "ada"})
    name, value = Visitor(example, "ada").cookie.split("=", 1)
    for cookie in (None, "", f"{name}=", f"{name}=ada", f"{name}={forged}", f"{name}={value[:-1]}", f"{name}x={value}"):
        assert exchange(example.push_url, handshake(Cookie=cookie)).status == 401


def test_a_page_of_another_site_cannot_use_the_session(example):
    """Browsers send the cookie along for any page; the origin gives it away."""
    cookie = Visitor(example, "ada").cookie
    assert exchange(example.push_url, handshake(Cookie=cookie, Origin="https://evil.example")).status == 403
    with RawClient(example.push_url, Cookie=cookie, Origin=example.url):
        pass


def test_the_cookie_is_for_this_site_alone(example):
    """Scripts cannot read it, and the forms of other sites come without it."""
    answer = Visitor(example).post("/login", user="ada", password=PASSWORD)
    assert {"HttpOnly", "SameSite=Lax"} <= set(answer.getheader("Set-Cookie").split("; "))


def test_a_wrong_password_opens_nothing(example):
    """403, and no session."""
    visitor = Visitor(example)
    for user, password in (("ada", ""), ("ada", "x"), ("ada", PASSWORD[:-1]), ("mallory", PASSWORD), ("", "é")):
        assert visitor.post("/login", user=user, password=password).status == 403
    assert visitor.cookie == ""


def test_logging_out_ends_the_connection(example):
    """At once, and nobody else's; the page's next attempt is refused."""
    ada, grace = Visitor(example, "ada"), Visitor(example, "grace")
    with ada.listen(example) as adas, grace.listen(example) as graces:
        assert ada.post("/logout").status == 303
        assert adas.read_close() == (4001, "logged out")
        assert exchange(example.push_url, handshake(Cookie=ada.cookie)).status == 401
        assert grace.post("/messages", to="grace", text="still here").status == 204
        assert graces.payloads(1)[0]["text"] == "still here"


@pytest.mark.parametrize("fields", [{}, {"to": "ada"}, {"to": "mallory", "text": "x"}, {"to": "ada", "text": ""},
                                    {"to": "ada", "text": "x" * 1001}, {"to": "", "text": "x"}], ids=str)
def test_a_message_that_cannot_be_is_refused(example, fields):
    """400, which says what to send."""
    assert Visitor(example, "ada").post("/messages", **fields).status == 400


def test_only_who_is_logged_in_sends(example):
    """401 for the others."""
    assert Visitor(example).post("/messages", to="ada", text="x").status == 401


def test_there_are_no_tickets_where_the_session_is_enough(example):
    """404, also for who is logged in."""
    assert Visitor(example, "ada").get("/ticket").status == 404


def test_the_page_names_the_push_server_on_the_host_that_it_was_asked_by(example):
    """A cookie goes to the host that set it, and no other name of it."""
    port = urlsplit(example.push_url).port
    ada = Visitor(example, "ada")
    for host in ("127.0.0.1:8080", "example.com", "[::1]:8080"):
        name = host.rpartition(":")[0] if host.endswith(":8080") else host
        page = ada.get("/", Host=host).text
        assert f'"ws://{name}:{port}/"' in page and f'src="http://{name}:{port}/wsqueue.js"' in page


def test_the_script_of_the_page_is_there(example):
    """The push server has it, for everyone."""
    answer = exchange(example.push_url, b"GET /wsqueue.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert answer.status == 200 and "WSQueue" in answer.body


def test_no_confidence_is_printed(example):
    """Neither key nor password that came by the environment are in the log or on the page."""
    page = Visitor(example, "ada").get("/").text
    for confidence in (PASSWORD, KEY):
        assert confidence not in said_by(example) + page


# ---- Tickets for another host ----------------------------------------------------------------------------------


def test_a_ticket_is_its_users(with_tickets):
    """For a minute, and nobody may keep it; it is plain text, as the page wants it."""
    response = Visitor(with_tickets, "ada").get("/ticket")
    assert (response.status, response.getheader("Cache-Control")) == (200, "no-store")
    assert response.getheader("Content-Type").startswith("text/plain")
    claims = jwt.decode(response.text, SECRET, algorithms=["HS256"])
    assert claims == {"sub": "ada", "topics": [], "iat": claims["iat"], "exp": claims["iat"] + 60}


def test_only_who_is_logged_in_gets_a_ticket(with_tickets):
    """401 for the others."""
    assert Visitor(with_tickets).get("/ticket").status == 401


def test_a_message_reaches_its_user_by_ticket(with_tickets):
    """Through the queue that both share; the session's cookie alone opens nothing there."""
    ada, grace = Visitor(with_tickets, "ada"), Visitor(with_tickets, "grace")
    url = with_tickets.push_url
    assert exchange(url, handshake(Cookie=ada.cookie)).status == 401
    assert exchange(url, handshake(f"/?ticket={sign_ticket('a guess', user='ada')}")).status == 401
    with RawClient(url, f"/?ticket={ada.get('/ticket').text}") as adas:
        with RawClient(url, f"/?ticket={grace.get('/ticket').text}") as graces:
            assert grace.post("/messages", to="ada", text="hello").status == 204
            assert ada.post("/messages", to="grace", text="good morning").status == 204
            assert adas.payloads(1) == [{"from": "grace", "text": "hello"}]
            assert graces.payloads(1) == [{"from": "ada", "text": "good morning"}]


def test_the_secret_is_not_printed(with_tickets):
    """Nor is it on the page."""
    assert SECRET not in said_by(with_tickets) + Visitor(with_tickets, "ada").get("/").text


# ---- In a browser ----------------------------------------------------------------------------------------------


def log_in(driver, example, user):
    driver.get(example.url)
    driver.delete_all_cookies()
    driver.get(example.url)
    Select(driver.find_element(By.NAME, "user")).select_by_visible_text(user)
    driver.find_element(By.NAME, "password").send_keys(PASSWORD)
    driver.find_element(By.TAG_NAME, "button").click()
    eventually(lambda: text_of(driver, "#status") == "open", what="a page that is connected")


def text_of(driver, selector):
    return driver.execute_script("return document.querySelector(arguments[0])?.textContent", selector)


def messages_on(driver):
    return driver.execute_script("return [...document.querySelectorAll('#messages > li')].map(li => li.textContent)")


@needs_chromium
@pytest.mark.parametrize("variant", ["example", "with_tickets"])
def test_a_user_sees_messages_in_the_browser(chromium, variant, request):
    """Log in, and what is sent to that user appears, as text."""
    running = request.getfixturevalue(variant)
    log_in(chromium, running, "ada")
    grace = Visitor(running, "grace")
    for to, text in (("ada", "first"), ("grace", "not for ada"), ("ada", HOSTILE)):
        assert grace.post("/messages", to=to, text=text).status == 204
    eventually(lambda: messages_on(chromium) == [f"grace: {HOSTILE}", "grace: first"], what="both messages")
    chromium.find_element(By.NAME, "text").send_keys("to myself")
    chromium.find_element(By.CSS_SELECTOR, "#send button").click()
    eventually(lambda: messages_on(chromium)[:1] == ["ada: to myself"], what="the message that the page sent")
    assert text_of(chromium, "#answer") == "sent"


def test_the_monitor_page_is_not_for_who_is_logged_in(example):
    """It would show the topics of all, and send to anybody."""
    answer = exchange(example.push_url, handshake(Cookie=Visitor(example, "ada").cookie, Upgrade=None, Connection=None))
    assert answer.status == 426


@needs_chromium
def test_a_user_who_logs_out_sees_the_form_again(chromium, example):
    """And no messages."""
    log_in(chromium, example, "grace")
    chromium.find_element(By.CSS_SELECTOR, "form[action='/logout'] button").click()
    eventually(lambda: chromium.find_elements(By.NAME, "password"), what="the form")
    assert messages_on(chromium) == []


# ---- Starting and stopping -------------------------------------------------------------------------------------


def test_ctrl_c_ends_it_cleanly(tmp_path):
    """Exit status 0, and no traceback, also while a client is connected."""
    with run_example(tmp_path / "ws_queue") as example, Visitor(example, "ada").listen(example) as client:
        example.process.send_signal(signal.SIGINT)
        assert client.close_code() == 1001
        client.send_frame(CLOSE, close_payload(1001))
        assert example.process.wait(10 * TIME_UNIT) == 0
        assert example.printed("stdout").endswith("stopped\n") and "Traceback" not in said_by(example)


def test_without_settings_each_start_makes_its_own_password(tmp_path):
    """It is printed, and lets in; and nobody is logged in by the cookie of an earlier start."""
    with run_example(tmp_path / "1", APP_PASSWORD="", SECRET_KEY="") as first:
        visitor = Visitor(first, "ada", password_of(first))
        with run_example(tmp_path / "2", APP_PASSWORD="", SECRET_KEY="") as second:
            assert password_of(first) != password_of(second)
            assert exchange(second.push_url, handshake(Cookie=visitor.cookie)).status == 401
            with visitor.listen(first):
                pass


def password_of(example):
    return eventually(lambda: re.search(r"with the password (\S+);", example.printed("stdout")), what="a password")[1]


@pytest.mark.parametrize("variable", ["APP_PORT", "WS_PORT"])
@pytest.mark.parametrize("port", ["eighty", "99999"])
def test_a_port_that_cannot_be_had_is_named(tmp_path, variable, port):
    """The example ends with a sentence."""
    said = complaint(NAME, **{"WS_QUEUE_PATH": tmp_path / "q", variable: port})
    assert port in said and variable in said


def test_a_queue_that_another_process_serves_is_named(example, tmp_path):
    """The example does not stand by for it without a word: its page would have no push server."""
    with spawn_server("--queue", tmp_path / "ws_queue") as server:
        said = complaint(NAME, WS_QUEUE_PATH=tmp_path / "ws_queue")
        assert f"process {server.pid} serves the queue" in said and "WS_QUEUE_PATH" in said


def test_a_secret_may_have_a_space(tmp_path):
    """What the server takes for one secret, the application signs with."""
    queue, secret = tmp_path / "ws_queue", "correct horse " * 5
    with spawn_server("--queue", queue, "--host", "localhost", env={**os.environ, "WS_SECRET": secret}) as server:
        push_url = f"ws://localhost:{server.port}/"
        with run_example(queue, PUSH_URL=push_url, WS_SECRET=secret) as example:
            ticket = Visitor(example, "ada").get("/ticket").text
            with RawClient(push_url, f"/?ticket={ticket}") as client:
                assert Visitor(example, "grace").post("/messages", to="ada", text="hello").status == 204
                assert client.payloads(1) == [{"from": "grace", "text": "hello"}]


def test_tickets_need_the_secret():
    """Without it, nobody could connect."""
    assert "WS_SECRET" in complaint(NAME, PUSH_URL="ws://localhost:8081/")
