"""The file alone, the packages built from it, and the shape of the repository."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest

from helpers import ROOT, TIME_UNIT

TOP_LEVEL = {"setup.py", "wsqueue.py", "tests", "examples", "README.md", "LICENSE"}

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


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy, because building leaves directories behind in the source tree."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in TOP_LEVEL - {"tests", "examples"}:
        shutil.copy(str(ROOT / name), str(source))
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
def installed(wheel, tmp_path_factory):
    """A virtual environment with nothing in it but the wheel; the directory of its programs."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(str(home), with_pip=False, symlinks=os.name != "nt")
    bin_dir = home / "bin"
    pip = [sys.executable, "-m", "pip", "--python", bin_dir / "python", "--quiet"]
    done = run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=home)
    assert done.returncode == 0, done.stderr
    return bin_dir


def test_wheel_holds_one_module_and_the_license(wheel):
    """The wheel is the file, its metadata and its license, and nothing that lay about in the tree."""
    with zipfile.ZipFile(str(wheel)) as archive:
        names = archive.namelist()
    assert [name for name in names if ".dist-info/" not in name] == ["wsqueue.py"]
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_requires_only_websocket_server(wheel):
    """Whoever installs the package gets one other, and the tests' tools only on demand."""
    with zipfile.ZipFile(str(wheel)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode("utf-8").splitlines()
    required = [line.replace(" ", "") for line in metadata if line.startswith("Requires-Dist:")]
    assert [line for line in required if "extra==" not in line] == ["Requires-Dist:websocket-server>=0.6.4"]


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
        names = set(os.listdir(str(ROOT))) - {"__pycache__"}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL
