"""Section 13, the command line: what it prints, where, and the status it ends with; as real processes."""

import errno
import json
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
from base64 import b64encode
from contextlib import contextmanager, suppress
from hashlib import sha1
from pathlib import Path
from types import SimpleNamespace

import pytest
from websockets.sync.client import connect

import wsqueue
from helpers import TIME_UNIT, WSQUEUE, eventually, run_cli, spawn_server

LISTENING = re.compile(r"listening on ws://127\.0\.0\.1:(\d+)\n")


# ---- What every command keeps to ---------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    """Relative paths, the default queue among them, lead here."""
    monkeypatch.chdir(tmp_path)


def complaint(done, status):
    """What a command says that could not do its work: nothing on stdout, one plain sentence on stderr."""
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert [line.startswith("wsqueue: ") for line in lines] == [True], done.stderr
    return lines[0]


def refusal(done):
    """What is said about a command line that makes no sense; argparse shows the usage before it."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def queued(directory="ws_queue"):
    """The records in a queue directory, without the times."""
    records = [json.loads(path.read_text("utf-8")) for path in sorted(directory_of(directory).glob("*.json"))]
    return [{key: record[key] for key in record if key not in ("timestamp", "queued_at")} for record in records]


def directory_of(name):
    path = Path(name)
    assert path.is_dir(), f"{name} was not made"
    return path


@contextmanager
def start(*args, **popen):
    """A command in a process of its own, killed at the end if it still runs."""
    settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
    process = subprocess.Popen([sys.executable, WSQUEUE, *map(str, args)], encoding="utf-8", **settings)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        with suppress(ValueError):  # a test has closed one of its pipes
            process.communicate()


def environment(**more):
    return {**os.environ, **more}


# ---- The command line as a whole ---------------------------------------------------------------------------


COMMANDS = ["serve", "send", "listen", "status", "ticket"]
EVERY_HELP = pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)


def help_of(*command, columns=200, **variables):
    """What --help prints on a terminal of that width."""
    done = run_cli(*command, "--help", env=environment(COLUMNS=str(columns), **variables))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def examples(*command):
    """The commands that a help shows, without `wsqueue`."""
    found = re.findall(r"^  wsqueue (.+)$", help_of(*command).partition("\nExample:\n")[2], re.MULTILINE)
    assert found
    return found


def test_help_names_every_command():
    """--help tells what there is."""
    shown = help_of()
    assert all(re.search(rf"^    {name} +[A-Z]", shown, re.MULTILINE) for name in COMMANDS)


@EVERY_HELP
def test_each_help_says_what_a_manual_page_does(command):
    """A synopsis, what it does, the exit statuses, and an example."""
    shown = help_of(*command)
    assert shown.startswith(f"usage: {' '.join(['wsqueue', *command])} ")
    assert re.search(r"\n\n[A-Z][^\n]*\.\n\n", shown)
    assert re.search(r"^Exit status: 0 if .+; 1 if .+; 2 for a command line that makes no sense\.$", shown, re.M)
    assert examples(*command)


@EVERY_HELP
@pytest.mark.parametrize("columns", [50, 80, 200])
def test_help_fits_the_terminal(command, columns):
    """No line is wider, and no option, nor a command to be copied, is broken in two."""
    lines = help_of(*command, columns=columns).splitlines()
    assert [line for line in lines if len(line) > columns] == []
    assert [line for line in lines if re.search(r"(^|\s)--[\w-]*-$", line)] == []
    wide = help_of(*command, columns=400).split()
    assert re.sub(r"- ", "-", " ".join(wide)) == re.sub(r"- ", "-", " ".join(" ".join(lines).split()))


@pytest.mark.parametrize("setting", [s for s in wsqueue.SETTINGS if s.name != "secret"], ids=lambda each: each.name)
def test_serve_has_an_option_for_every_setting(setting):
    """The options of serve are derived from the settings table, with meaning, variable and default."""
    off = setting.default is True
    usual = {(): "none", "": "none", True: "on"}.get(setting.default, setting.default)
    usual = "ws_queue" if setting.name == "queue" else usual
    variable = f"${setting.variable}, else " if setting.variable else ""
    option = ("--no-" if off else "--") + setting.name.replace("_", "-")
    entry = re.search(rf"^  {option}\b(?:.|\n   )*", help_of("serve"), re.MULTILINE)[0]
    assert " ".join(setting.meaning.split()) in " ".join(entry.split())
    assert f"(default: {variable}{usual})" in " ".join(entry.split())


def test_a_secret_has_no_option():
    """Every user of a machine sees its command lines; the variable is named instead."""
    shown = help_of("serve")
    assert "--secret " not in shown and "$WS_SECRET " in shown


@pytest.mark.parametrize("heading, option", [
    ("where it listens", "--port"), ("what is served", "--queue"), ("limits", "--max-clients"),
    ("who may connect", "--allowed-origins"), ("history", "--history-seconds"), ("encryption", "--tls-key"),
    ("monitoring", "--monitoring"),
])
def test_the_options_of_serve_are_grouped(heading, option):
    """Who looks for an option finds it under a heading; beside no option but --help stands none."""
    groups = re.split(r"^(\S[^:\n]*):$", help_of("serve"), flags=re.MULTILINE)
    found = dict(zip(groups[1::2], groups[2::2]))
    assert f"\n  {option} " in found[heading]
    assert re.findall(r"^  (-\S+)", groups[2], re.MULTILINE) == ["-h,"]


@pytest.mark.parametrize("command", ["serve", "send", "status", "ticket"])
def test_help_does_not_show_what_the_environment_holds(command):
    """The URL of a queue may hold a password, and help is pasted into questions; a % in it is no trouble, either."""
    assert "hunter2" not in help_of(command, WS_QUEUE_PATH="redis://:hunter2%(name)s%@host", WS_HOST="hunter2",
                                    WS_PORT="hunter2", WS_NODE="hunter2", WS_SECRET="hunter2", WS_SECRET_FILE="hunter2")


def shell(command_line):
    """Run wsqueue as a line of a shell, to its end."""
    command = f"exec '{sys.executable}' '{WSQUEUE}' {command_line}"
    return subprocess.run(["bash", "-c", command], capture_output=True, encoding="utf-8",
                          timeout=30 * TIME_UNIT, check=False)


@pytest.mark.parametrize("command", [[], ["serve"]], ids=" ".join)
def test_the_examples_of_help_serve(command):
    """A server, which says that it listens; but for the port, which may be somebody else's here."""
    for line in (line for line in examples(*command) if line.startswith("serve")):
        with start(*shlex.split(line.replace("8081", "0")), env=environment(WS_PORT="0")) as process:
            assert announced_port(process)
            assert end(process) == 0


