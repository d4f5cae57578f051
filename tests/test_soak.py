"""The soak test in its short forms, and its checker: it must see what it is there to see."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import soak
from clients import TEXT, frame_head
from helpers import TIME_UNIT
from soak import Diary, Ledger, Nomad, numbered, topics_of

SCRIPT = Path(__file__).with_name("soak.py")


def run_soak(*args):
    """Run one command to its end; returns the figures that it printed, once everything held."""
    with subprocess.Popen([sys.executable, str(SCRIPT), *map(str, args)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8") as process:
        try:
            output, _ = process.communicate(timeout=50 * TIME_UNIT)
        finally:
            process.terminate()  # it ends what it has started; kill would leave that behind
    assert process.returncode == 0, output
    assert output.endswith("everything that is promised held\n"), output
    return {what: float(value) for what, value in re.findall(r"^(.*?) +([\d.]+)$", output, re.MULTILINE)}


# ---- The short forms ---------------------------------------------------------------------------------------


def assert_nothing_lost(figures):
    """Every event was received, and in its place, and there were some."""
    assert figures["events queued"] > 0
    assert figures["lost"] == figures["misplaced"] == 0


@pytest.mark.parametrize("disk", [[], ["--no-mount"]], ids=["as this user can", "no mount"])
def test_faults_lose_nothing(disk):
    """Each fault at least once under a steady flow: every witness gets every event, in order."""
    figures = run_soak("faults", "--seconds", 3, "--seed", 1, *disk)
    assert_nothing_lost(figures)
    for fault in ("kill -9 of the server", "SIGSTOP of the server", "corrupt files", "full disk", "bursts", "visit"):
        assert any(what.startswith(fault) and count > 0 for what, count in figures.items()), fault


def test_kills_of_the_server_lose_nothing():
    """kill -9 in the middle of a burst, and what was queued meanwhile: all of it is received, in order."""
    figures = run_soak("kill-server", "--times", 3, "--seed", 1)
    assert figures["kills of the server"] == 3
    assert_nothing_lost(figures)


def test_kills_of_producers_leave_nothing():
    """No partial event is seen, none that was acknowledged is lost, and the sweep removes what is left and old."""
    figures = run_soak("kill-producer", "--times", 20, "--seed", 1)
    assert_nothing_lost(figures)
    left = figures["temporary files left by the kills"]
    assert left >= figures["hit in mid-write, once a temporary file was seen"] == 10
    assert figures["of these, left by the sweep while young"] == left
    assert figures["and once they were old"] == 0


def test_clients_that_come_back_miss_nothing_and_get_nothing_twice():
    """Over kills of the server and their own comings and goings: each has what was sent to its topics, and no more."""
    figures = run_soak("resume", "--times", 2, "--clients", 12, "--seed", 1)
    assert figures["kills of the server"] == 2
    assert_nothing_lost(figures)
    assert figures["connections that went on"] > 12
    for what in ("repeated", "dropped", "strange", "resets"):
        assert figures[what] == 0


def test_clients_that_lose_their_node_go_on_at_another():
    """kill -9 of each node in turn, in the middle of a flow: who stays and who moves has every event once, in order."""
    figures = run_soak("nodes", "--broker", "redis", "--clients", 20, "--events", 300, "--rounds", 3)
    assert figures["kills of a node"] == 3
    assert_nothing_lost(figures)
    assert figures["clients that went to another node"] >= 60
    assert figures["repeated"] == figures["resets"] == 0


def test_clients_that_vanish_leave_nothing():
    """However they go, the server has as many threads and descriptors afterwards as before."""
    figures = run_soak("churn", "--seconds", 3, "--rate", 50, "--seed", 1)
    assert figures["connections"] > 0
    for what in ("threads", "descriptors"):
        assert figures[f"{what} at the end"] <= figures[f"{what} at the start"]


# ---- The checker -------------------------------------------------------------------------------------------


def ledger_of(*connections):
    """A ledger that has seen the numbers of one producer, "p", over so many connections."""
    ledger = Ledger()
    for numbers in connections:
        ledger.begin()
        for number in numbers:
            ledger.see("p", number)
    return ledger


@pytest.mark.parametrize("connections, repeated", [
    ([[0, 1, 2, 3, 4]], 0),
    ([[0, 1, 2], [3, 4]], 0),
    ([[0, 1, 2], [1, 2, 3, 4]], 2),
    ([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]], 5),
    ([[0, 1, 2], [2], [1, 2, 3, 4]], 3),
], ids=str)
def test_the_checker_accepts_repeats_after_a_crash(connections, repeated):
    """A repeat starts at an earlier number and goes on from there."""
    ledger = ledger_of(*connections)
    assert ledger.end({"p": 5}) == []
    assert (ledger.lost, ledger.misplaced, ledger.repeated) == (0, 0, repeated)


@pytest.mark.parametrize("connections, lost, evidence", [
    ([[0, 1, 3, 4]], 1, "p: 3 came where 2 was due"),
    ([[1, 2, 3, 4]], 1, "p: 1 came where 0 was due"),
    ([[0, 1, 2]], 2, "p: lost 2, from 3 to 4"),
    ([], 5, "p: lost 5, from 0 to 4"),
    ([[0, 1], [3, 4]], 1, "p: 3 came where 2 was due"),
    ([[0, 2, 1, 3, 4]], 0, "p: 2 came where 1 was due"),
    ([[0, 1, 2, 3], [1, 3, 4]], 0, "p: 3 came where 2 was due"),
    ([[0, 1, 1, 2, 3, 4]], 0, "p: 1 came where 2 was due"),
    ([[0, 1, 2, 3, 4, 5]], 0, "p: 6 events came, of 5 that were queued"),
], ids=["lost", "lost first", "lost last", "lost all", "lost by a crash", "swapped", "gap in a repeat",
        "repeat without a crash", "never queued"])
def test_the_checker_sees_what_is_wrong(connections, lost, evidence):
    """A lost event, a swapped pair, a gap after a repeat: each is a violation that names the numbers."""
    ledger = ledger_of(*connections)
    assert any(text.startswith(evidence) for text in ledger.end({"p": 5}))
    assert ledger.lost == lost


def test_the_checker_judges_each_producer_by_itself():
    """Events of several producers may come in any order, but each one's own."""
    ledger = Ledger()
    for producer, number in [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("b", 2)]:
        ledger.see(producer, number)
    assert ledger.end({"a": 2, "b": 3}) == []
    assert len(ledger.end({"a": 3, "b": 3})) == 1


