"""The examples with Django, Bottle and plain wsgiref as a user runs them: real processes, cookies and browsers."""

import json
import os
import re
import secrets
import signal
import socket
import struct
import time
from contextlib import contextmanager
from urllib.parse import urlencode, urlsplit

import jwt
import pytest
from selenium.webdriver.common.by import By

from brokers import free_port
from browser import needs_chromium
from clients import CLOSE, RawClient, close_payload, exchange, handshake
from helpers import TIME_UNIT, eventually, put_in_the_way_of, spawn_server, spelled
from test_examples import HOSTILE, call, complaint, pushing, raw_exchange
from test_flask_example import Visitor, said_by, text_of
from wsqueue import queue_event

DJANGO, BOTTLE, WSGIREF = "django_login_and_topics.py", "bottle_notice_board.py", "wsgiref_door_sign.py"
PASSWORD, SECRET, KEY = (secrets.token_hex(32) for _ in range(3))
USERS = ("ada", "grace", "linus")  # of sales, of sales and support, and of support


def settings(queue, **variables):
    """Those of all examples here; a warning is an error, as it is in these tests."""
    return {"WS_QUEUE_PATH": queue, "WS_SECRET": SECRET, "APP_PASSWORD": PASSWORD, "PYTHONWARNINGS": "error",
            **variables}


@contextmanager
def run_example(name, queue, **variables):
    """Run an example; it is gone when the block ends."""
    with pushing(name, **settings(queue, **variables)) as example:
        example.queue = str(queue)
        yield example


def shown_on(driver, selector="li"):
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)", selector)


# ---- Django: the login decides who hears what ------------------------------------------------------------------


class User(Visitor):
    """Keeps all cookies, of which Django has two, and sends their token with each form."""

    def __init__(self, example, name=None, password=PASSWORD):
        self._cookies = {}
        super().__init__(example)
        assert self.get("/login/").status == 200
        if name:
            assert self.log_in(name, password).status == 302

    def log_in(self, name, password):
        return self.post("/login/", username=name, password=password)

    def ask(self, method, path, body=None, headers=None):
        response = super().ask(method, path, body, headers)
        for line in response.headers.get_all("Set-Cookie", []):
            name, value = line.partition(";")[0].split("=", 1)
            self._cookies[name] = value
        self.cookie = "; ".join(f"{name}={value}" for name, value in self._cookies.items())
        return response

    def post(self, path, **fields):
        form = urlencode({"csrfmiddlewaretoken": self._cookies["example_csrf"], **fields}, doseq=True)
        return self.ask("POST", path, form, {"Content-Type": "application/x-www-form-urlencoded"})

    def listen(self, example):
        return RawClient(example.push_url, f"/?ticket={self.get('/ticket/').text}")

    def topic_of(self, user):
        return re.search(rf'value="(user:\d+)"> {user}<', self.get("/").text)[1]


@pytest.fixture(scope="module")
def django(tmp_path_factory):
    """The site, and a push server on another host name, which pages of the site may connect to."""
    place, port = tmp_path_factory.mktemp("django"), free_port()
    (place / "secret").write_text(f"{SECRET}\nan older one\n")
    with spawn_server("--queue", place / "ws_queue", "--secret-file", place / "secret", "--host", "localhost",
                      "--allowed-origins", f"http://127.0.0.1:{port}") as server:
        variables = {"PUSH_URL": f"ws://localhost:{server.port}/", "APP_PORT": str(port), "WS_SECRET": ""}
        with run_example(DJANGO, place / "ws_queue", WS_SECRET_FILE=str(place / "secret"), **variables) as example:
            yield example


@pytest.fixture(scope="module")
def users(django):
    """Logged in once for all tests: to check a password is meant to take long."""
    return [User(django, name) for name in USERS]


def test_a_message_reaches_its_group_or_its_user_and_nobody_else(django, users):
    """Groups and users are topics of their own; who is in two groups hears both."""
    ada, grace, linus = users
    with ada.listen(django) as adas, grace.listen(django) as graces, linus.listen(django) as linuses:
        everybody = [grace.topic_of(name) for name in USERS]
        for text, to in (("1", "group:sales"), ("2", everybody[2]), ("3", "group:support"), ("4", everybody[0]),
                         ("5", ["group:sales", everybody[2]]), ("end", everybody)):
            assert grace.post("/messages/", to=to, text=text).status == 204
        heard = [[message["text"] for message in client.payloads(4)] for client in (adas, graces, linuses)]
    assert heard == [["1", "4", "5", "end"], ["1", "3", "5", "end"], ["2", "3", "5", "end"]]


