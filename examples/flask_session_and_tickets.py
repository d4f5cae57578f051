#!/usr/bin/env python3
"""A Flask application with a login, and a push server that knows who is logged in.

    pip install flask
    python examples/flask_session_and_tickets.py        then open http://127.0.0.1:8080/ as two users

The push server runs inside the application and opens the session cookie that Flask has signed: a browser sends
it to every port of its host, so who is logged in here is logged in there.

Another host never sees that cookie. With PUSH_URL the application starts no server, and hands out tickets for
the one at that URL instead; they share the secret that signs them, and the queue:

    export WS_SECRET=$(openssl rand -hex 32) WS_QUEUE_PATH=/tmp/ws_queue
    python wsqueue.py serve --host localhost --allowed-origins http://127.0.0.1:8080
    PUSH_URL=ws://localhost:8081/ python examples/flask_session_and_tickets.py

Environment: APP_HOST, APP_PORT, WS_PORT (0 picks a free one), WS_QUEUE_PATH, PUSH_URL, WS_SECRET; SECRET_KEY signs
the sessions and APP_PASSWORD is everybody's, and without them, each start makes its own.
"""

import hmac
import logging
import os
import re
import secrets
import sys
from pathlib import Path
from typing import Any, Optional
from urllib.parse import urljoin

from flask import Flask, Response, abort, redirect, render_template_string, request, session, url_for
from werkzeug.serving import make_server

# Run from a plain checkout, Python looks for modules beside this file; wsqueue.py is one directory up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wsqueue import WebSocketServer, WsqueueError, queue_event, sign_ticket

HERE = Path(__file__).resolve().parent
QUEUE = os.environ.get("WS_QUEUE_PATH") or str(HERE / "logs" / "ws_queue")
HOST = os.environ.get("APP_HOST") or "127.0.0.1"
PUSH_URL = os.environ.get("PUSH_URL")
PASSWORD = os.environ.get("APP_PASSWORD") or secrets.token_urlsafe(9)
USERS = ("ada", "grace")
TEXT_LIMIT = 1000  # characters of a message

app = Flask(__name__)
app.config.update(
    SECRET_KEY=os.environ.get("SECRET_KEY") or secrets.token_hex(),  # a new one ends all sessions
    SESSION_COOKIE_NAME="example_session",  # cookies know no ports: not that of another application on this host
    SESSION_COOKIE_SAMESITE="Lax",  # the forms of other sites come without it
    MAX_CONTENT_LENGTH=64 * 1024,
)
push = WebSocketServer(app, monitoring="off")  # that page would show all topics to whoever is logged in, and send


# ── The push server's side ───────────────────────────────────────────────────────────────────────────────


@push.authenticate
def logged_in_user(asking: Any) -> Optional[str]:
    """Whose session comes with a request to the push server: the user, or None, who is refused.

    Runs in a thread of the push server, where no request of Flask's is; so this makes one, with the same cookies.
    Whatever keeps the session, also on the server's side, works as it does in a view.
    """
    with app.test_request_context(headers={"Cookie": asking.headers.get("cookie", "")}):
        return session.get("user")


def push_url() -> str:
    """Where this page's browser finds the push server: on the host that it knows us by, on the other port."""
    if PUSH_URL:
        return PUSH_URL
    host = re.sub(r":\d+$", "", request.host)
    return f"ws://{host}:{push.url.rpartition(':')[2]}/"


# ── The application ──────────────────────────────────────────────────────────────────────────────────────


@app.get("/")
def page() -> str:
    url = push_url()
    script = urljoin(url.replace("ws", "http", 1), "/wsqueue.js")
    return render_template_string(PAGE, users=USERS, url=url, script=script, tickets=bool(PUSH_URL))


@app.post("/login")
def login() -> Any:
    user, password = request.form.get("user"), request.form.get("password", "")
    if user not in USERS or not hmac.compare_digest(password.encode(), PASSWORD.encode()):
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


