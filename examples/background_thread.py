#!/usr/bin/env python3
"""Slow work in threads of the web application, without a job queue: 202 at once, and the result when it is there.

    pip install flask
    python examples/background_thread.py                then open http://127.0.0.1:8080/

A request starts a job and is answered with its id. What becomes of the job is pushed to the visitor who asked, and
to nobody else: job_done, job_failed, job_cancelled, and job_progress on the way. GET /jobs/ID says the same to those
who have missed it.

The jobs live and end with this one process; those that must survive it belong into a database. Threads are for work
that waits, for a service or a disk: what computes for seconds goes into a ProcessPoolExecutor.

Environment: APP_HOST, APP_PORT, WS_PORT (0 picks a free one), WS_QUEUE_PATH; JOB_WORKERS (4) run at a time and
JOB_WAITING (16) wait, more are refused; JOB_STEP (0.5 s) is how slow the work is; JOB_GRACE (10 s) is what running jobs
have at the end; SECRET_KEY signs the cookie by which a visitor is known, and without it each start makes its own.
"""

import logging
import os
import re
import secrets
import signal
import sys
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional
from urllib.parse import urljoin

from flask import Flask, Response, abort, jsonify, render_template_string, request, session, url_for
from werkzeug.serving import make_server

# Run from a plain checkout, Python looks for modules beside this file; wsqueue.py is one directory up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wsqueue import WebSocketServer, WsqueueError, queue_event

HERE = Path(__file__).resolve().parent
QUEUE = os.environ.get("WS_QUEUE_PATH") or str(HERE / "logs" / "ws_queue")
HOST = os.environ.get("APP_HOST") or "127.0.0.1"
NUMBERS_LIMIT = 100  # of a job
KEPT = 1000  # jobs that GET /jobs/ID still knows, once they have ended
log = logging.getLogger("jobs")

app = Flask(__name__)
app.config.update(
    SECRET_KEY=os.environ.get("SECRET_KEY") or secrets.token_hex(),  # a new one makes all visitors new ones
    SESSION_COOKIE_NAME="example_jobs",  # cookies know no ports: not that of another application on this host
    SESSION_COOKIE_SAMESITE="Lax",
    MAX_CONTENT_LENGTH=64 * 1024,
)
push = WebSocketServer(app)


# ── The work ─────────────────────────────────────────────────────────────────────────────────────────────


class Cancelled(Exception):
    """Raised in a job that is not to go on."""


Progress = Callable[[int], None]


def average(numbers: List[float], progress: Progress) -> float:
    """A stand-in for a report, a conversion, a slow service. It raises what it likes, ZeroDivisionError for example."""
    for done in range(len(numbers)):
        progress(100 * done // len(numbers))
    return sum(numbers) / len(numbers)


# ── Jobs ─────────────────────────────────────────────────────────────────────────────────────────────────


class Job:
    """What one visitor has asked for, and what has become of it."""

    def __init__(self, owner: str, numbers: List[float]) -> None:
        self.id = secrets.token_urlsafe(16)  # nobody can guess it
        self.owner = owner
        self.numbers = numbers
        self.state: Dict[str, Any] = {"job": self.id, "status": "waiting"}  # replaced, never changed: no lock
        self.future: Future[None] = Future()

    def tell(self, status: str, **more: Any) -> None:
        """Note the state first: a page that asks when the event arrives sees it."""
        self.state = {"job": self.id, "status": status, **more}
        # By the directory, although the server is in this process: what clients have not got when it ends, they get
        # when it is started again and they come back.
        queue_event(QUEUE, f"job_{status}", {"job": self.id, **more}, to=f"user:{self.owner}")


class Jobs:
    """A pool with room for so many jobs and no more: an executor's own queue has no end."""

    def __init__(self, workers: int, waiting: int, step: float) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="job")
        self._room = threading.BoundedSemaphore(workers + waiting)
        self._step = step  # seconds
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards the following
        self._ending = False
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def start(self, owner: str, numbers: List[float]) -> Optional[Job]:
        """None: there is no room."""
        job = Job(owner, numbers)
        with self._lock:
            if self._ending or not self._room.acquire(blocking=False):
                return None
            job.future = self._pool.submit(self._run, job)
            self._jobs[job.id] = job
            self._forget()
        job.future.add_done_callback(lambda _: self._room.release())  # also when it is cancelled
        return job

    def _forget(self) -> None:
        ended = [job.id for job in self._jobs.values() if job.future.done()]
        for job_id in ended[:max(0, len(self._jobs) - KEPT)]:
            del self._jobs[job_id]

    def find(self, job_id: str, owner: str) -> Optional[Job]:
        with self._lock:
            job = self._jobs.get(job_id)
        return job if job and job.owner == owner else None

    def _run(self, job: Job) -> None:
        def progress(percent: int) -> None:
            job.tell("progress", percent=percent)
            if self._stopping.wait(self._step):
                raise Cancelled

        try:
            result = average(job.numbers, progress)
        except Cancelled:
            job.tell("cancelled")
        except Exception:  # the log gets the traceback, the visitor does not
            log.exception("job %s failed", job.id)
            job.tell("failed", error="The job failed. Whoever runs this finds the reason in the log, under its id.")
        else:
            job.tell("done", result=result)

    def stop(self, grace: float) -> None:
        """Cancel what waits, and give what runs `grace` seconds; then it is told to end, where it next looks."""
        with self._lock:
            self._ending = True
            jobs = list(self._jobs.values())
        running = []
        for job in jobs:
            if job.future.cancel():
                job.tell("cancelled")
            else:
                running.append(job.future)
        try:
            wait(running, timeout=grace)
        except KeyboardInterrupt:
            pass  # ctrl-C again: no more grace
        self._stopping.set()
        self._pool.shutdown()


def number_from(variable: str, default: float, least: float = 0) -> float:
    value = float(os.environ.get(variable) or default)
    if not least <= value <= 65535:  # of a port, werkzeug would take what is left of it modulo 65536
        raise ValueError(f"{variable} is {value:g}, and must be from {least:g} to 65535")
    return value


# ── The push server's side ───────────────────────────────────────────────────────────────────────────────


@push.authenticate
def visitor_of(asking: Any) -> Optional[str]:
    """Who asks the push server, by the cookie that Flask has signed, which browsers send to every port of a host."""
    with app.test_request_context(headers={"Cookie": asking.headers.get("cookie", "")}):
        return session.get("visitor")


# ── The application ──────────────────────────────────────────────────────────────────────────────────────


@app.get("/")
def page() -> str:
    session.setdefault("visitor", secrets.token_urlsafe(16))
    host = re.sub(r":\d+$", "", request.host)  # the push server is on the host that the browser knows us by
    url = f"ws://{host}:{push.url.rpartition(':')[2]}/"
    return render_template_string(PAGE, url=url, script=urljoin(url.replace("ws", "http", 1), "/wsqueue.js"))


@app.post("/jobs")
def start_job() -> Any:
    """The first events may arrive before this answer does: they carry the job's id, too."""
    owner, body = current_visitor(), request.get_json()  # a page of another site cannot post JSON
    numbers = body.get("numbers") if isinstance(body, dict) else None
    if not isinstance(numbers, list) or len(numbers) > NUMBERS_LIMIT or not all(map(is_number, numbers)):
        abort(400, f'Send {{"numbers": […]}} with up to {NUMBERS_LIMIT} numbers below 1e15.')
    job = app.config["JOBS"].start(owner, numbers)
    if job is None:
        return {"error": "Too many jobs are waiting: try again in a moment."}, 503, {"Retry-After": "5"}
    return {"job": job.id}, 202, {"Location": url_for("job_state", job_id=job.id)}


@app.get("/jobs/<job_id>")
def job_state(job_id: str) -> Response:
    job = app.config["JOBS"].find(job_id, current_visitor())
    if job is None:
        abort(404, "You have no such job, or it ended long ago.")
    answer = jsonify(job.state)
    answer.headers["Cache-Control"] = "no-store"
    return answer


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15  # nor NaN


def current_visitor() -> str:
    visitor = session.get("visitor")
    if visitor is None:
        abort(401, "Open the page first: it gives you a cookie by which results find you.")
    return str(visitor)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Jobs</title>
<form id="start">
  <label>Average of <input name="numbers" value="1 2 3 4" pattern="[-0-9. ]*"></label>
  <button>Start</button> <output id="status">connecting</output> <output id="answer"></output>
</form>
<ul id="jobs"></ul>
<script src="{{ script }}"></script>
<script>
const items = new Map();
const show = (id, text) => { document.getElementById(id).textContent = text; };
function update(job, text) {
  if (!items.has(job)) {
    items.set(job, document.createElement("li"));
    document.getElementById("jobs").prepend(items.get(job));
  }
  items.get(job).textContent = text;
}
const queue = new WSQueue({{ url|tojson }});
queue.onstatus = status => show("status", status);
queue.on("job_progress", ({ job, percent }) => update(job, `${percent} %`));
queue.on("job_done", ({ job, result }) => update(job, `done: ${result}`));
queue.on("job_failed", ({ job, error }) => update(job, error));
queue.on("job_cancelled", ({ job }) => update(job, "cancelled"));
queue.onreset = async () => {  // away for too long to be told: so ask
  for (const job of items.keys()) {
    const response = await fetch(`/jobs/${job}`);
    update(job, response.ok ? (await response.json()).status : "forgotten");
  }
};
document.getElementById("start").onsubmit = async event => {
  event.preventDefault();
  const body = JSON.stringify({ numbers: event.target.numbers.value.trim().split(/ +/).filter(Boolean).map(Number) });
  const response = await fetch("/jobs", { method: "POST", body, headers: { "Content-Type": "application/json" } });
  show("answer", response.ok ? "" : `not started: ${response.status} ${response.statusText}`);
};
</script>
</html>
"""


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as from systemd: the same end as by ctrl-C
    try:
        grace = number_from("JOB_GRACE", 10)
        jobs = app.config["JOBS"] = Jobs(
            int(number_from("JOB_WORKERS", 4, 1)), int(number_from("JOB_WAITING", 16)), number_from("JOB_STEP", 0.5))
        web = make_server(HOST, int(number_from("APP_PORT", 8080)), app, threaded=True)
        push.host(HOST).port(int(number_from("WS_PORT", 8081))).event_queue(QUEUE).start(background=True)
        url = push.url  # an error where another process serves the queue, and this one would stand by
    except (WsqueueError, OSError, ValueError) as error:
        sys.exit(f"cannot start: {error}. Check APP_HOST, APP_PORT, WS_PORT, WS_QUEUE_PATH and JOB_….")
    print(f"listening on http://{HOST}:{web.server_port}")
    print(f"push server: {url}; ctrl-C ends", flush=True)
    try:
        web.serve_forever()  # until ctrl-C
    finally:
        print(f"ending, once what runs is done, or in {grace:g} s; ctrl-C again ends it now", flush=True)
        jobs.stop(grace)
        push.stop()
    print("stopped")


if __name__ == "__main__":
    main()
