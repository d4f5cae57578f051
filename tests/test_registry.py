"""Section 8: who is connected, and to which topics; who is sent what; and what was sent last, for who comes back."""

import gc
import random
import threading
import time
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from wsqueue import LAGGING_TICKS, MIB, PLAIN, TICK_BYTES, ClientRegistry, Encoding, Event, History, audiences_of

TOPICS = ("/", "/chat", "user:1", "user:2")
CLIENTS = range(5)


class Client:
    """All that is needed of a client: that it is this one and no other, and how it is sent its messages."""

    _encoding = PLAIN


class Interruptible(Client):
    """A client that lets another thread run whenever it is looked for: every step of a call can be the last one."""

    def __hash__(self):
        time.sleep(0)
        return id(self) >> 4

    def __eq__(self, other):
        return self is other


# ---- Against a model ---------------------------------------------------------------------------------------


class RegistryMachine(RuleBasedStateMachine):
    """Any interleaving of calls leaves what a plain dictionary of lists would hold."""

    def __init__(self):
        super().__init__()
        self.registry = ClientRegistry()
        self.clients = [Client() for _ in CLIENTS]
        self.topics_of = {}  # client -> its topics
        self.members = {topic: [] for topic in TOPICS}  # in the order in which they came
        self.behind = set()

    def enter(self, client, topic):
        if topic not in self.topics_of[client]:
            self.topics_of[client].add(topic)
            if client not in self.behind:
                self.members[topic].append(client)

    def quit(self, client, topic):
        if topic in self.topics_of.get(client, ()):
            self.topics_of[client].remove(topic)
            if client not in self.behind:
                self.members[topic].remove(client)

    @rule(number=st.sampled_from(CLIENTS), topics=st.lists(st.sampled_from(TOPICS), max_size=3))
    def add(self, number, topics):
        client = self.clients[number]
        if client in self.topics_of:
            return  # a server adds a connection once
        self.registry.add(client, topics)
        self.topics_of[client] = set()
        for topic in topics:
            self.enter(client, topic)

    @rule(number=st.sampled_from(CLIENTS), topics=st.lists(st.sampled_from(TOPICS), max_size=3))
    def add_behind(self, number, topics):
        client = self.clients[number]
        if client not in self.topics_of:
            self.registry.add(client, topics, behind=True)
            self.topics_of[client] = set(topics)
            self.behind.add(client)

    @rule(number=st.sampled_from(CLIENTS))
    def catch_up(self, number):
        client = self.clients[number]
        self.registry.catch_up(client)
        if client in self.behind:
            self.behind.remove(client)
            topics, self.topics_of[client] = self.registry.topics(client), set()
            for topic in topics:
                self.enter(client, topic)

    @rule(number=st.sampled_from(CLIENTS))
    def discard(self, number):
        client = self.clients[number]
        self.registry.discard(client)
        for topic in TOPICS:
            self.quit(client, topic)
        self.topics_of.pop(client, None)
        self.behind.discard(client)

    @rule(number=st.sampled_from(CLIENTS), topic=st.sampled_from(TOPICS))
    def join(self, number, topic):
        client = self.clients[number]
        self.registry.join(client, topic)
        if client in self.topics_of:  # who has left joins nothing
            self.enter(client, topic)

    @rule(number=st.sampled_from(CLIENTS), topic=st.sampled_from(TOPICS))
    def leave(self, number, topic):
        client = self.clients[number]
        self.registry.leave(client, topic)
        self.quit(client, topic)

    @rule(topics=st.lists(st.sampled_from(TOPICS), min_size=2, max_size=4))
    def several_topics(self, topics):
        audience = self.registry.audience(tuple(topics))
        assert len(audience) == len(set(audience))
        assert set(audience) == {client for topic in topics for client in self.members[topic]}

    @invariant()
    def everyone_is_there(self):
        assert self.registry.everyone() == list(self.topics_of)
        assert self.registry.audience() == [client for client in self.topics_of if client not in self.behind]
        assert {client: set(self.registry.topics(client)) for client in self.topics_of} == self.topics_of
        assert len(self.registry) == len(self.topics_of)

    @invariant()
    def every_topic_has_its_members(self):
        assert {topic: self.registry.audience((topic,)) for topic in TOPICS} == self.members


TestAnyInterleaving = RegistryMachine.TestCase


# ---- One property at a time --------------------------------------------------------------------------------


