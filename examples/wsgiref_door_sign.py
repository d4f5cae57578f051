#!/usr/bin/env python3
"""A door sign with the standard library alone: whoever changes it, changes it on every page.

    python examples/wsgiref_door_sign.py        then open http://127.0.0.1:8080/ in two windows

Environment: APP_HOST, APP_PORT, WS_PORT (0 picks a free one), WS_QUEUE_PATH.
"""

import html
import os
import re
import sys
import threading
import time
from pathlib import Path
from socketserver import ThreadingMixIn
from string import Template
from typing import Any, Callable, Dict, List
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

# Run from a plain checkout, Python looks for modules beside this file; wsqueue.py is one directory up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wsqueue import Connection, WebSocketServer, WsqueueError, queue_event

QUEUE = os.environ.get("WS_QUEUE_PATH") or str(Path(__file__).resolve().parent / "logs" / "ws_queue")
HOST, PORT = os.environ.get("APP_HOST") or "127.0.0.1", os.environ.get("APP_PORT") or "8080"
PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Door sign</title>
<h1>$text</h1>
<form method="post"><input name="text" maxlength="100" required> <button>Change</button></form>
<script type="module">
const { WSQueue } = await import("http://" + location.hostname + ":$port/wsqueue.mjs");
let shown = 0;
new WSQueue("/").on("sign", ({ text, at }) => {
  if (at < shown) return;  // an older one that a newer has overtaken
  shown = at;
  document.querySelector("h1").textContent = text;  // as text, never as HTML: anyone may have written it
});
</script>
</html>
""")

sign = {"text": "Come in", "at": time.time()}
lock = threading.Lock()  # held for a change: events are queued in the order of the changes
push = WebSocketServer(history_events=0)  # whoever comes back is told the present sign, and needs no earlier ones


@push.on("/")
def greet(conn: Connection) -> None:
    """Tell a new client how things stand: they may have changed since its page was made."""
    conn.send({"event": "sign", "payload": sign})


def app(environ: Dict[str, Any], start_response: Callable[..., Any]) -> List[bytes]:
    status, headers, body = "200 OK", [("Content-Type", "text/html; charset=utf-8"), ("Cache-Control", "no-store")], ""
    if environ["REQUEST_METHOD"] != "POST":
        body = PAGE.substitute(text=html.escape(sign["text"]), port=push.url.rpartition(":")[2])
    elif change(posted_text(environ)):
        status = "303 See Other"
        headers.append(("Location", "/"))
    else:
        status, body = "400 Bad Request", "Write 1 to 100 characters into the form of this page."
    start_response(status, headers)
    return [body.encode()]


def posted_text(environ: Dict[str, Any]) -> str:
    """What the form's field holds; nothing for the form of another site, or one of 10,000 bytes and more."""
    origin, length = environ.get("HTTP_ORIGIN", ""), environ.get("CONTENT_LENGTH", "")
    if origin.rpartition("/")[2] not in ("", environ.get("HTTP_HOST")) or not re.fullmatch("[0-9]{1,4}", length):
        return ""
    fields = parse_qs(environ["wsgi.input"].read(int(length)).decode("ascii", "replace"))
    return fields.get("text", [""])[0].strip()


def change(text: str) -> bool:
    global sign
    if not 1 <= len(text) <= 100:
        return False
    with lock:
        sign = {"text": text, "at": time.time()}
        queue_event(QUEUE, "sign", sign)  # after the change, which stays if this fails; the log says why
    return True


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # one for each request: browsers also open connections that they do not use yet

    def handle_error(self, request: Any, client_address: Any) -> None:
        print(f"gave up on {client_address[0]}: {sys.exc_info()[1]}", file=sys.stderr)  # it hung up, or said nothing


class Handler(WSGIRequestHandler):
    timeout = 10  # seconds that a client may be silent


def main() -> None:
    try:
        push.host(HOST).port(int(os.environ.get("WS_PORT") or 8081)).event_queue(QUEUE).start(background=True)
        url = push.url  # an error where another process serves the queue, and this one would stand by
        with make_server(HOST, int(PORT), app, Server, Handler) as web:
            print(f"listening on http://{HOST}:{web.server_port}; ctrl-C ends")
            print(f"push server: {url}", flush=True)
            web.serve_forever()
    except (WsqueueError, OSError, ValueError, OverflowError) as error:
        sys.exit(f"cannot start at {HOST}:{PORT}: {error}. Check APP_HOST, APP_PORT, WS_PORT and WS_QUEUE_PATH.")
    except KeyboardInterrupt:
        print("stopped")
    finally:
        push.stop()


if __name__ == "__main__":
    main()