def test_a_page_that_comes_later_finds_its_users_messages(users):
    """Those of the user and of the user's groups, as they were typed, and nobody else's."""
    ada, _, linus = users
    assert ada.post("/messages/", to="group:sales", text=HOSTILE).status == 204
    assert linus.post("/messages/", to=linus.topic_of("linus"), text="a note to myself").status == 204
    adas, linuses = (user.get("/messages/").text for user in (ada, linus))
    assert ("a note to myself" in adas, "a note to myself" in linuses) == (False, True)
    assert json.loads(adas)["messages"][0]["text"] == HOSTILE


def test_a_transaction_that_is_rolled_back_sends_nothing(django, users):
    """Of two topics the second is refused: the first one hears nothing, either, and nothing is stored."""
    ada, _, linus = users
    with ada.listen(django) as adas, linus.listen(django) as linuses:
        refused = ada.post("/messages/", to=["group:sales", "group:support"], text="for both")
        assert (refused.status, refused.text) == (403, "You are not in that group.")
        assert ada.post("/messages/", to=["group:sales", ada.topic_of("linus")], text="allowed").status == 204
        assert adas.payloads(1)[0]["text"] == linuses.payloads(1)[0]["text"] == "allowed"
    assert "for both" not in ada.get("/messages/").text + linus.get("/messages/").text


def test_a_ticket_is_for_its_user_and_the_users_groups(users):
    """For a minute, and nobody may keep it."""
    for user, name, groups in zip(users, USERS, (["sales"], ["sales", "support"], ["support"])):
        response = user.get("/ticket/")
        claims = jwt.decode(response.text, SECRET, algorithms=["HS256"])
        assert f"user:{claims['sub']}" == user.topic_of(name)
        assert sorted(claims["topics"]) == [f"group:{group}" for group in groups]
        assert claims["exp"] - claims["iat"] == 60 and "no-store" in response.getheader("Cache-Control")


def test_after_the_logout_there_is_no_new_ticket(django):
    """401, as for everybody who is not logged in; and none of these may send or read."""
    ada = User(django, "ada")
    topic = ada.topic_of("ada")
    assert ada.get("/ticket/").status == 200
    assert ada.post("/logout/").status == 302
    for answer in (ada.get("/ticket/"), ada.get("/messages/"), ada.post("/messages/", to=topic, text="x"),
                   User(django).get("/ticket/")):
        assert (answer.status, answer.text) == (401, "Log in first.")
    assert exchange(django.push_url, handshake(Cookie=ada.cookie)).status == 401


@pytest.mark.parametrize("name, password", [("ada", "x"), ("ada", PASSWORD[:-1]), ("mallory", PASSWORD), ("", "é")],
                         ids=spelled)
def test_a_wrong_password_opens_nothing(django, name, password):
    """The form comes again, and there is no ticket."""
    user = User(django)
    assert user.log_in(name, password).status == 200
    assert "session" not in user.cookie and user.get("/ticket/").status == 401


def test_the_forms_of_other_sites_do_nothing(django):
    """They do not know the token; and the session's cookie does not come with them, nor can scripts read it."""
    ada = User(django)
    login = ada.log_in("ada", PASSWORD)
    assert any(line.startswith("example_session=") and {"HttpOnly", "SameSite=Lax"} <= set(line.split("; "))
               for line in login.headers.get_all("Set-Cookie"))
    assert ada.post("/messages/", to="group:sales", text="forged", csrfmiddlewaretoken="").status == 403
    assert "forged" not in ada.get("/messages/").text


def test_the_pages_of_other_sites_cannot_use_a_ticket(django, users):
    """Those of the site itself, on another host name than the push server, are let in by --allowed-origins."""
    target, host = f"/?ticket={users[0].get('/ticket/').text}", urlsplit(django.push_url).netloc
    for origin in ("http://evil.example", "http://127.0.0.1", "null"):
        assert exchange(django.push_url, handshake(target, Host=host, Origin=origin)).status == 403
    with RawClient(django.push_url, target, Host=host, Origin=django.url):
        pass