def test_an_audience_of_several_topics_holds_each_client_once():
    """Who is on two of an event's topics gets the event once; who is on none does not get it."""
    registry, both, one, none = ClientRegistry(), Client(), Client(), Client()
    registry.add(both, ("a", "b"))
    registry.add(one, ("b",))
    registry.add(none, ("c",))
    assert registry.audience(("a", "b")) == [both, one]


def test_an_audience_is_a_list_of_its_own():
    """What a broadcast goes through does not change while others come and go."""
    registry, clients = ClientRegistry(), [Client(), Client()]
    registry.add(clients[0], ("a",))
    before = [registry.audience(), registry.audience(("a",)), registry.audience(("a", "b"))]
    registry.add(clients[1], ("a",))
    registry.discard(clients[0])
    assert before == [[clients[0]]] * 3


def test_a_topic_that_nobody_is_on_has_no_audience():
    """An event for nobody goes to nobody, and asking for it makes no such topic."""
    registry = ClientRegistry()
    registry.add(Client(), ("a",))
    assert registry.audience(("b",)) == registry.audience(("b", "c")) == []


def test_who_has_left_joins_nothing():
    """A handler may be later than its client: its join() must not bring the connection back."""
    registry, client = ClientRegistry(), Client()
    registry.add(client, ("a",))
    registry.discard(client)
    registry.discard(client)
    registry.join(client, "b")
    registry.leave(client, "a")
    assert registry.audience() == registry.audience(("a", "b")) == [] and len(registry) == 0


@pytest.fixture
def allocated():
    """A function that returns how many bytes more are allocated than at its first call."""

    def now():
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - first

    tracemalloc.start()
    first = 0
    first = now()
    yield now
    tracemalloc.stop()


def test_an_emptied_topic_leaves_nothing_behind(allocated):
    """Topics come and go with users: 20,000 of them, joined and left or vanished with a client, cost no memory."""
    registry, client = ClientRegistry(), Client()
    registry.add(client)
    for number in range(10_000):
        registry.join(client, f"user:{number}")
        registry.leave(client, f"user:{number}")
        passing = Client()
        registry.add(passing, (f"session:{number}",))
        registry.discard(passing)
    assert allocated() < 50_000


def test_a_discarded_client_is_let_go():
    """Nothing keeps a connection alive once it is discarded, whatever it was on."""
    registry, client = ClientRegistry(), Client()
    registry.add(client, ("a", "b"))
    registry.join(client, "c")
    registry.discard(client)
    gone = weakref.ref(client)
    del client
    gc.collect()
    assert gone() is None


# ---- Who is sent what --------------------------------------------------------------------------------------

TO = st.lists(st.sampled_from(TOPICS), max_size=2, unique=True).map(tuple)


def event(number, to=(), **more):
    return Event(f"id-{number}", tuple(to), 0.0, b'{"event":"e"}', **more)


@given(st.lists(TO, max_size=12), st.lists(st.tuples(TO, st.booleans(), st.booleans()), max_size=8))
def test_each_client_is_sent_all_of_its_events_in_one_piece_and_in_order(events, clients):
    """Whatever the mixture of topics: as if each event had been looked at for each client."""
    registry, wanted = ClientRegistry(), {}
    events = [event(number, to) for number, to in enumerate(events)]
    for topics, ids, behind in clients:
        client = Client()
        client._encoding = Encoding(ids=ids)
        registry.add(client, topics, behind)
        heard = [n for n, sent in enumerate(events) if not behind and (not sent.to or set(sent.to) & set(topics))]
        if heard:
            wanted[client] = heard
    found = {}
    for encoding, numbers, members in audiences_of(events, registry):
        for client in members:
            assert client not in found and client._encoding == encoding
            found[client] = list(numbers)
    assert found == wanted


def test_clients_that_get_the_same_share_one_piece():
    """A burst is encoded and joined once for a thousand clients, and not for each."""
    registry = ClientRegistry()
    for number in range(1000):
        registry.add(Client(), ("/", f"user:{number}"))
    pieces = audiences_of([event(1), event(2, ["/"]), event(3, ["user:7"]), event(4)], registry)
    assert sorted((len(members), list(numbers)) for _, numbers, members in pieces) == [
        (1, [0, 1, 2, 3]), (999, [0, 1, 3])]


