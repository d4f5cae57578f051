"""Section 8, the history: whoever comes back gets what it missed, or is told that it is gone. Never a silent hole."""

import itertools
import json
import os
import random
import re
import resource
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from clients import LIBRARIES, PATIENCE, EventStream, Follower, RawClient, Received, serving, with_last_id
from helpers import eventually, spawn_server
from test_processes import second, takes_over
from test_queue_directory import needs_root, unprivileged
from test_server import (
    asleep,
    errors_of,
    frequent_switches,  # noqa: F401 - a fixture
    move_events,
    ready_files,
)
from wsqueue import History, HistoryFile, QueueError, WebSocketServer, queue_event, queue_events

KIB, MIB = 1024, 1024 * 1024
ID = re.compile(r"[A-Za-z0-9._~%:-]+")

both_kinds = pytest.mark.parametrize("stream", [False, True], ids=["WebSocket", "event stream"])


@pytest.fixture
def directory(tmp_path):
    """A queue directory that does not exist yet."""
    return str(tmp_path / "queue")


def put(directory, *numbers, to=None, size=0):
    """Queue events, each with its number; `size` bytes more in each."""
    for number in numbers:
        assert queue_event(directory, "e", [number, "x" * size], to=to)


def position(server, target="/", **kind):
    """The id with which a client that connects now may come back."""
    with Follower(server.url, target, **kind) as client:
        return client.hello()


def first_event(server, directory, number):
    """Queue an event; the id with which a client comes that has seen it."""
    sent(directory)
    with Follower(server.url) as client:
        client.hello()
        put(directory, number)
        assert client.recv().payload[0] == number
        return client.last


MARKS = itertools.count()


def put_mark(directory):
    """An event that tells the end of what is awaited."""
    name = f"mark {next(MARKS)}"
    assert queue_event(directory, name)
    return name


def what_comes(client, directory):
    """All that the client receives behind its hello, up to an event that is queued now; without the marks of others.

    A reset stands for all that was sent before it, which may be our mark, too; so another one follows it.
    """
    mark, found = put_mark(directory), []
    for received in iter(client.recv, None):
        if received.event == mark:
            break
        if received.event == "wsqueue.reset":
            mark = put_mark(directory)
        if not received.event.startswith("mark "):
            found.append(received)
    return found


def coming_back(server, directory, last, target="/", **kind):
    """What a client gets that comes back with this id, up to an event that is queued now."""
    with Follower(server.url, target, last, **kind) as client:
        client.hello()
        return what_comes(client, directory)


def numbers_of(received):
    """Their numbers; a client that was told to start anew fails here."""
    assert {event for _, event, _ in received} <= {"e"}, received
    return [payload[0] for _, _, payload in received]


def is_told_to_start_anew(received):
    """A reset that says where its stream goes on, before anything else; a second one where more is gone already."""
    resets = [message for message in received if message.event == "wsqueue.reset"]
    assert received[:len(resets)] == resets
    assert all(reset.payload is None and ID.fullmatch(reset.id) for reset in resets)
    return bool(resets)


def complete_or_told(received, numbers):
    """Never a silent hole: either all of what was missed, in order, or a reset and nothing of it. Which one?"""
    if is_told_to_start_anew(received):
        assert {event for _, event, _ in received} == {"wsqueue.reset"}, received
        return "told"
    assert numbers_of(received) == list(numbers)
    return "complete"


def sent(directory):
    """Once the queue is empty, everything is in the history."""
    eventually(lambda: not ready_files(directory), what="an empty queue")


def history_of(directory):
    return Path(directory) / "history"


def files_of(directory):
    """The files in history/, the newest first."""
    found = [path for path in history_of(directory).rglob("*") if path.is_file()]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def kill(server):
    server.process.kill()
    server.process.wait()


@contextmanager
def killed(directory, *arguments):
    """A server in a process of its own, that is killed when the block ends."""
    with spawn_server("--queue", directory, *arguments) as server:
        yield server
        kill(server)


# ---- What is sent ------------------------------------------------------------------------------------------


@both_kinds
def test_first_comes_a_hello_that_says_where_the_stream_goes_on(directory, stream):
    """Its id is there before any event is; then each event has another one, of characters that need no escape."""
    with serving(queue=directory) as server, Follower(server.url, stream=stream) as client:
        hello = client.hello()
        put(directory, *range(5))
        received = [client.recv() for _ in range(5)]
        assert numbers_of(received) == list(range(5))
        ids = [hello, *(message.id for message in received)]
        assert len({*ids}) == 6 and all(map(ID.fullmatch, ids))


def test_without_the_parameter_nothing_is_added(directory):
    """The three keys, no id, no hello: clients of the reference know nothing else."""
    with serving(queue=directory) as server, RawClient(server.url) as client:
        put(directory, 1)
        (message,) = client.events(1)
        assert list(message) == ["event", "payload", "timestamp"]
        assert message["event"] == "e"


def test_the_id_is_the_last_key(directory):
    """What a client reads that knows the three keys stays where it was."""
    with serving(queue=directory) as server, RawClient(server.url, with_last_id("/", "")) as client:
        put(directory, 1)
        for message in client.events(2):
            assert list(message) == ["event", "payload", "timestamp", "id"]
            assert isinstance(message["timestamp"], int)


@both_kinds
def test_what_a_handler_sends_has_no_id(directory, stream):
    """It belongs to one connection, so nobody can go on from it; the client's place stays what it was."""
    own = {"event": "own", "payload": 1, "timestamp": 2}
    with serving({"/": lambda conn: conn.send(own)}, queue=directory) as server:
        with Follower(server.url, stream=stream) as client:
            hello = client.hello()
            assert client.recv() == Received(None, "own", 1)
            assert client.last == hello


def test_what_is_too_old_does_not_stay_on_disk(directory):
    """history_seconds holds for the file, too, where nothing more is sent that would have it written anew."""
    with serving(queue=directory, history_seconds=0.1):
        assert queue_event(directory, "e", "of no use to anyone any more")
        sent(directory)
        log = Path(directory, "history", "events.log")
        eventually(lambda: b"of no use" not in log.read_bytes(), what="a file without the event")


def test_a_history_of_another_server_is_not_removed(tmp_path):
    """Who finds out that the directory is no longer its own leaves alone what is there."""
    kept = tmp_path / "events.log"
    kept.write_bytes(b"of another server")
    HistoryFile(str(tmp_path), History(0, 0, 0.0), 0, lambda: False).remove()
    assert kept.read_bytes() == b"of another server"


