"""Sections 1 to 3, and the file as a whole: what importing it does, what it offers, its settings, its shape."""

import ast
import compileall
import inspect
import json
import re
import statistics
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import wsqueue
from helpers import TIME_UNIT, WSQUEUE, eventually

SOURCE = Path(WSQUEUE).read_text("utf-8")
TREE = ast.parse(SOURCE)

# Neither site-packages nor environment variables: Python and its standard library.
BARE_PYTHON = [sys.executable, "-S", "-E", "-W", "error"]


def run(*command, cwd, **more):
    return subprocess.run(list(map(str, command)), cwd=str(cwd), capture_output=True, encoding="utf-8", check=False,
                          timeout=30 * TIME_UNIT, **more)


def run_python(program, cwd=Path(WSQUEUE).parent):
    """Run a program, with wsqueue.py importable, that prints its result as JSON."""
    done = run(*BARE_PYTHON, "-c", program, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


# ---- Names -------------------------------------------------------------------------------------------------


def defined_names():
    """The names of the classes and functions at the top level of the module."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name for node in TREE.body if isinstance(node, kinds)}


def test_all_names_exist():
    """Everything in __all__ is there, is listed once, in order, and is meant for others."""
    assert list(wsqueue.__all__) == sorted(set(wsqueue.__all__), key=lambda name: (name == name.lower(), name))
    for name in wsqueue.__all__:
        assert getattr(wsqueue, name) is not None
        assert not name.startswith("_")


def test_star_import_brings_exactly_all(tmp_path):
    """`from wsqueue import *` gives what __all__ says and nothing of the module's own imports."""
    program = "import json\nscope = {}\nexec('from wsqueue import *', scope)\n"
    names = run_python(program + "print(json.dumps(sorted(set(scope) - {'__builtins__'})))")
    assert names == sorted(wsqueue.__all__)


@pytest.mark.parametrize("name", wsqueue.__all__)
def test_public_things_are_explained(name):
    """Whatever is public says what it is for, and comes from this module."""
    thing = getattr(wsqueue, name)
    assert (inspect.getdoc(thing) or "").strip()
    assert thing.__module__ == "wsqueue"


def test_every_error_a_caller_may_meet_is_public():
    """What is raised on purpose has one base; but for two that never leave the module, each can be imported."""
    errors = {name for name in defined_names()
              if isinstance(getattr(wsqueue, name), type) and issubclass(getattr(wsqueue, name), Exception)}
    assert all(issubclass(getattr(wsqueue, name), wsqueue.WsqueueError) for name in errors)
    assert errors - set(wsqueue.__all__) == {"UnfinishedError", "HandshakeError", "PortInUseError"}


def test_public_names_of_the_design_are_public():
    """What the documentation tells people to use can be imported by name."""
    assert set(wsqueue.__all__) >= {"queue_event", "queue_events", "open_queue", "WebSocketServer", "Connection",
                                    "ConnectionClosed", "WsqueueError", "main"}
    assert wsqueue.WebSocketServer.queue_event is wsqueue.queue_event


def test_the_version_is_one():
    """__version__ has three numbers, as packaging tools expect."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", wsqueue.__version__)


def methods(thing):
    """A function itself, or the functions of a class."""
    return [thing] if inspect.isfunction(thing) else [f for f in vars(thing).values() if inspect.isfunction(f)]


@pytest.mark.parametrize("name", wsqueue.__all__)
def test_annotations_name_what_exists(name):
    """Annotations are never evaluated when the module is imported; but tools may do so, and then they must hold."""
    for function in methods(getattr(wsqueue, name)):
        assert set(function.__annotations__) - {"return"} <= set(inspect.signature(function).parameters)
        if sys.version_info >= (3, 10):  # they are written for it: an older one only has to compile them
            assert typing.get_type_hints(function) is not None


# ---- Importing ---------------------------------------------------------------------------------------------


def test_importing_starts_and_configures_nothing():
    """No thread, no log handler, not even a level: the host's process stays as it was."""
    program = """
import json, logging, threading
logging.getLogger("host")
before = [logging.root.handlers[:], logging.root.level]
import wsqueue
log = logging.getLogger("wsqueue")
print(json.dumps({"threads": threading.active_count(), "root": before == [logging.root.handlers, logging.root.level],
                  "handlers": len(log.handlers), "level": log.level, "propagate": log.propagate}))
"""
    assert run_python(program) == {"threads": 1, "root": True, "handlers": 0, "level": 0, "propagate": True}


def test_importing_loads_no_more_than_a_producer_needs():
    """What only a server or the command line uses is imported when it is used."""
    program = "import json, sys, wsqueue; print(json.dumps(sorted(sys.modules)))"
    loaded = set(run_python(program))
    assert not loaded & {"websocket_server", "ctypes", "argparse", "asyncio", "hashlib", "ssl", "urllib.parse",
                         "http.server", "socketserver", "http.client", "email", "fcntl", "sqlite3"}


def test_importing_loads_only_the_standard_library():
    """Python without site-packages can import it and queue an event."""
    loaded = set(run_python("import json, sys, wsqueue; print(json.dumps(sorted(sys.modules)))"))
    ours = {name for name in loaded if name.split(".")[0] == "wsqueue"}
    assert ours == {"wsqueue"}
    if hasattr(sys, "stdlib_module_names"):  # Python 3.10
        others = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names)
        assert others == {"wsqueue", "__main__"}


