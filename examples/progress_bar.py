#!/usr/bin/env python3
"""A progress bar in the browser for a long job, which runs in a process of its own.

    python examples/progress_bar.py                 then open http://127.0.0.1:8080/
    python examples/progress_bar.py work JOB        what it starts for each job: the worker

    POST /api/jobs          {"numbers": "1\\n2\\n3"}; answers with the job's state, and its id in job_id
    GET /api/jobs/JOB       the state: job_id, state (running, finished or failed), done, total, text

The job adds up numbers, slowly. Its worker keeps the state in SQLite, and then queues it as the event job_progressed,
job_finished or job_failed, for the topic /jobs/JOB alone. A page that is closed and opened again fetches the state. The
worker outlives this server: after a restart, pages go on where they were.

Environment: APP_HOST, APP_PORT, WS_PORT (0 picks a free one), WS_QUEUE_PATH, DATABASE_PATH, STEP_SECONDS.
"""

import fcntl
import html
import json
import logging
import os
import re
import secrets
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from http import HTTPStatus
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

# Run from a plain checkout, Python looks for modules beside this file; wsqueue.py is one directory up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wsqueue import WebSocketServer, WsqueueError, queue_event

HERE = Path(__file__).resolve().parent
QUEUE = os.path.abspath(os.environ.get("WS_QUEUE_PATH") or HERE / "logs" / "ws_queue")
DATABASE = os.path.abspath(os.environ.get("DATABASE_PATH") or HERE / "logs" / "jobs.db")
HOST = os.environ.get("APP_HOST") or "127.0.0.1"
STEP_SECONDS = os.environ.get("STEP_SECONDS") or "0.05"  # so long does the worker take for a number
INTERVAL = 0.1  # seconds between two events of a job: ten a second look smooth, and more is work for everybody
BODY_LIMIT = 64 * 1024  # bytes
DRAIN_LIMIT = 1024 * 1024  # bytes of a body that is too long which are still read, see read_body()
MOST_JOBS = 8  # at the same time
EVENTS = {"running": "job_progressed", "finished": "job_finished", "failed": "job_failed"}
log = logging.getLogger("jobs")
State = Dict[str, Any]


# ── Where the state of a job is kept ─────────────────────────────────────────────────────────────────────


@contextmanager
def transaction() -> Iterator[sqlite3.Connection]:
    """Commits when the block ends, and rolls back when it fails."""
    connection = sqlite3.connect(DATABASE, isolation_level=None)
    with closing(connection), connection:
        connection.row_factory = sqlite3.Row
        connection.execute("BEGIN IMMEDIATE")
        yield connection


def make_tables() -> None:
    os.makedirs(os.path.dirname(DATABASE), exist_ok=True)
    with transaction() as database:
        database.execute("""CREATE TABLE IF NOT EXISTS jobs (job_id TEXT PRIMARY KEY, numbers TEXT NOT NULL,
            state TEXT NOT NULL, done INTEGER NOT NULL, total INTEGER NOT NULL, text TEXT NOT NULL)""")


def state_of(database: sqlite3.Connection, job: str) -> Optional[State]:
    row = database.execute("SELECT job_id, state, done, total, text FROM jobs WHERE job_id = ?", (job,)).fetchone()
    return row and dict(row)


def tell(job: str, **change: Any) -> None:
    """Keep what has changed of a job, and only then tell its pages: who loads the state later finds no older one.

    Each event has the whole state, so that one alone is enough, and a repeat does no harm.
    """
    with transaction() as database:
        state = state_of(database, job)
        if state is None or state["state"] != "running":  # what has ended stays as it is
            return
        state.update(change)
        database.execute("UPDATE jobs SET state = :state, done = :done, text = :text WHERE job_id = :job_id", state)
    queue_event(QUEUE, EVENTS[state["state"]], state, to=f"/jobs/{job}")  # it logs what it could not do