@pytest.mark.parametrize("fields", [
    {}, {"to": "group:sales"}, {"text": "x"}, {"to": "group:sales", "text": " "},
    {"to": "group:sales", "text": "x" * 1001}, {"to": "group:sales", "text": "x", "more": "x" * 70000}],
    ids=lambda fields: ",".join(f"{name}:{len(value)}" for name, value in fields.items()))
def test_a_message_that_cannot_be_is_refused_by_django(users, fields):
    """400; also one with a form that is larger than any of the page's could be."""
    assert users[0].post("/messages/", **fields).status == 400


def test_no_confidence_of_django_is_shown(django, users):
    """Neither password nor secret are in the log or on the page."""
    page = users[0].get("/").text
    for confidence in (PASSWORD, SECRET):
        assert confidence not in said_by(django) + page


def test_a_message_is_kept_when_its_event_cannot_be_queued(tmp_path):
    """It has been committed: the request succeeds, and the log says that nobody was told."""
    (tmp_path / "file").write_text("")
    with run_example(DJANGO, tmp_path / "file" / "ws_queue") as example:
        ada = User(example, "ada")
        assert ada.post("/messages/", to="group:sales", text="kept").status == 204
        assert "kept" in ada.get("/messages/").text
        assert "ws_queue" in example.printed("stderr")


def test_what_fails_is_in_the_log_and_not_on_the_page(tmp_path):
    """Here, the file of the secret has gone."""
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    with run_example(DJANGO, tmp_path / "ws_queue", WS_SECRET_FILE=str(secret)) as example:
        ada = User(example, "ada")
        secret.unlink()
        answer = ada.get("/ticket/")
        assert (answer.status, str(secret) in answer.text) == (500, False)
        assert f"No such file or directory: '{secret}'" in example.printed("stderr")


def test_a_database_that_is_given_a_directory_outlives_the_site(tmp_path):
    """The messages are there after a restart, which has printed a new password; the old one opens nothing."""
    place = {"APP_DIRECTORY": str(tmp_path / "data"), "APP_PASSWORD": ""}
    with run_example(DJANGO, tmp_path / "ws_queue", **place) as first:
        old = password_of(first)
        assert User(first, "ada", old).post("/messages/", to="group:sales", text="kept").status == 204
    with run_example(DJANGO, tmp_path / "ws_queue", **place) as second:
        assert "kept" in User(second, "grace", password_of(second)).get("/messages/").text
        assert User(second).log_in("ada", old).status == 200


def password_of(example):
    return eventually(lambda: re.search(r"the password (\S+)\n", example.printed("stdout")), what="a password")[1]


def log_in(driver, example, name):
    driver.get(example.url)
    driver.delete_all_cookies()
    driver.get(example.url)
    driver.find_element(By.NAME, "username").send_keys(name)
    driver.find_element(By.NAME, "password").send_keys(PASSWORD)
    driver.find_element(By.TAG_NAME, "button").click()
    eventually(lambda: text_of(driver, "#status") == "open", what="a page that is connected")


@needs_chromium
def test_a_user_of_django_sees_messages_in_the_browser(chromium, django, users):
    """What came before, what comes for the user and the user's groups, and what the page sends; all as text."""
    _, grace, _ = users
    assert grace.post("/messages/", to="group:support", text="before").status == 204
    log_in(chromium, django, "linus")
    eventually(lambda: shown_on(chromium)[:1] == ["grace: before"], what="the message of before")
    for to, text in ((grace.topic_of("linus"), HOSTILE), ("group:sales", "not for linus"), ("group:support", "now")):
        assert grace.post("/messages/", to=to, text=text).status == 204
    pushed = ["grace: now", f"grace: {HOSTILE}", "grace: before"]
    eventually(lambda: shown_on(chromium)[:3] == pushed, what="the messages that were pushed")
    chromium.find_element(By.CSS_SELECTOR, "[value='group:support']").click()
    chromium.find_element(By.NAME, "text").send_keys("from the page")
    chromium.find_element(By.CSS_SELECTOR, "#send button").click()
    eventually(lambda: shown_on(chromium)[:1] == ["linus: from the page"], what="the message that the page sent")
    assert text_of(chromium, "#answer") == "sent"