def test_an_accident_amid_sending_loses_nothing(directory, caplog, monkeypatch):
    """The event is sent again, and who can resume, and may have a gap now, is cut off and comes back for it."""
    with serving(queue=directory) as server, Follower(server.url) as first, RawClient(server.url) as plain:
        last = first.hello()
        first.join_audience()
        accidents = []

        def send(*args, real=server._senders.send):
            if not accidents:
                accidents.append(args)
                raise ZeroDivisionError("a bug")
            return real(*args)

        monkeypatch.setattr(server._senders, "send", send)
        put(directory, 1)
        assert plain.payloads(1)[0][0] == 1
        with pytest.raises((EOFError, ConnectionError)):
            first.recv()
        assert numbers_of(coming_back(server, directory, last)) == [1]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info and "a bug" in record.getMessage()


def test_events_of_one_file_have_ids_of_their_own(directory):
    """A batch is sent as a whole, but a connection may break within it."""
    with serving(queue=directory) as server:
        with Follower(server.url) as client:
            client.hello()
            assert queue_events(directory, [("e", [number]) for number in range(6)])
            received = [client.recv() for _ in range(6)]
        sent(directory)
        for index, message in enumerate(received):
            assert numbers_of(coming_back(server, directory, message.id)) == list(range(index + 1, 6))


def test_what_is_repeated_is_not_compressed(directory):
    """A thousand clients that come back at once would have it compressed a thousand times; what follows is, as ever."""
    offer = {"Sec_WebSocket_Extensions": "permessage-deflate"}
    with serving(queue=directory) as server:
        last = position(server)
        put(directory, 0, 1, size=2 * KIB)
        sent(directory)
        with RawClient(server.url, with_last_id("/", last), **offer) as client:
            assert [event["payload"] for event in client.events(3)][1:] == [[0, "x" * 2 * KIB], [1, "x" * 2 * KIB]]
            put(directory, 2)
            client.recv()  # from now on it is sent what comes
            put(directory, 3, size=2 * KIB)
            with pytest.raises(AssertionError, match="0xc1"):  # this client knows no compressed frames
                client.recv()


@pytest.mark.parametrize("library", LIBRARIES)
def test_clients_of_other_libraries_can_come_back(directory, library):
    """Compressed or not: the id is in the text."""
    with serving(queue=directory) as server:
        with LIBRARIES[library](server.url + with_last_id("/", "")) as client:
            last = json.loads(client.recv())["id"]
        put(directory, *range(3), size=KIB)
        with LIBRARIES[library](server.url + with_last_id("/", last)) as client:
            messages = [json.loads(client.recv()) for _ in range(4)]
        assert [message["payload"][0] for message in messages[1:]] == [0, 1, 2]
        assert messages[0]["id"] == last


# ---- Coming back -------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("seen", range(4))
def test_who_comes_back_gets_what_it_missed_and_then_what_follows(directory, stream, seen):
    """After so many events, also after none: the rest in order, each once; its hello has the id that it came with."""
    with serving(queue=directory) as server:
        with Follower(server.url, stream=stream) as client:
            client.hello()
            put(directory, *range(seen))
            assert [payload[0] for payload in client.payloads(seen)] == list(range(seen))
        put(directory, *range(seen, 6))
        sent(directory)
        with Follower(server.url, "/", client.last, stream=stream) as again:
            assert again.hello() == client.last
            put(directory, 6, 7)
            assert numbers_of(what_comes(again, directory)) == list(range(seen, 8))


@both_kinds
def test_who_missed_nothing_gets_nothing(directory, stream):
    """However often it comes back."""
    with serving(queue=directory) as server:
        last = first_event(server, directory, 0)
        for number in range(1, 4):
            with Follower(server.url, "/", last, stream=stream) as client:
                assert client.hello() == last
                put(directory, number)
                assert client.recv().payload[0] == number
                last = client.last


def test_an_event_stream_comes_back_by_its_header_first(directory):
    """A browser sends the header when it reconnects, to the URL that a page has written; that one's id is older."""
    with serving(queue=directory) as server:
        before = position(server)
        last = first_event(server, directory, 0)
        put(directory, 1)
        sent(directory)
        for headers, numbers in [({}, [0, 1]), ({"Last_Event_ID": last}, [1])]:
            with Follower(server.url, with_last_id("/", before), "", stream=True, **headers) as client:
                assert client.hello() == (last if headers else before)
                assert numbers_of(what_comes(client, directory)) == numbers


def test_a_stream_may_be_continued_on_the_other_kind_of_connection(directory):
    """The ids are the same."""
    with serving(queue=directory) as server:
        last = position(server, stream=False)
        put(directory, 1)
        with Follower(server.url, "/", last, stream=True) as client:
            client.hello()
            assert client.payloads(1)[0][0] == 1
        put(directory, 2)
        assert numbers_of(coming_back(server, directory, client.last)) == [2]


@both_kinds
def test_only_what_is_for_its_topics_is_repeated(directory, stream):
    """Those of others are not missed, and what is for two of its topics comes once."""
    with serving({"/a": lambda conn: conn.join("more")}, queue=directory) as server:
        last = position(server, "/a", stream=stream)
        for number, to in enumerate(["/a", "/b", None, ["/b", "/a", "more"], "more", ["/b"], "/a"]):
            put(directory, number, to=to)
        sent(directory)
        assert numbers_of(coming_back(server, directory, last, "/a", stream=stream)) == [0, 2, 3, 4, 6]


@both_kinds
@pytest.mark.parametrize("stays", [False, True], ids=["returns", "recv()"])
def test_topics_that_a_handler_joins_are_repeated_too(directory, stream, stays, monkeypatch):
    """All those that it joins before it returns or first waits for a message: for either, and for no longer."""
    monkeypatch.setattr("wsqueue.HELD_SECONDS", 1000.0, raising=False)
    go_on = threading.Event()

    def handler(conn):
        assert go_on.wait(PATIENCE)
        conn.join("one")
        conn.join("two")
        if stays:
            for _ in conn:
                pass

    with serving({"/slow": handler}, queue=directory) as server:
        last = position(server)
        for number, to in enumerate(["one", "/slow", "two", None, "three", "one"]):
            put(directory, number, to=to)
        sent(directory)
        with Follower(server.url, "/slow", last, stream=stream) as client:
            client.hello()
            assert numbers_of(coming_back(server, directory, last)) == [3]  # the server has had time for both
            go_on.set()
            assert numbers_of(what_comes(client, directory)) == [0, 1, 2, 3, 5]


def test_a_topic_that_is_joined_later_counts_from_then_on(directory):
    """What was sent to it before is nothing that the client has missed."""
    joined = threading.Event()

    def handler(conn):
        conn.recv()
        conn.join("late")
        joined.set()

    with serving({"/": handler}, queue=directory) as server:
        last = position(server)
        put(directory, 0, to="late")
        put(directory, 1)
        sent(directory)
        with Follower(server.url, "/", last) as client:
            client.hello()
            assert client.payloads(1)[0][0] == 1
            client.client.send("go")
            assert joined.wait(PATIENCE)
            put(directory, 2, to="late")
            assert numbers_of(what_comes(client, directory)) == [2]


@both_kinds
def test_topics_that_authenticate_joins_are_repeated_too(directory, stream):
    """Those of request.join(), and that of the user."""
    server = WebSocketServer(port=0, queue=directory, close_timeout=1.0)

    @server.authenticate
    def check(request):
        request.join(request.query["room"])
        return request.query["user"]

    with server:
        target = "/?user=ann&room=blue"
        last = position(server, target, stream=stream)
        for number, to in enumerate(["blue", "user:ann", "user:bob", "red", "/", None]):
            put(directory, number, to=to)
        sent(directory)
        assert numbers_of(coming_back(server, directory, last, target, stream=stream)) == [0, 1, 4, 5]


def test_what_is_broadcast_from_inside_is_repeated_in_its_place(directory):
    """It has an id as every other event, and stands between those that were queued before and after."""
    with serving(queue=directory) as server, Follower(server.url) as witness:
        last = witness.hello()
        for number in range(6):
            if number % 2:
                server.broadcast("e", [number])
            else:
                put(directory, number)
            assert witness.payloads(1)[0][0] == number
        assert numbers_of(coming_back(server, directory, last)) == list(range(6))


@both_kinds
def test_who_is_excluded_does_not_get_it_as_missed(stream):
    """A handler tells all others who has come, while its own client is still behind."""
    def handler(conn):
        server.broadcast("e", [0], exclude=conn)

    with serving({"/": handler}) as server, Follower(server.url, "/other") as witness:
        witness.hello()
        with Follower(server.url, stream=stream) as client:
            client.hello()
            assert witness.payloads(1) == [[0]]
            server.broadcast("e", [1])
            assert client.payloads(1) == [[1]]


def test_a_server_without_a_queue_has_a_history_too():
    """As long as it runs."""
    with serving() as server:
        last = position(server)
        for number in range(3):
            server.broadcast("e", [number])
        with Follower(server.url, "/", last) as client:
            assert client.hello() == last
            assert [payload[0] for payload in client.payloads(3)] == [0, 1, 2]


def test_the_order_is_that_of_sending_and_not_of_the_names(directory):
    """A file whose name is older may come later: whoever has seen the younger one still has to get it."""
    os.mkdir(directory)

    def drop(stamp, number):
        path = Path(directory, f".{stamp}.json.tmp")
        path.write_text(json.dumps({"event": "e", "payload": [number]}))
        path.rename(Path(directory, f"{stamp}.json"))

    with serving(queue=directory) as server, Follower(server.url) as witness:
        witness.hello()
        ids = []
        for number, stamp in enumerate(["1700000005.0", "1700000001.0", "1700000003.0"]):
            drop(stamp, number)
            assert witness.recv().payload == [number]
            ids.append(witness.last)
        sent(directory)
        for number, last in enumerate(ids):
            assert numbers_of(coming_back(server, directory, last)) == list(range(number + 1, 3))


def test_a_name_that_is_used_again_is_another_event(directory):
    """A shell script that always writes the same file: each event is sent, and each has its own place."""
    os.mkdir(directory)
    with serving(queue=directory) as server:
        with Follower(server.url) as client:
            ids = [client.hello()]
            for number in range(5):
                path = Path(directory, ".again.json.tmp")
                path.write_text(json.dumps({"event": "e", "payload": [number]}))
                path.rename(Path(directory, "again.json" if number % 2 == 0 else "other.json"))
                assert client.recv().payload == [number]
                ids.append(client.last)
                sent(directory)
        for number, last in enumerate(ids):
            complete_or_told(coming_back(server, directory, last), range(number, 5))


@pytest.mark.parametrize("name", ["a b & c=1#?", "ünïcode ☃", "%41%zz", "x" * 240, "\"quoted\"\\", "a\nid: 7\n"])
def test_whatever_a_file_is_called_its_event_can_be_gone_on_from(directory, name):
    """Names are the producers' own; ids are of few characters, and go through a URL and a header."""
    os.mkdir(directory)
    with serving(queue=directory) as server:
        for stream in (False, True):
            with Follower(server.url, stream=stream) as client:
                client.hello()
                Path(directory, ".tmp").write_text('{"event": "e", "payload": [0]}')
                Path(directory, ".tmp").rename(Path(directory, f"{name}{stream}.json"))
                assert client.recv().payload == [0]
                assert ID.fullmatch(client.last)
            put(directory, 1)
            sent(directory)
            assert numbers_of(coming_back(server, directory, client.last, stream=stream)) == [1]


# ---- Over restarts -----------------------------------------------------------------------------------------


@both_kinds
def test_a_restart_is_no_gap(directory, stream):
    """What was sent before, what was queued meanwhile, and what comes after, in order; and so a second time."""
    with serving(queue=directory) as server:
        last = position(server, stream=stream)
        put(directory, 0, 1)
        sent(directory)
    put(directory, 2, 3)
    for more in (4, 5):
        with serving(queue=directory) as server:
            put(directory, more)
            sent(directory)
            assert numbers_of(coming_back(server, directory, last, stream=stream)) == list(range(more + 1))


def test_the_id_of_a_hello_outlives_the_server(directory):
    """Also where not one event has been sent so far."""
    with serving(queue=directory) as server:
        last = position(server)
    put(directory, 0)
    with serving(queue=directory) as server:
        assert numbers_of(coming_back(server, directory, last)) == [0]


@both_kinds
def test_a_kill_is_no_gap_either(directory, stream):
    """kill -9 of a real server, three times, with events queued before it, and while it is down."""
    last, number = "", 0
    for _ in range(3):
        with killed(directory) as server:
            if not last:
                last = position(server, stream=stream)
            received = coming_back(server, directory, last, stream=stream)
            assert numbers_of(received) == list(range(number))
            put(directory, *range(number, number + 50))
            sent(directory)
            put(directory, *range(number + 50, number + 80))
        number += 80
        put(directory, number)
        number += 1


