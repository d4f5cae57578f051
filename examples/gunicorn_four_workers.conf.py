"""Gunicorn's settings for gunicorn_four_workers.py, which says how to start it.

Where to start the push server, of the places that there are:

- In post_worker_init, as here: in each worker, once it has given up root's rights and has loaded the application. So
  it is the same with and without --preload, and files in the queue directory belong to the user who is to read them.
- When the application is imported is as good without --preload. With it the import happens in the arbiter, which then
  serves alone: nobody stands by, and `kill -HUP` does not reload what runs in there.
- post_fork is too early: the worker still has root's rights, and an application that cannot be imported would take
  the clients over with every attempt.

What happens to the clients when workers end:

- `kill -HUP` starts four new workers and ends the old ones. The old one that serves takes leave of its clients (1001),
  a new one takes over, and what was queued meanwhile is sent by that.
- --max-requests ends workers one by one, and in their turn the one that serves: its clients come back to another.
  Where workers are short-lived, or there are thousands of clients, run `wsqueue serve` beside gunicorn instead.
- `kill -9`, or want of memory: the same without a leave. Events are queued all the while, by the workers that live.

Clients that name the last event they saw, as /wsqueue.js does, miss nothing. Worker classes: sync and gthread; gevent
and eventlet replace the threads that the push server runs in.
"""

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the application is beside this file


def port(variable: str, default: str, least: int) -> int:
    text = os.environ.get(variable) or default
    if not text.isdecimal() or not least <= int(text) <= 65535:
        sys.exit(f"cannot start: {variable} is {text}. Set it to a number from {least} to 65535.")
    return int(text)


port("WS_PORT", "8081", 1)  # with 0, each worker would listen on another one
bind = f"{os.environ.get('APP_HOST') or '127.0.0.1'}:{port('APP_PORT', '8080', 0)}"
wsgi_app = "gunicorn_four_workers:app"
workers = 4


def when_ready(arbiter: Any) -> None:
    print(f"listening on {arbiter.LISTENERS[0]}")
    print("kill -HUP", arbiter.pid, "reloads the application; ctrl-C ends", flush=True)


def post_worker_init(worker: Any) -> None:
    # Not before: what the arbiter has imported, a reload would not import again.
    from gunicorn_four_workers import push

    from wsqueue import WsqueueError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(process)d] %(message)s")
    try:
        push.start(background=True)
        worker.push = push
    except (WsqueueError, OSError) as error:
        # Not raised: gunicorn ends when a worker cannot start, even a later one. Better a site without news than none.
        repair = f"Check WS_PORT and WS_QUEUE_PATH, then kill -HUP {worker.ppid}."
        worker.log.error("this worker pushes nothing: %s. %s", error, repair)


def worker_int(worker: Any) -> None:
    """Ctrl-C comes from the terminal, and again from the arbiter (SIGQUIT): that would end worker_exit half-way."""
    if threading.current_thread() is threading.main_thread():  # --reload calls this in a thread of its own
        for number in (signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, lambda *_: None)  # for SIG_IGN, one that has come already would be an OSError


def worker_exit(arbiter: Any, worker: Any) -> None:
    """Runs in the worker, however it ends, but by kill -9."""
    if hasattr(worker, "push"):
        worker.push.stop()  # clients are told (1001), and come back at once
