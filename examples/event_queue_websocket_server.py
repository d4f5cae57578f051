#!/usr/bin/env python3
"""A WebSocket server with three routes: every event that any process queues reaches every client.

    python examples/event_queue_websocket_server.py

Environment: WS_HOST, WS_PORT (0 picks a free one), WS_QUEUE_PATH.
"""

import logging
import os
import shlex
import sys
import time
from pathlib import Path

# Run from a plain checkout, Python looks for modules beside this file; wsqueue.py is one directory up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wsqueue import Connection, WebSocketServer, WsqueueError

HERE = Path(__file__).resolve().parent
ROUTES = ("/appointments", "/notifications", "/broadcast")


def welcome(conn: Connection) -> None:
    """Greet a new client. When this returns, the connection stays open and costs no thread."""
    # The shape of every queued event, so that a client reads all its messages in one way.
    payload = {"message": f"Welcome to {conn.path}"}
    conn.send({"event": "connected", "payload": payload, "timestamp": int(time.time())})


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    queue_path = os.environ.get("WS_QUEUE_PATH") or str(HERE / "logs" / "ws_queue")

    def announce() -> None:
        print(f"listening on {server.url} with the routes {', '.join(ROUTES)}")
        print(f"try it: python wsqueue.py send hello --queue {shlex.quote(queue_path)}")
        print("or run api_with_websocket_queue.py, which has a page for the browser; ctrl-C ends", flush=True)

    try:
        server = (
            WebSocketServer.get_instance()
            .host(os.environ.get("WS_HOST") or "127.0.0.1")
            .port(int(os.environ.get("WS_PORT") or 8081))
            .event_queue(queue_path)
        )
        for route in ROUTES:
            server.on(route, welcome)
        server.start(ready=announce)  # blocks until ctrl-C or SIGTERM
    except (WsqueueError, ValueError) as error:
        sys.exit(f"cannot start: {error}. Check WS_HOST, WS_PORT and WS_QUEUE_PATH.")
    print("stopped")


if __name__ == "__main__":
    main()