@pytest.mark.parametrize("moment", range(5))
def test_a_kill_in_the_middle_of_a_burst_is_neither_gap_nor_repeat(directory, moment):
    """Whatever a client has by then, what it gets from the next server goes on from there."""
    count = 400
    with spawn_server("--queue", directory) as server, Follower(server.url) as client:
        client.hello()
        with asleep(server.process):
            put(directory, *range(count), size=KIB)
        before = numbers_of([client.recv() for _ in range(1 + moment * 60)])
        kill(server)
        try:  # what the kernel has
            while True:
                before += numbers_of([client.recv()])
        except (EOFError, OSError):
            pass
    with serving(queue=directory) as server:
        after = numbers_of(coming_back(server, directory, client.last))
    assert before + after == list(range(count))


def test_who_takes_over_knows_what_was_sent(directory):
    """A server that stood by goes on where the killed one was."""
    with spawn_server("--queue", directory) as first, second(directory) as server:
        last = position(first)
        put(directory, *range(5))
        sent(directory)
        kill(first)
        takes_over(server)
        put(directory, 5)
        assert numbers_of(coming_back(server, directory, last)) == list(range(6))


def test_a_second_start_of_the_same_server_goes_on(directory):
    """stop() and start() of one object, with what came in between."""
    server = WebSocketServer(port=0, queue=directory, close_timeout=1.0)
    with server:
        last = position(server)
        put(directory, 0)
        sent(directory)
    put(directory, 1)
    with server:
        assert numbers_of(coming_back(server, directory, last)) == [0, 1]


# ---- What is gone ------------------------------------------------------------------------------------------

BOUNDS = {"events": ({"history_events": 10}, 0), "bytes": ({"history_bytes": 64 * KIB}, 4 * KIB)}


@both_kinds
@pytest.mark.parametrize("bound", BOUNDS)
def test_who_was_away_for_too_long_is_told(directory, stream, bound):
    """Beyond the bound there is a reset with the current id, and then what follows; within it, nothing is lost."""
    settings, size = BOUNDS[bound]
    with serving(queue=directory, **settings) as server:
        long_ago = position(server)
        put(directory, *range(200), size=size)
        late = first_event(server, directory, 200)
        put(directory, *range(201, 205), size=size)
        sent(directory)
        received = coming_back(server, directory, long_ago, stream=stream)
        assert complete_or_told(received, ()) == "told"
        put(directory, 205, size=size)
        sent(directory)
        assert numbers_of(coming_back(server, directory, late, stream=stream)) == [201, 202, 203, 204, 205]
        assert numbers_of(coming_back(server, directory, received[-1].id, stream=stream)) == [205]


def test_the_bounds_hold_over_a_restart(directory):
    """A server with a smaller one knows no more than that, and says so."""
    with serving(queue=directory) as server:
        long_ago = position(server)
        put(directory, *range(50))
        late = first_event(server, directory, 50)
        put(directory, 51, 52)
        sent(directory)
    with serving(queue=directory, history_events=8) as server:
        assert numbers_of(coming_back(server, directory, late)) == [51, 52]
        eventually(lambda: complete_or_told(coming_back(server, directory, long_ago), range(53)) == "told",
                   what="a reset, once the new bounds hold")


@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
def test_what_is_too_old_is_gone(directory, restart):
    """history_seconds: events that were kept so far are not repeated any more, and who lacks them is told."""
    with serving(queue=directory) as server:
        last = position(server)
        put(directory, 0)
        sent(directory)
        assert numbers_of(coming_back(server, directory, last)) == [0]
    with serving(queue=directory, history_seconds=86400.0 if restart else 0.05) as server:
        if not restart:
            eventually(lambda: complete_or_told(coming_back(server, directory, last), [0]) == "told", what="a reset")
    with serving(queue=directory, history_seconds=0.05) as server:
        eventually(lambda: complete_or_told(coming_back(server, directory, last), [0]) == "told", what="a reset")


def test_an_event_larger_than_the_history_is_sent_all_the_same(directory):
    """Who was there goes on from it; who was not is told."""
    with serving(queue=directory, history_bytes=KIB) as server:
        before = position(server)
        with Follower(server.url) as client:
            client.hello()
            put(directory, 0)
            assert client.payloads(1)[0][0] == 0
            client.join_audience()  # from then on it does not get what comes from the history, which will not hold it
            put(directory, 1, size=100 * KIB)
            assert client.payloads(1)[0][0] == 1
        put(directory, 2)
        sent(directory)
        complete_or_told(coming_back(server, directory, client.last), [2])
        assert complete_or_told(coming_back(server, directory, before), ()) == "told"


def test_without_a_history_nobody_misses_anything_unbeknown(directory):
    """history_events=0: whoever comes back after an event is told; nothing is written."""
    with serving(queue=directory, history_events=0) as server:
        last = position(server) or "0"
        put(directory, 0)
        sent(directory)
        assert complete_or_told(coming_back(server, directory, last), ()) == "told"
    assert files_of(directory) == []


def test_a_history_that_was_off_for_a_while_has_no_hole(directory):
    """What was sent meanwhile is not known, so everybody is told who came before it; then all is as it was."""
    with serving(queue=directory) as server:
        last = first_event(server, directory, 0)
        put(directory, 1)
        sent(directory)
    with serving(queue=directory, history_events=0):
        put(directory, 2, 3)
        sent(directory)
    put(directory, 4)
    with serving(queue=directory) as server:
        put(directory, 5)
        sent(directory)
        assert complete_or_told(coming_back(server, directory, last), ()) == "told"
        last = first_event(server, directory, 6)
        put(directory, 7)
        assert numbers_of(coming_back(server, directory, last)) == [7]


# ---- Ids that nobody was given -----------------------------------------------------------------------------

HOSTILE = ["x", "0", "-1", "1e999", "nan", "null", "..", "../../../etc/passwd", "%2e%2e%2f", "%", "%%", "%00", "~",
           ":", "*", "9" * 400, "x" * 4000, "1700000000.0_6922d3cb6f80f", "ünïcode", "\x00", "a\tb", "'; --", "{}",
           "[0]", "\\"]


@both_kinds
@pytest.mark.parametrize("last", HOSTILE, ids=lambda last: repr(last)[:20])
def test_an_unknown_id_is_answered_with_a_reset(directory, stream, last, caplog):
    """Whatever it looks like: the client is greeted, told, and gets what follows. It is no error of ours."""
    with serving(queue=directory) as server:
        put(directory, 0)
        sent(directory)
        if stream:  # by the parameter: not all of these may be in a header
            client = Follower(server.url, with_last_id("/", last), "", stream=True)
        else:
            client = Follower(server.url, "/", last)
        with client:
            client.hello()
            assert is_told_to_start_anew([client.recv()])
            put(directory, 1)
            assert numbers_of(what_comes(client, directory)) == [1]
    assert errors_of(caplog) == []