def test_queueing_starts_no_thread(tmp_path):
    """A producer's process is the same after an event as before it: no thread, no descriptor, no handler."""
    program = f"""
import json, logging, os, sys, threading
import wsqueue
count = lambda: len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
before = count()
assert wsqueue.queue_event({str(tmp_path / "q")!r}, "hello", {{"n": 1}}, to="a", durable=True)
print(json.dumps([threading.active_count(), count() - before, len(logging.root.handlers),
                  "websocket_server" in sys.modules]))
"""
    assert run_python(program) == [1, 0, 0, False]


def test_a_server_leaves_the_root_logger_alone(tmp_path):
    """The package it is built on configures logging when it is imported; the host must not notice."""
    program = f"""
import json, logging
import wsqueue
before = [logging.root.handlers[:], logging.root.level]
with wsqueue.WebSocketServer(port=0, queue={str(tmp_path / "q")!r}):
    pass
print(json.dumps(before == [logging.root.handlers, logging.root.level]))
"""
    done = run(sys.executable, "-c", program, cwd=Path(WSQUEUE).parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "true\n", "")


def test_warnings_are_errors(alone):
    """Importing and compiling warn of nothing, also in development mode."""
    done = run(*BARE_PYTHON, "-X", "dev", "-c", "import wsqueue", cwd=alone)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_compiles_with_this_interpreter(alone):
    """The file compiles, asserts stripped or not, by the oldest Python that it supports and by the newest."""
    for optimize in (0, 2):
        assert compileall.compile_dir(str(alone), quiet=1, force=True, optimize=optimize)


def test_run_as_a_program_it_is_one_module(alone):
    """A module that the program loads, and that imports wsqueue, gets the one that runs and not a second copy."""
    (alone / "websocket_server.py").write_text(
        "import sys, wsqueue\n"
        "print('same' if wsqueue is sys.modules['__main__'] else 'another', wsqueue.__name__)\n"
        "raise ImportError\n", "utf-8")
    done = run(*BARE_PYTHON, "wsqueue.py", "serve", "--port", "0", "--queue", "q", cwd=alone)
    assert done.stdout == "same __main__\n"
    assert done.returncode == 1


# ---- The single file ---------------------------------------------------------------------------------------


def test_the_file_alone_does_the_main_job(alone):
    """Copied to an empty directory: serve, listen and send are three processes, and the event arrives."""
    python = [sys.executable, "-W", "error", "wsqueue.py"]
    pipes = {"cwd": str(alone), "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
             "encoding": "utf-8"}
    processes = [subprocess.Popen([*python, "serve", "--port", "0", "--queue", "q"], **pipes)]
    try:
        url = processes[0].stdout.readline().split()[-1]
        processes.append(subprocess.Popen([*python, "listen", url, "--count", "1"], **pipes))

        def heard():
            assert run(*python, "send", "hello", '{"n": 1}', "--queue", "q", cwd=alone).returncode == 0
            return processes[1].poll() is not None

        eventually(heard, 20.0, "the listener's end")
        message = json.loads(processes[1].stdout.read())
        assert (message["event"], message["payload"]) == ("hello", {"n": 1})
        assert processes[1].stderr.read() == ""
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert {path.name for path in alone.iterdir()} <= {"wsqueue.py", "q", "__pycache__"}


