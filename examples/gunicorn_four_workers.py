#!/usr/bin/env python3
"""A Flask application under gunicorn, with four workers of which each can push to every browser.

    pip install flask gunicorn
    python examples/gunicorn_four_workers.py            then open http://127.0.0.1:8080/ in two windows

which is short for `gunicorn --config examples/gunicorn_four_workers.conf.py`, and takes gunicorn's other options. Its
settings start a push server in each worker: one serves, three stand by, and when it ends, be it by `kill -9`, another
one goes on within 2 s. Pages come back by themselves and are sent what they missed.

Environment: APP_HOST, APP_PORT (0 picks a free one), WS_PORT (not 0: every worker must come to the same),
WS_QUEUE_PATH.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any, Dict, Tuple
from urllib.parse import urljoin

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":  # up here, since what follows is for the workers
    settings = str(HERE / "gunicorn_four_workers.conf.py")
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", "--config", settings, *sys.argv[1:]])  # noqa: S606

from flask import Flask, abort, render_template_string, request

# Run from a plain checkout, Python looks for modules beside this file; wsqueue.py is one directory up.
sys.path.insert(0, str(HERE.parent))

from wsqueue import WebSocketServer, queue_event

QUEUE = os.environ.get("WS_QUEUE_PATH") or str(HERE / "logs" / "ws_queue")
WS_PORT = int(os.environ.get("WS_PORT") or 8081)
TEXT_LIMIT = 1000  # characters of a note

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 64 * 1024

# Made here, so that routes and authenticate() can be added to it; started by each worker, see the settings.
push = WebSocketServer(app).host(os.environ.get("APP_HOST") or "127.0.0.1").port(WS_PORT).event_queue(QUEUE)


@app.post("/notes")
def publish() -> Tuple[Dict[str, Any], int]:
    """An event for everybody, from whichever worker gets the request: push.broadcast() would reach its own clients,
    and only one worker has any."""
    note = request.get_json()  # a page of another site cannot post JSON without asking first
    text = note.get("text") if isinstance(note, dict) else None
    if not isinstance(text, str) or not 1 <= len(text) <= TEXT_LIMIT:
        abort(400, f'Send {{"text": …}} with 1 to {TEXT_LIMIT} characters.')
    if not queue_event(QUEUE, "note", {"text": text, "worker": os.getpid()}):
        abort(503, "The note could not be queued; the log says why.")
    return {"worker": os.getpid()}, 202


@app.get("/worker")
def worker() -> Dict[str, Any]:
    """Which worker answers, and whether it is the one that serves."""
    return {"worker": os.getpid(), "serves": push.is_running()}


@app.get("/")
def page() -> str:
    host = re.sub(r":\d+$", "", request.host)  # the push server is on the host that the browser knows us by
    url = f"ws://{host}:{WS_PORT}/"
    return render_template_string(PAGE, url=url, script=urljoin(url.replace("ws", "http", 1), "/wsqueue.js"))


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Notes</title>
<form id="send">
  <label>Note <input name="text" maxlength="1000" required></label>
  <button>Send</button> <output id="status">connecting</output> <output id="answer"></output>
</form>
<ul id="notes"></ul>
<script src="{{ script }}"></script>
<script>
const show = (id, text) => { document.getElementById(id).textContent = text; };
const queue = new WSQueue({{ url|tojson }});
queue.onstatus = status => show("status", status);
queue.on("note", note => {
  const item = document.createElement("li");
  item.textContent = `worker ${note.worker}: ${note.text}`;  // as text, never as HTML: anyone may have written it
  document.getElementById("notes").prepend(item);
});
document.getElementById("send").onsubmit = async event => {
  event.preventDefault();
  const body = JSON.stringify({ text: event.target.text.value });
  const response = await fetch("/notes", { method: "POST", body, headers: { "Content-Type": "application/json" } });
  show("answer", response.ok ? "sent" : `not sent: ${response.status} ${response.statusText}`);
};
</script>
</html>
"""
