"""What is for one client is in no byte that another receives: random audiences, and every byte recorded.

Each event carries a marker that nobody can guess, so that finding it where it does not belong is proof. Clients of all
kinds listen: with and without ids, compressed and not, and event streams.
"""

import json
import os
import random
import re
import socket
import threading
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from clients import PATIENCE, EventStream, RawClient, enter, serving, with_last_id
from helpers import eventually
from test_server import clients_arrived, move_events, ready_files
from wsqueue import WebSocketServer, queue_event, queue_events, sign_ticket

MARKER = re.compile(rb"<[0-9a-f]{32}>")
DEFLATE = {"Sec_WebSocket_Extensions": "permessage-deflate"}
LEAST = 160  # bytes from which on a message is compressed: some are, and some are not
SECRET = "of this test and no other, and long enough"

# Names that one could take for another: by a prefix, a case, a separator, a decoding.
USERS = ["1", "10", "11", "a", "A", "a:b", "user:1", "ä", "1 ", "0", "%31", "a,b"]
PATHS = ["/", "/a", "/A", "/a/", "/a/b", "/ab"]
ROOMS = ["room", "room1", "room 1", "ROOM", "user", "user:", "/", "None", "*", ""]  # "" is none
KINDS = ["plain", "ids", "deflate", "deflate ids", "stream"]


@pytest.fixture
def directory(tmp_path):
    """A queue directory that does not exist yet."""
    return str(tmp_path / "queue")


@pytest.fixture
def dice():
    return random.Random(20240229)


def new_marker():
    return f"<{os.urandom(16).hex()}>"


def sent(directory):
    eventually(lambda: not ready_files(directory), what="an empty queue")


# ---- Who listens -------------------------------------------------------------------------------------------


class Ear(threading.Thread):
    """A client that records every byte that it receives."""

    def __init__(self, server, name, user, path, rooms, kind, last="", ticket=None):
        super().__init__(name="test-ear", daemon=True)
        self.label, self.user, self.path, self.rooms, self.kind = name, user, path, rooms, kind
        self.topics = {path, f"user:{user}", *rooms}
        self.heard = bytearray()
        target = f"{path}?{query_of(name, user, rooms, ticket)}"
        self.client = open_client(server, target, kind, last)
        self.heard += getattr(self.client, "_data")  # noqa: B009 - what came with the head
        self.start()

    def run(self):
        try:
            for data in iter(lambda: self.client.socket.recv(65536), b""):
                self.heard += data
        except OSError:
            pass

    def waits_for(self, end):
        eventually(lambda: end.encode() in self.text(partial=True), 20, what=f"the end, for {self.label}")

    def leave(self):
        try:
            self.client.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        except OSError:
            pass
        self.join(PATIENCE)
        self.client.socket.close()

    def text(self, partial=False):
        """All that it was told; of compressed frames, what they inflate to."""
        return inflated(bytes(self.heard), partial) if "deflate" in self.kind else bytes(self.heard)

    def markers(self):
        return [marker.decode() for marker in MARKER.findall(self.text())]

    def is_on(self, to):
        return to is None or not self.topics.isdisjoint([to] if isinstance(to, str) else to)


def query_of(name, user, rooms, ticket):
    from urllib.parse import urlencode

    return urlencode({"ear": name, "ticket": ticket} if ticket else {
        "ear": name, "user": user, "rooms": json.dumps(sorted(rooms))})


def open_client(server, target, kind, last):
    if kind == "stream":
        return EventStream(server.url, with_last_id(target, last) if last else target)
    target = with_last_id(target, last) if "ids" in kind else target
    return RawClient(server.url, target, **(DEFLATE if "deflate" in kind else {}))


def inflated(data, partial):
    """The frames' payloads. Each compressed one must stand for itself, and hold nothing behind its end."""
    texts, place = [], 0
    while place + 2 <= len(data):
        size, width = data[place + 1], 0
        if size > 125:
            width = 2 if size == 126 else 8
            size = int.from_bytes(data[place + 2:place + 2 + width], "big")
        start = place + 2 + width
        if start + size > len(data):
            break
        payload = data[start:start + size]
        texts.append(inflate(payload) if data[place] & 0x40 else payload)
        place = start + size
    assert partial or place == len(data), "a frame is cut short"
    return b"\n".join(texts)


def inflate(payload):
    stream = zlib.decompressobj(-15)
    text = stream.decompress(payload + b"\x00\x00\xff\xff")
    assert not stream.unused_data and not stream.unconsumed_tail
    return text


@contextmanager
def guarded_server(directory, access, **settings):
    """A server that knows who comes: by a ticket, or by a check that believes the query."""
    by_ticket = {"secret": SECRET} if access == "tickets" else {}
    server = WebSocketServer(port=0, queue=directory, close_timeout=1.0, deflate_min_bytes=LEAST, **by_ticket,
                             **settings)
    if access == "authenticate":
        server.authenticate(check)
    server.start(background=True)
    try:
        yield server
    finally:
        server.stop()


def check(request):
    for room in json.loads(request.query["rooms"]):
        request.join(room)
    return request.query["user"]


