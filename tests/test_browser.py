"""The test page in a real browser: what a user sees who opens it, clicks, and waits for the event."""

import pytest
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import wsqueue
from browser import emulate, needs_chromium, save_picture
from helpers import eventually
from test_examples import EXAMPLES, HOSTILE, run_both

pytestmark = needs_chromium


# ---- The browser and the page ------------------------------------------------------------------------------


class Page:
    """The test page: what a user does with it, and what it shows."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get_log("browser")  # what earlier pages complained about
        driver.get(url)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).text

    def fill(self, call, **fields):
        for name, value in fields.items():
            field = self.form(call).find_element(By.NAME, name)
            field.clear()
            field.send_keys(value)

    def form(self, call):
        """The form of an API call, opened if it is folded."""
        form = self.one(f"form[data-call={call}]")
        if not form.is_displayed():
            form.find_element(By.XPATH, "../summary").click()
        return form

    def submit(self, call):
        self.form(call).find_element(By.TAG_NAME, "button").click()

    def events(self):
        """What the list shows, newest first: (name, payload as it is displayed)."""
        # In one step, because the list may change between two.
        return [tuple(pair) for pair in self.driver.execute_script(
            "return [...document.querySelectorAll('#events > li')]"
            ".map(li => [li.querySelector('.badge').textContent, li.querySelector('pre').textContent])"
        )]

    def wait_for_status(self, status):
        eventually(lambda: self.text("#status") == status, what=f"status {status!r}")

    def wait_for_event(self, name):
        """Return what is shown as the payload of the newest event, once that has the given name."""
        found = eventually(lambda: [p for n, p in self.events()[:1] if n == name], what=f"the event {name}")
        return found[0]

    def wait_for_answer(self, status):
        """Return the text of the last API answer, once its status is the given one."""
        eventually(lambda: self.text("#answer-status").startswith(status), what=f"the answer {status!r}")
        return self.text("#answer")

    def emulate(self, width, height, scheme="light"):
        emulate(self.driver, width, height, scheme)


@pytest.fixture
def examples(tmp_path):
    with run_both(tmp_path / "ws_queue") as both:
        yield both


@pytest.fixture
def page(chromium, examples, request, tmp_path):
    """The page as the API serves it, connected to the server; its last look is kept as a picture."""
    server, api = examples
    page = Page(chromium, f"{api.url}/?ws={server.url}/notifications")
    page.emulate(1280, 900)
    page.wait_for_status("Connected")
    page.wait_for_event("connected")
    yield page
    save_picture(chromium, request.node.name, tmp_path)


# ---- Events ------------------------------------------------------------------------------------------------


def test_an_appointment_that_is_created_appears_as_an_event(page):
    """The main job: click Create, and see the event."""
    page.fill("create", patient_name="Grace")
    page.submit("create")
    assert '"patient_name": "Grace"' in page.wait_for_event("appointment_created")


@pytest.mark.parametrize("call, event", [
    ("status", "appointment_status_changed"),
    ("cancel", "appointment_cancelled"),
    ("notify", "notification"),
    ("broadcast", "door_opened"),
])
def test_each_call_of_the_page_causes_its_event(page, call, event):
    """Every form works as it stands, once there is an appointment: the page fills in its number."""
    page.submit("create")
    page.wait_for_event("appointment_created")
    page.submit(call)
    page.wait_for_event(event)


def test_the_page_works_without_complaints_of_the_browser(page):
    """No error, no warning, no violated policy in the console."""
    page.submit("create")
    page.wait_for_event("appointment_created")
    page.submit("health")
    page.wait_for_answer("200")
    assert page.driver.get_log("browser") == []


def test_the_page_loads_nothing_but_itself(page):
    """It works with no network: the calls that it makes are the only requests."""
    requested = "return performance.getEntriesByType('resource').map(resource => resource.name)"
    assert page.driver.execute_script(requested) == []


def test_markup_from_the_api_is_shown_as_text(page):
    """What was typed is what is displayed, in the event and in the answer."""
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    page.fill("notify", message=markup)
    page.submit("notify")
    assert markup in page.wait_for_event("notification") and markup in page.wait_for_answer("202")
    assert_nothing_ran(page)


def test_markup_in_an_event_and_its_name_is_shown_as_text(page, tmp_path):
    """A producer may queue anything under any name."""
    name = "<svg onload=alert(1)>"
    assert wsqueue.queue_event(str(tmp_path / "ws_queue"), name, {HOSTILE: [HOSTILE]})
    assert page.wait_for_event(name).count("<script>alert(1)</script>") == 2
    assert_nothing_ran(page)


def assert_nothing_ran(page):
    """No alert is open, and no element was made of text."""
    with pytest.raises(NoAlertPresentException):
        page.driver.switch_to.alert  # noqa: B018  (the look at it is what raises)
    made = "return document.querySelectorAll('img, svg, main script, iframe').length"
    assert page.driver.execute_script(made) == 0


def test_the_events_of_a_burst_are_all_counted_and_the_newest_shown(page, tmp_path):
    """The list is bounded; the count is not."""
    assert wsqueue.queue_events(str(tmp_path / "ws_queue"), [("tick", n) for n in range(1000)])
    eventually(lambda: page.text("#total") == "1001 received", what="1001 events")
    assert [payload for _, payload in page.events()] == [str(n) for n in range(999, 799, -1)]


def test_pause_holds_events_back_and_resume_shows_them(page):
    """Nothing that arrives during a pause is lost."""
    page.one("#pause").click()
    page.submit("notify")
    eventually(lambda: page.text("#total") == "2 received, 1 waiting", what="an event that waits")
    shown = [name for name, _ in page.events()]
    page.one("#pause").click()
    page.wait_for_event("notification")
    assert shown == ["connected"]


def test_clear_empties_the_list_and_the_counts(page):
    """It starts afresh."""
    page.one("#clear").click()
    assert (page.events(), page.text("#total"), page.text("#counts")) == ([], "", "")


# ---- Calls that fail ---------------------------------------------------------------------------------------


def test_a_refused_call_shows_the_reason_of_the_api(page):
    """The page checks little itself, so that it can show what the API says."""
    page.fill("create", patient_name="")
    page.submit("create")
    assert "patient_name must be text" in page.wait_for_answer("400")


def test_a_payload_that_is_not_json_is_not_sent(page):
    """The page says so, at the form and with the reason."""
    page.fill("broadcast", payload="{oops")
    page.submit("broadcast")
    assert "The payload is not JSON" in page.wait_for_answer("Not sent")
    assert page.form("broadcast").find_element(By.TAG_NAME, "output").text == "Not sent"


def test_an_api_that_is_gone_is_named(page, examples):
    """A call without an answer says whom it asked."""
    api = examples[1]
    api.interrupt()
    page.submit("notify")
    assert f"{api.url} gave no answer" in page.wait_for_answer("No answer")


# ---- The connection ----------------------------------------------------------------------------------------


def test_the_page_shows_that_the_server_stopped(page, examples):
    """A lost connection is seen at once, with its reason; nothing pretends to be live."""
    examples[0].interrupt()
    page.wait_for_status("Connection lost")
    assert "(code 1001)" in page.text("#problem")


def test_the_page_shows_that_the_server_was_killed(page, examples):
    """Without a goodbye, too."""
    examples[0].process.kill()
    page.wait_for_status("Connection lost")
    assert "(code 1006)" in page.text("#problem")


def test_disconnect_and_connect(page):
    """Both buttons do what they say, and the welcome comes again."""
    page.one("#disconnect").click()
    page.wait_for_status("Disconnected")
    page.one("#connect").click()
    page.wait_for_status("Connected")
    eventually(lambda: page.text("#total") == "2 received", what="the second welcome")


def test_choosing_a_route_moves_the_connection(page):
    """The welcome tells which route it is."""
    page.one("input[value='/broadcast']").click()
    eventually(lambda: "Welcome to /broadcast" in page.events()[0][1], what="the welcome of the new route")
    assert page.one("#ws-url").get_attribute("value").endswith("/broadcast")


def test_a_server_that_is_not_there_is_named(page):
    """The page says where it looked, and what may be wrong."""
    page.one("#disconnect").click()
    page.one("#ws-url").clear()
    page.one("#ws-url").send_keys("ws://127.0.0.1:9/x", Keys.ENTER)
    page.wait_for_status("Could not connect")
    assert "No WebSocket server at ws://127.0.0.1:9/x" in page.text("#problem")


def test_a_page_of_another_host_name_is_refused(chromium, examples):
    """The server takes pages of its own host name only; the page says that this may be why."""
    server, api = examples
    page = Page(chromium, f"{api.url.replace('127.0.0.1', 'localhost')}/?ws={server.url}/notifications")
    page.wait_for_status("Could not connect")
    assert "or it refused this page" in page.text("#problem")


def test_what_is_no_url_is_refused(page):
    """A slip in the address is an explanation, not an exception."""
    page.one("#disconnect").click()
    page.one("#ws-url").clear()
    page.one("#ws-url").send_keys("ws://", Keys.ENTER)
    page.wait_for_status("Not connected")
    assert "not a URL to connect to" in page.text("#problem")


def test_the_page_opened_as_a_file_says_where_to_go(chromium):
    """From a file neither server may answer it; it says so before anything fails, and when it does."""
    page = Page(chromium, (EXAMPLES / "websocket_client_test.html").as_uri())
    assert "opened as a file" in page.text("#file-note") and page.text("#status") == "Not connected"
    page.submit("notify")
    assert "may not read answers" in page.wait_for_answer("No answer")


# ---- Looks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_fits_every_width(page, width, scheme):
    """Nothing sticks out sideways, whatever an event carries."""
    page.fill("notify", title="x" * 100, message="unbroken" * 100)
    page.submit("notify")
    page.wait_for_event("notification")
    page.emulate(width, 900, scheme)
    too_wide = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
    assert page.driver.execute_script(too_wide) == 0
