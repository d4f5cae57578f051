#!/usr/bin/env python3
"""A plain WSGI API that tells every connected browser what has just happened.

    python examples/event_queue_websocket_server.py      in one terminal
    python examples/api_with_websocket_queue.py          in another; then open http://127.0.0.1:8080/

It holds no connection and knows no browser: each call changes the store and drops an event into the queue
directory, from where the WebSocket server takes it. The same `queue_event` line works in Flask or Django.
Environment: API_HOST, API_PORT (0 picks a free one), WS_QUEUE_PATH.
"""

import itertools
import json
import logging
import os
import re
import sys
import threading
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, Callable, Dict, List, NamedTuple, Tuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

# Run from a plain checkout, Python looks for modules beside this file; wsqueue.py is one directory up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wsqueue import WebSocketServer

HERE = Path(__file__).resolve().parent
BODY_LIMIT = 64 * 1024  # bytes; an appointment needs a few hundred
DRAIN_LIMIT = 1024 * 1024  # bytes of a refused body that are still read, see read_body()
CLIENT_TIMEOUT = 10  # seconds a client may stay silent in the middle of a request
STATUSES = ("scheduled", "confirmed", "checked_in", "completed")  # of appointments; DELETE cancels one
TYPES = ("info", "success", "warning", "error")  # of notifications
log = logging.getLogger("api")


# ── Requests and responses ───────────────────────────────────────────────────────────────────────────────


class Response(NamedTuple):
    """What goes back to the client."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Tuple[Tuple[str, str], ...] = ()


class Refusal(Exception):
    """A request that is answered with a 4xx status and a sentence that says what to change."""

    def __init__(self, status: int, reason: str, *headers: Tuple[str, str]) -> None:
        super().__init__(reason)
        self.response = json_response(status, {"success": False, "error": reason}, *headers)


def json_response(status: int, value: Dict[str, Any], *headers: Tuple[str, str]) -> Response:
    return Response(status, json.dumps(value).encode("ascii"), headers=headers)


def read_body(environ: Dict[str, Any]) -> bytes:
    """Read the whole body, or refuse it.

    This happens before anything else is looked at: closing a socket that still holds unread bytes resets
    the connection, and the client would see an error of its network instead of the reason.
    """
    declared = environ.get("CONTENT_LENGTH") or ""
    if not declared:
        if environ["REQUEST_METHOD"] in ("POST", "PUT"):
            raise Refusal(411, "Content-Length is missing: send it with the length of the body in bytes")
        return b""
    if not re.fullmatch("[0-9]{1,18}", declared):
        raise Refusal(400, "Content-Length must be a whole number of bytes")
    length = int(declared)
    try:
        body: bytes = environ["wsgi.input"].read(min(length, DRAIN_LIMIT))
    except OSError:  # a timeout, or the client is gone and nobody reads this answer
        raise Refusal(408, f"the body did not arrive within {CLIENT_TIMEOUT} s: send it at once") from None
    if length > BODY_LIMIT:
        raise Refusal(413, f"the body has {length} bytes: send {BODY_LIMIT} at most")
    if len(body) < length:
        raise Refusal(400, f"the body ended after {len(body)} of the {length} bytes in Content-Length")
    return body


def parse_object(environ: Dict[str, Any], body: bytes) -> Dict[str, Any]:
    """Return the JSON object in a body."""
    # A page of another site can post a form here from a visitor's browser, but not with this content type:
    # for application/json the browser asks first (a CORS preflight), and this API does not agree.
    if environ.get("CONTENT_TYPE", "").split(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the Content-Type must be application/json")
    try:
        value = json.loads(body.decode("utf-8"))
        # Python reads more than JSON and UTF-8 can hold: NaN, 1e999, half a surrogate; writing it tells.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body must be JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, 'the body must be a JSON object, such as {"name": "value"}')
    return value


# ── Validation: a check returns the value to keep, or raises ValueError with what it must be ─────────────

Check = Callable[[Any], Any]


def text(longest: int) -> Check:
    """Any text is kept as it is, markup too: who shows it must escape it, and knows how."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or not 1 <= len(value.strip()) <= longest:
            raise ValueError(f"must be text of 1 to {longest} characters")
        return value.strip()

    return check