@EVERY_HELP
def test_the_examples_of_help_work(command):
    """Beside a server of ws_queue, each does what it says: status 0 and no complaint."""
    Path("rows.json").write_text("[1, 2]", "utf-8")
    Path("secret").write_text("0123456789abcdef" * 4 + "\n", "utf-8")
    with spawn_server("--queue", "ws_queue") as running, Sending("ws_queue"):
        for line in (line for line in examples(*command) if not line.startswith("serve")):
            done = shell(line.replace("8081", str(running.port)))
            assert (done.returncode, done.stderr) == (0, "")
            assert bool(done.stdout) == (not line.startswith("send"))


def test_version_is_the_modules():
    """--version prints the version that the module declares."""
    done = run_cli("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wsqueue {wsqueue.__version__}\n", "")


@pytest.mark.parametrize("args, named", [
    (["launch"], "launch"),
    (["serve", "--colour", "red"], "--colour"),
    (["--colour", "red"], "--colour"),
    (["send"], "EVENT"),
    (["send", "one", "2", "three"], "three"),
    (["listen"], "URL"),
    (["listen", "ws://127.0.0.1/", "--count", "many"], "many"),
    (["status", "here"], "here"),
])
def test_a_command_line_that_makes_no_sense_is_refused(args, named):
    """An unknown command or option, a missing or superfluous argument: status 2, and what is meant is named."""
    assert named in refusal(run_cli(*args))


def test_main_returns_the_status(tmp_path, capsys):
    """main() is the command line for a program that has the module: it takes arguments and returns the status."""
    assert wsqueue.main(["send", "hello", "--queue", str(tmp_path / "q")]) == 0
    assert wsqueue.main(["status", "--queue", str(tmp_path / "missing")]) == 1
    assert wsqueue.main(["send", "hello", "{", "--queue", str(tmp_path / "q")]) == 2
    assert "Traceback" not in capsys.readouterr().err


# ---- serve -------------------------------------------------------------------------------------------------