# ---- The settings table ------------------------------------------------------------------------------------

UNITS = {"address", "port", "path or URL", "name", "file", "seconds", "bytes", "clients", "origins", "events", "secret",
         "auto|on|off", ""}
SETTINGS = pytest.mark.parametrize("setting", wsqueue.SETTINGS, ids=lambda setting: setting.name)


def test_settings_have_names_of_their_own():
    """No two rows share a name or a variable of the environment."""
    names = [setting.name for setting in wsqueue.SETTINGS]
    variables = [setting.variable for setting in wsqueue.SETTINGS if setting.variable]
    assert len(names) == len(set(names)) and len(variables) == len(set(variables))


@SETTINGS
def test_a_setting_says_all_about_itself(setting):
    """A name that is an identifier, a default of a simple type, a known unit, and a sentence."""
    assert setting.name.isidentifier() and setting.name == setting.name.lower()
    assert type(setting.default) in (str, int, float, bool, tuple)
    assert setting.unit in UNITS
    assert re.fullmatch(r"[A-Z].*[^.;]\.?", setting.meaning)
    assert setting.variable == "" or re.fullmatch(r"WS_[A-Z_]+", setting.variable)


@SETTINGS
def test_a_number_has_a_unit_and_a_floor(setting):
    """A number without a unit means nothing; and its default is a value that makes sense."""
    if type(setting.default) in (int, float):
        assert setting.unit
        assert setting.least <= setting.default
    else:
        assert setting.least == 0


def test_the_variables_are_those_that_are_promised():
    """Host, port, queue, node and secrets can come from the environment; nothing else does."""
    variables = {setting.name: setting.variable for setting in wsqueue.SETTINGS if setting.variable}
    assert variables == {"host": "WS_HOST", "port": "WS_PORT", "queue": "WS_QUEUE_PATH", "node": "WS_NODE",
                         "secret": "WS_SECRET", "secret_file": "WS_SECRET_FILE"}


def test_the_environment_is_the_command_lines(monkeypatch):
    """A program that embeds a server says what it wants; the environment is not looked at."""
    monkeypatch.setenv("WS_PORT", "1")
    assert wsqueue.checked_settings({}).port == 8081


def test_settings_default_to_the_table():
    """No settings given: each has its default."""
    assert vars(wsqueue.checked_settings({})) == {s.name: s.default for s in wsqueue.SETTINGS}


@SETTINGS
def test_the_default_can_be_given(setting):
    """Saying what would hold anyway changes nothing."""
    settings = wsqueue.checked_settings({setting.name: setting.default})
    assert vars(settings) == vars(wsqueue.checked_settings({}))


@SETTINGS
def test_a_value_of_another_type_is_refused(setting):
    """None, an object, and text for a number or a number for text: an error with the setting's name."""
    if setting.name == "queue":  # a path, or a queue that is open already: open_queue() is who knows
        with pytest.raises(wsqueue.QueueError):
            wsqueue.open_queue(object())
        return
    for value in (None, object(), 7 if isinstance(setting.default, (str, bool, tuple)) else "7", b"7"):
        with pytest.raises(wsqueue.SettingError, match=rf"\b{setting.name}\b"):
            wsqueue.checked_settings({setting.name: value})


@SETTINGS
def test_a_number_out_of_range_is_refused(setting):
    """Below the floor, infinite or not a number at all: an error with name and value."""
    if type(setting.default) not in (int, float):
        return
    kind = type(setting.default)
    wsqueue.checked_settings({setting.name: kind(setting.least)})
    bad = [kind(setting.least - 1)] + ([float("nan"), float("inf")] if kind is float else [])
    for value in bad:
        with pytest.raises(wsqueue.SettingError, match=rf"\b{setting.name}\b.*{value}"):
            wsqueue.checked_settings({setting.name: value})


