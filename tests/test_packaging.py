"""The file alone, the packages built from it, and the shape of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from contextlib import contextmanager
from email import message_from_string
from fnmatch import fnmatch

import pytest

from helpers import ROOT, TIME_UNIT, eventually

TOP_LEVEL = {"setup.py", "wsqueue.py", "tests", "examples", "README.md", "LICENSE"}
MADE = {"PKG-INFO", "setup.cfg", "wsqueue.egg-info"}  # what setuptools adds to an sdist

# What setuptools does when it is asked to build a project. Run with -E: a warning is to be about the project,
# not about somebody's PYTHONDONTWRITEBYTECODE.
BUILD = "from setuptools.build_meta import __legacy__ as backend; backend.build_%s(%r)"

# Neither site-packages nor environment variables: Python and its standard library, and no websocket_server.
BARE_PYTHON = [sys.executable, "-S", "-E"]


def run(*command, cwd):
    return subprocess.run(
        list(map(str, command)), cwd=str(cwd), capture_output=True, encoding="utf-8", timeout=60 * TIME_UNIT
    )


def build(kind, source, target):
    """Build an sdist or a wheel of the source tree into the target directory, and return the file."""
    before = set(target.glob("*"))
    done = run(sys.executable, "-E", "-W", "error", "-c", BUILD % (kind, str(target)), cwd=source)
    assert done.returncode == 0, done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    return (set(target.glob("*")) - before).pop()


def queued(directory):
    """The name and the payload of every event in the queue directory."""
    events = [json.loads(path.read_text("utf-8")) for path in directory.glob("*.json")]
    return [(event["event"], event["payload"]) for event in events]


# ---- The packages ------------------------------------------------------------------------------------------


# What lies about in a checkout, and belongs to nobody else's.
LEFT_BEHIND = [".git", ".venv", ".autobahn", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist"]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy, because building leaves directories behind in the source tree."""
    source, target = tmp_path_factory.mktemp("source") / "wsqueue", tmp_path_factory.mktemp("sdist")
    shutil.copytree(str(ROOT), str(source), ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    for stray in ("tests/__pycache__/test_event.pyc", "tests/.venv/bin/python", "examples/.cache", "notes.txt"):
        (source / stray).parent.mkdir(parents=True, exist_ok=True)
        (source / stray).touch()
    return build("sdist", source, target)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, which proves that the sdist is complete."""
    source = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(str(sdist)) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # absent from the first 3.8
        archive.extractall(str(source))
    return build("wheel", next(source.iterdir()), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(str(wheel)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        return message_from_string(archive.read(name).decode("utf-8"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A virtual environment with nothing in it but the wheel; the directory of its programs."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(str(home), with_pip=False, symlinks=os.name != "nt")
    bin_dir = home / "bin"
    pip = [sys.executable, "-m", "pip", "--python", bin_dir / "python", "--quiet"]
    done = run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=home)
    assert done.returncode == 0, done.stderr
    return bin_dir


def test_sdist_holds_what_the_readme_describes(sdist):
    """All that the repository holds, tests and examples with it, and nothing that lay about in the tree."""
    with tarfile.open(str(sdist)) as archive:
        files = {member.name.split("/", 1)[1]: member.mode for member in archive if member.isfile()}
    there = {str(path.relative_to(ROOT)) for name in TOP_LEVEL for path in [ROOT / name, *(ROOT / name).rglob("*")]
             if path.is_file() and not any(fnmatch(part, left) for part in path.parts for left in LEFT_BEHIND)}
    made = {name for name in files if name in MADE or name.split("/")[0] in MADE}
    assert set(files) - made == there | {".ruff.toml"}
    assert files["tests/run"] & 0o100


def test_wheel_holds_one_module_its_types_and_the_license(wheel):
    """The wheel is the file, twice: types of an installed module are believed in a package beside it only."""
    with zipfile.ZipFile(str(wheel)) as archive:
        names = archive.namelist()
        module, types = archive.read("wsqueue.py"), archive.read("wsqueue-stubs/__init__.pyi")
    assert sorted(name for name in names if ".dist-info/" not in name) == ["wsqueue-stubs/__init__.pyi", "wsqueue.py"]
    assert any(name.endswith("LICENSE") for name in names)
    assert module == types == (ROOT / "wsqueue.py").read_bytes()


def test_an_index_would_take_the_packages(sdist, wheel):
    """Metadata are valid, and the description can be rendered."""
    done = run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=sdist.parent)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def test_the_description_links_to_no_file(metadata):
    """An index shows the README alone: a picture or a file beside it would be a dead link there."""
    links = re.findall(r"\[[^]]+\]\(([^)]+)\)", metadata.get_payload())
    assert any(link.startswith("#") for link in links)
    assert [link for link in links if not link.startswith(("#", "http://", "https://"))] == []
    assert "![" not in metadata.get_payload()


def test_metadata_say_what_it_is(metadata):
    """The licence as an expression, the Pythons that it runs on, and that it has types."""
    assert (metadata["License-Expression"] or metadata["License"]) == "MIT"
    assert metadata["Requires-Python"] == ">=3.8"
    classifiers = metadata.get_all("Classifier")
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(8, 14)} <= set(classifiers)
    assert "Typing :: Typed" in classifiers


def test_wheel_requires_only_websocket_server(metadata):
    """Whoever installs the package gets one other, and the tests' tools only on demand."""
    required = [line.replace(" ", "") for line in metadata.get_all("Requires-Dist")]
    assert [line for line in required if "extra==" not in line] == ["websocket-server>=0.6.4"]


def test_an_editable_installation_has_no_copy(tmp_path):
    """Who edits the file has that one alone, also where each file is linked; a copy of its types went stale."""
    for name in ("setup.py", "wsqueue.py", "LICENSE"):
        shutil.copy(str(ROOT / name), str(tmp_path))
    program = BUILD.replace("%r", "%r, {'editable_mode': 'strict'}") % ("editable", str(tmp_path))
    done = run(sys.executable, "-E", "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(str(next(tmp_path.glob("*.whl")))) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".pyi", "wsqueue.py"))]


# ---- Types -------------------------------------------------------------------------------------------------

RIGHT = """\
from typing import Union
from wsqueue import Connection, Request, WebSocketServer, queue_event

queued: bool = queue_event("ws_queue", "order_paid", {"id": 42}, to=["/orders"])
server = WebSocketServer(port=8081, queue="ws_queue")

@server.on("/chat")
def chat(conn: Connection) -> None:
    conn.join("room:" + conn.query["room"])
    for message in conn:
        server.broadcast("said", {"text": message}, to=conn.path.upper(), exclude=conn)

server.on("/hall", chat).port(8082)

@server.on_message("/chat")
def said(conn: Connection, message: Union[str, bytes]) -> None:
    conn.send(message)

@server.authenticate
def check(request: Request) -> bool:
    return request.path == "/chat"

print(server.get_connection_count() + len(server.registry.audience()))
"""
# Each line is wrong by itself.
WRONG = {
    "name-defined": "from wsqueue import queue_events; queue_evens('q', [])",
    "attr-defined": "import wsqueue; wsqueue.WebSocketServer().prot(8081)",
    "arg-type": "import wsqueue; wsqueue.WebSocketServer().port('8081')",
    "assignment": "import wsqueue; queued: str = wsqueue.queue_event('q', 'order_paid')",
}


@pytest.fixture(params=["installed", "copied"])
def check_types(request, tmp_path, tmp_path_factory):
    """A function that runs mypy --strict over a program that imports wsqueue, and returns what it says, and its status.

    The wheel is in an environment of its own; the copied file lies beside the program.
    """
    if request.param == "copied":
        shutil.copy(str(ROOT / "wsqueue.py"), str(tmp_path))
        python = sys.executable
    else:
        python = request.getfixturevalue("installed") / "python"
    cache = tmp_path_factory.getbasetemp() / f"mypy-{request.param}"  # checked once, and not once for each test

    def check(program):
        (tmp_path / "program.py").write_text(program, "utf-8")
        # silent: what an old mypy says about the file itself is not about this program.
        mypy = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file", os.devnull]
        done = run(*mypy, "--cache-dir", cache, "--python-executable", python, "program.py", cwd=tmp_path)
        return done.stdout, done.returncode

    return check


def test_a_right_program_passes(check_types):
    """Strictly: every name that it uses has a type."""
    said, status = check_types(RIGHT)
    assert status == 0, said


@pytest.mark.parametrize("rule", WRONG)
def test_a_wrong_program_is_refused(check_types, rule):
    """A name that does not exist, an argument or a result of another type: the line, and nothing else."""
    said, status = check_types(WRONG[rule] + "\n")
    assert status == 1
    assert re.findall(r"^(\S+): error: .*\[(.*)\]$", said, re.MULTILINE) == [("program.py:1", rule)], said


# ---- The installed command ---------------------------------------------------------------------------------


def test_installed_command_explains_itself(installed, tmp_path):
    """The wheel puts a `wsqueue` on the path."""
    done = run(installed / "wsqueue", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "serve" in done.stdout and "send" in done.stdout


def test_installed_command_queues_without_any_other_package(installed, tmp_path):
    """Sending is a producer's work: the standard library is enough, and main's result is the exit status."""
    done = run(installed / "wsqueue", "send", "hello", '{"n": 1}', "--queue", "q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert queued(tmp_path / "q") == [("hello", {"n": 1})]
    assert run(installed / "wsqueue", "no-such-command", cwd=tmp_path).returncode != 0


# ---- The single file ---------------------------------------------------------------------------------------


def test_file_alone_is_a_program(alone):
    """Copied to an empty directory, the file runs."""
    done = run(*BARE_PYTHON, "wsqueue.py", "--help", cwd=alone)
    assert (done.returncode, done.stderr) == (0, "")
    assert "serve" in done.stdout


def test_file_alone_is_a_producer(alone):
    """Copied to an empty directory, the file queues events with nothing but the standard library."""
    program = "import wsqueue; assert wsqueue.queue_event('q', 'hello', {'n': 1})"
    done = run(*BARE_PYTHON, "-c", program, cwd=alone)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert queued(alone / "q") == [("hello", {"n": 1})]


def test_file_alone_says_what_a_server_needs(alone):
    """Without websocket-server a server cannot start; it names the package and does not show a traceback."""
    done = run(*BARE_PYTHON, "wsqueue.py", "serve", "--port", "0", "--queue", "q", cwd=alone)
    assert done.returncode != 0
    assert "pip install websocket-server" in done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def serving(*command, cwd):
    """A server, in a process of its own; its URL. At its end it is asked to stop, and must not have complained."""
    with open(cwd / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen([*map(str, command), "--port", "0", "--queue", "q"], cwd=str(cwd),
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, encoding="utf-8")
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            process.communicate(timeout=20 * TIME_UNIT)
        log.seek(0)
        said = log.read()
    assert process.returncode == 0, said
    assert not re.search("Warning|Traceback|ERROR|Exception ignored", said), said


STRICT = [["-W", "error"], ["-W", "error", "-X", "dev"], ["-W", "error", "-bb"], ["-W", "error", "-I"]]


@pytest.mark.parametrize("flags", STRICT, ids=" ".join)
def test_no_command_warns(alone, flags):
    """Warnings are errors, in development mode and where bytes are no text: each command does its work, and no more.

    Whatever needs the standard library alone is run without any other.
    """
    wsqueue, bare = [sys.executable, *flags, "wsqueue.py"], [sys.executable, *flags, "-S", "wsqueue.py"]
    (alone / "secret").write_text("0123456789abcdef" * 4, "utf-8")
    with serving(*wsqueue, "serve", cwd=alone) as url:
        program = [*bare, "listen", url, "--count", "1"]
        listener = subprocess.Popen(program, cwd=str(alone), stdout=subprocess.PIPE, stderr=subprocess.PIPE)

        def heard():
            done = run(*bare, "send", "hello", '{"n": 1}', "--queue", "q", "--durable", cwd=alone)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            return listener.poll() is not None

        try:
            eventually(heard, 20.0, "the listener's end")
        finally:
            listener.kill()
            said, complaint = listener.communicate()
        assert (json.loads(said)["payload"], complaint, listener.returncode) == ({"n": 1}, b"", 0)
        for command in ("status --queue q", "ticket --user 42 --secret-file secret", "--version", "serve --help"):
            done = run(*bare, *command.split(), cwd=alone)
            assert (done.returncode, done.stderr) == (0, "") and done.stdout


# ---- The repository ----------------------------------------------------------------------------------------


def test_top_level_holds_only_what_belongs_there():
    """The product is one file; whatever else there is has its place in tests/ or examples/."""
    if (ROOT / ".git").exists():
        # safe.directory: the tests may run as another user than the one who cloned.
        git = ["git", "-c", "safe.directory=*"]
        files = run(*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
        assert files.returncode == 0, files.stderr
        names = {path.split("/")[0] for path in files.stdout.split("\0") if path}
    else:
        names = set(os.listdir(str(ROOT))) - {"__pycache__"} - MADE
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL
