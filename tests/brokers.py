"""Real brokers, each a process of its own on loopback, and a cable to them that can be cut.

Every broker is Debian's, needs a password, keeps all that it writes in one directory, and ends with its block, also
after it was killed or frozen in it. What it has confirmed survives kill(), but for RabbitMQ's newest queue or binding,
which is on its disk with the next one, or two seconds later.
"""

import glob
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import uuid
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode, urlsplit, urlunsplit

import pika
import psycopg
import redis

from helpers import TIME_UNIT, eventually

PASSWORD = "correct-horse-battery-staple"  # of every broker; no line of any log may hold it
HOST = "127.0.0.1"
PATIENCE = 60.0  # RabbitMQ takes several seconds on a machine with nothing else to do

REDIS = shutil.which("redis-server")
RABBITMQ = shutil.which("/usr/lib/rabbitmq/bin/rabbitmq-server")  # not the one on PATH, which becomes another user
EPMD = shutil.which("epmd")
POSTGRES = max(glob.glob("/usr/lib/postgresql/*/bin/postgres"), default=shutil.which("postgres"))

# Settings of the developer's own servers are not for ours.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "RABBITMQ_", "ERL_"))}


def free_port():
    """A free port that stays free while its server is away: the system gives it to no client.

    A client that is given the very port that it tries to connect to gets through: to itself.
    """
    while True:
        port = random.randrange(10000, 32768)
        with socket.socket() as sock:
            try:
                sock.bind((HOST, port))
                return port
            except OSError:
                continue


# ---- Processes ---------------------------------------------------------------------------------------------


def _state_and_parent(pid):
    """From /proc; None when there is no such process (any more)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    state, parent = stat.rpartition(")")[2].split()[:2]
    return state, int(parent)


def _is_running(pid):
    """A process that ended and that nobody has asked for yet does not count."""
    found = _state_and_parent(pid)
    return found is not None and found[0] not in "ZX"


def _family(pids):
    """The processes and all that descends from them. PostgreSQL's are of no common group."""
    children = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        found = _state_and_parent(name)
        if found:
            children.setdefault(found[1], []).append(int(name))
    family = list(pids)
    for pid in family:  # which grows meanwhile
        family += children.get(pid, [])
    return [pid for pid in family if _is_running(pid)]


def _signal(pids, number):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


class Broker:
    """A broker's processes: ended and started at will, always with the same port and the same data."""

    def __init__(self, commands, url, port, answers, *, log, stop_signal=signal.SIGTERM, **popen):
        self.url = url
        self.port = port
        self.log = log
        self._commands = commands  # the last one is the broker, the others are what it needs
        self._answers = answers
        self._stop_signal = stop_signal
        self.popen = popen
        self._processes = []

    @property
    def pid(self):
        return self._processes[-1].pid

    def queue_url(self, name=None, port=None, **query):
        """The address of a queue, of a new one if it has no name; port: of a Cutter in front of the broker."""
        parts = urlsplit(self.url)
        netloc = f"{parts.netloc.rpartition(':')[0]}:{port or self.port}"
        query = urlencode({"queue": name or f"q_{uuid.uuid4().hex[:12]}", **query})
        return urlunsplit(parts._replace(netloc=netloc, query=query))

    def start(self):
        """Start it, and return when it answers."""
        with open(str(self.log), "ab") as log:
            for command in self._commands:
                self._processes.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self.popen)
                )
        eventually(self._is_ready, PATIENCE, f"an answer of {self._commands[-1][0]}")

    def _is_ready(self):
        process = self._processes[-1]
        if process.poll() is not None:
            raise AssertionError(f"{process.args[0]} ended with {process.returncode}:\n{self._log_text()}")
        try:
            # A library takes longer to find out that nobody listens, and some log it.
            socket.create_connection((HOST, self.port), 10.0 * TIME_UNIT).close()
            return self._answers(self.url)
        except (OSError, redis.RedisError, psycopg.Error, pika.exceptions.AMQPError):
            return False

    def _log_text(self):
        return self.log.read_text("utf-8", "replace")[-4000:]

    def stop(self):
        """Ask it to end, and return when it has."""
        family = self._family()
        os.kill(self.pid, self._stop_signal)
        self._processes[-1].wait(PATIENCE * TIME_UNIT)
        _signal(_family([process.pid for process in self._processes[:-1]]), signal.SIGKILL)
        self._await_end_of(family)

    def kill(self):
        """End it by force, all of it, and return when nothing of it runs; it may have ended already."""
        self.freeze()  # so that it starts no further process meanwhile
        family = self._family()
        _signal(family, signal.SIGKILL)
        self._await_end_of(family)

    def freeze(self):
        """Keep it from doing anything, while its connections stay open."""
        _signal([process.pid for process in self._processes], signal.SIGSTOP)
        _signal(self._family(), signal.SIGSTOP)

    def thaw(self):
        _signal(self._family(), signal.SIGCONT)

    def _family(self):
        return _family([process.pid for process in self._processes])

    def _await_end_of(self, family):
        for process in self._processes:
            process.wait(PATIENCE * TIME_UNIT)
        self._processes.clear()
        eventually(lambda: not any(map(_is_running, family)), PATIENCE, f"the end of {family}")