@pytest.mark.parametrize("given, name, value", [
    ({"poll_interval": 1}, "poll_interval", 1.0),
    ({"max_age": 0}, "max_age", 0.0),
    ({"allowed_origins": ["https://a"]}, "allowed_origins", ("https://a",)),
    ({"allowed_origins": {"https://a"}}, "allowed_origins", ("https://a",)),
    ({"wakeup": False}, "wakeup", False),
    ({"port": 65535}, "port", 65535),
])
def test_values_that_mean_the_same_are_accepted(given, name, value):
    """A whole number of seconds, a list of origins: taken as the setting's own type."""
    found = getattr(wsqueue.checked_settings(given), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("given", [
    {"port": True}, {"poll_interval": True}, {"wakeup": 1}, {"port": 80.0}, {"port": 65536}, {"max_event_bytes": 1e6},
    {"allowed_origins": "https://a"}, {"allowed_origins": [1]}, {"host": ""},
], ids=str)
def test_values_that_may_mean_something_else_are_refused(given):
    """True is no number, one origin is no list of them, and an empty host would listen everywhere."""
    with pytest.raises(wsqueue.SettingError, match=rf"\b{next(iter(given))}\b"):
        wsqueue.checked_settings(given)


@pytest.mark.parametrize("name", ["colour", "Port", "", "port "])
def test_an_unknown_setting_is_refused(name):
    """The error lists those that exist."""
    with pytest.raises(wsqueue.SettingError) as caught:
        wsqueue.WebSocketServer(**{name: 1})
    assert repr(name) in str(caught.value)
    assert all(setting.name in str(caught.value) for setting in wsqueue.SETTINGS)


def test_setting_errors_are_value_errors():
    """Whoever has never heard of SettingError can catch what Python would raise."""
    with pytest.raises(ValueError):
        wsqueue.WebSocketServer(port=-1)
    with pytest.raises(wsqueue.WsqueueError):
        wsqueue.WebSocketServer().port(-1)


# ---- The shape of the file ---------------------------------------------------------------------------------


def functions():
    return [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def body_lines(function):
    """The lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_the_file_stays_within_its_budget():
    """It can be read in a day: 5,909 lines, none longer than 120 characters."""
    lines = SOURCE.splitlines()
    assert len(lines) <= 5909
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []


def test_functions_are_short():
    """None is over 60 lines, nine of ten have at most 30, and half have at most 8."""
    sizes = sorted((body_lines(function), function.name) for function in functions())
    assert [pair for pair in sizes if pair[0] > 60] == []
    numbers = [size for size, _ in sizes]
    assert numbers[len(numbers) * 9 // 10] <= 30
    assert statistics.median(numbers) <= 8


def test_nothing_is_asynchronous():
    """This is for code that is not asyncio, and holds no asyncio itself."""
    found = [node for node in ast.walk(TREE) if isinstance(node, (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor))]
    assert found == []
    assert not re.search(r"^\s*(import|from) asyncio\b", SOURCE, re.MULTILINE)


def test_sections_stand_in_order():
    """Ruler banners number what stands behind the docstring, section 1."""
    banners = re.findall(r"^# (.*?) ─{3,}$", SOURCE, re.MULTILINE)
    numbers = [int(number) for banner in banners for number in re.findall(r"(?:^|· )(\d+) ─", banner)]
    assert numbers == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]


def test_the_map_leads_to_the_sections():
    """What the docstring says that a section holds is defined there."""
    banners = {int(match[1]): SOURCE.count("\n", 0, match.start()) + 1
               for match in re.finditer(r"^# (\d+) ─", SOURCE, re.MULTILINE)}
    ends = {**{number - 1: line for number, line in banners.items()}, max(banners): SOURCE.count("\n")}
    defined = {node.name: node.lineno for node in TREE.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    text = re.search(r"^Where to look;.*?\n\n(.*?)\n\n", ast.get_docstring(TREE), re.MULTILINE | re.DOTALL)[1]
    rows = re.findall(r"(?:^|(?<= {6})) *(\d+) (.*?)(?= {6}|$)", text, re.MULTILINE)
    assert sorted(int(number) for number, _ in rows) == sorted(banners)
    for number, holds in rows:
        for name in set(re.findall(r"\w+", holds)) & set(defined):
            assert banners[int(number)] < defined[name] < ends[int(number)], name
