#!/usr/bin/env python3
"""Orders whose status changes on their customers' pages: the order and its event are one transaction of SQLite.

    pip install flask
    python examples/order_status.py        then open http://127.0.0.1:8080/ as a customer, and elsewhere as staff

    PUT /api/orders/2/status   {"status": "shipped"}      by staff; the event order_status_changed has order_id, status
                               and updated_at, and reaches the order's customer, customer:ID, and staff
    GET /api/orders                                       a customer's own; for staff, all, and what each may become

The event is a row beside the order's: both are there, or neither is. Nobody hears of what was rolled back, and nothing
that was committed is kept from anybody, also if we are killed in between. The push server reads these rows. It runs
inside the application; with PUSH_URL there is one elsewhere, on the same file and with the same secret:

    export WS_SECRET=$(openssl rand -hex 32) DATABASE_PATH=/tmp/shop.db
    python wsqueue.py serve --queue sqlite:///$DATABASE_PATH
    PUSH_URL=ws://127.0.0.1:8081/ python examples/order_status.py

Environment: APP_HOST, APP_PORT, WS_PORT (0 picks a free one), DATABASE_PATH, PUSH_URL, WS_SECRET; SECRET_KEY signs the
sessions and APP_PASSWORD is everybody's, and without them, each start makes its own.
"""

import hmac
import json
import logging
import os
import re
import secrets
import sqlite3
import sys
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterator
from urllib.parse import quote, urljoin

from flask import Flask, Response, abort, jsonify, redirect, render_template_string, request, session, url_for
from werkzeug.exceptions import HTTPException
from werkzeug.serving import make_server

# Run from a plain checkout, Python looks for modules beside this file; wsqueue.py is one directory up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wsqueue import WebSocketServer, WsqueueError, open_queue, queue_event, sign_ticket

HERE = Path(__file__).resolve().parent
DATABASE = os.path.abspath(os.environ.get("DATABASE_PATH") or HERE / "logs" / "shop.db")
QUEUE = f"sqlite:///{quote(DATABASE)}"  # the push server's side of it; ours is the transaction's own connection
HOST = os.environ.get("APP_HOST") or "127.0.0.1"
PUSH_URL = os.environ.get("PUSH_URL")
SECRET = os.environ.get("WS_SECRET", "").strip() or secrets.token_hex()  # a page asks for a ticket whenever it connects
PASSWORD = os.environ.get("APP_PASSWORD") or secrets.token_urlsafe(9)
CUSTOMERS = {"ada": 1, "grace": 2}
STAFF = "staff"

# What an order may become. Everything else is refused, also what two people press at the same time.
TRANSITIONS = {
    "placed": ("paid", "cancelled"),
    "paid": ("shipped", "cancelled"),
    "shipped": ("delivered", "returned"),
    "delivered": ("returned",),
    "cancelled": (),
    "returned": (),
}

TABLES = """
CREATE TABLE IF NOT EXISTS stock (item TEXT PRIMARY KEY, pieces INTEGER NOT NULL CHECK (pieces >= 0));
CREATE TABLE IF NOT EXISTS orders (
    order_id INTEGER PRIMARY KEY, customer INTEGER NOT NULL, item TEXT NOT NULL,
    status TEXT NOT NULL, updated_at TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS of_customer ON orders (customer);
INSERT OR IGNORE INTO stock VALUES ('Tea, 250 g', 5), ('Blue teapot', 1), ('Two cups', 3);
INSERT OR IGNORE INTO orders VALUES
    (1, 1, 'Tea, 250 g', 'placed', '2025-01-31T14:00:00.000000Z'),
    (2, 1, 'Blue teapot', 'paid', '2025-01-31T14:00:00.000000Z'),
    (3, 2, 'Blue teapot', 'paid', '2025-01-31T14:00:00.000000Z'),
    (4, 2, 'Two cups', 'placed', '2025-01-31T14:00:00.000000Z');
"""

app = Flask(__name__)
app.config.update(
    SECRET_KEY=os.environ.get("SECRET_KEY") or secrets.token_hex(),  # a new one ends all sessions
    SESSION_COOKIE_NAME="orders_session",  # cookies know no ports: not that of another application on this host
    SESSION_COOKIE_SAMESITE="Lax",  # the forms of other sites come without it
    MAX_CONTENT_LENGTH=4 * 1024,
)
# On a loopback address, the monitor page would be there, too: for whoever has a ticket, and it shows and sends all.
push = WebSocketServer(app, secret=SECRET, monitoring="off")