@contextmanager
def _running(broker):
    try:
        broker.start()
        yield broker
    finally:
        broker.kill()


# ---- Redis -------------------------------------------------------------------------------------------------


@contextmanager
def redis_server(directory, *options):
    """A Redis that has written what it confirmed; options: more of its command line."""
    directory, port = Path(directory), free_port()
    config = directory / "redis.conf"
    lines = [
        f"bind {HOST}",
        f"port {port}",
        f'dir "{directory}"',
        f"requirepass {PASSWORD}",
        f"masterauth {PASSWORD}",
        "appendonly yes",
        "appendfsync no",  # what kills the broker leaves the system, which has it; and disks may stall for seconds
        'save ""',
        "repl-diskless-sync-delay 0",
    ]
    config.write_text("\n".join(lines) + "\n", "utf-8")
    command = [REDIS, str(config), *map(str, options)]
    url = f"redis://:{PASSWORD}@{HOST}:{port}/0"
    with _running(Broker([command], url, port, _redis_answers, log=directory / "log", env=CLEAN)) as broker:
        yield broker


def _redis_answers(url):
    with redis.Redis.from_url(url, socket_timeout=10.0 * TIME_UNIT) as client:
        return client.ping()


# ---- PostgreSQL --------------------------------------------------------------------------------------------


@contextmanager
def postgres_server(directory, *options):
    """A PostgreSQL with a database "events" that belongs to a user "events"; admin_url is the superuser's.

    options: more of its command line.
    """
    with _postgres_directory(Path(directory)) as (home, become):
        _make_cluster(home, become)
        port = free_port()
        command = [*become, POSTGRES, "-D", f"{home}/data", "-p", str(port), *options]
        urls = [f"postgresql://{user}:{PASSWORD}@{HOST}:{port}" for user in ("events", "postgres")]
        settings = {"log": home / "log", "stop_signal": signal.SIGINT, "env": CLEAN, "cwd": str(home)}
        broker = Broker([command], f"{urls[1]}/postgres", port, _postgres_answers, **settings)
        with _running(broker):
            broker.admin_url, broker.url = broker.url, f"{urls[0]}/events"
            with psycopg.connect(broker.admin_url, autocommit=True) as connection:
                connection.execute(f"CREATE USER events PASSWORD '{PASSWORD}'")
                connection.execute("CREATE DATABASE events OWNER events")
            yield broker


