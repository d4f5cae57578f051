"""Section 8, ClientRegistry: who is connected, and to which topics."""

import gc
import random
import threading
import time
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from wsqueue import ClientRegistry

TOPICS = ("/", "/chat", "user:1", "user:2")
CLIENTS = range(5)


class Client:
    """All that the registry needs of a client: that it is this one and no other."""


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

    def enter(self, client, topic):
        if topic not in self.topics_of[client]:
            self.topics_of[client].add(topic)
            self.members[topic].append(client)

    def quit(self, client, topic):
        if topic in self.topics_of.get(client, ()):
            self.topics_of[client].remove(topic)
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

    @rule(number=st.sampled_from(CLIENTS))
    def discard(self, number):
        client = self.clients[number]
        self.registry.discard(client)
        for topic in TOPICS:
            self.quit(client, topic)
        self.topics_of.pop(client, None)

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
        assert self.registry.audience() == list(self.topics_of)
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