# ── The database ─────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def transaction() -> Iterator[sqlite3.Connection]:
    """Commits when the block ends, and rolls back when it fails; an abort() is a failure, too."""
    connection = sqlite3.connect(DATABASE, isolation_level=None)
    with closing(connection), connection:
        connection.row_factory = sqlite3.Row
        connection.execute("BEGIN IMMEDIATE")  # nobody else writes between what we read and what we write
        yield connection


def make_tables() -> None:
    os.makedirs(os.path.dirname(DATABASE), exist_ok=True)
    with closing(sqlite3.connect(DATABASE)) as database:
        database.executescript(TABLES)
    with closing(open_queue(QUEUE)) as queue:
        queue.backlog()  # makes the queue's table: a push server does so as well, but our first order may come sooner


def now() -> str:
    """In UTC, to the microsecond, all of one width: a page compares two such texts to know which is newer."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


# ── What is asked, and by whom ───────────────────────────────────────────────────────────────────────────


@app.errorhandler(HTTPException)
def refuse(error: HTTPException) -> Any:
    """Each refusal is JSON with one sentence."""
    response = error.get_response()  # with its headers, such as Allow
    response.set_data(json.dumps({"success": False, "error": error.description}))
    response.content_type = "application/json"
    return response


def posted_status() -> str:
    if not request.is_json:  # which the forms of other sites cannot send: so this keeps them out as well
        abort(415, "The Content-Type must be application/json.")
    try:
        body = json.loads(request.get_data())
    except (ValueError, RecursionError):
        abort(400, "The body must be JSON in UTF-8.")
    status = body.get("status") if isinstance(body, dict) else None
    if not isinstance(status, str) or status not in TRANSITIONS:
        abort(400, f"The body must be a JSON object whose status is one of {', '.join(TRANSITIONS)}.")
    return status


def current_user() -> str:
    if session.get("user") not in (STAFF, *CUSTOMERS):
        abort(401, "Log in first: load the page anew.")
    return str(session["user"])


def topic_of(user: str) -> str:
    return STAFF if user == STAFF else f"customer:{CUSTOMERS[user]}"


# ── The application ──────────────────────────────────────────────────────────────────────────────────────


@app.put("/api/orders/<int:order_id>/status")
def change_status(order_id: int) -> Any:
    if current_user() != STAFF:
        abort(403, "Only staff may change an order.")
    status = posted_status()
    try:
        with transaction() as database:
            change = changed(database, order_id, status)
    except sqlite3.IntegrityError:  # stock has a CHECK. The order is as it was, and the event has never been
        abort(409, "There is no such piece left in stock.")
    return jsonify(success=True, **change)


def changed(database: sqlite3.Connection, order_id: int, status: str) -> Dict[str, Any]:
    """The order, its event and the stock, all in the caller's transaction; what raises undoes all three."""
    number = min(order_id, sys.maxsize)  # the largest that SQLite can compare with
    order = database.execute("SELECT * FROM orders WHERE order_id = ?", (number,)).fetchone()
    if order is None:
        abort(404, "There is no such order.")
    if status not in TRANSITIONS[order["status"]]:
        possible = " or ".join(TRANSITIONS[order["status"]]) or "nothing else"
        abort(409, f"The order is {order['status']} and can become {possible}.")
    # Never less than before, also if the clock was put back: pages leave out what is older than what they show.
    change = {"order_id": order_id, "status": status, "updated_at": max(now(), order["updated_at"])}
    database.execute("UPDATE orders SET status = :status, updated_at = :updated_at WHERE order_id = :order_id", change)
    # Given the connection instead of a queue's name, queue_event writes a row into this very transaction.
    if not queue_event(database, "order_status_changed", change, to=[f"customer:{order['customer']}", STAFF]):
        abort(503, "The change could not be announced, so it was not made; the log says why.")
    if status == "shipped":
        database.execute("UPDATE stock SET pieces = pieces - 1 WHERE item = ?", (order["item"],))
    return change


@app.get("/api/orders")
def orders() -> Any:
    user = current_user()
    mine = CUSTOMERS.get(user)  # None is staff
    with transaction() as database:
        rows = database.execute("SELECT order_id, item, status, updated_at FROM orders"
                                " WHERE ? IS NULL OR customer = ? ORDER BY order_id", (mine, mine)).fetchall()
    return uncached(jsonify([dict(row) for row in rows]))