@needs_chromium
def test_a_page_of_django_whose_session_is_over_goes_back_to_the_login(tmp_path, chromium):
    """As soon as it needs another ticket: here the push server ends, and another one takes its place."""
    port, origin = free_port(), free_port()
    options = ("--queue", tmp_path / "ws_queue", "--port", port)
    environ = {**os.environ, "WS_SECRET": SECRET}
    variables = {"PUSH_URL": f"ws://127.0.0.1:{port}/", "APP_PORT": str(origin)}
    with run_example(DJANGO, tmp_path / "ws_queue", **variables) as example:
        with spawn_server(*options, env=environ):
            log_in(chromium, example, "ada")
            chromium.delete_all_cookies()
        eventually(lambda: chromium.find_elements(By.NAME, "password"), what="the form")


@needs_chromium
def test_a_user_of_django_who_logs_out_sees_the_form_again(chromium, django):
    """And no messages."""
    log_in(chromium, django, "grace")
    chromium.find_element(By.CSS_SELECTOR, "form[action='/logout/'] button").click()
    eventually(lambda: chromium.find_elements(By.NAME, "password"), what="the form")
    assert shown_on(chromium) == []


# ---- Bottle: a notice board ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    with run_example(BOTTLE, tmp_path_factory.mktemp("bottle") / "ws_queue") as example:
        yield example


def pin_up(board, text):
    response = call(board, "POST", "/notices", {"text": text})
    assert (response.status, response.json["queued"]) == (200, True)
    return response.json["notice"]


def test_a_notice_reaches_every_client(board):
    """Once, as it was typed, and in the order in which notices were pinned up."""
    with RawClient(board.push_url) as one, RawClient(board.push_url) as another:
        pinned = [pin_up(board, text) for text in ("first", HOSTILE, "last")]
        assert [notice["text"] for notice in pinned] == ["first", HOSTILE, "last"]
        assert one.payloads(3) == another.payloads(3) == pinned
    assert call(board, "GET", "/notices").json["notices"][-3:] == pinned


@pytest.mark.parametrize("body, content_type, status", [
    (b"text=x", "application/x-www-form-urlencoded", 400), (b'{"text": "x"}', "text/plain", 400),
    (b'{"text": "x"', "application/json", 400), (b'["text"]', "application/json", 400),
    (b"{}", "application/json", 400), (b'{"text": 7}', "application/json", 400),
    (b'{"text": " "}', "application/json", 400), (b'{"text": "%s"}' % (b"x" * 501), "application/json", 400),
    (b"", "application/json", 400)], ids=spelled)
def test_a_notice_that_cannot_be_is_refused(board, body, content_type, status):
    """Nor may it be what the form of another site would send."""
    before = call(board, "GET", "/notices").json
    assert call(board, "POST", "/notices", body, {"Content-Type": content_type}).status == status
    assert call(board, "GET", "/notices").json == before


@pytest.mark.parametrize("field, status", [("Content-Length: 200000", 413), ("Transfer-Encoding: chunked", 411)])
def test_a_notice_without_a_bound_is_not_even_read(board, field, status):
    """The answer comes before the body."""
    head = f"POST /notices HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{field}\r\n\r\n"
    assert f" {status} ".encode() in raw_exchange(board, head.encode()).partition(b"\r\n")[0]


def test_a_notice_is_pinned_up_when_its_event_cannot_be_queued(tmp_path):
    """Who pins it up is told that the others were not."""
    queue = tmp_path / "ws_queue"
    with run_example(BOTTLE, queue) as board:
        put_in_the_way_of(queue)
        response = call(board, "POST", "/notices", {"text": "kept"})
        assert (response.status, response.json["queued"]) == (200, False)
        assert call(board, "GET", "/notices").json["notices"] == [response.json["notice"]]