@app.post("/messages")
def send_message() -> Any:
    """An event for one user, wherever and however often that user is connected."""
    sender, to, text = current_user(), request.form.get("to"), request.form.get("text", "")
    if to not in USERS or not 1 <= len(text) <= TEXT_LIMIT:
        abort(400, f"Send a text of 1 to {TEXT_LIMIT} characters to one of {', '.join(USERS)}.")
    if not queue_event(QUEUE, "message", {"from": sender, "text": text}, to=f"user:{to}"):
        abort(503, "The message could not be queued; the log says why.")
    return "", 204


@app.get("/ticket")
def ticket() -> Response:
    """Lets its user connect to the push server within the next minute; the page fetches one each time."""
    if not PUSH_URL:
        abort(404, "Here the session is enough.")
    secret = os.environ["WS_SECRET"].strip().splitlines()[0]  # of several, the first is the newest
    made = Response(sign_ticket(secret, user=current_user()), mimetype="text/plain")
    made.headers["Cache-Control"] = "no-store"
    return made


def current_user() -> str:
    user = session.get("user")
    if user is None:
        abort(401, "Log in first.")
    return str(user)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Messages</title>
{% if not session.user %}
<form method="post" action="/login">
  <label>User <select name="user">{% for user in users %}<option>{{ user }}</option>{% endfor %}</select></label>
  <label>Password <input name="password" type="password" autocomplete="current-password" required></label>
  <button>Log in</button>
</form>
{% else %}
<form method="post" action="/logout">
  <output id="user">{{ session.user }}</output>, <output id="status">connecting</output> <button>Log out</button>
</form>
<form method="post" action="/messages" id="send">
  <label>To <select name="to">{% for user in users %}<option>{{ user }}</option>{% endfor %}</select></label>
  <label>Text <input name="text" maxlength="1000" required></label>
  <button>Send</button> <output id="answer"></output>
</form>
<ul id="messages"></ul>
<script src="{{ script }}"></script>
<script>
const show = (id, text) => { document.getElementById(id).textContent = text; };
{% if tickets %}
const queue = new WSQueue({{ url|tojson }}, { ticket: async () => {
  const response = await fetch("/ticket");
  if (!response.ok) throw new Error(await response.text());
  return response.text();
} });
{% else %}
const queue = new WSQueue({{ url|tojson }});
{% endif %}
queue.onstatus = status => show("status", status);
queue.on("message", message => {
  const item = document.createElement("li");
  item.textContent = `${message.from}: ${message.text}`;  // as text, never as HTML: anyone may have written it
  document.getElementById("messages").prepend(item);
});
document.getElementById("send").onsubmit = async event => {
  event.preventDefault();
  const response = await fetch("/messages", { method: "POST", body: new FormData(event.target) });
  show("answer", response.ok ? "sent" : `not sent: ${response.status} ${response.statusText}`);
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
        web = make_server(HOST, port_from("APP_PORT", 8080), app, threaded=True)
        if not PUSH_URL:
            push.host(HOST).port(port_from("WS_PORT", 8081)).event_queue(QUEUE).start(background=True)
        url = PUSH_URL or push.url  # an error where another process serves the queue, and this one would stand by
    except (WsqueueError, OSError, ValueError) as error:
        sys.exit(f"cannot start: {error}. Check APP_HOST, APP_PORT, WS_PORT and WS_QUEUE_PATH.")
    print(f"listening on http://{HOST}:{web.server_port}")
    print(f"push server: {url}")
    if not os.environ.get("APP_PASSWORD"):
        print(f"log in as {' or '.join(USERS)} with the password {PASSWORD}; ctrl-C ends", flush=True)
    sys.stdout.flush()
    try:
        web.serve_forever()  # until ctrl-C
    finally:
        push.stop()
    print("stopped")


if __name__ == "__main__":
    main()