def one_of(known: Tuple[str, ...]) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise ValueError("must be one of " + ", ".join(known))
        return value

    return check


def date_and_time(value: Any) -> str:
    # The fixed shape first: strptime alone also takes "2030-1-1 9:5".
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?", value, re.ASCII):
        try:
            return datetime.fromisoformat(value).strftime("%Y-%m-%d %H:%M:%S")
        except ValueError:
            pass  # the 30th of February
    raise ValueError('must be a date and time such as "2030-01-31 14:00"')


def event_name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,99}", value):
        raise ValueError("must be 1 to 100 letters, digits, _ . or -, and begin with a letter")
    if value.lower().startswith("wsqueue."):
        raise ValueError("must not begin with wsqueue., which is kept for the server's own events")
    return value


def any_json(value: Any) -> Any:
    return value


def checked(body: Dict[str, Any], checks: Dict[str, Check]) -> Dict[str, Any]:
    """Return the body's fields after their checks; nothing may be missing and nothing unknown."""
    unknown = sorted(set(body) - set(checks))
    if unknown:
        raise Refusal(400, f"{unknown[0][:100]!r} is not known here: send {', '.join(checks)}")
    fields = {}
    for name, check in checks.items():
        if name not in body:
            raise Refusal(400, f"{name} is missing: send {', '.join(checks)}")
        try:
            fields[name] = check(body[name])
        except ValueError as error:
            raise Refusal(400, f"{name} {error}") from None
    return fields


# ── The API ──────────────────────────────────────────────────────────────────────────────────────────────