def test_serve_says_on_stdout_where_it_listens_and_nothing_else():
    """Exactly one line on stdout, from start to end; the log goes to stderr."""
    with spawn_server("--queue", "q") as server:
        with connect(server.url) as client:
            run_cli("send", "hello", "--queue", "q")
            assert json.loads(client.recv(timeout=10 * TIME_UNIT))["event"] == "hello"
        server.end()
        assert LISTENING.fullmatch(server.stdout_text())
        assert int(LISTENING.fullmatch(server.stdout_text())[1]) == server.port != 0
        assert os.path.abspath("q") in server.stderr_text()
        assert "Traceback" not in server.stderr_text()


def test_serve_without_options_serves_ws_queue():
    """The default queue is ./ws_queue; it is made."""
    with spawn_server():
        assert directory_of("ws_queue")
        assert run_cli("status").returncode == 0


def announced_port(process):
    """The port that a started server prints."""
    line = process.stdout.readline()
    match = LISTENING.fullmatch(line)
    assert match, line or process.stderr.read()
    return int(match[1])


def end(process, number=signal.SIGTERM):
    """Stop a started server, and return its status."""
    process.send_signal(number)
    return process.wait(10 * TIME_UNIT)


@contextmanager
def reserved_port():
    """A port that nobody else is given, and that a server may still take: bound, but not listening."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", 0))
        yield sock.getsockname()[1]


def test_wsqueue_without_a_command_serves():
    """No arguments at all are enough to start a server."""
    with start(env=environment(WS_PORT="0", WS_QUEUE_PATH="from_env")) as process:
        assert announced_port(process)
        assert directory_of("from_env")


@pytest.mark.parametrize("number", 3 * [signal.SIGTERM, signal.SIGINT])
def test_a_server_can_be_stopped_once_it_says_that_it_listens(number):
    """Whoever reads the line may stop the server in the same moment: it ends in order, with status 0."""
    with start("serve", "--port", "0", "--queue", "q") as process:
        assert announced_port(process)
        assert end(process, number) == 0
        assert "Traceback" not in process.stderr.read()


def test_options_without_a_command_are_those_of_serve():
    """`wsqueue --port 0 --queue q` serves."""
    with start("--port", "0", "--queue", "q") as process:
        assert announced_port(process)
        assert directory_of("q")


def test_environment_gives_host_port_and_queue():
    """WS_HOST, WS_PORT and WS_QUEUE_PATH stand in for the options."""
    with reserved_port() as port:
        env = environment(WS_HOST="127.0.0.2", WS_PORT=str(port), WS_QUEUE_PATH="from_env")
        with start("serve", env=env) as process:
            assert process.stdout.readline() == f"listening on ws://127.0.0.2:{port}\n"
            for command in ("send hello", "status"):
                assert run_cli(*command.split(), env=env).returncode == 0
            assert directory_of("from_env")


def test_options_win_over_the_environment():
    """What the command line says holds, whatever the environment says."""
    env = environment(WS_HOST="203.0.113.1", WS_PORT="1", WS_QUEUE_PATH="from_env")
    with start("serve", "--host", "127.0.0.1", "--port", "0", "--queue", "q", env=env) as process:
        assert announced_port(process) > 1
        assert directory_of("q")
        assert not os.path.exists("from_env")


def test_empty_environment_variables_count_as_unset():
    """`WS_PORT=` in an environment file means nothing was said, and the default holds."""
    env = environment(WS_HOST="", WS_QUEUE_PATH="", WS_PORT="0")
    with start("serve", env=env) as process:
        assert announced_port(process)
        assert directory_of("ws_queue")


@pytest.mark.parametrize("value", ["eight", "-1", "65536", "80.5"])
def test_a_bad_port_in_the_environment_is_refused_by_its_name(value):
    """The variable is named, because there is no --port on the command line to look for."""
    said = refusal(run_cli("serve", "--queue", "q", env=environment(WS_PORT=value)))
    assert value in said
    assert "WS_PORT" in said or value in ("-1", "65536")  # of the right type: the setting's own check says its name
    assert "port" in said.lower()


def test_a_bad_port_in_the_environment_is_no_concern_of_other_commands():
    """Sending needs no port, and does not fail for one."""
    assert run_cli("send", "hello", env=environment(WS_PORT="eight")).returncode == 0


@pytest.mark.parametrize("option, value", [
    ("--port", "eight"), ("--port", "-1"), ("--port", "65536"), ("--poll-interval", "0"), ("--poll-interval", "nan"),
    ("--outbox-bytes", "1"), ("--max-event-bytes", "1.5"), ("--ping-timeout", "-1"), ("--send-timeout", "inf"),
])
def test_a_senseless_value_is_refused(option, value):
    """The option or its setting is named, and so is the value."""
    said = refusal(run_cli("serve", "--port", "0", "--queue", "q", f"{option}={value}"))
    assert option[2:] in said.replace("_", "-")
    assert value in said


def test_every_numeric_option_is_accepted_with_its_default():
    """What --help shows as the default of an option can be given as its value."""
    numbers = [s for s in wsqueue.SETTINGS if type(s.default) in (int, float) and s.name != "port"]
    options = [f"--{s.name.replace('_', '-')}={s.default}" for s in numbers]
    with spawn_server("--queue", "q", "--no-wakeup", *options) as server:
        with connect(server.url) as client:
            run_cli("send", "hello", "--queue", "q")
            assert json.loads(client.recv(timeout=10 * TIME_UNIT))["event"] == "hello"


def test_allowed_origins_may_be_repeated():
    """Each --allowed-origins adds one; other pages stay out."""
    origins = ["https://one.example", "https://two.example"]
    options = [word for origin in origins for word in ("--allowed-origins", origin)]
    with spawn_server("--queue", "q", *options) as server:
        for origin in origins:
            with connect(server.url, origin=origin):
                pass
        with pytest.raises(Exception, match="403"):
            connect(server.url, origin="https://three.example")


@pytest.mark.parametrize("option", ["--queue", "--host"])
def test_an_empty_value_is_refused(option):
    """`--queue "$UNSET"` must not start a server that serves nothing, nor `--host ""` one that listens everywhere."""
    # Before the option comes a host that works, so that nothing but the empty value can be refused.
    with start("serve", "--port", "0", "--host", "127.0.0.1", f"{option}=") as process:
        _, said = process.communicate(timeout=10 * TIME_UNIT)
    assert process.returncode in (1, 2)
    assert option[2:] in said and "empty" in said
    assert "Traceback" not in said


def test_a_taken_port_is_named():
    """Status 1, and a sentence with the address and the remedy."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = complaint(run_cli("serve", "--port", port, "--queue", "q"), 1)
    assert "127.0.0.1" in said and str(port) in said
    assert "--port" in said


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid", "a" * 70])
def test_a_host_that_is_not_this_machine_is_named(host):
    """Status 1, and a sentence with the host."""
    assert host in complaint(run_cli("serve", "--host", host, "--port", "0", "--queue", "q"), 1)


