"""The short form of tests/fuzz.py; and that it finds what is there to be found, and says how to see it again."""

import ast
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fuzz
import wsqueue
from helpers import TIME_UNIT, eventually

SEED = 6455
CASES = {
    "request": 3000, "frames": 1000, "close": 3000, "events": 3000, "names": 5000, "directory": 150, "socket": 256,
}  # half a second each


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_nothing_that_comes_in_breaks_anything(name):
    """Whatever is sent, written or named, the only exceptions are those that are documented, and nothing is lost."""
    report = fuzz.fuzz(fuzz.TARGETS[name], range(CASES[name]), SEED)
    assert report.cases == CASES[name]
    assert not report.failures, "\n\n".join(map(str, report.failures[:3]))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_case_follows_from_seed_and_number_alone(name):
    """The same seed and number make the same case, which is a Python literal; others make others."""
    target = fuzz.TARGETS[name]
    cases = [[repr(target.make(fuzz.dice_for(seed, name, number))) for number in range(50)] for seed in (1, 1, 2)]
    assert cases[0] == cases[1]
    assert all(repr(ast.literal_eval(case)) == case for case in cases[0])
    assert len(set(cases[0])) > 10 and cases[0] != cases[2]


# ---- Faults, each of which must be found -------------------------------------------------------------------


def strict_request(head, parse=wsqueue.parse_request):
    """Lets an exception escape that is none of ours."""
    if b"%zz" in head:
        raise ValueError("not hexadecimal")
    return parse(head)


class CutsMatter(wsqueue.FrameParser):
    """Makes something else of a stream that comes in certain pieces."""

    def feed(self, data):
        return super().feed(data[:-1] if len(data) == 7 else data)


class KeepsEverything(wsqueue.FrameParser):
    """Holds on to what it has dealt with."""

    def feed(self, data):
        for message in super().feed(data):
            self.__dict__.setdefault("kept", []).append(bytes(20_000))
            yield message


class Greedy(wsqueue.FrameParser):
    """Takes much memory, and gives it back."""

    def feed(self, data):
        bytearray(100 * len(data))
        return super().feed(data)


class Boundless(wsqueue.FrameParser):
    """Has no limit."""

    def __init__(self, *, max_bytes, **options):
        super().__init__(max_bytes=1 << 40, **options)


def short_close(code, reason="", encode=wsqueue.encode_close):
    """Loses the last character of a reason."""
    return encode(code, reason[:-1])


def hasty_events(data, event_id, stamp, source=None, parse=wsqueue.parse_events):
    """Takes a file whose end is missing for a whole one."""
    try:
        return parse(data, event_id, stamp, source)
    except wsqueue.UnfinishedError:
        return parse(data + b"}", event_id, stamp, source)


def exact_stamp(name, stamp=wsqueue.name_stamp):
    """Refuses a number that is too large to be a time."""
    if "9" * 20 in name:
        raise OverflowError("too many nines")
    return stamp(name)


class Forgetful(wsqueue.DirectoryQueue):
    """Removes files that nobody was sent."""

    def take(self, max_bytes=wsqueue.TICK_BYTES):
        events = super().take(max_bytes)
        if len(events) < 2:
            return events
        self.done(events)
        return []


class Repeats(wsqueue.DirectoryQueue):
    """Never removes what was sent."""

    def done(self, events):
        pass


class OutOfOrder(wsqueue.DirectoryQueue):
    """Sends the youngest first."""

    def take(self, max_bytes=wsqueue.TICK_BYTES):
        events = super().take(max_bytes)
        sources = reversed(dict.fromkeys(event.source for event in events))
        return [event for source in sources for event in events if event.source == source]


class Leaks(wsqueue.DirectoryQueue):
    """Leaves a descriptor open."""

    opened = ()

    def open(self):
        super().open()
        Leaks.opened = (*self.opened, os.open("/", os.O_RDONLY))


def failing_deflate(offers, accept=wsqueue.accept_deflate):
    """Fails in the server's own thread, which logs it, closes the connection and goes on."""
    if "x-webkit" in offers:
        raise ValueError("a bug in reading offers")
    return accept(offers)


def another_close(code, reason="", encode=wsqueue.encode_close):
    """Tells a client something else than what it did wrong."""
    return encode(1011 if code == 1002 else code, reason)


def empty_pong(opcode, payload, encode=wsqueue.encode_frame, **options):
    """Answers a ping with nothing of what it said."""
    return encode(opcode, b"" if opcode == wsqueue.PONG else payload, **options)


FAULTS = {
    "another exception": ("request", "parse_request", strict_request, "not hexadecimal"),
    "cuts matter": ("frames", "FrameParser", CutsMatter, "at once"),
    "memory held": ("frames", "FrameParser", KeepsEverything, "bytes held"),
    "memory used": ("frames", "FrameParser", Greedy, "bytes used"),
    "no limit": ("frames", "FrameParser", Boundless, "but should be"),
    "a reason that is too short": ("close", "encode_close", short_close, "became"),
    "half a file": ("events", "parse_events", hasty_events, "are understood"),
    "a name": ("names", "name_stamp", exact_stamp, "too many nines"),
    "events lost": ("directory", "DirectoryQueue", Forgetful, "was not sent"),
    "files not removed": ("directory", "DirectoryQueue", Repeats, "is still there"),
    "order": ("directory", "DirectoryQueue", OutOfOrder, "out of order"),
    "a descriptor": ("directory", "DirectoryQueue", Leaks, "descriptors"),
    "a traceback": ("socket", "accept_deflate", failing_deflate, "the server logged"),
    "another close code": ("socket", "encode_close", another_close, "close codes"),
    "another pong": ("socket", "encode_frame", empty_pong, "pongs"),
}