def test_a_client_that_came_later_may_start_anywhere():
    """From its first event on, a visitor misses nothing."""
    ledger = Ledger(anywhere=True)
    ledger.see("p", 7)
    ledger.see("p", 8)
    assert ledger.violations == []
    ledger.see("p", 10)
    assert ledger.violations != []


def test_the_checker_sees_half_an_event():
    """What is cut short, damaged or no event at all is a violation."""
    event, payload = numbered("p", 0, size=100)
    whole = json.dumps({"event": event, "payload": payload})
    ledger = Ledger()
    ledger.take(whole)
    assert ledger.violations == []
    for number, damaged in enumerate([whole[:-1], whole.replace("xx", "x"), "[]", b"\xff"], start=1):
        ledger.take(damaged)
        assert len(ledger.violations) >= number


def diary_of(numbers, producer="p"):
    """What a client wrote down that received these numbers; events of a producer with this name go to everyone."""
    diary = Diary("client", ["/path0"])
    for number in numbers:
        diary.take(f"id-{number}", *numbered(producer, number))
    return diary


def found_in(diary, total, producer="p"):
    """How many of each kind were wrong, and the texts."""
    texts = diary.end({producer: total})
    return [diary.lost, diary.repeated + diary.dropped, diary.strange, diary.misplaced, diary.resets], texts


@pytest.mark.parametrize("numbers, found", [
    ([0, 1, 2, 3], [0, 0, 0, 0, 0]),
    ([0, 1, 3], [1, 0, 0, 0, 0]),
    ([1, 2, 3], [1, 0, 0, 0, 0]),
    ([0, 1, 2], [1, 0, 0, 0, 0]),
    ([0, 1, 1, 2, 3], [0, 1, 0, 0, 0]),
    ([0, 1, 2, 3, 0], [0, 1, 0, 0, 0]),
    ([0, 2, 1, 3], [0, 0, 0, 1, 0]),
    ([0, 1, 2, 3, 4], [0, 0, 1, 0, 0]),
], ids=str)
def test_the_checker_of_those_who_come_back_sees_what_is_wrong(numbers, found):
    """Four events were sent: what is lost, came twice, was not sent or is out of order is counted apart, and told."""
    counts, texts = found_in(diary_of(numbers), 4)
    assert counts == found
    assert bool(texts) == any(found)


def test_a_repeat_under_another_id_is_seen():
    """A client that goes by ids would show it."""
    diary = diary_of([0, 1, 2])
    diary.take("another", *numbered("p", 1))
    assert found_in(diary, 3)[0] == [0, 1, 0, 1, 0]