def test_a_directory_held_by_another_server_is_not_served_twice():
    """Status 1, and the process that holds it is named; that one is not disturbed."""
    with spawn_server("--queue", "q") as first:
        said = complaint(run_cli("serve", "--port", "0", "--queue", "q"), 1)
        assert str(first.pid) in said
        assert "q" in said
        with connect(first.url) as client:
            run_cli("send", "hello", "--queue", "q")
            assert json.loads(client.recv(timeout=10 * TIME_UNIT))["event"] == "hello"


def test_a_directory_is_free_again_after_kill():
    """A server that was killed leaves nothing that keeps the next one out."""
    with start("serve", "--port", "0", "--queue", "q") as process:
        announced_port(process)
        process.kill()
        process.wait()
    with spawn_server("--queue", "q"):
        assert run_cli("status", "--queue", "q").returncode == 0


def test_a_queue_that_is_a_file_is_refused():
    """Status 1, and a sentence with the path."""
    with open("q", "w"):
        pass
    assert "queue directory q" in complaint(run_cli("serve", "--port", "0", "--queue", "q"), 1)


def test_a_queue_of_another_kind_is_refused():
    """A URL is not taken for a directory name."""
    assert "gopher://" in complaint(run_cli("serve", "--port", "0", "--queue", "gopher://localhost"), 1)
    assert os.listdir(".") == []


def test_a_server_says_which_package_it_lacks():
    """Without websocket-server: status 1, and the command that installs it."""
    bare = [sys.executable, "-S", "-E", WSQUEUE, "serve", "--port", "0", "--queue", "q"]
    done = subprocess.run(bare, capture_output=True, encoding="utf-8", timeout=30 * TIME_UNIT, check=False)
    assert "pip install websocket-server" in complaint(done, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_is_stopped_by_ctrl_c_and_sigterm(number):
    """Status 0, clients are told goodbye with code 1001, and no traceback is shown."""
    with spawn_server("--queue", "q") as server:
        with connect(server.url) as client:
            server.process.send_signal(number)
            with pytest.raises(Exception, match="1001"):
                client.recv(timeout=10 * TIME_UNIT)
        assert server.process.wait(10 * TIME_UNIT) == 0
        assert "Traceback" not in server.stderr_text()


# ---- send --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument, payload", [
    ('{"id": 42}', {"id": 42}), ("[1, 2]", [1, 2]), ('"text"', "text"), ("-1.5", -1.5), ("true", True), ("null", None),
    ('"Zażółć \\ud83d\\ude00"', "Zażółć \U0001f600"),
])
def test_send_queues_the_argument_as_payload(argument, payload):
    """The payload is any JSON; what is queued is one event file, and nothing is printed."""
    done = run_cli("send", "order_paid", argument)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert queued() == [{"event": "order_paid", "payload": payload}]


