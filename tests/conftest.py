"""What holds for every test: it tests this checkout, leaves nothing behind, ends, and in CI it is run."""

import faulthandler
import gc
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import settings

from autobahn import find_python27
from brokers import EPMD, POSTGRES, RABBITMQ, REDIS, postgres_server, rabbitmq_server, redis_server
from browser import CHROMEDRIVER, CHROMIUM, run_chromium
from helpers import ROOT, TIME_UNIT, WSQUEUE, eventually

# Whatever else is installed under the name, the file that is tested is the one next to this directory.
sys.path.insert(0, str(ROOT))

# Settings of the developer's own server would reach the servers that tests start.
for name in [name for name in os.environ if name.startswith("WS_")]:
    del os.environ[name]

# On Python 3.8 a library warns of that alone: no news (see pytest.ini), and not for the stderr that tests look at.
os.environ["PYTHONWARNINGS"] = "ignore:Python {}.{} is no longer supported".format(*sys.version_info)

# A hung test fails, and the next one runs. Said here and not in pytest.ini, where it could not be scaled;
# a test that needs longer says @pytest.mark.timeout.
os.environ.setdefault("PYTEST_TIMEOUT", str(60 * TIME_UNIT))

# One slow example proves nothing on a busy machine; the deadline above is there for the test as a whole.
settings.register_profile("wsqueue", settings(), deadline=None)
settings.load_profile("wsqueue")

# coverage measures processes that a test starts from Python 3.9 on; setup.py asks for it there.
collect_ignore = [] if sys.version_info >= (3, 9) else ["test_measure_coverage.py"]

IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")
DESCRIPTORS = Path("/proc/self/fd")


@pytest.fixture
def alone(tmp_path):
    """A directory that holds wsqueue.py and nothing else."""
    directory = tmp_path / "alone"
    directory.mkdir()
    shutil.copy(WSQUEUE, str(directory))
    return directory


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """One browser for all tests: starting it is what takes long. Each test opens its page anew."""
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("needs Debian's chromium and chromium-driver")
    with run_chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


# ---- Brokers: one of each for all tests, which nobody ends -------------------------------------------------


def _broker(package, server, *programs):
    """A fixture; programs: their paths, or None."""

    @pytest.fixture(scope="session")
    def broker(tmp_path_factory):
        if not all(programs):
            pytest.skip(f"needs Debian's {package}")
        with server(tmp_path_factory.mktemp(package)) as running:
            yield running

    return broker


redis_broker = _broker("redis-server", redis_server, REDIS)
postgres_broker = _broker("postgresql", postgres_server, POSTGRES)
rabbitmq_broker = _broker("rabbitmq-server", rabbitmq_server, RABBITMQ, EPMD)


@pytest.fixture(params=["directory", "sqlite", "postgresql", "redis", "amqp"])
def queue_url(request, tmp_path):
    """A fresh queue of every kind."""
    if request.param == "directory":
        return str(tmp_path / "queue")
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/queue.db"
    broker = {"postgresql": "postgres_broker", "redis": "redis_broker", "amqp": "rabbitmq_broker"}[request.param]
    return request.getfixturevalue(broker).queue_url()


# ---- Several workers ---------------------------------------------------------------------------------------

# Whole files are given to pytest-xdist's workers one by one. Of these the longest come first: a long one that came
# last would run alone.
LONGEST = (
    "test_queues", "test_broker_trouble", "test_bench", "test_nodes", "test_history", "test_cli", "test_processes",
    "test_server", "test_reach", "test_autobahn", "test_soak", "test_brokers", "test_tls", "test_wsgi_examples",
    "test_page_examples", "test_producer_examples", "test_readme", "test_hostile", "test_deploy",
)


def pytest_configure(config):
    """Else those with the most tests would come first. (Before pytest-xdist 3.7, on Python 3.8, they do.)"""
    config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


# ---- In CI nothing is skipped: a missing tool must not look like a passed test -----------------------------


def _fail_if_skipped(report):
    if IN_CI and report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"In CI every test has to run and pass. {reason}"
    return report


# tryfirst makes a wrapper the outermost one: it sees what all the others made of the outcome.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport():
    """For pytest.skip, skipif, an empty parameter set, and xfail, which is a skip that sounds better."""
    return _fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report():
    """For whole files: importorskip, and skip with allow_module_level."""
    return _fail_if_skipped((yield))


def pytest_terminal_summary(terminalreporter):
    """What is left out for want of a Python that hardly any machine has is no skip, but is not kept quiet, either."""
    if find_python27() is None:
        terminalreporter.write_line("Autobahn|Testsuite was not run: no CPython 2.7 was found (see tests/autobahn.py)")


# ---- Nothing is left behind --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    """Every thread of ours that a test starts ends with it (servers of wider fixtures started before it)."""
    before = set(threading.enumerate())

    def left():
        return [t for t in threading.enumerate() if t not in before and t.name.startswith("wsqueue")]

    yield
    eventually(lambda: not left(), timeout=5.0, what=f"the end of {left()}")


@pytest.fixture(scope="session", autouse=True)
def _no_descriptor_is_left():
    """A leak in what many tests repeat shows up as a sum; a handful is what libraries keep open."""
    if not DESCRIPTORS.exists():
        yield
        return
    before = _open_descriptors()
    yield
    gc.collect()
    more = [what for fd, what in _open_descriptors().items() if fd not in before]
    assert len(more) <= 8, f"{len(more)} descriptors were left open: {more}"


def _open_descriptors():
    found = {}
    for link in DESCRIPTORS.iterdir():
        try:
            found[link.name] = os.readlink(link)
        except OSError:  # the one that lists the directory is gone by now
            continue
    return found


def pytest_unconfigure():
    """The interpreter ends when its threads do, or never: then show them, and end it."""
    faulthandler.dump_traceback_later(30 * TIME_UNIT, exit=True, file=sys.__stderr__)