@needs_chromium
def test_a_notice_appears_in_the_browser(chromium, board):
    """What hung there before, what others pin up, and what the page does; newest first, and as text."""
    pin_up(board, "before")
    chromium.get(board.url)
    eventually(lambda: text_of(chromium, "#status") == "open", what="a page that is connected")
    eventually(lambda: shown_on(chromium)[:1] == ["before"], what="the notice of before")
    pin_up(board, HOSTILE)
    eventually(lambda: shown_on(chromium)[:2] == [HOSTILE, "before"], what="the notice that was pushed")
    chromium.find_element(By.NAME, "text").send_keys("from the page")
    chromium.find_element(By.TAG_NAME, "button").click()
    eventually(lambda: shown_on(chromium)[:2] == ["from the page", HOSTILE], what="the notice of the page")
    assert chromium.find_element(By.NAME, "text").get_property("value") == ""


# ---- wsgiref: a door sign --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    with run_example(WSGIREF, tmp_path_factory.mktemp("wsgiref") / "ws_queue") as example:
        yield example


def change(door, text):
    response = Visitor(door).post("/", text=text)
    assert (response.status, response.getheader("Location")) == (303, "/")


def test_a_change_of_the_sign_reaches_every_client(door):
    """And who comes later is told at once."""
    with RawClient(door.push_url) as one, RawClient(door.push_url) as another:
        present = one.payloads(1)
        assert another.payloads(1) == present
        change(door, HOSTILE)
        changed = one.payloads(1)
        assert another.payloads(1) == changed
        assert changed[0]["text"] == HOSTILE and changed[0]["at"] > present[0]["at"]
    with RawClient(door.push_url) as late:
        assert late.payloads(1) == changed


def test_the_sign_is_on_the_page_without_a_script_too(door):
    """Escaped."""
    change(door, "<b>Gone</b> & 'back'")
    assert "<h1>&lt;b&gt;Gone&lt;/b&gt; &amp; &#x27;back&#x27;</h1>" in Visitor(door).get("/").text


@pytest.mark.parametrize("form, headers", [
    ("", {}), ("text=", {}), ("text=+", {}), ("other=x", {}), ("text=" + "x" * 101, {}), ("text=" + "x" * 9999, {}),
    ("text=x", {"Origin": "http://evil.example"}), ("text=x", {"Origin": "null"}),
    ("text=x", {"Origin": "http://["}), ("text=x", {"Content-Length": "x"}), ("text=x", {"Content-Length": "-1"}),
], ids=spelled)
def test_a_change_that_cannot_be_is_refused(door, form, headers):
    """400, and the sign stays; the forms of other sites are among these."""
    change(door, "stays")
    assert Visitor(door).ask("POST", "/", form, headers).status == 400
    assert "<h1>stays</h1>" in Visitor(door).get("/").text


def test_the_form_of_the_page_itself_may_change_the_sign(door):
    """Its origin is that of the page."""
    assert Visitor(door).ask("POST", "/", "text=origin", {"Origin": door.url}).status == 303


@needs_chromium
def test_the_sign_changes_in_the_browser(chromium, door):
    """Under the eyes of whoever looks at it, as text; and its form changes it."""
    change(door, "before")
    chromium.get(door.url)
    assert text_of(chromium, "h1") == "before"
    with RawClient(door.push_url) as client:
        client.payloads(1)
        for text in ("now", HOSTILE):
            change(door, text)
            eventually(lambda text=text: text_of(chromium, "h1") == text, what="the change")
        client.payloads(2)
        chromium.find_element(By.NAME, "text").send_keys("from the page")
        chromium.find_element(By.TAG_NAME, "button").click()
        assert client.payloads(1)[0]["text"] == "from the page"
    eventually(lambda: text_of(chromium, "h1") == "from the page", what="the page after its form")


@needs_chromium
def test_an_older_sign_that_comes_late_is_not_shown(chromium, door):
    """As when the greeting of a new client and a change overtake each other."""
    change(door, "present")
    chromium.get(door.url)
    chromium.execute_script("""
        window.shown = [];
        const sign = document.querySelector("h1");
        new MutationObserver(() => shown.push(sign.textContent)).observe(sign, { childList: true });""")
    present = {"text": "connected", "at": time.time()}
    eventually(lambda: queue_event(door.queue, "sign", present) and text_of(chromium, "h1") == "connected",
               what="a page that is connected")
    assert queue_event(door.queue, "sign", {"text": "old", "at": present["at"] - 1})
    change(door, "new")
    eventually(lambda: text_of(chromium, "h1") == "new", what="the change")
    assert "old" not in chromium.execute_script("return shown")


# ---- Starting and stopping, of all three -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [DJANGO, BOTTLE, WSGIREF])
def test_ctrl_c_ends_an_example_with_status_0(tmp_path, name):
    """It says so, warns of nothing, and leaves no temporary files."""
    (tmp_path / "tmp").mkdir()
    with run_example(name, tmp_path / "ws_queue", TMPDIR=str(tmp_path / "tmp")) as example:
        assert Visitor(example).get("/").status in (200, 302)
        assert example.interrupt() == 0
        assert example.printed("stdout").endswith("stopped\n")
        assert not re.search("Traceback|Warning|Exception", example.printed("stderr"))
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("name", [BOTTLE, WSGIREF])
def test_ctrl_c_closes_the_connections(tmp_path, name):
    """With the code of a server that goes away."""
    with run_example(name, tmp_path / "ws_queue") as example, RawClient(example.push_url) as client:
        example.process.send_signal(signal.SIGINT)
        assert client.close_code() == 1001
        client.send_frame(CLOSE, close_payload(1001))
        assert example.process.wait(10 * TIME_UNIT) == 0


@pytest.mark.parametrize("fixture", ["django", "board", "door"])
def test_a_client_that_says_nothing_delays_nobody(fixture, request):
    """Browsers open such connections, for later."""
    example = request.getfixturevalue(fixture)
    target = urlsplit(example.url)
    with socket.create_connection((target.hostname, target.port)):
        assert Visitor(example).get("/").status in (200, 302)


@pytest.mark.parametrize("fixture", ["board", "door"])
def test_a_client_that_hangs_up_is_one_line_in_the_log(fixture, request):
    """And no traceback: it is the client's own affair."""
    example = request.getfixturevalue(fixture)
    target = urlsplit(example.url)
    with socket.create_connection((target.hostname, target.port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
        client.sendall(b"GET / HT")
    eventually(lambda: "gave up on 127.0.0.1: " in example.printed("stderr"), what="the line")
    assert "Traceback" not in example.printed("stderr")


def sentence(name, queue, **variables):
    """What is said by an example that cannot start: one sentence or two, on one line."""
    said = complaint(name, **settings(queue, **variables))
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("port", ["taken", "eighty", "99999"])
@pytest.mark.parametrize("name, variable", [
    (DJANGO, "APP_PORT"), (BOTTLE, "APP_PORT"), (BOTTLE, "WS_PORT"), (WSGIREF, "APP_PORT"), (WSGIREF, "WS_PORT")])
def test_an_example_names_the_port_that_cannot_be_had(tmp_path, name, variable, port):
    """And where it is set."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1]) if port == "taken" else port
        said = sentence(name, tmp_path / "ws_queue", **{variable: port})
    assert port in said and variable in said


@pytest.mark.parametrize("name, variable", [(DJANGO, "APP_DIRECTORY"), (BOTTLE, "WS_QUEUE_PATH"),
                                            (WSGIREF, "WS_QUEUE_PATH")])
def test_an_example_names_the_directory_that_cannot_be_made(tmp_path, name, variable):
    """Not even by root: its parent is a file."""
    (tmp_path / "file").write_text("")
    said = sentence(name, tmp_path / "ws_queue", **{variable: str(tmp_path / "file" / "directory")})
    assert str(tmp_path / "file") in said and variable in said


@pytest.mark.parametrize("name", [BOTTLE, WSGIREF])
def test_an_example_does_not_stand_by_for_another(tmp_path, name):
    """Its page would not know where to connect to."""
    with run_example(name, tmp_path / "ws_queue"):
        said = sentence(name, tmp_path / "ws_queue")
        assert "serves the queue" in said and "WS_QUEUE_PATH" in said


@pytest.mark.parametrize("variables", [{"WS_SECRET": ""}, {"WS_SECRET": " \n"}, {"WS_SECRET_FILE": "/no/such/file"}],
                         ids=spelled)
def test_django_needs_the_secret_of_the_push_server(tmp_path, variables):
    """Without it, nobody could connect."""
    assert "WS_SECRET_FILE" in sentence(DJANGO, tmp_path / "ws_queue", **variables)