def test_send_without_payload_queues_null():
    """An event may be its name alone."""
    assert run_cli("send", "wake_up").returncode == 0
    assert queued() == [{"event": "wake_up", "payload": None}]


def test_send_reads_the_payload_from_stdin():
    """- is stdin, to its end, with the newline that echo adds."""
    done = run_cli("send", "order_paid", "-", input='{"name": "Łukasz"}\n')
    assert (done.returncode, done.stderr) == (0, "")
    assert queued() == [{"event": "order_paid", "payload": {"name": "Łukasz"}}]


def test_send_uses_the_queue_option_and_the_variable():
    """--queue, else WS_QUEUE_PATH, else ws_queue; missing directories are made, parents included."""
    env = environment(WS_QUEUE_PATH="logs/from_env")
    assert run_cli("send", "one", "--queue", "a/b", env=env).returncode == 0
    assert run_cli("send", "two", env=env).returncode == 0
    assert run_cli("send", "three").returncode == 0
    names = [queued(directory)[0]["event"] for directory in ("a/b", "logs/from_env", "ws_queue")]
    assert names == ["one", "two", "three"]


def test_send_to_topics():
    """--to may be repeated, and all topics are kept."""
    assert run_cli("send", "hello", "--to", "/chat", "--to", "user:1").returncode == 0
    assert queued() == [{"event": "hello", "payload": None, "to": ["/chat", "user:1"]}]


def test_send_durable():
    """--durable queues the same event."""
    assert run_cli("send", "hello", "1", "--durable").returncode == 0
    assert queued() == [{"event": "hello", "payload": 1}]


@pytest.mark.parametrize("payload", [
    "hello", "{", "{'a': 1}", "[1,]", "", " ", "1 2", pytest.param("[" * 100_000, id="100,000 brackets"),
])
def test_a_payload_that_is_not_json_is_refused(payload):
    """Status 2, one sentence that says so, and nothing queued; also where only the stack is too small for it."""
    assert "payload" in complaint(run_cli("send", "hello", "-", input=payload), 2)
    assert os.listdir(".") == []


@pytest.mark.parametrize("data", [b"\xff", b'"\xc3"', b"\x00"])
def test_bytes_on_stdin_that_are_not_text_are_refused(data):
    """Status 2 and a sentence: a payload is JSON in UTF-8."""
    done = run_cli("send", "hello", "-", input=data, encoding=None)  # which subprocess takes bytes without
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "payload" in complaint(done, 2)
    assert os.listdir(".") == []


@pytest.mark.parametrize("payload", ["NaN", "[Infinity]", '{"x": -Infinity}'])
def test_numbers_that_json_has_not_are_refused(payload):
    """Python would read them, and no browser could: an error, and nothing queued."""
    done = run_cli("send", "hello", "-", input=payload)
    assert complaint(done, done.returncode or 1)
    assert done.returncode in (1, 2)
    assert os.listdir(".") == []


@pytest.mark.parametrize("args", [[""], ["hello", "1", "--to", ""]])
def test_an_empty_name_is_refused(args):
    """An event and a topic have a name; the sentence says which of them had none, and nothing is queued."""
    done = run_cli("send", *args)
    assert done.returncode in (1, 2)
    assert ('"to"' if "--to" in args else '"event"') in complaint(done, done.returncode)
    assert os.listdir(".") == []


def test_an_event_that_is_too_large_is_refused():
    """More than the largest event file would only be moved to failed/ by the server."""
    done = run_cli("send", "hello", "-", input=json.dumps("x" * (1024 * 1024)))
    assert "max_event_bytes" in complaint(done, 1)


