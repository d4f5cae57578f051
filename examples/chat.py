#!/usr/bin/env python3
"""A chat with rooms: a message is saved in SQLite, then queued, and every page in its room shows it once.

    pip install flask
    python examples/chat.py        then open http://127.0.0.1:8080/ in two windows

    POST /api/chat/messages   {"room": "lobby", "text": "hello"}     answers with what is sent as the event new_message:
                              message_id, room, user_id, username, text, sent_at
    GET /api/chat/messages?room=lobby                                the last 50

A room is a topic, room:lobby, and a ticket lets its user hear one room. The push server runs inside the application;
with PUSH_URL there is one elsewhere, which shares the secret and the queue:

    export WS_SECRET=$(openssl rand -hex 32) WS_QUEUE_PATH=/tmp/ws_queue
    python wsqueue.py serve
    PUSH_URL=ws://127.0.0.1:8081/ python examples/chat.py

Environment: APP_HOST, APP_PORT, WS_PORT (0 picks a free one), WS_QUEUE_PATH, DATABASE_PATH, PUSH_URL, WS_SECRET;
SECRET_KEY signs the sessions, and without it each start makes its own.
"""

import json
import logging
import os
import re
import secrets
import sqlite3
import sys
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple
from urllib.parse import urljoin

from flask import Flask, Response, abort, jsonify, redirect, render_template_string, request, session, url_for
from werkzeug.exceptions import HTTPException
from werkzeug.serving import make_server

# Run from a plain checkout, Python looks for modules beside this file; wsqueue.py is one directory up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wsqueue import WebSocketServer, WsqueueError, queue_event, sign_ticket

HERE = Path(__file__).resolve().parent
QUEUE = os.environ.get("WS_QUEUE_PATH") or str(HERE / "logs" / "ws_queue")
DATABASE = os.environ.get("DATABASE_PATH") or str(HERE / "logs" / "chat.db")
HOST = os.environ.get("APP_HOST") or "127.0.0.1"
PUSH_URL = os.environ.get("PUSH_URL")
SECRET = os.environ.get("WS_SECRET", "").strip() or secrets.token_hex()  # a page asks for a ticket whenever it connects

ROOMS = ("lobby", "kitchen", "garden")
SHOWN = 50  # messages that a page begins with
NAME_LIMIT, TEXT_LIMIT = 40, 1000  # characters
# What one may do in a while, in seconds. The messages are counted where they are kept, so the bound holds for all
# threads, for all processes and over a restart, and there is nothing to clean up. An address is bounded as well,
# because whoever may not post any more could come again under another name.
MESSAGES, USERS = (10, 10), (20, 60)
COUNT_MESSAGES = "SELECT count(*) FROM messages WHERE user_id = ? AND sent_at > ?"
COUNT_USERS = "SELECT count(*) FROM users WHERE address = ? AND joined_at > ?"