@pytest.mark.parametrize("value", ["x\x01y", "\xff\xfe", "a b", " "])
def test_an_odd_header_is_an_unknown_id(directory, value):
    """Last-Event-ID is anybody's to write; an empty one is none."""
    with serving(queue=directory) as server, open_stream(server, value) as client:
        messages = [client.recv() for _ in range(2 if value.strip() else 1)]
        assert [json.loads(data)["event"] for _, data in messages] == ["wsqueue.hello", "wsqueue.reset"][:len(messages)]


def open_stream(server, value):
    """The header as it is, whatever characters are in it."""
    return EventStream(server.url, "/", Last_Event_ID=value)


def test_an_id_that_was_tampered_with_makes_no_hole(directory):
    """Cut short, extended, or changed by a character: a reset, or some of the events up to the last, without a gap."""
    dice = random.Random(1)
    with serving(queue=directory) as server:
        last = first_event(server, directory, 0)
        put(directory, *range(1, 10))
        sent(directory)
        changed = {last[:-1], last + "0", last + last, last.upper() + ".", last[1:], last.replace(".", "")}
        for _ in range(100):
            place = dice.randrange(len(last))
            changed.add(last[:place] + dice.choice("0123456789abcdef._~%:-") + last[place + 1:])
        for identity in changed - {last}:
            received = coming_back(server, directory, identity)
            if not is_told_to_start_anew(received):
                numbers = numbers_of(received)
                assert numbers == list(range(10))[10 - len(numbers):], identity


def test_the_id_of_another_queue_is_unknown(tmp_path):
    """A client that was moved to another server is told."""
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    with serving(queue=one) as first, serving(queue=other) as server:
        last = first_event(first, one, 0)
        hello = position(first)
        put(other, 1)
        sent(other)
        for identity in (last, hello):
            assert complete_or_told(coming_back(server, other, identity), ()) == "told"


# ---- What befalls the files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left_by_a_kill(tmp_path_factory):
    """A queue directory whose server was killed when all was sent; ids, of the hello and of events 0 to 29."""
    directory = str(tmp_path_factory.mktemp("killed") / "queue")
    with killed(directory) as server, Follower(server.url) as client:
        ids = [client.hello()]
        put(directory, *range(30), size=100)
        ids += [client.recv().id for _ in range(30)]
        sent(directory)
    return directory, ids


def judge_copy(directory, ids):
    """Everybody who comes back to a server on this directory is told, or misses nothing; which of it?"""
    with serving(queue=directory) as server:
        put(directory, 30)
        sent(directory)
        found = [complete_or_told(coming_back(server, directory, last), range(index, 31))
                 for index, last in enumerate(ids)]
        last = first_event(server, directory, 31)
        put(directory, 32)
        assert numbers_of(coming_back(server, directory, last)) == [32]  # whatever was, it works again
        return found


def test_what_a_killed_server_leaves_is_complete(left_by_a_kill, tmp_path):
    """Else the tests below would prove nothing."""
    directory, ids = left_by_a_kill
    shutil.copytree(directory, tmp_path / "queue")
    assert judge_copy(str(tmp_path / "queue"), ids) == ["complete"] * 31


def cut(size):
    return lambda data: data[:-size]


def change(place, value):
    """At so many hundredths of it."""
    def changed(data):
        index = len(data) * place // 100
        return data[:index] + value + data[index + len(value):]
    return changed


