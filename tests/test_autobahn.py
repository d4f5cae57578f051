"""Autobahn|Testsuite finds nothing that is not strict; of compression, which takes it ten minutes, a part is here."""

import re
import subprocess
import sys

import pytest

import autobahn
from clients import serving
from helpers import TIME_UNIT

# Collected only where there is a Python for the suite; where there is none, conftest.py says so.
__test__ = autobahn.find_python27() is not None

# The first test may have to install the suite.
pytestmark = pytest.mark.timeout(240 * TIME_UNIT)


def judge(*arguments):
    """Run tests/autobahn.py to its end; the result has returncode, stdout and stderr as text."""
    return subprocess.run([sys.executable, autobahn.__file__, *arguments], capture_output=True, encoding="utf-8",
                          timeout=230 * TIME_UNIT, check=False)


@pytest.mark.parametrize("cases", [
    pytest.param(["-9.*", "-12.*", "-13.*"], id="protocol"),
    pytest.param(["9.*"], id="limits"),
    # All five kinds of data, all seven kinds of offers; messages from 16 bytes to 128 KiB, some of them in fragments.
    pytest.param(["12.*.4", "12.*.11", "12.1.10", "13.*.1", "13.*.11"], id="compression"),
])
def test_every_case_is_strict(cases):
    """The echo server does what the suite expects, not just what it puts up with, and closes as it should."""
    judged = judge(*cases)
    assert judged.returncode == 0, judged.stdout + judged.stderr


def test_server_that_does_not_echo_is_found_out():
    """A case that is not strict makes the script fail and is listed with what the suite missed."""
    with serving(callbacks={"/": lambda conn, message: None}) as server:
        judged = judge("--url", server.url, "1.1.2")
    assert judged.returncode == 1, judged.stdout + judged.stderr
    assert re.search(r'^FAILED, close .*: expected \[\["message", "\*.*, got \[\]', judged.stdout, re.MULTILINE)
    assert "\n    1.1.2\n" in judged.stdout
    assert "0 of 1 cases are strict" in judged.stdout


def test_cases_that_never_ran_are_not_strict():
    """A server that is not there, or no longer, passes nothing."""
    with serving() as server:
        url = server.url
    judged = judge("--url", url, "1.1.*", "-1.1.1")
    assert judged.returncode == 1, judged.stdout + judged.stderr
    assert "\nNOT RUN\n    1.1.2 1.1.3 1.1.4 1.1.5 1.1.6 1.1.7 1.1.8\n" in judged.stdout
    assert "0 of 7 cases are strict" in judged.stdout


def test_pattern_without_a_case_is_refused():
    """A mistyped pattern does not pass for a successful run of nothing."""
    judged = judge("8.*")
    assert judged.returncode == 2
    assert judged.stderr == "autobahn.py: no case matches 8.*\n"