def test_an_event_may_leave_one_client_out():
    """"Everybody but me"."""
    registry, me, other = ClientRegistry(), Client(), Client()
    registry.add(me)
    registry.add(other)
    assert [members for _, _, members in audiences_of([event(1, exclude=weakref.ref(me))], registry)] == [[other]]


# ---- The history -------------------------------------------------------------------------------------------


def test_an_id_that_stands_twice_counts_where_it_stood_last():
    """As in a file of the history that somebody has edited: who has seen it gets nothing twice."""
    history = History(1, MIB, 60.0, clock=lambda: 0.0)
    history.restore("epoch", 0, "", [(0.0, event(1)), (0.0, event(1))])
    assert history.position(event(1).id) == history.end == 2


class HistoryMachine(RuleBasedStateMachine):
    """Clients come, go, lag and come back, while events are sent: each has every event of its topics exactly once."""

    def __init__(self):
        super().__init__()
        self.registry, self.history = ClientRegistry(), History(8, 10_000, 60.0, clock=lambda: 0.0)
        self.clients = [Client() for _ in CLIENTS]
        self.sent = []  # all events
        self.heard = {client: [] for client in self.clients}  # since it came for the first time, or was reset
        self.start = {}  # client -> the number of events that were sent before that
        self.last = {}  # client -> the last id that it knows
        self.position = {}  # of those who are connected
        self.topics = dict(zip(self.clients, [(), ("/",), ("/chat",), ("/", "user:1"), ("user:2",)]))

    @rule(events=st.lists(TO, min_size=1, max_size=5))
    def send(self, events):
        fresh = [event(len(self.sent) + number, to) for number, to in enumerate(events)]
        with self.history.lock:
            self.history.add(fresh)
            pieces = audiences_of(fresh, self.registry)
        self.sent += fresh
        for _, numbers, members in pieces:
            for client in members:
                self.hear(client, [fresh[number] for number in numbers])

    def hear(self, client, events):
        self.heard[client] += [heard.id for heard in events]
        self.last[client] = self.heard[client][-1]

    def begin(self, client):
        """As a hello or a reset says."""
        self.heard[client], self.start[client] = [], len(self.sent)
        self.last[client], self.position[client] = self.history.current, self.history.end

    @rule(client=st.sampled_from(CLIENTS))
    def come(self, client):
        client = self.clients[client]
        if client in self.position:
            return
        self.position[client] = self.history.position(self.last[client]) if client in self.last else None
        if self.position[client] is None:
            self.begin(client)
        self.registry.add(client, self.topics[client], behind=True)

    @rule(client=st.sampled_from(CLIENTS))
    def go(self, client):
        client = self.clients[client]
        if self.position.pop(client, None) is not None:
            self.registry.discard(client)

    @rule(client=st.sampled_from(CLIENTS), most=st.sampled_from((1, 30, 1000)))
    def read(self, client, most):
        client = self.clients[client]
        if client not in self.position or client in self.registry.audience():
            return
        with self.history.lock:
            found = self.history.after(self.position[client], client, self.registry.topics(client), most)
            if found is None:
                self.begin(client)
            elif not found[0]:
                self.registry.catch_up(client)
            else:
                self.position[client] = found[1]
                self.hear(client, found[0])

    @invariant()
    def nobody_has_a_gap_or_a_repeat(self):
        live = set(self.registry.audience())
        for client, start in self.start.items():
            wanted = [sent.id for sent in self.sent[start:] if not sent.to or set(sent.to) & set(self.topics[client])]
            heard = self.heard[client]
            assert heard == wanted if client in live else heard == wanted[:len(heard)]

    @invariant()
    def it_is_bounded(self):
        assert len(self.history.kept()[3]) <= 8 and len(self.history._numbers) <= 8


TestHistory = HistoryMachine.TestCase


@pytest.mark.parametrize("bounds", [(3, 10_000, 60.0), (1000, 3 * len(event(0).text), 60.0), (1000, 10_000, 2.5)],
                         ids=["events", "bytes", "seconds"])
def test_the_history_is_bounded(bounds):
    """By count, size and age; the id just before what is kept has missed nothing of it, and the one before that has."""
    clock = iter(range(1000))
    history = History(*bounds, clock=lambda: next(clock) / 2)  # it looks twice for each event
    for number in range(10):
        history.add([event(number)])
    _, first, base, kept = history.kept()
    numbers = [int(entry.id[3:]) for _, entry in kept]
    assert 2 <= len(kept) <= 3 and numbers[-1] == 9
    assert base == f"id-{numbers[0] - 1}" and first == numbers[0]
    history._clock = lambda: kept[-1][0]
    assert history.position(base) is not None and history.position(f"id-{numbers[0] - 2}") is None