class Api:
    """The WSGI application. Appointments live in memory: this is about the events, not about databases."""

    def __init__(self, queue_path: str) -> None:
        self.queue_path = queue_path
        self.not_queued = 0
        self._appointments: Dict[str, Dict[str, Any]] = {}
        self._ids = itertools.count(1)
        # Guards all of the above. Events are queued under it too: they then tell of the changes in the order
        # in which these happened. That costs microseconds, since queueing never waits for the server.
        self._lock = threading.Lock()
        self._routes: List[Tuple[str, str, Callable[..., Response]]] = [
            ("GET", "/", self.page),
            ("GET", "/api/health", self.health),
            ("POST", "/api/appointments", self.create_appointment),
            ("PUT", "/api/appointments/([^/]+)/status", self.change_status),
            ("DELETE", "/api/appointments/([^/]+)", self.cancel_appointment),
            ("POST", "/api/notifications", self.notify),
            ("POST", "/api/broadcast", self.broadcast),
        ]

    def __call__(self, environ: Dict[str, Any], start_response: Callable[..., Any]) -> List[bytes]:
        try:
            response = self.respond(environ)
        except Refusal as refusal:
            response = refusal.response
        except Exception:  # the log gets the traceback, the client does not
            log.exception("%s %s failed", environ["REQUEST_METHOD"], environ.get("PATH_INFO"))
            response = json_response(500, {"success": False, "error": "the API failed; its log says why"})
        headers = [
            ("Content-Type", response.content_type),
            ("Content-Length", str(len(response.body))),
            ("X-Content-Type-Options", "nosniff"),
            ("Cache-Control", "no-store"),
            *response.headers,
        ]
        start_response(f"{response.status} {HTTPStatus(response.status).phrase}", headers)
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else response.body]

    def respond(self, environ: Dict[str, Any]) -> Response:
        body = read_body(environ)
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO") or "/"
        if method == "HEAD":  # a GET whose answer is sent without its body
            method = "GET"
        allowed = []
        for route_method, pattern, handler in self._routes:
            match = re.fullmatch(pattern, path)
            if match and route_method == method:
                if method in ("POST", "PUT"):
                    return handler(*match.groups(), parse_object(environ, body))
                return handler(*match.groups())
            if match:
                allowed.append(route_method)
        if allowed:
            methods = ", ".join(allowed)
            raise Refusal(405, f"{method} is not possible here: use {methods}", ("Allow", methods))
        paths = ", ".join(pattern.replace("([^/]+)", "ID") for _, pattern, _ in self._routes)
        raise Refusal(404, f"there is nothing at this path: the API has {paths}")

    def create_appointment(self, body: Dict[str, Any]) -> Response:
        fields = checked(body, {"patient_name": text(100), "doctor_name": text(100), "time": date_and_time})
        with self._lock:
            number = next(self._ids)
            appointment = {"appointment_id": number, **fields, "status": "scheduled"}
            self._appointments[str(number)] = appointment
            return self._stored(201, "appointment_created", appointment)

    def change_status(self, appointment_id: str, body: Dict[str, Any]) -> Response:
        fields = checked(body, {"status": one_of(STATUSES)})
        with self._lock:
            appointment = self._find(appointment_id)
            appointment["status"] = fields["status"]
            change = {"appointment_id": appointment["appointment_id"], **fields, "updated_at": now()}
            return self._stored(200, "appointment_status_changed", change)

    def cancel_appointment(self, appointment_id: str) -> Response:
        with self._lock:
            appointment = self._find(appointment_id)
            del self._appointments[appointment_id]
            cancelled = {"appointment_id": appointment["appointment_id"], "cancelled_at": now()}
            return self._stored(200, "appointment_cancelled", cancelled)

    def notify(self, body: Dict[str, Any]) -> Response:
        fields = checked(body, {"type": one_of(TYPES), "title": text(100), "message": text(1000)})
        with self._lock:
            return self._stored(202, "notification", fields)

    def broadcast(self, body: Dict[str, Any]) -> Response:
        fields = checked({"payload": None, **body}, {"event": event_name, "payload": any_json})
        with self._lock:
            queued = self._queue(fields["event"], fields["payload"])
            return json_response(202, {"success": True, "queued": queued, "event": fields["event"]})

    def health(self) -> Response:
        try:
            names = os.listdir(self.queue_path)
        except OSError:
            names = []
        writable = os.path.isdir(self.queue_path) and os.access(self.queue_path, os.W_OK | os.X_OK)
        return json_response(200, {
            "status": "ok" if writable else "degraded",
            "queue_path": self.queue_path,
            "queue_writable": writable,
            "backlog": sum(name.endswith(".json") and not name.startswith(".") for name in names),
            "events_not_queued": self.not_queued,
        })

    def page(self) -> Response:
        page = (HERE / "websocket_client_test.html").read_bytes()
        return Response(200, page, "text/html; charset=utf-8")

    def _find(self, appointment_id: str) -> Dict[str, Any]:
        try:
            return self._appointments[appointment_id]
        except KeyError:
            reason = "there is no such appointment: use an appointment_id that POST /api/appointments gave"
            raise Refusal(404, reason) from None

    def _stored(self, status: int, event: str, payload: Dict[str, Any]) -> Response:
        """Announce a change that has already been made, and answer with it."""
        queued = self._queue(event, payload)
        return json_response(status, {"success": True, "queued": queued, **payload})

    def _queue(self, event: str, payload: Any) -> bool:
        queued = WebSocketServer.queue_event(self.queue_path, event, payload)
        # What was stored stays stored, so this is no reason to fail the call; but it must not go unseen.
        self.not_queued += not queued
        return queued


def now() -> str:
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S")


# ── The server ───────────────────────────────────────────────────────────────────────────────────────────


class ThreadingWSGIServer(ThreadingMixIn, WSGIServer):
    """One thread per request, so that a slow client delays nobody else."""

    daemon_threads = True
    request_queue_size = 128


class RequestHandler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT

    def handle(self) -> None:
        try:
            super().handle()
        except OSError as error:  # it timed out or hung up: its own affair, not a traceback of ours
            self.log_message("gave up: %s", error)


def main() -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    queue_path = os.environ.get("WS_QUEUE_PATH") or str(HERE / "logs" / "ws_queue")
    host, port = os.environ.get("API_HOST") or "127.0.0.1", os.environ.get("API_PORT") or "8080"
    try:
        server = ThreadingWSGIServer((host, int(port)), RequestHandler)
    except (OSError, ValueError, OverflowError) as error:
        sys.exit(f"cannot listen on {host}:{port}: {error}. Set API_HOST or API_PORT to something else.")
    server.set_app(Api(queue_path))
    try:
        os.makedirs(queue_path, exist_ok=True)
    except OSError as error:
        log.error("no event will be queued: %s. Set WS_QUEUE_PATH to a directory that can be made.", error)
    try:
        print(f"listening on http://{host}:{server.server_port}")
        print(f"events go to {queue_path}; open the address above in a browser, ctrl-C ends", flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main()