DAMAGE = {
    **{f"{size} bytes less": cut(size) for size in (1, 2, 3, 10, 50, 100, 130)},
    "empty": lambda data: b"",
    "half of it": lambda data: data[:len(data) // 2],
    "a tail of zeros": lambda data: data[:-20] + bytes(20),
    "more zeros": lambda data: data + bytes(4096),
    "a head of zeros": lambda data: bytes(30) + data[30:],
    "garbage behind it": lambda data: data + b"\xff\xfegarbage",
    "garbage in a line": lambda data: data + b"garbage\n" * 3,
    "garbage instead": lambda data: b"\x80garbage\n" * 10,
    "a list": lambda data: b"[]\n[1, 2]\n",
    "deep": lambda data: b"[" * 200_000,
    "numbers": lambda data: b"1e999\n" * 10,
    "a damaged middle": change(50, b"\x00\xff\x00\xff"),
    "no line ends": lambda data: data.replace(b"\n", b" "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_makes_no_hole(left_by_a_kill, tmp_path, damage, caplog):
    """The newest one torn, as by a crash in mid-write, or otherwise spoilt: clients are told, or miss nothing."""
    directory, ids = left_by_a_kill
    copy = str(tmp_path / "queue")
    shutil.copytree(directory, copy)
    newest = files_of(copy)[0]
    newest.write_bytes(DAMAGE[damage](newest.read_bytes()))
    judge_copy(copy, ids)
    assert "Traceback" not in caplog.text and errors_of(caplog) == []


def replace_by(make):
    """Another thing under the name of each file."""
    def replaced(history):
        for path in list(history.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            make(path)
    return replaced


def replace_whole(make):
    def replaced(history):
        shutil.rmtree(history)
        make(history)
    return replaced


REPLACED = {
    "no directory": shutil.rmtree,
    "nothing in it": replace_by(lambda path: None),
    "a file": replace_whole(lambda path: path.write_text("garbage")),
    "a link to nowhere": replace_whole(lambda path: path.symlink_to("/nonexistent/place")),
    "a link to another directory": replace_whole(lambda path: path.symlink_to(path.parent.parent)),
    "a pipe": replace_whole(os.mkfifo),
    "links instead of files": replace_by(lambda path: path.symlink_to("/etc/passwd")),
    "pipes instead of files": replace_by(os.mkfifo),
    "directories instead of files": replace_by(Path.mkdir),
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_history_that_is_something_else_makes_no_hole(left_by_a_kill, tmp_path, what):
    """Who comes back is told; events flow, and nothing outside is written or hangs the server."""
    directory, ids = left_by_a_kill
    copy = tmp_path / "queue"
    shutil.copytree(directory, copy)
    REPLACED[what](copy / "history")
    beside, passwd = sorted(os.listdir(tmp_path)), Path("/etc/passwd").read_bytes()
    with serving(queue=str(copy)) as server:
        put(str(copy), 30)
        sent(str(copy))
        for index, last in enumerate(ids):
            complete_or_told(coming_back(server, str(copy), last), range(index, 31))
        last = first_event(server, str(copy), 31)
        put(str(copy), 32)
        complete_or_told(coming_back(server, str(copy), last), [32])
    assert sorted(os.listdir(tmp_path)) == beside
    assert Path("/etc/passwd").read_bytes() == passwd


@pytest.mark.parametrize("what", ["no directory", "nothing in it", "a file", "a link to another directory"])
def test_a_history_may_vanish_under_a_running_server(directory, what, caplog):
    """Those who come back while it runs miss nothing; those who come to the next one may be told."""
    with serving(queue=directory) as server:
        last = first_event(server, directory, 0)
        put(directory, 1)
        sent(directory)
        REPLACED[what](history_of(directory))
        put(directory, *range(2, 50), size=KIB)
        sent(directory)
        assert numbers_of(coming_back(server, directory, last)) == list(range(1, 50))
    put(directory, 50)
    with serving(queue=directory) as server:
        sent(directory)
        complete_or_told(coming_back(server, directory, last), range(1, 51))
    assert "Traceback" not in caplog.text


def test_a_whole_queue_directory_may_vanish_under_a_running_server(directory):
    """It is made again, and nobody misses anything unbeknown, now or after the next start."""
    with serving(queue=directory) as server:
        last = first_event(server, directory, 0)
        put(directory, 1)
        sent(directory)
        shutil.rmtree(directory)
        eventually(lambda: os.path.isdir(directory), what="the directory to be made anew")
        put(directory, *range(2, 5))
        sent(directory)
        complete_or_told(coming_back(server, directory, last), range(1, 5))
    put(directory, 5)
    with serving(queue=directory) as server:
        sent(directory)
        complete_or_told(coming_back(server, directory, last), range(1, 6))


def limit_files(server, size):
    """The process can make no file larger, as on a full disk; None: it can again."""
    hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


@pytest.mark.parametrize("size", [1, 3000, 20_000])
def test_a_full_disk_makes_no_hole(directory, size):
    """Events flow all the same; there is no hole now, nor once there is room again, nor with the next server."""
    with spawn_server("--queue", directory) as server:
        last = first_event(server, directory, 0)
        with Follower(server.url) as witness:
            witness.hello()
            limit_files(server, size)
            put(directory, *range(1, 41), size=KIB)
            assert [payload[0] for payload in witness.payloads(40)] == list(range(1, 41))
            complete_or_told(coming_back(server, directory, last), range(1, 41))
            limit_files(server, None)
            middle = witness.last
            put(directory, *range(41, 60), size=KIB)
            sent(directory)
            complete_or_told(coming_back(server, directory, last), range(1, 60))
            complete_or_told(coming_back(server, directory, middle), range(41, 60))
        kill(server)
    put(directory, 60)
    with serving(queue=directory) as server:
        sent(directory)
        complete_or_told(coming_back(server, directory, last), range(1, 61))
        complete_or_told(coming_back(server, directory, middle), range(41, 61))


def test_a_directory_that_may_not_be_written_makes_no_hole(directory, tmp_path):
    """Where history/ cannot be made, the server serves, says so once, and knows what it needs while it runs."""
    os.mkdir(directory)
    history_of(directory).write_text("in the way")
    with spawn_server("--queue", directory) as server:
        last = first_event(server, directory, 0)
        put(directory, *range(1, 20))
        sent(directory)
        assert numbers_of(coming_back(server, directory, last)) == list(range(1, 20))
        said = server.stderr_text()
        assert "Traceback" not in said and 1 <= said.count(str(history_of(directory))) < 10
        kill(server)
    with serving(queue=directory) as server:
        assert complete_or_told(coming_back(server, directory, last), range(1, 20)) == "told"


@contextmanager
def forbidden(history):
    """Nobody but root can write there; what is in it can be read."""
    files = [*history.iterdir()]
    for path, mode in [*((path, 0o444) for path in files), (history, 0o555)]:
        path.chmod(mode)
    try:
        yield
    finally:
        for path, mode in [(history, 0o755), *((path, 0o644) for path in files)]:
            path.chmod(mode)


def test_a_history_that_could_not_be_written_for_a_while_has_no_hole(open_base):
    """A server that may read it, but not go on with it: what that one would send were missing to who came before."""
    directory = str(open_base / "queue")
    with unprivileged():
        with serving(queue=directory) as server:
            last = first_event(server, directory, 0)
            put(directory, 1)
            sent(directory)
        with forbidden(history_of(directory)):
            serve_or_refuse(directory, 2, 3)
        with serving(queue=directory) as server:
            put(directory, 4)
            sent(directory)
            complete_or_told(coming_back(server, directory, last), range(1, 5))


def serve_or_refuse(directory, *numbers):
    """Have these events sent by a server, now or later: it may refuse to start, but must then say why."""
    put(directory, *numbers)
    try:
        with serving(queue=directory):
            sent(directory)
    except QueueError as error:
        if str(history_of(directory)) not in str(error):
            raise


def test_a_history_of_another_user_has_no_hole(open_base):
    """Two users serve the directory in turns, as after a `sudo`: neither may believe that its history is all."""
    directory = str(open_base / "queue")
    with unprivileged(), serving(queue=directory) as server:
        last = first_event(server, directory, 0)
        put(directory, 1)
        sent(directory)
    with serving(queue=directory):  # as root, where root is who runs the tests
        put(directory, 2)
        sent(directory)
    with unprivileged(), serving(queue=directory) as server:
        put(directory, 3)
        sent(directory)
        complete_or_told(coming_back(server, directory, last), range(1, 4))


@pytest.fixture
def open_base(tmp_path, tmp_path_factory):
    """A directory that nobody, too, can reach and write."""
    base = tmp_path_factory.getbasetemp()
    made = base.parent if base.name.startswith("popen-") else base  # whose part a worker of pytest-xdist has
    for path in [tmp_path, *tmp_path.parents]:
        if made in (path, *path.parents) or path.name.startswith("pytest-of-"):
            path.chmod(path.stat().st_mode | 0o711)
    tmp_path.chmod(0o777)
    return tmp_path


def test_after_a_crash_of_the_machine_everybody_is_told(directory, monkeypatch):
    """The end of what was written may be missing; but what a server had closed is whole."""
    with killed(directory) as server:
        last = first_event(server, directory, 0)
        put(directory, 1)
        sent(directory)
    monkeypatch.setattr("wsqueue._boot_id", lambda: "another start of the machine")
    with serving(queue=directory) as server:
        assert complete_or_told(coming_back(server, directory, last), [1]) == "told"
        last = first_event(server, directory, 2)
        put(directory, 3)
        sent(directory)
    monkeypatch.setattr("wsqueue._boot_id", lambda: "one more")
    with serving(queue=directory) as server:
        assert numbers_of(coming_back(server, directory, last)) == [3]


def test_a_history_that_is_restored_from_a_copy_has_no_hole(directory, tmp_path):
    """Under a running server an older state takes its place: the next server must not believe it."""
    with spawn_server("--queue", directory) as server:
        last = first_event(server, directory, 0)
        sent(directory)
        shutil.copytree(history_of(directory), tmp_path / "older")
        put(directory, 1)
        sent(directory)
        shutil.rmtree(history_of(directory))
        shutil.copytree(tmp_path / "older", history_of(directory))
        put(directory, 2)
        sent(directory)
        kill(server)
    put(directory, 3)
    with serving(queue=directory) as server:
        sent(directory)
        complete_or_told(coming_back(server, directory, last), [1, 2, 3])


def test_what_is_still_queued_is_not_forgotten(directory):
    """A slow client keeps what was sent in the queue; after a kill it is no news to those who have it."""
    with spawn_server("--queue", directory, "--history-events", 2) as server:
        with RawClient(server.url, receive_buffer=4 * KIB), Follower(server.url) as client:
            ids = [client.hello()]
            client.join_audience()  # else so short a history may pass before, and it is told to start anew
            put(directory, *range(30), size=100 * KIB)
            ids += [client.recv().id for _ in range(30)]
            kill(server)
    put(directory, 30)
    with serving(queue=directory) as server:
        sent(directory)
        for index, last in enumerate(ids):
            complete_or_told(coming_back(server, directory, last), range(index, 31))


@needs_root
def test_a_flow_without_a_pause_does_not_keep_the_history(directory):
    """After a restart, too, and though the queue is never empty: who was away for too long is told."""
    with serving(queue=directory) as server:
        last = first_event(server, directory, 0)
    over = threading.Event()

    def flow():
        while not over.is_set():
            put(directory, 1, size=100)

    with serving(queue=directory, history_events=10) as server, ThreadPoolExecutor(2) as pool:
        flows = [pool.submit(flow) for _ in range(2)]
        try:
            eventually(lambda: comes_back_to(server, last).event == "wsqueue.reset", what="a reset")
        finally:
            over.set()
        for call in flows:
            call.result(PATIENCE)


def comes_back_to(server, last):
    """What such a client receives first behind its hello."""
    with Follower(server.url, "/", last) as client:
        client.hello()
        return client.recv()


# ---- Much of it, slowly, and at the same time --------------------------------------------------------------


@both_kinds
def test_a_long_replay_waits_for_a_slow_client(directory, stream):
    """Far more than outbox_bytes and than a turn of the server, while events go on: it gets all, and is not closed."""
    count, size = 1500, 4 * KIB
    with serving(queue=directory, outbox_bytes=64 * KIB, history_events=10_000) as server:
        last = position(server)
        put(directory, *range(count), size=size)
        sent(directory)
        with Follower(server.url, "/", last, stream=stream, receive_buffer=8 * KIB) as client:
            client.hello()
            for number in range(20):  # while the replay waits for it
                put(directory, count + number, size=size)
            sent(directory)
            assert numbers_of([client.recv() for _ in range(count + 20)]) == list(range(count + 20))
            put(directory, count + 20)
            assert numbers_of(what_comes(client, directory)) == [count + 20]


def test_a_client_that_never_reads_its_replay_is_closed(directory):
    """Being replayed to is no way to stay for ever: send_timeout is for these, too."""
    with serving(queue=directory, send_timeout=0.2, ping_interval=0.0) as server:
        last = position(server)
        put(directory, *range(500), size=16 * KIB)
        sent(directory)
        with Follower(server.url, "/", last, receive_buffer=4 * KIB):
            eventually(lambda: server.get_connection_count() == 0, what="the client to be closed")


def test_a_slow_replay_is_in_nobodys_way(directory):
    """While one client does not take what it has missed, the others get events, and come back at once."""
    with serving(queue=directory) as server:
        last = position(server)
        put(directory, *range(300), size=16 * KIB)
        sent(directory)
        with Follower(server.url, "/", last, receive_buffer=4 * KIB) as slow, Follower(server.url) as other:
            slow.hello()
            late = other.hello()
            put(directory, 300)
            assert other.payloads(1)[0][0] == 300
            assert numbers_of(coming_back(server, directory, late)) == [300]


def test_what_falls_out_of_the_history_during_a_replay_is_told(directory):
    """A client that is slower than the history is long gets a reset in the middle, and never a hole."""
    with serving(queue=directory, history_events=50, outbox_bytes=64 * KIB, send_timeout=PATIENCE) as server:
        last = position(server)
        put(directory, *range(50), size=64 * KIB)
        sent(directory)
        with Follower(server.url, "/", last, receive_buffer=4 * KIB) as client:
            client.hello()
            put(directory, *range(50, 200))  # so few bytes that they may wait for it if the reset comes early
            sent(directory)
            received = what_comes(client, directory)
    resets = [index for index, message in enumerate(received) if message.event == "wsqueue.reset"]
    if not resets:
        assert numbers_of(received) == list(range(200))
    else:
        before, after = numbers_of(received[:resets[0]]), numbers_of(received[resets[0] + 1:])
        assert len(resets) == 1
        assert before == list(range(len(before)))
        assert after == list(range(200))[200 - len(after):]


@pytest.mark.parametrize("source", ["queue", "broadcast"])
@pytest.mark.usefixtures("frequent_switches")
def test_coming_and_going_amid_the_stream_is_neither_gap_nor_repeat(directory, source):
    """Twelve clients that reconnect all the time, while events flow: where the replay meets what is sent now."""
    count, crowd = 1500, 12
    with serving(queue=directory, history_events=10_000) as server, ThreadPoolExecutor(crowd) as pool:
        started = threading.Barrier(crowd + 1)

        def live(index):
            dice = random.Random(index)
            kind = {} if index % 3 else {"receive_buffer": 8 * KIB}
            with Follower(server.url) as client:
                first = client.hello()
            started.wait(PATIENCE)
            return wander_from(server, first, dice, count, index % 2 == 1, kind)

        lives = [pool.submit(live, index) for index in range(crowd)]
        started.wait(PATIENCE)
        for number in range(count):
            if source == "queue":
                put(directory, number, size=200)
            else:
                server.broadcast("e", [number])
        for life in lives:
            assert life.result(6 * PATIENCE) == list(range(count))


def wander_from(server, last, dice, count, stream, kind):
    """Come and go until all numbers are here; returns them as they came."""
    numbers = []
    while len(numbers) < count:
        with Follower(server.url, "/", last, stream=stream, **kind) as client:
            assert client.hello() == last
            most = min(dice.choice((0, 1, 5, 50)), count - len(numbers))
            numbers += numbers_of([client.recv() for _ in range(most)])
            last = client.last
    return numbers


def test_a_client_that_leaves_amid_its_replay_leaves_nothing(directory):
    """However it goes; the next one is served, and the server knows of nobody."""
    with serving(queue=directory) as server:
        last = position(server)
        put(directory, *range(500), size=8 * KIB)
        sent(directory)
        for number in range(20):
            with Follower(server.url, "/", last, stream=number % 2 == 1, receive_buffer=4 * KIB) as client:
                client.hello()
                if number % 4 < 2:
                    client.client.socket.shutdown(socket.SHUT_WR)
        eventually(lambda: server.get_connection_count() == 0, what="everybody to be gone")
        assert numbers_of(coming_back(server, directory, last)) == list(range(500))


# ---- Bounds ------------------------------------------------------------------------------------------------


def put_many(directory, count, size):
    """In files of so many events that each is well below the limit."""
    each = max(1, 500 * KIB // (size + 100))
    for start in range(0, count, each):
        events = [("e", [number, "x" * size]) for number in range(start, min(count, start + each))]
        assert queue_events(directory, events)


def resident(pid):
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) * KIB


def size_of(directory):
    return sum(path.stat().st_size for path in files_of(directory))


LIMITS = {"events": (["--history-events", 100], 100 * 1200), "bytes": (["--history-bytes", 128 * KIB], 128 * KIB)}


@pytest.mark.parametrize("bound", LIMITS)
def test_the_history_is_bounded_in_memory_and_on_disk(directory, bound):
    """50,000 events of a kilobyte pass through; what is kept of them is what the setting says, and some room."""
    arguments, kept = LIMITS[bound]
    with spawn_server("--queue", directory, *arguments) as server:
        put_many(directory, 10_000, KIB)
        sent(directory)
        early = resident(server.pid)
        put_many(directory, 40_000, KIB)
        sent(directory)
        assert resident(server.pid) - early < 8 * MIB  # of 40 that have passed
        assert size_of(directory) < 4 * kept + 4 * MIB
        assert len(files_of(directory)) < 20


def test_long_lists_of_topics_are_bounded_too(directory):
    """They take memory and disk as the events themselves do: 100 MB of them pass through, of which a megabyte stays."""
    with spawn_server("--queue", directory, "--history-bytes", MIB) as server:
        def pass_through(count):
            for number in range(count):
                to = [f"{number}/{index}/{'t' * 100}" for index in range(4000)]
                put(directory, number, to=to)
            sent(directory)

        pass_through(20)
        early = resident(server.pid)
        pass_through(230)
        assert resident(server.pid) - early < 32 * MIB
        assert size_of(directory) < 8 * MIB


def test_a_smaller_history_becomes_smaller_on_disk(directory):
    """What a server has left that might keep more is gone once the next one has sent something itself."""
    with serving(queue=directory):
        put_many(directory, 900, 4 * KIB)
        sent(directory)
        assert size_of(directory) > 3 * MIB
    def is_small_after_some_more():
        put_many(directory, 2000, KIB)
        sent(directory)
        return size_of(directory) < 3 * MIB

    with serving(queue=directory, history_events=10, history_bytes=16 * KIB):
        eventually(is_small_after_some_more, what="a small history")


def test_only_the_server_may_read_the_history(directory):
    """It holds what was for single users, and the queue directory may be open to others."""
    with serving(queue=directory):
        put(directory, 0)
        sent(directory)
        assert history_of(directory).stat().st_mode & 0o077 == 0


def test_a_history_is_no_event_of_the_queue(directory):
    """history/ is nothing that is sent, counted as waiting, or set aside."""
    with serving(queue=directory) as server:
        put(directory, 0)
        sent(directory)
        with Follower(server.url) as client:
            client.hello()
            assert what_comes(client, directory) == []
    assert not os.path.exists(f"{directory}/failed")


def test_a_repeat_after_a_crash_is_none_for_who_goes_by_ids(directory, tmp_path):
    """Killed before it could remove what it had sent: the next server finds it, but whoever has it does not get it."""
    aside, kept = tmp_path / "aside", tmp_path / "kept"
    put(str(aside), 0, 1, 2)
    shutil.copytree(aside, kept, copy_function=os.link)  # the same files, as if they had not been removed
    with killed(directory) as server, Follower(server.url) as client:
        ids = [client.hello()]
        move_events(str(aside), directory)
        ids += [client.recv().id for _ in range(3)]
        sent(directory)
    move_events(str(kept), directory)
    put(directory, 3)
    with serving(queue=directory) as server:
        for index, last in enumerate(ids):
            assert numbers_of(coming_back(server, directory, last)) == list(range(index, 4))
        sent(directory)
        for index, last in enumerate(ids):
            assert numbers_of(coming_back(server, directory, last)) == list(range(index, 4))


@pytest.mark.parametrize("left", [0, 1, 40, -1], ids=["nothing", "a byte", "a part", "all but the end"])
def test_a_kill_amid_the_writing_makes_no_hole(directory, tmp_path, left):
    """So much of its line is there, and the event is still queued: it comes once, in its place, or clients are told."""
    aside, kept = tmp_path / "aside", tmp_path / "kept"
    put(str(aside), 2)
    shutil.copytree(aside, kept, copy_function=os.link)
    with killed(directory) as server, Follower(server.url) as client:
        last = client.hello()
        put(directory, 0, 1)
        client.payloads(2)
        sent(directory)
        before = files_of(directory)[0].read_bytes()
        move_events(str(aside), directory)
        client.payloads(1)
        sent(directory)
    newest = files_of(directory)[0]
    line = newest.read_bytes()[len(before):]
    newest.write_bytes(before + line[:left])
    move_events(str(kept), directory)
    put(directory, 3)
    with serving(queue=directory) as server:
        sent(directory)
        complete_or_told(coming_back(server, directory, last), range(4))