def make_ear(server, access, name, user, path, rooms, kind, last=""):
    ticket = sign_ticket(SECRET, user=user, topics=sorted(rooms)) if access == "tickets" else None
    return Ear(server, name, user, path, rooms, kind, last, ticket)


def some_rooms(dice):
    return {room for room in ROOMS if room and dice.random() < 0.2}


def gather_ears(server, access, dice, stack):
    """Two for each user, of any kind, on any path."""
    ears = {}
    for index in range(2 * len(USERS)):
        ear = make_ear(server, access, str(index), USERS[index % len(USERS)], dice.choice(PATHS), some_rooms(dice),
                       KINDS[index % len(KINDS)])
        stack.callback(ear.leave)
        ears[ear.label] = ear
    clients_arrived(server, len(ears))
    return ears


# ---- What is said ------------------------------------------------------------------------------------------


class Speaker:
    """Sends events to random audiences, and notes who is to hear what, for each way of sending apart."""

    def __init__(self, directory, ears, dice):
        self.directory, self.ears, self.dice = directory, ears, dice
        self.count = 0
        self.due = {"queued": {}, "broadcast": {}}  # way -> name of the ear -> markers
        self.topics = [*(f"user:{user}" for user in USERS), *PATHS, *filter(None, ROOMS), "nobody", "user:2"]

    def audience(self):
        return None if self.dice.random() < 0.03 else self.dice.choice(self.topics) if self.dice.random() < 0.6 else (
            self.dice.sample(self.topics, self.dice.randrange(1, 6)))

    def event(self, way, to, exclude=None):
        """A payload, noted."""
        marker = new_marker()
        self.count += 1
        for name, ear in self.ears.items():
            if ear.is_on(to) and name != exclude:
                self.due[way].setdefault(name, []).append(marker)
        return {"marker": marker, "pad": "words and words " * self.dice.randrange(12)}

    def queue_one(self):
        to = self.audience()
        assert queue_event(self.directory, "e", self.event("queued", to), to=to)

    def queue_batch(self):
        """Several to the same audience."""
        to = self.audience()
        events = [("e", self.event("queued", to)) for _ in range(self.dice.randrange(1, 8))]
        assert queue_events(self.directory, events, to=to)

    def queue_mixed(self):
        """One file, and each event in it to others."""
        records = []
        for _ in range(self.dice.randrange(1, 12)):
            to = self.audience()
            record = {"event": "e", "payload": self.event("queued", to)}
            records.append(record if to is None else {**record, "to": to})
        assert queue_events(f"{self.directory}-form", [("e", None)])  # for a name that is in its turn
        (name,) = ready_files(f"{self.directory}-form")
        form = Path(f"{self.directory}-form", name)
        form.write_text(json.dumps(records))
        form.rename(Path(self.directory, name))

    def broadcast(self, server):
        to, exclude = self.audience(), None
        if self.dice.random() < 0.3:
            exclude = self.dice.choice(server.get_connections())
        name = exclude.query["ear"] if exclude else None
        server.broadcast("e", self.event("broadcast", to, name), to, exclude=exclude)

    def say_some(self, server, count):
        """At once, so that many are taken in one turn: the files are there all together."""
        here, self.directory = self.directory, f"{self.directory}-aside"
        os.makedirs(self.directory, exist_ok=True)
        end = self.count + count
        while self.count < end - count // 4:
            self.dice.choice([self.queue_one, self.queue_batch, self.queue_mixed])()
        aside, self.directory = self.directory, here
        moving = threading.Thread(target=move_events, args=(aside, here))
        moving.start()
        while self.count < end:
            self.broadcast(server)
        moving.join()
        sent(here)

    def judge(self):
        """Each has heard what was for it, in order, and not one byte of a marker of others."""
        way_of = {marker: way for way, due in self.due.items() for markers in due.values() for marker in markers}
        for name, ear in self.ears.items():
            heard = ear.markers()
            for way, due in self.due.items():
                mine = [marker for marker in heard if way_of[marker] == way]
                assert mine == due.get(name, []), f"{ear.kind} of user {ear.user!r}, {way}"
            assert len(MARKER.findall(bytes(ear.heard))) <= len(heard)


def change_topics(server, ears, dice):
    """Somebody joins, somebody leaves: from now on, for nothing is on its way."""
    for conn in server.get_connections():
        ear, room = ears[conn.query["ear"]], dice.choice([room for room in ROOMS if room])
        if room in ear.topics and room not in PATHS:
            conn.leave(room)
            ear.topics.remove(room)
        elif dice.random() < 0.2:
            conn.join(room)
            ear.topics.add(room)


@pytest.mark.parametrize("access", ["tickets", "authenticate"])
def test_no_byte_reaches_who_it_is_not_for(directory, access, dice):
    """5,000 events to random audiences, by the queue, in batches, and from inside: each client has exactly its own."""
    with guarded_server(directory, access) as server, ExitStack() as stack:
        ears = gather_ears(server, access, dice, stack)
        speaker = Speaker(directory, ears, dice)
        for _ in range(10):
            speaker.say_some(server, 500)
            change_topics(server, ears, dice)
        server.broadcast("end", "the end")
        for ear in ears.values():
            ear.waits_for("the end")
        assert speaker.count >= 5000
        assert server.get_connection_count() == len(ears)
        speaker.judge()


