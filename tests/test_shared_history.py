"""Section 8 where servers share a queue: ids are places in it, and a client may have been elsewhere before."""

import itertools
import random

import pytest

from clients import Follower, serving
from helpers import eventually
from wsqueue import AHEAD, History, close_queues, make_event, open_queue, place_of, queue_event


def event(identity, payload=None, to=None):
    """As a queue gives it."""
    return make_event("e", payload, to, 0.0, identity, source=identity)


def unconnected(most=1000):
    """Of a server that has yet to reach its queue."""
    made = History(most, 1 << 20, 1e9, clock=lambda: 0.0)
    made.shared = True
    return made


def history(most=1000, base="0-0", past=()):
    """Of a server that has found `past` in its queue."""
    made = unconnected(most)
    made.recall(base, past)
    return made


def send(made, *events):
    """Returns the ids under which they are sent; repeats are not."""
    entered, repeats = made.enter(events)
    fresh = [one for number, one in enumerate(entered) if number not in repeats]
    made.add(fresh)
    made.settle(fresh)
    return [one.id for one in fresh]


def after(made, identity):
    """The ids of what a client gets that comes with this one; or None, or AHEAD."""
    position = made.position(identity)
    if position in (None, AHEAD):
        return position
    found = made.after(position, None, (), 1 << 20)
    return None if found is None else [one.id for one in found[0]]


# ---- Places ------------------------------------------------------------------------------------------------


def test_places_are_in_the_order_of_the_queue():
    """By number and not as text; the events of a batch one after another, and the place of all of it behind them."""
    ids = ["2-9", "2-10:0", "2-10:1", "2-10:10", "2-10", "10-0", "10-1:0"]
    assert sorted(random.Random(1).sample(ids, len(ids)), key=place_of) == ids


@pytest.mark.parametrize("identity", ["", "5", "5-", "-5", "5-x", "5-6:", "5-6:x", "1-2-3", "5 -6", "9" * 20 + "-1",
                                      "\u0665-6", "5-6\n", "1763890123.4567_6922d3cb6f7fc1a2f0001"])
def test_what_is_no_place_is_none(identity):
    """Whatever a client sends: it is looked at, and not believed."""
    assert place_of(identity) is None


def test_what_is_sent_past_the_queue_is_at_the_place_before_it():
    """So that another server, which knows nothing of it, can go on there."""
    made = history()
    assert send(made, event("5-1"))[0] == "5-1"
    (local,) = send(made, make_event("e", None, None, 0.0, "1763890123.4567_6922d3cb6f7fc1a2f0001"))
    assert local.startswith("5-1~")
    assert place_of(local) == place_of("5-1")
    (second,) = send(made, make_event("e", None, None, 0.0, "other"))
    assert second == "5-1~other"


# ---- Where a client goes on --------------------------------------------------------------------------------


def test_a_client_goes_on_behind_what_it_has_seen():
    """By an event's id, and by one of which this server knows only the place."""
    made = history()
    send(made, event("5-1"), event("5-2:0"), event("5-2:1"), event("7-0"))
    assert after(made, "0-0") == ["5-1", "5-2:0", "5-2:1", "7-0"]
    assert after(made, "5-1") == ["5-2:0", "5-2:1", "7-0"]
    assert after(made, "5-2:0") == ["5-2:1", "7-0"]
    assert after(made, "5-2") == after(made, "6-0") == after(made, "5-2~local-to-another") == ["7-0"]
    assert after(made, "7-0") == []


def test_who_has_seen_what_is_yet_to_be_sent_is_ahead():
    """Until it has been sent: then it goes on behind it."""
    made = history()
    send(made, event("5-1"))
    assert after(made, "6-0") is AHEAD
    send(made, event("5-9"))
    assert after(made, "6-0") is AHEAD
    send(made, event("6-0"), event("6-1"))
    assert after(made, "6-0") == ["6-1"]


def test_who_has_missed_what_is_not_kept_is_told():
    """Nothing, and not AHEAD: it will never be known what it missed."""
    made = history(most=2)
    send(made, *(event(f"5-{number}") for number in range(5)))
    assert after(made, "5-1") is None
    assert after(made, "5-2") == ["5-3", "5-4"]


@pytest.mark.parametrize("identity", ["0123456789ab-3", "nonsense", "5", "~", "1763890123.4567_6922d3cb6f7fc1a2f0001"])
def test_an_id_of_another_kind_is_not_known(identity):
    """That of a directory's server, of another queue, or nobody's."""
    assert after(history(), identity) is None