app = Flask(__name__)
app.config.update(
    SECRET_KEY=os.environ.get("SECRET_KEY") or secrets.token_hex(),  # a new one ends all sessions
    SESSION_COOKIE_NAME="chat_session",  # cookies know no ports: not that of another application on this host
    SESSION_COOKIE_SAMESITE="Lax",
    MAX_CONTENT_LENGTH=16 * 1024,  # a text of 1,000 characters is 12 KB at most, each as \\ud83d\\udc41
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
    os.makedirs(os.path.dirname(os.path.abspath(DATABASE)), exist_ok=True)
    with transaction() as database:
        # AUTOINCREMENT: the number of what was deleted is never given to another one.
        database.execute("""CREATE TABLE IF NOT EXISTS users (
            user_id INTEGER PRIMARY KEY AUTOINCREMENT, username TEXT NOT NULL, address TEXT NOT NULL,
            joined_at TEXT NOT NULL)""")
        database.execute("""CREATE TABLE IF NOT EXISTS messages (
            message_id INTEGER PRIMARY KEY AUTOINCREMENT, room TEXT NOT NULL, user_id INTEGER NOT NULL,
            username TEXT NOT NULL, text TEXT NOT NULL, sent_at TEXT NOT NULL)""")
        database.execute("CREATE INDEX IF NOT EXISTS of_room ON messages (room, message_id)")
        database.execute("CREATE INDEX IF NOT EXISTS of_user ON messages (user_id, sent_at)")
        database.execute("CREATE INDEX IF NOT EXISTS of_address ON users (address, joined_at)")


def ago(seconds: float) -> str:
    """The time so many seconds ago: in UTC, all of one width, so that texts compare as times do."""
    at = datetime.now(timezone.utc) - timedelta(seconds=seconds)
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def check_rate(database: sqlite3.Connection, count: str, who: Any, bound: Tuple[int, int]) -> None:
    most, seconds = bound
    if database.execute(count, (who, ago(seconds))).fetchone()[0] >= most:
        response = jsonify(success=False, error=f"That is {most} within {seconds} seconds: wait a little.")
        response.status_code, response.headers["Retry-After"] = 429, str(seconds)
        abort(response)


# ── What is asked, and by whom ───────────────────────────────────────────────────────────────────────────


@app.errorhandler(HTTPException)
def refuse(error: HTTPException) -> Any:
    """Each refusal is JSON with one sentence."""
    response = error.get_response()  # with its headers, such as Allow; or the whole answer that abort() was given
    if error.response is None:
        response.set_data(json.dumps({"success": False, "error": error.description}))
        response.content_type = "application/json"
    return response


def posted(*names: str) -> List[str]:
    """The texts of these names in the JSON object that was posted; what is none is None."""
    if not request.is_json:  # which the forms of other sites cannot send: so this keeps them out as well
        abort(415, "The Content-Type must be application/json.")
    try:
        body = json.loads(request.get_data())
        json.dumps(body, ensure_ascii=False).encode()  # JSON can hold half a surrogate, which no UTF-8 can
    except (ValueError, RecursionError):
        abort(400, "The body must be JSON in UTF-8.")
    if not isinstance(body, dict) or not all(isinstance(body.get(name), str) for name in names):
        abort(400, f"The body must be a JSON object with the texts {' and '.join(names)}.")
    return [body[name].strip() for name in names]


def current_user() -> int:
    if "user_id" not in session:
        abort(401, "Say your name first: load the page anew.")
    return int(session["user_id"])


def entered(room: Any) -> str:
    """The room, if the user may be there: the place for a rule of yours, which then holds for reading and writing."""
    current_user()
    if room not in ROOMS:
        abort(404, f"There is no such room: the rooms are {', '.join(ROOMS)}.")
    return str(room)


# ── The application ──────────────────────────────────────────────────────────────────────────────────────


@app.post("/api/chat/users")
def join() -> Any:
    """Whoever says a name is let in: put your login here. Two may have one name; their numbers tell them apart."""
    [name] = posted("username")
    if not 1 <= len(name) <= NAME_LIMIT or not name.isprintable():
        abort(400, f"A name has 1 to {NAME_LIMIT} characters, all in one line.")
    address = str(request.remote_addr)
    with transaction() as database:
        check_rate(database, COUNT_USERS, address, USERS)
        made = database.execute("INSERT INTO users (username, address, joined_at) VALUES (?, ?, ?)",
                                (name, address, ago(0)))
    session["user_id"], session["username"] = made.lastrowid, name
    return jsonify(success=True, user_id=made.lastrowid, username=name), 201


@app.post("/api/chat/messages")
def send_message() -> Any:
    room, text = posted("room", "text")
    room, user = entered(room), current_user()
    if not 1 <= len(text) <= TEXT_LIMIT:
        abort(400, f"A message has 1 to {TEXT_LIMIT} characters.")
    with transaction() as database:
        check_rate(database, COUNT_MESSAGES, user, MESSAGES)
        message = {"room": room, "user_id": user, "username": session["username"], "text": text, "sent_at": ago(0)}
        made = database.execute("INSERT INTO messages (room, user_id, username, text, sent_at)"
                                " VALUES (:room, :user_id, :username, :text, :sent_at)", message)
        message["message_id"] = made.lastrowid
    # Only now, after the commit: a page that hears of a message must also find it when it loads. If we die in between,
    # pages show it when they load next; where that will not do, order_status.py makes both one transaction.
    queued = queue_event(QUEUE, "new_message", message, to=f"room:{room}")
    return jsonify(success=True, queued=queued, **message), 201


@app.get("/api/chat/messages")
def last_messages() -> Any:
    room = entered(request.args.get("room"))
    with transaction() as database:
        rows = database.execute(
            "SELECT * FROM messages WHERE room = ? ORDER BY message_id DESC LIMIT ?", (room, SHOWN)).fetchall()
    return uncached(jsonify([dict(row) for row in reversed(rows)]))


@app.get("/ticket")
def ticket() -> Response:
    """Lets the user hear one room, if it is used within a minute; the page fetches one each time it connects."""
    room, user = entered(request.args.get("room")), current_user()
    key = SECRET.splitlines()[0]  # of several, while they are changed, the first is the new one
    return uncached(Response(sign_ticket(key, user=user, topics=[f"room:{room}"]), mimetype="text/plain"))


@app.get("/")
def home() -> Any:
    return redirect(url_for("page", room=ROOMS[0]))


@app.get("/rooms/<room>")
def page(room: str) -> Any:
    if room not in ROOMS:
        abort(404, f"There is no such room: the rooms are {', '.join(ROOMS)}.")
    limits: Dict[str, int] = {"name_limit": NAME_LIMIT, "text_limit": TEXT_LIMIT}
    return uncached(Response(render_template_string(PAGE, room=room, rooms=ROOMS, script=script_url(), **limits)))


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
<!-- The browser refuses innerHTML and its like: what others wrote is shown as text and never becomes markup. -->
<meta http-equiv="Content-Security-Policy" content="require-trusted-types-for 'script'">
<link rel="icon" href="data:,">
<title>Chat: {{ room }}</title>
<style>
  :root { color-scheme: light dark; --line: #d5d9e0; --quiet: #5b6472; --accent: #2f52c9; --on-accent: #fff;
    --tint: #f1f3f7; --mine: #e3eaff; --bad: #b3261e; }
  @media (prefers-color-scheme: dark) { :root { --line: #3a404a; --quiet: #a3acba; --accent: #9fb4ff;
    --on-accent: #101836; --tint: #22262d; --mine: #26315a; --bad: #ff9a92; } }
  * { box-sizing: border-box; }
  body { margin: 0 auto; padding: 0 1rem; max-width: 46rem; height: 100vh; height: 100dvh; display: flex;
    flex-direction: column; font: 16px/1.45 system-ui, sans-serif; }
  header, nav, form { display: flex; flex-wrap: wrap; gap: .4rem .7rem; align-items: baseline; padding: .6rem 0; }
  header { border-bottom: 1px solid var(--line); justify-content: space-between; }
  h1 { font-size: 1.1rem; margin: 0; }
  a { color: var(--accent); } nav { padding: 0; } nav [aria-current] { color: inherit; font-weight: 650;
    text-decoration: none; }
  small, #status { color: var(--quiet); font-size: .82rem; }
  ol { flex: 1; overflow-y: auto; margin: 0; padding: .8rem 0; list-style: none; display: flex;
    flex-direction: column; gap: .45rem; }
  ol:empty::before { content: "Nobody has said anything here yet."; color: var(--quiet); }
  li { background: var(--tint); border-radius: .7rem; padding: .4rem .75rem; max-width: 85%; align-self: flex-start;
    overflow-wrap: anywhere; }
  li.mine { background: var(--mine); align-self: flex-end; }
  li p { margin: 0; white-space: pre-wrap; }
  form { border-top: 1px solid var(--line); align-items: end; }
  label { flex: 1 1 12rem; display: grid; gap: .2rem; font-size: .82rem; color: var(--quiet); }
  input, button { font: inherit; padding: .5rem .8rem; border-radius: .5rem; border: 1px solid var(--quiet); }
  input { width: 100%; background: Canvas; color: CanvasText; }
  button { background: var(--accent); border-color: var(--accent); color: var(--on-accent); font-weight: 600;
    cursor: pointer; }
  :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
  output { flex-basis: 100%; color: var(--bad); font-size: .88rem; } output:empty { display: none; }
</style>
<header>
  <h1>Chat</h1>
  <nav aria-label="Rooms">{% for other in rooms %}
    <a href="/rooms/{{ other }}"{% if other == room %} aria-current="page"{% endif %}>{{ other }}</a>{% endfor %}</nav>
  {% if session.user_id %}<span id="status" role="status">not connected</span>{% endif %}
</header>
{% if not session.user_id %}
<form id="join">
  <label>Your name <input name="username" maxlength="{{ name_limit }}" autocomplete="nickname" required></label>
  <button>Enter</button> <output></output>
</form>
<script>
document.getElementById("join").onsubmit = async event => {
  event.preventDefault();
  const body = JSON.stringify(Object.fromEntries(new FormData(event.target)));
  const response = await fetch("/api/chat/users",
                               { method: "POST", headers: { "Content-Type": "application/json" }, body });
  if (response.ok) location.reload();
  else event.target.querySelector("output").textContent = (await response.json()).error;
};
</script>
{% else %}
<ol id="messages" role="log" aria-label="Messages" tabindex="0"></ol>
<form id="send">
  <label>Message <input name="text" maxlength="{{ text_limit }}" autocomplete="off" required></label>
  <button>Send</button> <output></output>
</form>
<script src="{{ script }}"></script>
<script>
const room = {{ room|tojson }}, me = {{ session.user_id|tojson }}, MOST_SHOWN = 500;
const list = document.getElementById("messages"), form = document.getElementById("send");
const say = text => { form.querySelector("output").textContent = text; };
const idOf = item => Number(item.dataset.id);

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;  // as text, never as HTML: anyone may have written it
  return made;
}

// A message may come several times: as the answer to a post, as an event, as one of the last when the page loads. So
// it replaces what is there under its id; and it is put where its id belongs, since two may arrive in the wrong order.
function put(message) {
  const wasAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  const item = document.createElement("li"), head = document.createElement("small");
  item.dataset.id = message.message_id;
  item.className = message.user_id === me ? "mine" : "";
  // bdi: a name that is written from right to left leaves what stands beside it alone.
  const at = new Date(message.sent_at).toLocaleTimeString();
  head.append(element("bdi", message.username), ` #${message.user_id}, ${at}`);
  item.append(head, element("p", message.text));
  const old = list.querySelector(`[data-id="${item.dataset.id}"]`);
  if (old) old.replaceWith(item);
  else list.insertBefore(item, [...list.children].find(other => idOf(other) > message.message_id) || null);
  if (list.childElementCount > MOST_SHOWN) list.firstElementChild.remove();
  if (wasAtEnd) list.scrollTop = list.scrollHeight;
}

async function load() {
  try {
    const response = await fetch(`/api/chat/messages?room=${room}`);
    if (response.status === 401) return location.reload();  // the session has ended: to the form
    const messages = await response.json();
    if (!response.ok) throw new Error(messages.error);
    // Between what was loaded and what is older, there may be a hole.
    for (const item of [...list.children]) if (messages.length && idOf(item) < messages[0].message_id) item.remove();
    messages.forEach(put);
    say("");
  } catch (error) {
    say(`The last messages could not be loaded: ${error.message}`);
    setTimeout(load, 3000);
  }
}

load();

form.onsubmit = async event => {
  event.preventDefault();
  const text = form.elements.text.value;
  try {
    const response = await fetch("/api/chat/messages", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ room, text }) });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    put(answer);
    if (form.elements.text.value === text) form.reset();
    say(answer.queued ? "" : "Saved, but the others see it only when they load the page.");
  } catch (error) {
    say(`Not sent: ${error.message}`);
  }
};

const queue = new WSQueue("/", { ticket: async () => {  // a fresh one for each attempt: it lasts a minute
  const response = await fetch(`/ticket?room=${room}`);
  if (!response.ok) throw new Error((await response.json()).error);
  return response.text();
} });
let wasOpen = false;
queue.on("new_message", put);
queue.onreset = load;  // away for longer than the history reaches
queue.onstatus = status => {
  document.getElementById("status").textContent = status === "open" ? "connected" : `${status}…`;
  // Once more, when we first hear: what was sent after the page loaded the last messages, and before this, is missing.
  // After that, WSQueue itself gets what was missed.
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
        sys.exit(f"cannot start: {error}. Check APP_HOST, APP_PORT, WS_PORT, WS_QUEUE_PATH and DATABASE_PATH.")
    print(f"listening on http://{HOST}:{web.server_port}")
    print(f"push server: {url}; ctrl-C ends", flush=True)
    try:
        web.serve_forever()  # until ctrl-C
    finally:
        push.stop()
    print("stopped")


if __name__ == "__main__":
    main()