@app.get("/ticket")
def ticket() -> Response:
    """Lets its user hear of what is the user's, if it is used within a minute; the page fetches one each time."""
    user = current_user()
    key = SECRET.splitlines()[0]  # of several, while they are changed, the first is the new one
    return uncached(Response(sign_ticket(key, user=user, topics=[topic_of(user)]), mimetype="text/plain"))


@app.post("/login")
def login() -> Any:
    user, password = request.form.get("user"), request.form.get("password", "")
    if user not in (STAFF, *CUSTOMERS) or not hmac.compare_digest(password.encode(), PASSWORD.encode()):
        abort(403, "There is no such user with this password.")
    session["user"] = user
    return redirect(url_for("page"), 303)


@app.post("/logout")
def logout() -> Any:
    user = session.pop("user", None)
    for conn in push.get_connections():  # a connection outlives the session that it was opened with
        if conn.user == user:
            conn.close(4001, "logged out")
    return redirect(url_for("page"), 303)


@app.get("/")
def page() -> Response:
    steps = TRANSITIONS if session.get("user") == STAFF else {}
    return uncached(Response(render_template_string(PAGE, users=(*CUSTOMERS, STAFF), steps=steps, script=script_url())))


def script_url() -> str:
    """Of the push server's script, which finds the server by it: on the host that the browser knows us by."""
    host = re.sub(r":\d+$", "", request.host)
    url = PUSH_URL or f"ws://{host}:{push.url.rpartition(':')[2]}/"
    return urljoin(url.replace("ws", "http", 1), "/wsqueue.js")