def test_a_history_of_nothing_knows_the_latest_id():
    """Who has seen the latest event has missed nothing, whatever is kept."""
    history = History(0, 0, 0.0)
    history.add([event(1), event(2)])
    assert history.position("id-2") == history.end and history.position("id-1") is None
    assert history.kept()[2:] == ("id-2", [])


def test_a_place_in_the_history_is_known_as_long_as_nothing_behind_it_is_gone():
    """What a hello names is where the history ended, whatever came before and after; and it tells no file's name."""
    history = History(2, 10_000, 60.0)
    history.add([event(1), event(2)])
    here = history.current
    assert "id-2" not in here and history.position(here) == history.end
    history.add([event(3), event(4)])
    assert history.position(here) == history.end - 2
    history.add([event(5)])
    for unknown in (here, f"{here}0", here.replace("-", "-0x"), here.rpartition("-")[0], "-", "x-1", f"{here}-"):
        assert history.position(unknown) is None


def test_what_may_still_be_in_its_queue_is_kept_and_known():
    """After a kill the next server finds it there again: it must not be sent twice to who can tell."""
    history, sent = History(2, 10_000, 60.0), [event(number, source=("a", number)) for number in range(5)]
    entered, repeats = history.enter(sent)
    assert entered == sent and not repeats
    history.add(entered)
    assert len(history.kept()[3]) == 5 and history.enter(sent[1:3])[1] == {0, 1}
    history.settle(sent[:4])
    assert len(history.kept()[3]) == 2
    history.settle(sent)
    assert history.enter(sent)[1] == set()


def test_what_never_leaves_its_queue_does_not_keep_the_history():
    """A flow without a pause, or a file that cannot be removed: memory stays bounded, and a repeat may be the price."""
    history = History(2, 1000, 60.0)
    for number in range(200):
        history.add([event(number, source=("a", number))._replace(text=bytes(MIB))])
    assert len(history.kept()[3]) <= LAGGING_TICKS * TICK_BYTES // MIB


def test_a_name_that_is_used_again_makes_another_event():
    """A cron job may write status.json each minute: an id is of one event, as long as the history knows it."""
    history = History(10, 10_000, 60.0)
    for _ in range(3):
        entered, repeats = history.enter([event(1, source=("status", 1)), event(1, source=("status", 2))])
        assert not repeats
        history.add(entered)
        history.settle(entered)
    assert len({kept.id for _, kept in history.kept()[3]}) == 6


# ---- Threads -----------------------------------------------------------------------------------------------


def disturb(registry, own, clients, seed):
    """Random calls on clients that other threads use as well; only its own it adds, as a server does: once."""
    chance = random.Random(seed)

    def renew(_, topic):
        registry.discard(own)
        registry.add(own, (topic,))

    def look(_, topic):
        registry.audience((topic, "/"))

    calls = (renew, look, registry.join, registry.join, registry.leave, lambda client, _: registry.discard(client))
    for _ in range(300):
        chance.choice(calls)(chance.choice(clients), chance.choice(TOPICS))


def test_many_threads_leave_it_consistent_and_empty():
    """No call fails while eight threads make them, no topic knows more than the whole, and discarding empties it."""
    registry, clients = ClientRegistry(), [Interruptible() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(disturb, registry, own, clients, seed) for seed, own in enumerate(clients)]:
            done.result()
    assert set(registry.audience()).issuperset(registry.audience(TOPICS))
    for client in clients:
        registry.discard(client)
    assert registry.audience() == registry.audience(TOPICS) == [] and len(registry) == 0


def test_a_broadcast_sees_whole_states_only():
    """A client that is always on one of two topics is in every audience of both."""
    registry, client, done = ClientRegistry(), Interruptible(), threading.Event()
    registry.add(client, ("a", "b"))

    def swing():
        for _ in range(300):
            registry.leave(client, "a")
            registry.join(client, "a")
            registry.leave(client, "b")
            registry.join(client, "b")
        done.set()

    with ThreadPoolExecutor(1) as pool:
        swinging = pool.submit(swing)
        seen = []
        while not done.is_set():
            seen.append(len(registry.audience(("a", "b"))))
        swinging.result()
    assert seen and set(seen) == {1}