@contextmanager
def _postgres_directory(directory):
    """A directory, and what stands before a command that is to write there: PostgreSQL does not run as root."""
    if os.getuid() != 0:
        yield directory, []
        return
    user = _unprivileged_user()
    # That user cannot reach what root's tests write. Short, because a Unix socket has its place there.
    with tempfile.TemporaryDirectory(prefix="wsqueue-postgres-") as name:
        os.chown(name, user.pw_uid, user.pw_gid)
        yield Path(name), ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _unprivileged_user():
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _make_cluster(home, become):
    password = home / "password"
    password.write_text(PASSWORD, "utf-8")
    initdb = os.path.join(os.path.dirname(POSTGRES), "initdb")
    options = ["--pwfile", str(password), "-U", "postgres", "-A", "scram-sha-256", "-E", "UTF8", "--locale=C"]
    command = [*become, initdb, "-D", f"{home}/data", "--no-sync", *options]
    done = subprocess.run(command, cwd=str(home), env=CLEAN, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    settings = [
        f"listen_addresses = '{HOST}'",
        f"unix_socket_directories = '{home}'",
        "fsync = off",  # see redis_server()
        "shared_buffers = 16MB",
        "dynamic_shared_memory_type = mmap",  # in its directory, and not where a killed one leaves it to the machine
    ]
    with open(f"{home}/data/postgresql.conf", "a", encoding="utf-8") as config:
        config.write("\n".join(settings) + "\n")


def _postgres_answers(url):
    psycopg.connect(url, connect_timeout=max(2, int(10 * TIME_UNIT))).close()
    return True


# ---- RabbitMQ ----------------------------------------------------------------------------------------------


@contextmanager
def rabbitmq_server(directory):
    """A RabbitMQ with a user "events"; Erlang's name server is one of its processes."""
    home, port, epmd_port = Path(directory), free_port(), free_port()
    _configure_rabbitmq(home, port)
    environment = {**CLEAN, **_rabbitmq_environment(home, port), "ERL_EPMD_PORT": str(epmd_port)}
    # In the foreground: one that the broker starts for itself would stay when the broker ends.
    epmd = [EPMD, "-port", str(epmd_port), "-address", HOST]
    url = f"amqp://events:{PASSWORD}@{HOST}:{port}/%2f"
    settings = {"log": home / "log", "env": environment, "cwd": str(home)}
    with _running(Broker([epmd, [RABBITMQ]], url, port, _rabbitmq_answers, **settings)) as broker:
        yield broker


def rabbitmqctl(broker, *args):
    """Have an administrator do something, and return what that printed; it takes two seconds."""
    command = [os.path.join(os.path.dirname(RABBITMQ), "rabbitmqctl"), "--quiet", *map(str, args)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", **broker.popen)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _configure_rabbitmq(home, port):
    cookie = home / ".erlang.cookie"
    cookie.write_text(uuid.uuid4().hex, "utf-8")
    cookie.chmod(0o400)
    (home / "enabled_plugins").write_text("[].\n", "utf-8")
    (home / "env.conf").write_text("", "utf-8")
    lines = [
        f"listeners.tcp.local = {HOST}:{port}",
        "default_user = events",
        f"default_pass = {PASSWORD}",
        "log.console = true",
        "log.file = false",
        "disk_free_limit.absolute = 1MB",  # a full disk is a test's own affair
    ]
    (home / "rabbitmq.conf").write_text("\n".join(lines) + "\n", "utf-8")


def _rabbitmq_environment(home, port):
    return {
        "HOME": str(home),
        "ERL_EPMD_ADDRESS": HOST,
        "RABBITMQ_NODENAME": f"wsqueue-{port}@localhost",
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
        "RABBITMQ_CONF_ENV_FILE": str(home / "env.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
        "RABBITMQ_GENERATED_CONFIG_DIR": str(home / "config"),
        "RABBITMQ_LOG_BASE": str(home / "logs"),
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_PID_FILE": str(home / "pid"),
        # The script becomes the broker instead of waiting for it, and the broker takes SIGTERM for itself.
        "RABBITMQ_ALLOW_INPUT": "1",
        "RABBITMQ_SERVER_START_ARGS": "-noinput",
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
    }


def _rabbitmq_answers(url):
    parameters = pika.URLParameters(url)
    parameters.socket_timeout = parameters.stack_timeout = 10.0 * TIME_UNIT
    pika.BlockingConnection(parameters).close()
    return True


# ---- The cable ---------------------------------------------------------------------------------------------


class Cutter:
    """A port that leads to another one, until it is cut. To lead elsewhere, set target before heal()."""

    def __init__(self, target):
        self.target = target
        self.port = free_port()
        self._changed = threading.Condition()  # guards what follows
        self._listener = None
        self._links = set()
        self._is_whole = True

    def __enter__(self):
        self.heal()
        return self

    def __exit__(self, *exc_info):
        self.refuse()

    @property
    def connections(self):
        """How many go through it, or wait to."""
        return len(self._links)

    def cut(self):
        """Nothing gets through, either way, and nobody is told; what was on its way waits."""
        self._is_whole = False

    def refuse(self):
        """Everyone is told: connections close, new ones are refused."""
        with self._changed:
            listener, self._listener = self._listener, None
            links, self._links = self._links, set()
            self._changed.notify_all()
        if listener:
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() does not
            listener.close()
        for link in links:
            link.end()

    def heal(self):
        """All gets through again; connections that were refused have to be made anew."""
        with self._changed:
            self._is_whole = True
            self._changed.notify_all()
            if self._listener is None:
                self._listener = socket.create_server((HOST, self.port))
                _in_background(self._accept, self._listener)

    def _accept(self, listener):
        while True:
            try:
                near = listener.accept()[0]
            except OSError:
                return
            link = _Link(near)
            with self._changed:
                if self._listener is listener:
                    self._links.add(link)
            _in_background(self._join, link)

    def _join(self, link):
        back = None
        try:
            if self._may_pass(link):
                link.far.connect((HOST, self.target))
                back = _in_background(self._carry, link, link.far, link.near)
                self._carry(link, link.near, link.far)
        except OSError:
            pass  # the target refuses, and so do we
        finally:
            if back:
                back.join()
            link.close()
            with self._changed:
                self._links.discard(link)

    def _carry(self, link, source, sink):
        try:
            while True:
                data = source.recv(65536)
                if not self._may_pass(link):
                    return
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
        except OSError:
            link.end()

    def _may_pass(self, link):
        """Wait while it is cut; whether the link still belongs to it then."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_whole or link not in self._links)
            return link in self._links


class _Link:
    """One connection through a Cutter: two sockets."""

    def __init__(self, near):
        self.near, self.far = near, socket.socket()

    def end(self):
        """For both sides; whoever waits for one wakes up."""
        for sock in (self.near, self.far):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self):
        """Once nobody uses it, since the number of a closed socket is given to another one."""
        self.near.close()
        self.far.close()


def _in_background(function, *args):
    thread = threading.Thread(target=function, args=args, name="cutter", daemon=True)
    thread.start()
    return thread
