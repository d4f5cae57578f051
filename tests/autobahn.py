#!/usr/bin/env python3
"""Judges the server with Autobahn|Testsuite, whose fuzzing client plays 517 cases against an echo server.

    python tests/autobahn.py                        all of them
    python tests/autobahn.py '1.*' 7.5.1            some
    python tests/autobahn.py '-9.*' '-12.*'         all but some
    python tests/autobahn.py --url ws://HOST:PORT/  another server, which runs already and echoes what it gets
    python tests/autobahn.py --serve                the echo server alone, until its standard input ends

`--output DIR` keeps the reports of the suite: DIR/report/index.html is the one to open. `--timeout` ends a run that
takes longer than so many seconds. The status is 0 when every chosen case ran and is strict, that is, OK or
INFORMATIONAL both in what was exchanged and in how it was closed; 1 when one is not; 2 when none could run.

The suite is a program for CPython 2.7: $PYTHON27, python2.7 on the PATH, or one of pyenv's. It is installed once, as
tests/data/autobahn.txt says, in tests/.autobahn or $AUTOBAHN_ENV; this takes half a minute, an index of packages, and
a C compiler.
"""

import argparse
import fnmatch
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from helpers import ROOT, TIME_UNIT, Server

HERE = Path(__file__).resolve().parent
PINS = HERE / "data" / "autobahn.txt"
MIB = 1024 * 1024
STRICT = ("OK", "INFORMATIONAL")

# The suite's words for a result, and as the table has them.
EXCHANGE = {"OK": "OK", "NON-STRICT": "NON-STRICT", "INFORMATIONAL": "INFO", "UNIMPLEMENTED": "UNIMPL",
            "FAILED": "FAILED", "NOT RUN": "NOT RUN"}
CLOSE = {"OK": "OK", "INFORMATIONAL": "INFO", "WRONG CODE": "WRONG CODE", "UNCLEAN": "UNCLEAN", "FAILED": "FAILED",
         "FAILED BY CLIENT": "BY CLIENT"}