def test_before_the_queue_was_reached_everyone_is_ahead():
    """What a client has missed is not known yet: it waits."""
    made = unconnected()
    assert made.knows_nothing
    assert made.position("5-1") is AHEAD
    made.recall("0-0", [event("5-1"), event("5-2")])
    assert not made.knows_nothing
    assert after(made, "5-1") == ["5-2"]


# ---- What was sent before ----------------------------------------------------------------------------------


def test_what_was_sent_before_stands_before_all_else():
    """Also before what the server itself has sent in the meantime; nobody's position moves."""
    made = unconnected()
    now = made.end
    (local,) = send(made, make_event("e", None, None, 0.0, "local"))
    made.recall("4-0", [event("5-1"), event("5-2")])
    assert [one.id for one in made.after(now, None, (), 1 << 20)[0]] == [local]
    assert after(made, "4-0") == ["5-1", "5-2", local]
    assert after(made, "3-9") is None
    assert made.current == local


def test_what_was_sent_before_is_bounded_too():
    """The newest of it are kept."""
    made = history(most=2, past=[event(f"5-{number}") for number in range(4)])
    assert after(made, "5-0") is None
    assert after(made, "5-1") == ["5-2", "5-3"]


def test_an_entry_that_comes_twice_is_a_repeat():
    """As after a failover to a copy that lags behind."""
    made = history(past=[event("5-1")])
    assert send(made, event("5-1"), event("5-2")) == ["5-2"]
    assert send(made, event("5-2")) == []


def test_after_its_queue_went_back_a_history_begins_anew():
    """Ids are used again: an event with a known one is no repeat, and who comes with one is told."""
    made = history()
    send(made, event("5-1"), event("5-2"), event("5-3"))
    behind = made.position("5-2")
    assert send(made, event("5-1~reset"), event("5-2")) == ["5-1~reset", "5-2"]
    assert made.after(behind, None, (), 1 << 20) is None
    assert [after(made, identity) for identity in ("5-1", "5-2", "5-3", "5-1~reset")] == [None] * 4
    send(made, event("5-3"), event("5-4"), event("5-5"))
    assert after(made, "5-3") is None
    assert after(made, "5-4") == ["5-5"]


def test_two_servers_agree_about_every_client():
    """Whoever leaves one anywhere and comes to the other, wherever that is, gets what comes next, or waits for it."""
    rng = random.Random(5)
    ids = [f"{rng.randrange(3) + 3 * number}-{rng.randrange(9)}" for number in range(60)]
    for seen, here in itertools.product(range(0, 60, 7), range(60)):
        made = history(most=20)
        send(made, *map(event, ids[:here]))
        found = after(made, ids[seen])
        kept = ids[max(0, here - 20):here]
        if seen >= here:
            assert found is AHEAD
        elif seen < here - 20 - 1:
            assert found is None
        else:
            assert found == [one for one in kept if ids.index(one) > seen]


# ---- In a server -------------------------------------------------------------------------------------------


@pytest.fixture
def queue(tmp_path):
    """A queue that servers can share."""
    yield f"sqlite:///{tmp_path}/queue.db"
    close_queues()


def put(queue, *numbers):
    for number in numbers:
        assert queue_event(queue, "e", number)


def test_a_client_that_is_ahead_waits_and_gets_what_comes_behind_it(queue, monkeypatch):
    """Neither what it has seen, nor a reset."""
    behind = open_queue(queue, node="behind")
    assert behind.take() == []
    behind.close()
    with serving(queue=queue) as server:
        eventually(lambda: not server._history.knows_nothing, what="the server to have its place")
        with Follower(server.url) as client:
            client.hello()
            put(queue, 1, 2)
            assert client.payloads(2) == [1, 2]
            seen = client.last
    monkeypatch.setattr("wsqueue._SqliteLink.read", lambda *_: [])  # this server is behind, for as long as that holds
    with serving(queue=open_queue(queue, node="behind")) as server, Follower(server.url, last=seen) as client:
        assert client.hello() == seen
        eventually(lambda: server._history.awaiting, what="the server to know that it is ahead")
        put(queue, 3)
        monkeypatch.undo()
        assert client.payloads(1) == [3]


def test_a_client_that_is_ahead_of_what_never_comes_is_told(queue, monkeypatch):
    """After a while: what it has seen may have been lost, and it is not to wait for ever."""
    monkeypatch.setattr("wsqueue.HELD_SECONDS", 0.1)
    with serving(queue=queue) as server, Follower(server.url, last="99999999999-1") as client:
        client.hello()
        assert client.recv().event == "wsqueue.reset"
        put(queue, 1)
        assert client.payloads(1) == [1]