# ---- Coming back -------------------------------------------------------------------------------------------


def ids_of(ear):
    """The ids that it was given, and the marker of each."""
    if ear.kind == "stream":
        pairs = re.findall(rb"id: (\S+)\ndata: [^\n]*?(<[0-9a-f]{32}>)", ear.text())
    else:
        pairs = [found[::-1] for found in re.findall(rb'(<[0-9a-f]{32}>)[^\n]*?"id":"([^"]+)"', ear.text())]
    return {marker.decode(): identity.decode() for identity, marker in pairs}


def say_to_all_kinds(speaker, count):
    """Queue events; returns the markers in their order, and to whom each is."""
    said = []
    for _ in range(count):
        to = speaker.audience()
        payload = speaker.event("queued", to)
        assert queue_event(speaker.directory, "e", payload, to=to)
        said.append((payload["marker"], to))
    sent(speaker.directory)
    return said


@pytest.mark.parametrize("access", ["tickets", "authenticate"])
@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
def test_an_id_opens_nothing(directory, access, restart, dice):
    """Whoever comes with an id of its own, of another user or of nobody, gets what is for it, and that alone."""
    with guarded_server(directory, access, history_events=10_000) as server, ExitStack() as stack:
        ears = gather_ears(server, access, dice, stack)
        said = say_to_all_kinds(Speaker(directory, ears, dice), 800)
        server.broadcast("end", "the end")
        for ear in ears.values():
            ear.waits_for("the end")
        identities = {}
        for ear in ears.values():
            identities.update(ids_of(ear) if ear.kind in ("stream", "ids", "deflate ids") else {})
        assert len(identities) > 500  # what is for nobody here has none that anybody knows
        if not restart:
            come_back(server, access, said, identities, dice)
    if restart:
        with guarded_server(directory, access, history_events=10_000) as server:
            come_back(server, access, said, identities, dice)


def come_back(server, access, said, identities, dice):
    place_of = {identities[marker]: place for place, (marker, _) in enumerate(said) if marker in identities}
    for number in range(150):
        last = dice.choice([*dice.sample(sorted(place_of), 5), "1700000000.0_6922d3cb6f80f"])
        ear = make_ear(server, access, f"again {number}", dice.choice(USERS), dice.choice(PATHS), some_rooms(dice),
                       dice.choice(["ids", "deflate ids", "stream"]), last)
        try:
            if last not in place_of:
                ear.waits_for("wsqueue.reset")  # which stands for all that was sent before it
            end = f"the end of {number}"
            server.broadcast("end", end)
            ear.waits_for(end)
            following = said[place_of[last] + 1:] if last in place_of else []
            assert ear.markers() == [marker for marker, to in following if ear.is_on(to)], (ear.kind, ear.user, last)
        finally:
            ear.leave()


def test_who_changes_its_ticket_gets_what_that_one_grants(directory):
    """A user that comes back as another one gets nothing of what the first one missed."""
    with guarded_server(directory, "tickets") as server:
        ear = make_ear(server, "tickets", "first", "ann", "/", {"staff"}, "ids")
        eventually(lambda: b"wsqueue.hello" in ear.heard, what="the hello")
        last = json.loads(ear.text()[2:].partition(b"}")[0] + b"}")["id"]
        ear.leave()
        markers = {to: new_marker() for to in ("user:ann", "user:bob", "staff", "/", "/other")}
        for to, marker in markers.items():
            assert queue_event(directory, "e", marker, to=to)
        sent(directory)
        for user, rooms, due in [("bob", [], ["user:bob", "/"]), ("ann", [], ["user:ann", "/"]),
                                 ("bob", ["staff"], ["user:bob", "staff", "/"])]:
            again = make_ear(server, "tickets", user, user, "/", {*rooms}, "ids", last)
            server.broadcast("end", "the end")
            again.waits_for("the end")
            again.leave()
            assert again.markers() == [markers[to] for to in due]


# ---- Descriptors and buffers -------------------------------------------------------------------------------


def test_who_gets_the_descriptor_of_another_gets_nothing_of_its_events(directory):
    """What waited for a client that has gone is for nobody: not for the one that comes next, under the same number."""
    with serving(queue=directory, outbox_bytes=64 * 1024 * 1024) as server:
        theirs = [new_marker() for _ in range(20)]
        for _ in range(10):
            leaving = [enter(server, "/theirs", receive_buffer=4096) for _ in range(8)]
            for marker in theirs:
                server.broadcast("e", [marker, "x" * 100_000], "/theirs")
            for client, conn in leaving:
                assert conn.is_connected()
                client.socket.close()
            mine = new_marker()
            clients = [RawClient(server.url, "/mine") for _ in range(8)]
            eventually(lambda: len(server.registry.audience(("/mine",))) == 8, what="those who come next")
            server.broadcast("e", mine, "/mine")
            for client in clients:
                assert client.recv().encode().count(mine.encode()) == 1
                client.close()