def test_an_event_of_another_topic_is_seen():
    """What was not addressed to the client is a violation, and what was, is due."""
    sent = range(100)
    mine = [number for number in sent if "/path0" in (topics_of("Aimed", number) or ["/path0"])]
    assert 0 < len(mine) < len(sent)
    assert found_in(diary_of(mine, "Aimed"), 100, "Aimed") == ([0, 0, 0, 0, 0], [])
    other = next(number for number in sent if number not in mine)
    assert found_in(diary_of(sorted([*mine, other]), "Aimed"), 100, "Aimed")[0] == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("message", [
    ("7", "wsqueue.reset", None),
    (None, *numbered("p", 0)),
    ("7", "soak", {**numbered("p", 10)[1], "pad": "xx"}),
], ids=["reset", "no id", "damaged"])
def test_what_should_not_come_to_those_who_come_back(message):
    """That events are gone, an event that one cannot go on from, or half an event."""
    diary = diary_of([])
    diary.take(*message)
    assert len(diary.end({})) == 1


HELLO = {"event": "wsqueue.hello", "payload": None, "id": "0"}


def soak_event(number, **changes):
    event, payload = numbered("p", number, size=200)
    return {"event": event, "payload": payload, "id": f"id-{number}", **changes}


def nomad_of(index, *messages, size=None, url="ws://127.0.0.1:9"):
    """A nomad that has received these in pieces of this size; every fourth is an event stream."""
    nomad = Nomad(index, [url])
    if index % 4 == 3:
        blocks = [f"id: {message.pop('id')}\ndata: {json.dumps(message)}\n\n" for message in map(dict, messages)]
        data = "".join(["HTTP/1.1 200 OK\r\n\r\n: comment\n\n", *blocks]).encode()
    else:
        texts = [json.dumps(message).encode() for message in messages]
        frames = [frame_head(0x80 | TEXT, len(text), masked=False) + text for text in texts]
        data = b"".join([b"HTTP/1.1 101 Switching Protocols\r\n\r\n", *frames])
    for start in range(0, len(data), size or len(data)):
        nomad.feed(data[start:start + (size or len(data))], None)
    return nomad


@pytest.mark.parametrize("index", [0, 3], ids=["WebSocket", "event stream"])
@pytest.mark.parametrize("size", [1, 7, None], ids=str)
def test_the_reader_of_the_nodes_takes_what_comes_in_any_pieces(index, size):
    """Whole messages, however the stream was cut."""
    nomad = nomad_of(index, HELLO, *map(soak_event, range(5)), size=size)
    assert nomad.is_settled()
    assert nomad.ledger.end({"p": 5}) == []


@pytest.mark.parametrize("index", [0, 3], ids=["WebSocket", "event stream"])
@pytest.mark.parametrize("messages", [
    [HELLO, soak_event(0), soak_event(2), soak_event(1)],
    [HELLO, soak_event(0), soak_event(2)],
    [HELLO, soak_event(0), soak_event(1)],
    [HELLO, soak_event(0), soak_event(1), soak_event(1), soak_event(2)],
    [HELLO, HELLO, soak_event(0), soak_event(1), soak_event(2)],
    [soak_event(0), soak_event(1), soak_event(2)],
    [HELLO, soak_event(0), soak_event(1), soak_event(2), {**HELLO, "event": "wsqueue.reset"}],
    [HELLO, soak_event(0), soak_event(1), soak_event(2, id="")],
    [HELLO, soak_event(0), soak_event(1), {**soak_event(2), "payload": {**soak_event(2)["payload"], "pad": "x"}}],
], ids=["swapped", "lost", "lost at the end", "repeated", "two hellos", "no hello", "reset", "no id", "damaged"])
def test_the_checker_of_the_nodes_sees_what_is_wrong(index, messages):
    """Three events were sent."""
    assert nomad_of(index, *messages).ledger.end({"p": 3}) != []


def test_a_nomad_must_be_greeted_with_the_id_that_it_came_with():
    """Else it would not know where the stream goes on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nomad = nomad_of(0, HELLO, url=f"ws://127.0.0.1:{listener.getsockname()[1]}")
        nomad.connect().close()
    text = json.dumps({**HELLO, "id": "1"}).encode()
    nomad.feed(b"HTTP/1.1 101 \r\n\r\n" + frame_head(0x80 | TEXT, len(text), masked=False) + text, None)
    assert nomad.ledger.violations != []


def test_a_violation_is_the_exit_status(monkeypatch, tmp_path, capsys):
    """1, with what was found, and the directory with the evidence stays."""
    monkeypatch.setattr(soak, "COMMANDS", {"churn": lambda options, base: ["p: lost 1"]})
    monkeypatch.setattr(soak.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(soak.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["soak.py", "churn"])
    assert soak.main() == 1
    assert tmp_path.is_dir()
    output = capsys.readouterr().out
    assert "VIOLATION: p: lost 1" in output and str(tmp_path) in output