class Throttle:
    """Lets something through at once, and then not before an interval has passed. What it keeps back is not made up
    for: the next one says more. So whatever must be said, such as the end, is not asked about here."""

    def __init__(self, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._clock, self._next = interval, clock, clock()

    def lets_through(self) -> bool:
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + self._interval
        return True


# ── The worker: a process of its own ─────────────────────────────────────────────────────────────────────


def work(job: str) -> None:
    with transaction() as database:
        row = database.execute("SELECT numbers FROM jobs WHERE job_id = ?", (job,)).fetchone()
    if row is None:
        sys.exit(f"there is no job {job!r} in {DATABASE}: POST /api/jobs makes one.")
    try:
        add_up(job, row["numbers"].split("\n"))
    except Exception as error:  # whatever it is, those who wait for the end are told
        tell(job, state="failed", text=str(error))


def add_up(job: str, lines: List[str]) -> None:
    """The long job: yours may be an import, a report, a video."""
    total, throttle = 0, Throttle(INTERVAL)
    for done, line in enumerate(lines, 1):
        if not re.fullmatch(r"-?[0-9]{1,15}", line.strip()):
            raise ValueError(f"Line {done} is not a whole number: {line[:100]}")
        total += int(line)
        if throttle.lets_through():
            tell(job, done=done)
        time.sleep(float(STEP_SECONDS))
    tell(job, state="finished", done=len(lines), text=f"The sum is {total}.")


# ── Starting a worker, and noticing that it has ended ────────────────────────────────────────────────────


def lock_path(job: str) -> str:
    return f"{DATABASE}-{job}.lock"


def start(job: str) -> None:
    """The worker inherits a lock, which the kernel lets go of when it ends, in whatever way."""
    process = None
    try:
        with open(lock_path(job), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # A session of its own: ctrl-C here does not end it. Of the job, the command line has the id and no more.
            process = subprocess.Popen([sys.executable, __file__, "work", job], pass_fds=[lock.fileno()],  # noqa: S603
                                       stdin=subprocess.DEVNULL, start_new_session=True)
    finally:
        watch(job, process)  # also if there is no worker: then that is told


def watch(job: str, process: Optional["subprocess.Popen[bytes]"] = None) -> None:
    """Until the worker ends, in a thread. process: None, if this server has not started it, but an earlier one."""

    def wait() -> None:
        with open(lock_path(job), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for the worker
        if process:
            process.wait()
        # It told its end itself, and then this changes nothing; unless it was killed, or the machine was.
        tell(job, state="failed", text="The worker has died before it was done.")
        Path(lock_path(job)).unlink(missing_ok=True)

    threading.Thread(target=wait, daemon=True).start()


def running_jobs() -> List[str]:
    with transaction() as database:
        return [row["job_id"] for row in database.execute("SELECT job_id FROM jobs WHERE state = 'running'")]


# ── The application: plain WSGI ──────────────────────────────────────────────────────────────────────────


class Refusal(Exception):
    """What is asked cannot be; the text says, in a sentence, what to change."""

    def __init__(self, status: int, reason: str, *headers: Tuple[str, str]) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers


def read_body(environ: Dict[str, Any]) -> bytes:
    """Before anything else: a connection that is closed with unread bytes is reset, and the answer is lost with it."""
    length = environ.get("CONTENT_LENGTH") or "0"
    if not re.fullmatch("[0-9]{1,18}", length):
        raise Refusal(400, "Content-Length must be the length of the body in bytes.")
    body: bytes = environ["wsgi.input"].read(min(int(length), DRAIN_LIMIT))
    if int(length) > BODY_LIMIT:
        raise Refusal(413, f"The body must have {BODY_LIMIT} bytes at most.")
    return body


def lines_of(body: bytes, environ: Dict[str, Any]) -> List[str]:
    # The forms of other sites cannot send this type: so it keeps them from starting jobs here.
    if environ.get("CONTENT_TYPE", "").split(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "The Content-Type must be application/json.")
    try:
        numbers = json.loads(body.decode())["numbers"].strip()
        numbers.encode()  # JSON can hold half a surrogate, which no UTF-8 can
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Refusal(400, 'The body must be JSON in UTF-8, such as {"numbers": "1\\n2"}.') from None
    return list(numbers.split("\n"))


def new_job(lines: List[str]) -> State:
    # Anybody may connect to any path of the push server, so the path must be one that nobody can guess. And never the
    # same for two jobs: a page would show the end of the one for that of the other.
    job = secrets.token_urlsafe(16)
    with transaction() as database:
        running = database.execute("SELECT count(*) FROM jobs WHERE state = 'running'").fetchone()[0]
        if running >= MOST_JOBS:
            raise Refusal(503, f"{running} jobs are running: wait for one of them.", ("Retry-After", "10"))
        database.execute("INSERT INTO jobs VALUES (?, ?, 'running', 0, ?, '')", (job, "\n".join(lines), len(lines)))
    start(job)
    return {"job_id": job, "state": "running", "done": 0, "total": len(lines), "text": ""}


def respond(environ: Dict[str, Any], push_port: str) -> Tuple[int, str, str]:
    """Status, type and text of the answer."""
    body = read_body(environ)
    method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO") or "/"
    expected = "POST" if path == "/api/jobs" else "GET"
    found = re.fullmatch("/api/jobs/([A-Za-z0-9_-]{1,64})", path)
    if path not in ("/", "/api/jobs") and not found:
        raise Refusal(404, "There is nothing at this path.")
    if method != expected:
        raise Refusal(405, f"{method} is not possible here: use {expected}.", ("Allow", expected))
    if path == "/api/jobs":
        return 202, "application/json", json.dumps(new_job(lines_of(body, environ)))
    if not found:
        return 200, "text/html; charset=utf-8", page(environ, push_port)
    with transaction() as database:
        state = state_of(database, found[1])
    if state is None:
        raise Refusal(404, "There is no such job.")
    return 200, "application/json", json.dumps(state)


def page(environ: Dict[str, Any], push_port: str) -> str:
    """With the push server on the host that the browser knows us by."""
    host = re.sub(r":\d+$", "", environ.get("HTTP_HOST") or HOST)
    return PAGE.replace("{{script}}", html.escape(f"http://{host}:{push_port}/wsqueue.js"))


def make_app(push_port: str) -> Callable[..., List[bytes]]:
    def app(environ: Dict[str, Any], start_response: Callable[..., Any]) -> List[bytes]:
        more: Tuple[Tuple[str, str], ...] = ()
        try:
            status, kind, text = respond(environ, push_port)
        except Refusal as refusal:
            status, kind, more = refusal.status, "application/json", refusal.headers
            text = json.dumps({"success": False, "error": str(refusal)})
        except Exception:  # the log gets the traceback, the client does not
            log.exception("%s %s failed", environ["REQUEST_METHOD"], environ.get("PATH_INFO"))
            status, kind, text = 500, "application/json", '{"success": false, "error": "It failed; the log says why."}'
        headers = [("Content-Type", kind), ("Content-Length", str(len(text.encode()))), ("Cache-Control", "no-store"),
                   ("X-Content-Type-Options", "nosniff"), *more]
        start_response(f"{status} {HTTPStatus(status).phrase}", headers)
        return [text.encode()]

    return app


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<!-- The browser refuses innerHTML and its like: what a job says is shown as text and never becomes markup. -->
<meta http-equiv="Content-Security-Policy" content="require-trusted-types-for 'script'">
<link rel="icon" href="data:,">
<title>A long job</title>
<style>
  :root { color-scheme: light dark; --line: #d5d9e0; --quiet: #5b6472; --accent: #2f52c9; --on-accent: #fff;
    --good: #12753a; --bad: #b3261e; }
  @media (prefers-color-scheme: dark) { :root { --line: #3a404a; --quiet: #a3acba; --accent: #9fb4ff;
    --on-accent: #101836; --good: #6fdc95; --bad: #ff9a92; } }
  * { box-sizing: border-box; }
  body { margin: 0 auto; padding: 1rem; max-width: 34rem; font: 16px/1.45 system-ui, sans-serif; }
  h1 { font-size: 1.3rem; margin: 0 0 1rem; }
  form, section { display: grid; gap: .6rem; }
  label, #status { color: var(--quiet); font-size: .88rem; }
  textarea, button { font: inherit; padding: .5rem .8rem; border-radius: .5rem; border: 1px solid var(--quiet); }
  textarea { width: 100%; resize: vertical; background: Canvas; color: CanvasText; font-variant-numeric: tabular-nums; }
  button { justify-self: start; background: var(--accent); border-color: var(--accent); color: var(--on-accent);
    font-weight: 600; cursor: pointer; }
  :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
  section { margin-top: 1.5rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
  section[hidden] { display: none; }
  section > div { display: flex; justify-content: space-between; gap: 1rem; font-variant-numeric: tabular-nums; }
  progress { width: 100%; height: 1rem; accent-color: var(--accent); }
  p { margin: 0; overflow-wrap: anywhere; min-height: 1.45em; }
  .finished { color: var(--good); } .failed, #problem { color: var(--bad); }
</style>
<h1>A long job</h1>
<form id="start">
  <label for="numbers">Numbers to add up, one a line</label>
  <textarea id="numbers" rows="6" required></textarea>
  <button>Start</button> <output id="problem"></output>
</form>
<section id="job" hidden>
  <div><label for="bar">Progress</label> <span id="count"></span></div>
  <progress id="bar" value="0" max="1" aria-describedby="news"></progress>
  <p id="news" aria-live="polite"></p>
  <span id="status"></span>
</section>
<script src="{{script}}"></script>
<script>
const $ = id => document.getElementById(id);
let queue = null, shown = null;

// The state comes by two ways, when the page loads it and as events, and either may be the later one: a job never goes
// back, so what has come less far says nothing new.
function show(state) {
  if (state.job_id !== shown?.job_id) shown = null;
  else if (shown.state !== "running" || state.done < shown.done) return;
  $("job").hidden = false;
  $("bar").max = state.total;
  $("bar").value = state.done;
  $("count").textContent = `${state.done} of ${state.total}`;
  announce(state);
  shown = state;
  if (state.state !== "running") leave();
}

// Whoever listens to the page is told of each quarter, and of the end; ten numbers a second would drown all else.
function announce(state) {
  const quarter = ({ done, total }) => Math.min(3, Math.floor(4 * done / total));  // the fourth one is the end
  if (state.state === "running" && shown && quarter(state) === quarter(shown)) return;
  const running = quarter(state) ? `At least ${25 * quarter(state)} % done.` : "Running.";
  const sentences = { running, finished: `Finished. ${state.text}`, failed: `Failed. ${state.text}` };
  $("news").textContent = sentences[state.state];  // as text, never as HTML
  $("news").className = state.state;
}

function follow(job) {
  leave();
  localStorage.setItem("job", job);  // for when the page is closed and opened again
  load(job);
  if (!window.WSQueue) return $("status").textContent = "not connected";  // the push server was away: no script
  queue = new WSQueue(`/jobs/${job}`);
  for (const event of ["job_progressed", "job_finished", "job_failed"]) queue.on(event, show);
  let wasOpen = false;
  queue.onreset = () => load(job);  // away for longer than the history reaches
  queue.onstatus = status => {
    $("status").textContent = { open: "", closed: "" }[status] ?? `${status}…`;
    // Once more, when we first hear: what happened after the page loaded the state, and before this, is missing.
    if (status === "open" && !wasOpen) { wasOpen = true; load(job); }
  };
}

function leave() {
  queue?.close();
  queue = null;
}

async function load(job) {
  try {
    const response = await fetch(`/api/jobs/${job}`), state = await response.json();
    if (job !== localStorage.getItem("job")) return;  // meanwhile, another one was started
    if (response.ok) return show(state);
    leave();
    localStorage.removeItem("job");
    $("problem").textContent = state.error;
  } catch (error) {
    setTimeout(() => { if (queue) load(job); }, 1000);  // the server is away, and the job may well go on
  }
}

$("start").onsubmit = async event => {
  event.preventDefault();
  try {
    const body = JSON.stringify({ numbers: $("numbers").value }), headers = { "Content-Type": "application/json" };
    const response = await fetch("/api/jobs", { method: "POST", headers, body });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    $("problem").textContent = "";
    show(answer);
    follow(answer.job_id);
  } catch (error) {
    $("problem").textContent = `Not started: ${error.message}`;
  }
};

$("numbers").value = Array.from({ length: 100 }, (_, i) => i + 1).join("\\n");
if (localStorage.getItem("job")) follow(localStorage.getItem("job"));
</script>
</html>
"""


# ── The server ───────────────────────────────────────────────────────────────────────────────────────────


class ThreadingWSGIServer(ThreadingMixIn, WSGIServer):
    """One thread per request, so that a slow client delays nobody else."""

    daemon_threads = True
    request_queue_size = 128


class RequestHandler(WSGIRequestHandler):
    timeout = 10  # seconds a client may stay silent in the middle of a request

    def handle(self) -> None:
        try:
            super().handle()
        except OSError as error:  # it timed out or hung up: its own affair, not a traceback of ours
            self.log_message("gave up: %s", error)


def port_from(variable: str, default: int) -> int:
    port = int(os.environ.get(variable) or default)
    if not 0 <= port <= 65535:
        raise ValueError(f"{variable} is {port}, and ports end at 65535")
    return port


def serve() -> None:
    # Without the monitor page, which is there on a loopback address else, and names the topics: they are our secrets.
    push = WebSocketServer(monitoring="off").host(HOST).event_queue(QUEUE)
    try:
        make_tables()
        float(STEP_SECONDS)
        web = ThreadingWSGIServer((HOST, port_from("APP_PORT", 8080)), RequestHandler)
        push.port(port_from("WS_PORT", 8081)).start(background=True)
        url = push.url  # an error where another process serves the queue, and this one would stand by
    except (WsqueueError, OSError, ValueError, sqlite3.Error) as error:
        sys.exit(f"cannot start: {error}. Check APP_HOST, APP_PORT, WS_PORT, STEP_SECONDS, WS_QUEUE_PATH and"
                 " DATABASE_PATH.")
    web.set_app(make_app(url.rpartition(":")[2]))
    for job in running_jobs():  # whose workers have outlived an earlier start, or have not
        watch(job)
    print(f"listening on http://{HOST}:{web.server_port}")
    print(f"push server: {url}; ctrl-C ends", flush=True)
    try:
        web.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        push.stop()
    print("stopped")


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if len(sys.argv) == 3 and sys.argv[1] == "work":
        work(sys.argv[2])
    elif len(sys.argv) == 1:
        serve()
    else:
        sys.exit("usage: progress_bar.py, or progress_bar.py work JOB")


if __name__ == "__main__":
    main()