@pytest.mark.parametrize("queue", ["file/q", "file"])
def test_send_to_a_queue_that_cannot_be_made(queue):
    """Status 1, and a sentence with the path."""
    with open("file", "w"):
        pass
    assert f"queue directory {queue}" in complaint(run_cli("send", "hello", "--queue", queue), 1)


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs a directory that nobody may write to")
def test_send_to_a_directory_that_may_not_be_written():
    """Status 1, and a sentence with the path, also for root."""
    said = complaint(run_cli("send", "hello", "--queue", "/proc/self"), 1)
    assert "/proc/self" in said


# ---- listen ------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    with spawn_server("--queue", "q") as running:
        yield running


class Sending:
    """Sends "tick" again and again: a listener cannot be asked whether it is connected yet."""

    def __init__(self, queue="q"):
        self._queue = queue

    def __enter__(self):
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self):
        number = 0
        while not self._stop.wait(0.02):
            number += 1
            wsqueue.queue_event(self._queue, "tick", number)


def test_listen_prints_one_message_a_line(server):
    """--count messages as they came, one a line, in order; then it ends with status 0."""
    with Sending():
        done = run_cli("listen", server.url, "--count", "3")
    assert (done.returncode, done.stderr) == (0, "")
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    first = messages[0]["payload"]
    assert [set(message) for message in messages] == 3 * [{"event", "payload", "timestamp"}]
    assert [message["payload"] for message in messages] == [first, first + 1, first + 2]


def test_listen_hears_its_path(server):
    """The URL's path is the client's topic."""
    with start("listen", f"{server.url}/chat?x=1", "--count", "1") as process:
        with connect(server.url + "/chat") as witness:
            # An event to /chat that the witness has got was sent to everybody on the topic, but perhaps before
            # the process joined it; so it is sent until one arrives there.
            while process.poll() is None:
                wsqueue.queue_event("q", "said", to="/chat")
                assert json.loads(witness.recv(timeout=10 * TIME_UNIT))["event"] == "said"
        assert json.loads(process.stdout.read())["event"] == "said"
        assert process.returncode == 0