def uncached(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    return response


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<!-- The browser refuses innerHTML and its like: what comes from the database is text and never becomes markup. -->
<meta http-equiv="Content-Security-Policy" content="require-trusted-types-for 'script'">
<link rel="icon" href="data:,">
<title>Orders</title>
<style>
  :root { color-scheme: light dark; --line: #d5d9e0; --quiet: #5b6472; --accent: #2f52c9; --on-accent: #fff;
    --tint: #eef1f6; --good: #12753a; --bad: #b3261e; }
  @media (prefers-color-scheme: dark) { :root { --line: #3a404a; --quiet: #a3acba; --accent: #9fb4ff;
    --on-accent: #101836; --tint: #262b33; --good: #6fdc95; --bad: #ff9a92; } }
  * { box-sizing: border-box; }
  body { margin: 0 auto; padding: 0 1rem 2rem; max-width: 46rem; font: 16px/1.45 system-ui, sans-serif; }
  header, header form, li { display: flex; flex-wrap: wrap; gap: .4rem .9rem; align-items: center; }
  header { border-bottom: 1px solid var(--line); justify-content: space-between; padding: .6rem 0; }
  h1 { font-size: 1.1rem; margin: 0; }
  small, #status, label { color: var(--quiet); font-size: .82rem; }
  ul { list-style: none; margin: 0; padding: 0; }
  li { padding: .9rem 0; border-bottom: 1px solid var(--line); }
  li > div { flex: 1 1 12rem; display: grid; overflow-wrap: anywhere; }
  .state { padding: .15rem .7rem; border-radius: 1rem; background: var(--tint); font-weight: 600; font-size: .9rem; }
  .delivered { color: var(--good); } .cancelled, .returned { color: var(--bad); }
  .login { display: grid; gap: .8rem; max-width: 20rem; padding: 1rem 0; } label { display: grid; gap: .2rem; }
  input, select, button { font: inherit; padding: .45rem .8rem; border-radius: .5rem; border: 1px solid var(--quiet);
    background: Canvas; color: CanvasText; }
  button { cursor: pointer; } .main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
  li button { font-size: .88rem; }
  :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
  #answer { display: block; padding: .6rem 0; color: var(--bad); } #answer:empty { display: none; }
  .unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
</style>
{% if session.user not in users %}
<header><h1>Orders</h1></header>
<form method="post" action="/login" class="login">
  <label>User <select name="user">{% for user in users %}<option>{{ user }}</option>{% endfor %}</select></label>
  <label>Password <input name="password" type="password" autocomplete="current-password" required></label>
  <button class="main">Log in</button>
</form>
{% else %}
<header>
  <h1>Orders</h1> <span id="status" role="status">not connected</span>
  <form method="post" action="/logout"><span>{{ session.user }}</span> <button>Log out</button></form>
</header>
<output id="answer"></output>
<ul id="orders"></ul>
<p id="news" class="unseen" role="status"></p>
<script src="{{ script }}"></script>
<script>
const steps = {{ steps|tojson }};  // what staff may do; customers look on
const orders = new Map();
const $ = id => document.getElementById(id);

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;  // as text, never as HTML
  made.className = className;
  return made;
}

// What the page loads and what it hears come by two ways, and either may be the later one: the older says nothing new.
function put(order) {
  const known = orders.get(order.order_id);
  if (!known && !order.item) return load();  // an event for an order that was made after the page had loaded
  if (known && order.updated_at < known.updated_at) return;
  const merged = { ...known, ...order };  // an event has less than a row
  if (JSON.stringify(merged) === JSON.stringify(known)) return;  // a repeat: leave the button that is being pressed
  orders.set(order.order_id, merged);
  if (known && known.status !== order.status) $("news").textContent = `Order ${order.order_id}: ${order.status}`;
  const old = document.querySelector(`[data-id="${order.order_id}"]`);
  const made = row(merged), hadFocus = old?.contains(document.activeElement);
  if (old) old.replaceWith(made);
  else $("orders").append(made);
  if (hadFocus) made.querySelector("button")?.focus();  // for who works with the keyboard
}

function row({ order_id, item, status, updated_at }) {
  const made = document.createElement("li"), what = document.createElement("div");
  made.dataset.id = order_id;
  what.append(element("span", item), element("small", `order ${order_id}, ${new Date(updated_at).toLocaleString()}`));
  made.append(what, element("span", status, `state ${status}`));
  for (const next of steps[status] || []) {
    const button = element("button", next);
    button.setAttribute("aria-label", `Order ${order_id}: ${next}`);
    button.onclick = () => change(order_id, next);
    made.append(button);
  }
  return made;
}

async function load() {
  try {
    const response = await fetch("/api/orders");
    if (response.status === 401) return location.reload();  // the session has ended: to the form
    const rows = await response.json();
    if (!response.ok) throw new Error(rows.error);
    rows.forEach(put);
    $("answer").textContent = "";
  } catch (error) {
    $("answer").textContent = `The orders could not be loaded: ${error.message}`;
    setTimeout(load, 3000);
  }
}

async function change(order_id, status) {
  try {
    const response = await fetch(`/api/orders/${order_id}/status`, {
      method: "PUT", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ status }) });
    const answer = await response.json();
    $("answer").textContent = response.ok ? "" : answer.error;
    if (response.ok) put(answer);
  } catch (error) {
    $("answer").textContent = `Not changed: ${error.message}`;
  }
}

load();

const queue = new WSQueue("/", { ticket: async () => {  // a fresh one for each attempt: it lasts a minute
  const response = await fetch("/ticket");
  if (!response.ok) throw new Error((await response.json()).error);
  return response.text();
} });
let wasOpen = false;
queue.on("order_status_changed", put);
queue.onreset = load;  // away for longer than the history reaches
queue.onstatus = status => {
  $("status").textContent = status === "open" ? "connected" : `${status}…`;
  // Once more, when we first hear: what changed after the page loaded the orders, and before this, is missing. After
  // that, WSQueue itself gets what was missed.
  if (status === "open" && !wasOpen) { wasOpen = true; load(); }
};
</script>
{% endif %}
</html>
"""


def port_from(variable: str, default: int) -> int:
    port = int(os.environ.get(variable) or default)
    if not 0 <= port <= 65535:  # werkzeug would listen on what is left of it modulo 65536
        raise ValueError(f"{variable} is {port}, and ports end at 65535")
    return port


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if PUSH_URL and not os.environ.get("WS_SECRET", "").strip():
        sys.exit("PUSH_URL needs WS_SECRET: that of the push server, to sign tickets for it.")
    try:
        make_tables()
        web = make_server(HOST, port_from("APP_PORT", 8080), app, threaded=True)
        if not PUSH_URL:
            push.host(HOST).port(port_from("WS_PORT", 8081)).event_queue(QUEUE).start(background=True)
        url = PUSH_URL or push.url  # an error where another process serves the queue, and this one would stand by
    except (WsqueueError, OSError, ValueError, sqlite3.Error) as error:
        sys.exit(f"cannot start: {error}. Check APP_HOST, APP_PORT, WS_PORT and DATABASE_PATH.")
    print(f"listening on http://{HOST}:{web.server_port}")
    print(f"push server: {url}")
    if not os.environ.get("APP_PASSWORD"):
        print(f"log in as {', '.join(CUSTOMERS)} or {STAFF} with the password {PASSWORD}; ctrl-C ends")
    sys.stdout.flush()
    try:
        web.serve_forever()  # until ctrl-C
    finally:
        push.stop()
    print("stopped")


if __name__ == "__main__":
    main()