# Whether the wheels of PINS fit an interpreter.
FITS = """
import sys
from distutils.util import get_platform
sys.exit(sys.version_info[:2] != (2, 7) or sys.maxunicode == 0xFFFF or get_platform() != "linux-x86_64")
"""
LIST_CASES = """
import json
from autobahntestsuite.case import CaseCategories, Cases
print(json.dumps([[case.__name__[len("Case"):].replace("_", ".") for case in Cases], CaseCategories]))
"""
# What a developer has set for Python 3 is not for Python 2.7; what is set for pip is.
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
ENVIRON.update(PYTHONUNBUFFERED="1", PYTHONWARNINGS="ignore", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")


class CannotRun(Exception):
    """No case can be judged, and why."""


# ---- The suite and its interpreter -------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def find_python27() -> Optional[str]:
    """The interpreter for the suite, if there is one."""
    return next(filter(fits, candidates()), None)


def candidates() -> Iterator[str]:
    named = os.environ.get("PYTHON27") or shutil.which("python2.7")
    if named:
        yield named
    if not os.environ.get("PYTHON27"):  # who names one does not want another
        pyenv = Path(os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv"))
        yield from map(str, sorted(pyenv.glob("versions/2.7*/bin/python2.7")))


def fits(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", FITS], env=ENVIRON, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def environment() -> Path:
    """The environment's python; the first time, and whenever PINS changes, the environment is made."""
    home = Path(os.environ.get("AUTOBAHN_ENV") or HERE / ".autobahn").absolute()
    stamp = home / "made-by-autobahn"
    if not stamp.exists() or stamp.read_text("utf-8") != PINS.read_text("utf-8"):
        make_environment(home, stamp)
    return home / "venv" / "bin" / "python"


def make_environment(home: Path, stamp: Path) -> None:
    python = find_python27()
    if python is None:
        raise CannotRun("no CPython 2.7 was found, with UCS4 and for x86-64 Linux: name one in PYTHON27")
    # It is about to be emptied: never somebody's directory that was named by mistake.
    if home.exists() and any(home.iterdir()) and not stamp.exists():
        raise CannotRun(f"{home} was not made by this script: name another in AUTOBAHN_ENV")
    print(f"installing Autobahn|Testsuite in {home}", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    stamp.touch()
    install(python, home / "venv")
    stamp.write_text(PINS.read_text("utf-8"), "utf-8")


def install(python: str, venv: Path) -> None:
    first, *rest = [line for line in PINS.read_text("utf-8").splitlines() if not line.startswith("#")]
    with tempfile.TemporaryDirectory(prefix="autobahn-") as tool:
        # By the pip of the Python that runs this: Debian's 2.7 has none.
        pip_install(sys.executable, [first], "--target", tool)
        quietly([python, f"{tool}/virtualenv.py", "--no-download", str(venv)])
    pip_install(str(venv / "bin" / "python"), rest, "--no-build-isolation")


def pip_install(python: str, pins: Sequence[str], *options: str) -> None:
    command = [python, "-m", "pip", "install", "--no-deps", "--require-hashes", *options, "-r", "/dev/stdin"]
    quietly(command, "\n".join(pins))


def quietly(command: Sequence[str], stdin: str = "") -> str:
    """Run a command and return what it printed; what an installer prints matters only when it fails."""
    done = subprocess.run(command, env=ENVIRON, cwd=tempfile.gettempdir(), input=stdin, encoding="utf-8",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600 * TIME_UNIT, check=False)
    if done.returncode:
        raise CannotRun(f"{done.stdout}\nfailed with {done.returncode}: {' '.join(command)}")
    return done.stdout


def list_cases(python: Path) -> Tuple[List[str], Dict[str, str]]:
    """The numbers of all cases, in order, and the names of their sections."""
    cases, sections = json.loads(quietly([str(python), "-c", LIST_CASES]))
    return cases, sections


def choose(cases: Sequence[str], patterns: Sequence[str]) -> List[str]:
    """What a pattern matches, or everything, without what a pattern behind a minus matches."""
    wanted = [pattern for pattern in patterns if not pattern.startswith("-")] or ["*"]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("-")]
    for pattern in wanted + unwanted:
        if not fnmatch.filter(cases, pattern):
            raise CannotRun(f"no case matches {pattern}")
    chosen = [case for case in cases if matches(case, wanted) and not matches(case, unwanted)]
    if not chosen:  # wstest would wait for ever
        raise CannotRun("no case is left")
    return chosen


def matches(case: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(case, pattern) for pattern in patterns)


# ---- The server --------------------------------------------------------------------------------------------


def serve() -> None:
    """Echo every message until the standard input ends, which it does at the latest with whoever started this."""
    sys.path.insert(0, str(ROOT))
    from wsqueue import WebSocketServer

    # Section 9 sends messages of 16 MiB, and does not read the echo before all is sent; sections 12 and 13 are to see
    # our compression, and not only their own.
    server = WebSocketServer(host="127.0.0.1", port=0, max_message_bytes=32 * MIB, outbox_bytes=64 * MIB,
                             ping_interval=0, deflate_min_bytes=0)
    server.on_message("/", lambda conn, message: conn.send(message))
    server.start(background=True)
    print("listening on", server.url, flush=True)
    sys.stdin.read()
    server.stop()


@contextmanager
def echo_server(output: Path) -> Iterator[str]:
    """The URL of serve() in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    with open(output / "stdout", "wb") as out, open(output / "stderr", "wb") as err:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=err)
    with process:
        server = Server(process, output)
        try:
            server.wait_until_it_listens()
            yield server.url
        finally:
            server.end()


# ---- The run -----------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What became of a case."""

    case: str
    exchange: str
    close: str
    seconds: float = 0.0
    reason: str = ""

    @property
    def section(self) -> str:
        return self.case.split(".")[0]

    @property
    def strict(self) -> bool:
        return self.exchange in STRICT and self.close in STRICT


def run(python: Path, url: str, cases: Sequence[str], output: Path, timeout: float) -> List[Result]:
    """Let wstest play the cases against the server, and read its reports."""
    report = output / "report"
    specification = {"outdir": str(report), "servers": [{"agent": "server", "url": url}], "cases": cases,
                     "exclude-cases": [], "exclude-agent-cases": {}}
    (output / "spec.json").write_text(json.dumps(specification), "utf-8")
    if (report / "index.json").exists():  # an earlier run's, which a crash of this one must not leave to be read
        (report / "index.json").unlink()
    play(python, output, timeout)
    return read_results(report, cases)


def play(python: Path, output: Path, timeout: float) -> None:
    command = [str(python), "-m", "autobahntestsuite.wstest", "-m", "fuzzingclient", "-s", str(output / "spec.json")]
    with open(output / "wstest.log", "wb") as log:
        try:
            # It would import what lies in its working directory.
            subprocess.run(command, cwd=str(output), env=ENVIRON, stdin=subprocess.DEVNULL, stdout=log,
                           stderr=subprocess.STDOUT, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            print(f"ended after {timeout:g} s", file=sys.stderr)


def read_results(report: Path, cases: Sequence[str]) -> List[Result]:
    """wstest writes its reports when it ends, and only about the cases that it came to."""
    index = report / "index.json"
    found = json.loads(index.read_text("utf-8")).get("server", {}) if index.exists() else {}
    return [read_result(report, case, found[case]) if case in found else Result(case, "NOT RUN", "") for case in cases]


def read_result(report: Path, case: str, entry: Dict[str, Any]) -> Result:
    exchange, close = entry["behavior"], entry["behaviorClose"]
    if exchange == "UNIMPLEMENTED":
        close = ""  # there was nothing to close: the suite's own table has no result here, either
    result = Result(case, exchange, close, entry["duration"] / 1000)
    if result.strict:
        return result
    details = json.loads((report / entry["reportfile"]).read_text("utf-8"))
    return result._replace(reason="; ".join(reasons(result, details)))


def reasons(result: Result, details: Dict[str, Any]) -> Iterator[str]:
    if result.exchange == "UNIMPLEMENTED":
        yield "no extension was agreed on"
    elif result.exchange not in STRICT:
        best = details["expected"].get("OK")
        yield details["result"] if best is None else f"expected {shown(best)}, got {shown(details['received'])}"
    if result.close and result.close not in STRICT:
        yield f"{details['resultClose']}; the close code was {details['remoteCloseCode']}"
    for what in ("wasOpenHandshakeTimeout", "wasCloseHandshakeTimeout", "wasServerConnectionDropTimeout"):
        if details[what]:
            yield what


def shown(events: Sequence[Any]) -> str:
    return textwrap.shorten(json.dumps(events), 120)


# ---- The verdict -------------------------------------------------------------------------------------------


def print_table(results: Sequence[Result], names: Dict[str, str]) -> None:
    """A line for each section, and one for all of them."""
    sections = {result.section: f"{result.section} {names[result.section]}" for result in results}
    lines = [["section", "cases", "seconds", *EXCHANGE.values(), *CLOSE.values()]]
    lines += [line_of(name, [result for result in results if result.section == section])
              for section, name in sections.items()]
    lines += [line_of("all", results)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    exchange, close = (sum(widths[:column]) + 2 * column for column in (3, 3 + len(EXCHANGE)))
    print(f"{'':{exchange}}exchange".ljust(close) + "close")
    for name, *figures in lines:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(figures, widths[1:])), sep="  ")


def line_of(name: str, results: Sequence[Result]) -> List[str]:
    exchange = Counter(result.exchange for result in results)
    close = Counter(result.close for result in results)
    seconds = sum(result.seconds for result in results)
    counts = [exchange[word] for word in EXCHANGE] + [close[word] for word in CLOSE]
    return [name, str(len(results)), f"{seconds:.1f}", *(str(count or ".") for count in counts)]


def print_faults(results: Sequence[Result]) -> None:
    """What is not strict; cases that went wrong in the same way stand together."""
    groups: Dict[Tuple[str, str, str], List[str]] = {}
    for result in results:
        if not result.strict:
            groups.setdefault((result.exchange, result.close, result.reason), []).append(result.case)
    for (exchange, close, reason), cases in groups.items():
        print(f"\n{exchange}{close and f', close {close}'}{reason and f': {reason}'}")
        print(textwrap.fill(" ".join(cases), 118, initial_indent="    ", subsequent_indent="    "))


def print_verdict(results: Sequence[Result], names: Dict[str, str], output: Path) -> bool:
    """Whether all is well, after the table and what there is to say about it."""
    print_table(results, names)
    print_faults(results)
    strict = sum(result.strict for result in results)
    print(f"\n{strict} of {len(results)} cases are strict")
    if any(result.exchange == "NOT RUN" for result in results):
        log = (output / "wstest.log").read_text("utf-8", "replace")
        print("the end of wstest.log:", *log.splitlines()[-8:], sep="\n")
    return strict == len(results)


# ---- The command line --------------------------------------------------------------------------------------


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", metavar="CASES", nargs="*", help="patterns such as '1.*'; '-1.*' leaves cases out")
    parser.add_argument("--output", metavar="DIR", type=Path, help="where reports and logs go, and stay")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=1800 * TIME_UNIT, help="for the whole run")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="judge this server")
    where.add_argument("--serve", action="store_true", help="run the echo server alone")
    options, rest = parser.parse_known_args(arguments)
    for unknown in rest:  # to argparse, a pattern behind a minus is an option
        if not re.match(r"-?\d", unknown):
            parser.error(f"unknown argument: {unknown}")
    options.cases += rest
    return options


@contextmanager
def directory(chosen: Optional[Path]) -> Iterator[Path]:
    if chosen is None:
        with tempfile.TemporaryDirectory(prefix="autobahn-") as temporary:
            yield Path(temporary)
    else:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen.resolve()


def judge(options: argparse.Namespace) -> bool:
    python = environment()
    cases, names = list_cases(python)
    chosen = choose(cases, options.cases)
    with directory(options.output) as output:
        if options.url:
            results = run(python, options.url, chosen, output, options.timeout)
        else:
            with echo_server(output) as url:
                results = run(python, url, chosen, output, options.timeout)
        return print_verdict(results, names, output)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    options = parse(arguments)
    if options.serve:
        serve()
        return 0
    try:
        return 0 if judge(options) else 1
    except CannotRun as error:
        print(f"autobahn.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