@pytest.fixture
def fault(request, monkeypatch):
    """One of them, in the place of what it imitates."""
    target, name, wrong, what = FAULTS[request.param]
    monkeypatch.setattr(wsqueue, name, wrong)
    monkeypatch.setattr(fuzz, "MOST_FAILURES", 5)
    yield target, what
    for descriptor in Leaks.opened:
        os.close(descriptor)
    Leaks.opened = ()


RACES = ("'reset')", "'close')")  # a client that leaves may be faster than the fault
REPORT = r"^(FAILURE: .*?^input: (.*?)\nagain: python tests/fuzz.py (.*?))$"


@pytest.mark.parametrize("fault", FAULTS, indirect=True)
def test_a_fault_is_found_and_can_be_seen_again(fault, capsys):
    """The status is 1, and the output has the exception, the input as a literal, and the command for this one case."""
    target, what = fault
    assert fuzz.main([target, "--cases", str(CASES[target]), "--seed", str(SEED)]) == 1
    failures = re.findall(REPORT, capsys.readouterr().out, re.S | re.M)
    case, again = next(rest for failure, *rest in failures if what in failure and not rest[0].endswith(RACES))
    with pytest.raises(Exception, match=what):
        check(fuzz.TARGETS[target], ast.literal_eval(case))
    assert fuzz.main(again.split()) == 1
    assert f"input: {case}\n" in capsys.readouterr().out


def check(target, case):
    target.open()
    try:
        target.check(case)
    finally:
        target.close()


# ---- The program ---------------------------------------------------------------------------------------------


def test_the_program_reports_each_target_in_a_line(capsys):
    """Seed first; at the end cases, seconds and failures of each; and status 0 where nothing was found."""
    assert fuzz.main(["close", "names", "--cases", "700", "--seed", "5"]) == 0
    first, *reports = capsys.readouterr().out.splitlines()
    assert first == "seed 5"
    found = [re.fullmatch(r"(\w+) +(\d+) cases +\d+\.\d s +\d+/s +0 failures", report) for report in reports]
    cases = {match[1]: int(match[2]) for match in found}
    assert list(cases) == ["close", "names"] and 700 <= sum(cases.values()) <= 701


def test_without_arguments_there_are_a_million_cases_for_all_targets():
    """What a developer gets who only knows the file's name."""
    given = fuzz.parse_arguments([])
    assert given.targets == list(fuzz.TARGETS) and given.seed is not None
    assert sum(fuzz.shares(given.targets, given.cases).values()) >= 1_000_000


def test_an_unknown_target_is_refused_with_those_that_exist(capsys):
    """A misspelt name must not look like a passed run."""
    with pytest.raises(SystemExit) as ended:
        fuzz.main(["frame"])
    assert ended.value.code == 2
    assert "no target frame; there are: request, frames," in capsys.readouterr().err


class Untidy(fuzz.Target):
    """Leaves a thread behind, which no case is to blame for."""

    name, weight = "untidy", 1
    left: threading.Thread

    def open(self):
        self.over = threading.Event()
        self.left = threading.Thread(target=self.over.wait)
        self.left.start()

    def make(self, dice):
        return dice.below(10)

    def check(self, case):
        pass


def test_a_thread_that_stays_is_a_failure(monkeypatch):
    """Threads and descriptors are counted for a target as a whole, too."""
    monkeypatch.setattr(fuzz, "eventually", lambda condition, what: eventually(condition, 0.1, what))
    target = Untidy()
    try:
        (failure,) = fuzz.fuzz(target, range(3), SEED).failures
    finally:
        target.over.set()
        target.left.join()
    assert "threads and descriptors" in str(failure) and failure.number is None


class Together(fuzz.Target):
    """Fails once it has seen two cases."""

    name, weight = "together", 1

    def open(self):
        self.seen = []

    def make(self, dice):
        return dice.below(10)

    def check(self, case):
        self.seen.append(case)
        fuzz.expect(len(self.seen) < 2, "one too many")


def test_what_no_case_does_alone_is_reported_with_all_of_them():
    """A failure that takes several cases is none that may be lost on the way to the one that is guilty."""
    (failure,) = fuzz.fuzz(Together(), range(3), SEED).failures
    assert len(failure.case) == 3 and "one too many" in str(failure)


HANGS = """
import sys, threading
import fuzz, wsqueue
wsqueue.name_stamp = lambda name: threading.Event().wait()
sys.exit(fuzz.main(["names", "--cases", "1", "--seed", "1"], patience=0.05))
"""


def test_a_case_that_hangs_ends_the_program_and_is_shown():
    """Nobody has to wait for the timeout of something else, and to guess then."""
    done = subprocess.run([sys.executable, "-c", HANGS], cwd=Path(__file__).parent, capture_output=True, text=True,
                          timeout=30 * TIME_UNIT, check=False)
    case = fuzz.TARGETS["names"].make(fuzz.dice_for(1, "names", 0))
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"FAILURE: names hangs, or is slower than 0.05 s\ninput: {case!r}\n" in done.stdout
    assert "name_stamp" in done.stderr or "<lambda>" in done.stderr