def test_listen_ends_at_its_timeout(server):
    """Nothing was expected, and nothing came: status 0."""
    done = run_cli("listen", server.url, "--timeout", "0.2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_deadline_may_pass_while_it_is_looked_at(monkeypatch):
    """No socket takes the negative time that would be left: it is a timeout like any other."""
    monkeypatch.setattr(wsqueue, "time", SimpleNamespace(monotonic=iter([9.9, 10.1, 10.2]).__next__))
    with suppress(TimeoutError):
        assert wsqueue._remaining(10.0) > 0
    with pytest.raises(TimeoutError):
        wsqueue._remaining(10.0)


def test_listen_fails_if_the_count_is_not_reached(server):
    """Status 1 tells a script that it has waited in vain."""
    done = run_cli("listen", server.url, "--count", "1", "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [["--count", "0"], ["--count", "-1"], ["--timeout", "-1"], ["--timeout", "nan"]])
def test_listen_refuses_senseless_limits(server, args):
    """Nothing to count, or time that runs backwards: status 2 at once, and no waiting for ever."""
    done = run_cli("listen", server.url, *args, timeout=10 * TIME_UNIT)
    assert args[0][2:] in refusal(done)


def test_listen_ends_when_the_server_says_goodbye(server):
    """The stream has ended in order: status 0."""
    with start("listen", server.url) as process:
        with Sending():
            assert process.stdout.readline()  # it is connected
        server.end()
        _, errors = process.communicate(timeout=10 * TIME_UNIT)
        assert (process.returncode, errors) == (0, "")


def test_listen_is_ended_by_ctrl_c(server):
    """Status 130, as shells expect, and no traceback."""
    with start("listen", server.url) as process:
        with Sending():
            assert process.stdout.readline()
        assert end(process, signal.SIGINT) == 130
        assert process.stderr.read() == ""


def test_listen_does_not_complain_when_its_reader_leaves(server):
    """`wsqueue listen URL | head -1` ends without a word."""
    with start("listen", server.url) as process:
        with Sending():
            assert process.stdout.readline()
            process.stdout.close()
            assert process.wait(10 * TIME_UNIT) is not None
        assert process.stderr.read() == ""


def test_listen_in_a_pipeline(server):
    """The same in a real shell, to its end."""
    command = f"{sys.executable} {WSQUEUE} listen {server.url} | head -n 1"
    with Sending():
        done = subprocess.run(["bash", "-c", command], capture_output=True, encoding="utf-8",
                              timeout=30 * TIME_UNIT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["event"] == "tick"


def test_listen_to_nobody():
    """An unreachable server: status 1, and a sentence with the URL and the reason."""
    with reserved_port() as port:
        url = f"ws://127.0.0.1:{port}/"
        said = complaint(run_cli("listen", url), 1)
    assert url in said
    assert os.strerror(errno.ECONNREFUSED) in said


@pytest.mark.parametrize("url", [
    "http://127.0.0.1/", "127.0.0.1:8081", "ws://", "chat", "", "ws://[::1", "ws://127.0.0.1:port/", "ws://127.0.0.1:99999",
])
def test_listen_refuses_what_is_no_websocket_url(url):
    """Status 1 or 2, and a sentence that repeats it."""
    done = run_cli("listen", url)
    assert done.returncode in (1, 2)
    assert url in complaint(done, done.returncode)


@contextmanager
def answering(*steps):
    """A server for one client: each step is bytes that it sends, or a function of the socket and the request."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(20 * TIME_UNIT)

        def serve():
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(20 * TIME_UNIT)
                request = b""
                while b"\r\n\r\n" not in request:
                    request += sock.recv(4096)
                for step in steps:
                    if callable(step):
                        step(sock, request)
                    else:
                        sock.sendall(step)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}/"
        thread.join(20 * TIME_UNIT)


def accept(sock, request):
    """The 101 that answers the request."""
    key = re.search(rb"(?i)sec-websocket-key: (\S+)", request)[1]
    proof = b64encode(sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 b"Sec-WebSocket-Accept: " + proof + b"\r\n\r\n")


def ping(sock, _):
    """A ping, and a text message with what the pong has brought."""
    sock.sendall(b"\x89\x04Ada!")
    pong = b""
    while len(pong) < 10:
        pong += sock.recv(10 - len(pong))
    assert pong[:2] == b"\x8a\x84"  # a pong, masked, of four bytes
    sock.sendall(b"\x81\x04" + bytes(byte ^ mask for byte, mask in zip(pong[6:], pong[2:6])))


def pong(sock, request):
    """One that nobody has asked for, before a ping: what comes back must be an answer to that."""
    sock.sendall(b"\x8a\x00")
    ping(sock, request)


def reset(sock, _):
    """Close in such a way that the peer's next recv() fails."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_listen_answers_pings():
    """A pong with the ping's payload, masked as a client's frames must be; the ping is not printed."""
    with answering(accept, ping) as url:
        done = run_cli("listen", url, "--count", "1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Ada!\n", "")


def test_listen_ignores_a_pong():
    """A server may send one for itself (RFC 6455, section 5.5.3)."""
    with answering(accept, pong) as url:
        done = run_cli("listen", url, "--count", "1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Ada!\n", "")


def test_listen_prints_what_its_terminal_cannot_show():
    """A terminal that is not UTF-8 is no reason to end: what it lacks is escaped."""
    with answering(accept, b"\x81\x07\xc5\x81ukasz") as url:
        done = run_cli("listen", url, "--count", "1", env=environment(PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("ukasz\n")


@pytest.mark.parametrize("status", ["404 Not Found", "426 Upgrade Required", "403 Forbidden", "200 OK"])
def test_listen_tells_what_a_server_answered_instead(status):
    """Status 1, and a sentence with the HTTP status and the URL."""
    answer = f"HTTP/1.1 {status}\r\nContent-Length: 6\r\nConnection: close\r\n\r\nreason"
    with answering(answer.encode()) as url:
        said = complaint(run_cli("listen", url), 1)
    assert status in said and url in said


def test_listen_shows_why_it_was_refused():
    """The sentence of a wsqueue server that refuses reaches whoever typed the command."""
    with answering(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 15\r\n\r\n", b"Ask Ada for it.") as url:
        assert "403" in complaint(run_cli("listen", url), 1)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 101", b"SSH-2.0-OpenSSH_9\r\n", b"\x15\x03\x01\r\n\r\n"])
def test_listen_to_something_else(answer):
    """A port where something else answers, or hangs up: status 1 and a sentence."""
    with answering(answer) as url:
        assert url in complaint(run_cli("listen", url), 1)


def test_listen_to_a_server_that_stays_silent():
    """A connection that is never answered: it ends at the timeout, with status 1, and says who did not answer."""
    done = threading.Event()
    with answering(lambda *_: done.wait(20 * TIME_UNIT)) as url:
        said = complaint(run_cli("listen", url, "--timeout", "0.3"), 1)
        done.set()
    assert url in said
    assert "Send the request" not in said  # that is what a server says to a client


@pytest.mark.parametrize("step", [
    b"", reset, b"\x81\x05he", b"\xf1\x05hello", b"\x81\x01\xff",
], ids=["end", "reset", "half a frame", "reserved bits", "not UTF-8"])
def test_listen_when_the_server_breaks_off(step):
    """Gone without goodbye, or not WebSocket any more: status 1 and a sentence."""
    with answering(accept, step) as url:
        complaint(run_cli("listen", url), 1)


def test_listen_survives_a_killed_server():
    """kill -9 of the server: the listener ends with status 1 and a sentence."""
    with start("serve", "--port", "0", "--queue", "q") as serving:
        with start("listen", f"ws://127.0.0.1:{announced_port(serving)}/") as process:
            with Sending():
                assert process.stdout.readline()
                serving.kill()
            _, errors = process.communicate(timeout=10 * TIME_UNIT)
    assert process.returncode == 1
    assert errors.startswith("wsqueue: ws://127.0.0.1:") and "Traceback" not in errors


# ---- status ------------------------------------------------------------------------------------------------


def status(*args):
    """What `wsqueue status` shows, by the first word of each line; and its exit status."""
    done = run_cli("status", "--queue", "q", *args)
    assert done.stderr == ""
    return {line.split(None, 1)[0]: line.split(None, 1)[1] for line in done.stdout.splitlines()}, done.returncode


def test_status_of_a_queue_that_nobody_serves():
    """Backlog, the age of the oldest event, what failed; status 1, so that a monitor can tell."""
    for _ in range(3):
        assert wsqueue.queue_event("q", "hello")
    shown, code = status()
    assert code == 1
    assert shown["queue"] == os.path.abspath("q")
    assert shown["server"].startswith("none")
    assert re.fullmatch(r"3\b.*oldest.* \d+\.\d s", shown["backlog"])
    assert shown["failed"].split()[0].strip(",") == "0"


def test_status_of_a_queue_that_is_served(server):
    """The server's process, an empty backlog, and status 0."""
    shown, code = status()
    assert code == 0
    assert re.search(rf"\b{server.pid}\b", shown["server"])
    assert shown["backlog"] == "0"


def test_status_counts_what_failed(server):
    """Each event file in failed/ counts once, whatever lies beside it."""
    with open("q/not-an-event.json", "w") as file:
        file.write('{"event": 1}')
    eventually(lambda: status()[0]["failed"].startswith("1"), what="one failed file")
    assert "failed/" in status()[0]["failed"]


def test_status_shows_the_age_of_the_oldest_event():
    """In seconds, from the time that stands in the file's name."""
    os.mkdir("q")
    for name in ("1000.5_0000000100001.json", "2000.5_0000000200001.json"):
        with open(f"q/{name}", "w") as file:
            file.write('{"event": "old"}')
    age = float(re.search(r"(\d+\.\d) s", status()[0]["backlog"])[1])
    assert age > 1_000_000_000


def test_status_changes_nothing():
    """Whoever looks leaves the directory as it was, and no lock behind."""
    wsqueue.queue_event("q", "hello")
    before = os.listdir("q")
    status()
    assert os.listdir("q") == before


def test_status_of_a_directory_that_does_not_exist():
    """Status 1, and a sentence with the path; the directory is not made."""
    said = complaint(run_cli("status", "--queue", "nowhere"), 1)
    assert "nowhere" in said
    assert os.listdir(".") == []


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are text there")
def test_status_of_a_name_that_is_not_text():
    """File names are bytes on Linux: what the terminal cannot show is escaped."""
    name = os.fsdecode(b"q\xff")
    os.mkdir(name)
    env = environment(PYTHONIOENCODING="utf-8:strict")
    done = run_cli("status", "--queue", name, env=env)
    assert (done.returncode, done.stderr) == (1, "")
    assert "backlog" in done.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("command", ["status --queue q", "--help", "send --help", "listen URL"])
def test_a_reader_that_has_left_is_no_traceback(command, unbuffered, server):
    """Whoever closes the pipe before anything is written hears no complaint, whenever the interpreter writes."""
    reading, writing = os.pipe()
    os.close(reading)
    words = command.replace("URL", server.url).split()
    with start(*words, stdout=writing, env=environment(PYTHONUNBUFFERED=unbuffered)) as process:
        os.close(writing)
        with Sending():
            assert process.wait(10 * TIME_UNIT) is not None
        assert process.stderr.read() == ""
