"""Section 4: what a producer passes or a file holds becomes events, 'not yet', or one kind of error."""

import datetime
import json
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers import spelled
from wsqueue import MIB, Event, EventError, UnfinishedError, encode_batch, make_event, parse_events

DATA = Path(__file__).resolve().parent / "data"
VALID = sorted((DATA / "valid").glob("*.json"))
INVALID = sorted((DATA / "invalid").glob("*.json"))

NOW = 1763890123.4567
STAMP = 1500000000.25  # stands in where the file says nothing about time


def parse(text, event_id="id", stamp=STAMP):
    """The events in the text of a file."""
    return parse_events(text.encode("utf-8"), event_id, stamp)


def encode_record(name, payload, to, now):
    """One event as an event file holds it."""
    return encode_batch([(name, payload)], to, now, MIB)


def message(event):
    """What clients get, as they see it."""
    return json.loads(event.text.decode("utf-8"))


def payload_of(value):
    """The payload that clients get when a producer passes this value."""
    (event,) = parse_events(encode_record("e", value, None, NOW), "id", STAMP)
    assert message(event) == message(make_event("e", value, None, NOW)), "the queue must not change an event"
    return message(event)["payload"]


# ---- The corpus --------------------------------------------------------------------------------------------


def name_of(path):
    return path.stem


@pytest.mark.parametrize("path", VALID, ids=name_of)
def test_valid_files_give_what_any_json_parser_finds_in_them(path):
    """Each object becomes one event with the object's own name, payload and timestamp."""
    data = path.read_bytes()
    records = json.loads(data.decode("utf-8-sig"))
    expected = [
        {
            "event": record["event"],
            "payload": record.get("payload"),
            "timestamp": int(STAMP if record.get("timestamp") is None else record["timestamp"]),
        }
        for record in (records if isinstance(records, list) else [records])
    ]
    assert [message(event) for event in parse_events(data, "id", STAMP)] == expected


@pytest.mark.parametrize("path", VALID, ids=name_of)
def test_no_strict_prefix_of_a_valid_file_is_more_than_unfinished(path):
    """A writer that stops for a moment anywhere in the file is waited for."""
    data = path.read_bytes().rstrip()
    for end in range(len(data)):
        with pytest.raises(UnfinishedError):
            parse_events(data[:end], "id", STAMP)


@pytest.mark.parametrize("path", INVALID, ids=name_of)
def test_invalid_files_are_unfinished_or_never_an_event(path):
    """What is not JSON may still become so (unfinished-*); JSON that is not an event never will (never-*)."""
    with pytest.raises(EventError) as caught:
        parse_events(path.read_bytes(), "id", STAMP)
    kinds = {"unfinished": UnfinishedError, "never": EventError}
    assert type(caught.value) is kinds[path.name.split("-")[0]]
    assert_is_a_sentence(str(caught.value))


def assert_is_a_sentence(text):
    assert text.strip() and "\n" not in text and "Traceback" not in text


def test_the_corpus_is_there():
    """Both halves have files of every kind, so that the tests above test something."""
    kinds = [path.name.split("-")[0] for path in INVALID]
    assert len(VALID) >= 15 and min(kinds.count("unfinished"), kinds.count("never")) >= 20


# ---- From a file -------------------------------------------------------------------------------------------


def test_an_event_keeps_what_its_file_says():
    """Name, payload, both times and topics are the producer's; id and source are the queue's."""
    text = '{"event":"paid","payload":{"id":42},"timestamp":1763890000,"queued_at":1763890001.5,"to":"/shop"}'
    (event,) = parse_events(text.encode(), "1763890001.5_x", STAMP, source="1763890001.5_x.json")
    assert event == Event("1763890001.5_x", ("/shop",), 1763890001.5, event.text, "1763890001.5_x.json")
    assert message(event) == {"event": "paid", "payload": {"id": 42}, "timestamp": 1763890000}


def test_clients_get_three_keys_in_the_order_that_is_documented():
    """The text has event, payload and timestamp, and nothing of what the queue knows besides."""
    (event,) = parse('{"to":"/a","queued_at":1,"timestamp":2,"secret":3,"payload":4,"event":"e"}')
    assert event.text == b'{"event":"e","payload":4,"timestamp":2}'


def test_only_the_name_is_required():
    """A missing timestamp is the file's stamp, a missing payload is null, and no topic is everyone."""
    (event,) = parse('{"event":"ping"}')
    assert message(event) == {"event": "ping", "payload": None, "timestamp": int(STAMP)}
    assert (event.to, event.queued_at) == ((), STAMP)


def test_without_queued_at_the_timestamp_says_when_it_was_queued():
    """An event from elsewhere that knows only its own time still has an age."""
    (event,) = parse('{"event":"ping","timestamp":1600000000.5}')
    assert (event.queued_at, message(event)["timestamp"]) == (1600000000.5, 1600000000)


def test_a_timestamp_is_whole_seconds():
    """PHP's microtime(true) as a timestamp is cut to what the contract promises clients."""
    (event,) = parse('{"event":"ping","timestamp":1763890123.987}')
    assert b'"timestamp":1763890123}' in event.text


def test_the_events_of_an_array_are_numbered_in_its_order():
    """Each has an id of its own that says which file and which place it had."""
    events = parse('[{"event":"a"},{"event":"b"},{"event":"a"}]', "stem")
    assert [message(event)["event"] for event in events] == ["a", "b", "a"]
    assert [event.id for event in events] == ["stem:0", "stem:1", "stem:2"]


def test_an_array_is_taken_whole_or_not_at_all():
    """One wrong event in it refuses the others too."""
    with pytest.raises(EventError):
        parse('[{"event":"a"},{"event":"b","timestamp":"yesterday"},{"event":"c"}]')


def test_a_payload_that_changes_its_mind_is_refused():
    """What could not be written at first makes no batch, whatever it says when it is asked which one it was."""
    class Once:
        asked = False

        def isoformat(self):
            first, self.asked = not self.asked, True
            if first:
                raise ValueError("not yet")
            return "now"

    with pytest.raises(EventError, match=r"batch.*not yet"):
        encode_batch([("a", 1), ("b", Once())], None, 0.0, 1000)


def test_an_empty_array_has_no_events():
    """It is JSON and complete, and says nothing to anyone."""
    assert parse("[]") == []


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_only_python_reads_are_refused_by_name(constant):
    """JSON.parse in a browser would throw on them; the message says which one it was."""
    with pytest.raises(EventError, match=constant) as caught:
        parse('{"event":"a","payload":[' + constant + "]}")
    assert not isinstance(caught.value, UnfinishedError)


def test_a_name_with_a_constant_in_it_is_only_a_name():
    """Text is never mistaken for a number that does not exist."""
    (event,) = parse('{"event":"NaN","payload":["Infinity"]}')
    assert message(event)["payload"] == ["Infinity"]


@pytest.mark.parametrize(
    "data, kind",
    [
        (b"[" * 10000, EventError),
        (b'{"a":' * 10000, EventError),
        (b'{"event":"a","payload":' + b"[" * 10000 + b"]" * 10000 + b"}", EventError),
        (b'{"event":"a","payload":' + b'{"a":' * 10000 + b"1" + b"}" * 10000 + b"}", EventError),
        (b'{"event":"a","payload":' + b"9" * 5000 + b"}", None),
        (b'{"event":"a","timestamp":' + b"9" * 400 + b"}", None),
        (b'{"event":"a","timestamp":1' + b"0" * 5000 + b"}", None),
        (b'{"event":"a","payload":1e400}', EventError),
        (b'{"event":"a","timestamp":1e400}', EventError),
        (b'{"event":"a","timestamp":1e308}', None),
        (b'{"event":"\\ud800","payload":"\\udfff\\ud800"}', None),
        (b'{"event":"a","to":"\\ud800"}', None),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else "",
)
def test_hostile_json_ends_in_events_or_an_error_of_ours(data, kind):
    """Depth, size and half characters never end in an exception that nobody expects."""
    try:
        events = parse_events(data, "id", STAMP)
    except EventError as error:
        assert_is_a_sentence(str(error))
        return
    assert kind is None, f"parsed as {events}"
    assert [message(event)["event"] for event in events] == [json.loads(data.decode())["event"]]


# ---- Topics: what is not clearly a topic list is never taken for "everyone" --------------------------------


@pytest.mark.parametrize(
    "to, topics",
    [
        (None, ()),
        ("/chat", ("/chat",)),
        ("user:7", ("user:7",)),
        (["/chat"], ("/chat",)),
        (("/chat", "user:7"), ("/chat", "user:7")),
        ({"/chat"}, ("/chat",)),
        ((topic for topic in ["/a", "/b"]), ("/a", "/b")),
    ],
    ids=["nobody named", "path", "user", "list", "tuple", "set", "generator"],
)
def test_a_topic_or_a_list_of_topics_is_an_audience(to, topics):
    """Python's ways to write a list are all as good; None alone is everyone."""
    assert make_event("e", 1, to, NOW).to == topics


@pytest.mark.parametrize(
    "to", ["", [], (), set(), {}, 0, 1, 0.0, False, True, b"", b"/chat", [""], ["/chat", ""], [None], [["/chat"]],
           [b"/chat"], [0], object(), iter(())], ids=spelled)
@pytest.mark.parametrize("make", [make_event, encode_record])
def test_what_is_not_clearly_a_topic_list_is_refused(make, to):
    """A variable that happens to be empty must not publish somebody's message to everyone."""
    with pytest.raises(EventError, match='"to"'):
        make("e", 1, to, NOW)


def test_an_object_is_not_a_topic_list():
    """Its keys are not meant as topics: {"user:7": false} would go to whom it excludes."""
    with pytest.raises(EventError, match='"to"'):
        parse('{"event":"e","to":{"user:7":false}}')
    with pytest.raises(EventError, match='"to"'):
        make_event("e", 1, {"user:7": False}, NOW)


@given(to=st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                       lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)))
def test_everyone_is_never_reached_by_accident(to):
    """Whatever stands after "to", no topics come out unless it is null; and topics are as they were written."""
    try:
        (event,) = parse_events(json.dumps({"event": "e", "to": to}).encode(), "id", STAMP)
    except EventError:
        assert to is not None
        return
    assert list(event.to) == ([] if to is None else [to] if isinstance(to, str) else to)
    assert bool(event.to) == (to is not None)


# ---- From a producer ---------------------------------------------------------------------------------------


def test_a_record_is_what_the_disk_format_says():
    """All four keys, "to" only where there is one, on one line of UTF-8."""
    data = encode_record("größe", [1], None, NOW)
    assert data.decode("utf-8") == '{"event":"größe","payload":[1],"timestamp":1763890123,"queued_at":1763890123.4567}'
    assert json.loads(encode_record("e", 1, "/chat", NOW).decode())["to"] == ["/chat"]


@pytest.mark.parametrize("name", ["", None, 0, 7, b"paid", ["paid"], True], ids=spelled)
@pytest.mark.parametrize("make", [make_event, encode_record])
def test_a_name_is_a_string_that_is_not_empty(make, name):
    """The message says what is wrong with it."""
    with pytest.raises(EventError, match="non-empty string"):
        make(name, None, None, NOW)


@dataclass
class Order:
    id: int
    due: datetime.date
    parts: list


UTC = datetime.timezone.utc
ACCEPTED = [
    (datetime.datetime(2025, 11, 23, 9, 28, 43, 500, UTC), "2025-11-23T09:28:43.000500+00:00"),
    (datetime.datetime(2025, 11, 23, 9, 28), "2025-11-23T09:28:00"),
    (datetime.date(2025, 11, 23), "2025-11-23"),
    (datetime.time(9, 28), "09:28:00"),
    (Decimal("19.90"), "19.90"),
    (Decimal("0.1234567890123456789012345"), "0.1234567890123456789012345"),
    (UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    ({"b", "a", "c"}, ["a", "b", "c"]),
    (frozenset({1}), [1]),
    ((1, (2,)), [1, [2]]),
    (Order(42, datetime.date(2030, 1, 31), [{"n"}]), {"id": 42, "due": "2030-01-31", "parts": [["n"]]}),
    ({"nested": [{"deep": {Decimal("1.0")}}]}, {"nested": [{"deep": ["1.0"]}]}),
    ({1: "a"}, {"1": "a"}),
]


@pytest.mark.parametrize("value, seen", ACCEPTED, ids=lambda value: type(value).__name__)
def test_types_that_producers_have_in_hand_are_accepted(value, seen):
    """Dates, Decimal and UUID arrive as text, sets as lists, dataclasses as objects."""
    assert payload_of(value) == seen


def circle():
    """A list that holds itself."""
    value = []
    value.append(value)
    return value


def tower():
    """A payload of 100,000 levels."""
    value = None
    for _ in range(100_000):
        value = [value]
    return value


class Hostile:
    def isoformat(self):
        return self


REFUSED = {
    "nan": float("nan"), "infinity": float("inf"), "nested nan": [{"x": float("-inf")}], "object": object(),
    "bytes": b"text", "complex": 1j, "class": Order, "date class": datetime.date, "function": len,
    "generator": (n for n in []), "tuple as key": {(1, 2): 3}, "nan as key": {float("nan"): 1}, "circle": circle(),
    "tower": tower(), "endless isoformat": Hostile(),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("make", [make_event, encode_record])
def test_what_json_cannot_hold_is_refused_with_the_name_of_the_event(make, what):
    """Nothing is written that a browser could not read, and the message says which event it was."""
    with pytest.raises(EventError, match="'order_paid'") as caught:
        make("order_paid", REFUSED[what], None, NOW)
    assert_is_a_sentence(str(caught.value))


@pytest.mark.parametrize("what", REFUSED)
def test_of_a_batch_the_event_at_fault_is_named(what):
    """A thousand events are one call: which of them is it?"""
    with pytest.raises(EventError, match="'order_paid'"):
        encode_batch([("before", 1), ("order_paid", REFUSED[what]), ("after", 2)], None, NOW, MIB)


def test_half_a_character_is_written_as_an_escape():
    """A lone surrogate is legal in JSON and impossible in UTF-8; the rest of the text survives with it."""
    assert payload_of({"\ud83d": "größe \udc00"}) == {"\ud83d": "größe \udc00"}


# ---- Properties --------------------------------------------------------------------------------------------

NAMES = st.text(min_size=1)
TOPICS = st.none() | NAMES | st.lists(NAMES, min_size=1, max_size=4)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
PAYLOADS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
TIMES = st.floats(min_value=0, max_value=4e9)
RECORDS = st.builds(encode_record, NAMES, PAYLOADS, TOPICS, TIMES)
FILES = RECORDS | st.lists(RECORDS, max_size=4).map(lambda records: b"[" + b",\n".join(records) + b"]")


@given(name=NAMES, payload=PAYLOADS, to=TOPICS, now=TIMES)
def test_what_is_put_is_what_is_parsed(name, payload, to, now):
    """Name, payload, topics and times come out of a file as a producer put them in."""
    (event,) = parse_events(encode_record(name, payload, to, now), "id", STAMP)
    assert message(event) == {"event": name, "payload": payload, "timestamp": int(now)}
    assert event.to == (() if to is None else (to,) if isinstance(to, str) else tuple(to))
    assert event.queued_at == now


@given(text=st.text(st.characters(exclude_categories=())))
def test_any_python_string_can_be_an_event(text):
    """Half characters included: whatever os.fsdecode or a cut emoji left in it, it arrives as UTF-16 would hold it."""
    (event,) = parse_events(encode_record("n" + text, text, None, NOW), "id", STAMP)
    assert utf16(message(event)["payload"]) == utf16(text)
    assert utf16(message(event)["event"]) == utf16("n" + text)


def utf16(text):
    return text.encode("utf-16-le", "surrogatepass")


@given(data=FILES, share=st.floats(min_value=0, max_value=1, exclude_max=True))
@example(data=b"[]", share=0.5)
def test_a_strict_prefix_of_an_event_file_never_parses(data, share):
    """Object or array: what parses is complete, so a file may be read while it is being written."""
    assert parse_events(data, "id", STAMP) is not None
    with pytest.raises(UnfinishedError):
        parse_events(data[: int(len(data) * share)], "id", STAMP)


JSON_PIECES = st.sampled_from(
    ["{", "}", "[", "]", ",", ":", '"', "\\", '"event"', '"to"', '"payload"', '"timestamp"', '"queued_at"', '"a"', '""',
     "null", "true", "false", "NaN", "Infinity", "-", "0", "1", "1e400", "1e308", "9" * 400, "9" * 5000, "\\ud800",
     '"\\ud800"', "\ufeff", " ", "\n", "é", "[" * 2000, "]" * 2000, '{"a":' * 2000, '{"event":"a"}', '{"event":"a",']
)
TEXTS = st.lists(JSON_PIECES | st.text(max_size=3), max_size=12).map("".join)
WRONG = st.dictionaries(
    st.sampled_from(["event", "payload", "timestamp", "queued_at", "to", "x"]), PAYLOADS | st.just(10**400)
).map(json.dumps)
DIRT = st.binary(max_size=2)
ANYTHING = st.one_of(
    st.binary(),
    TEXTS.map(str.encode),
    TEXTS.map(lambda text: b"\xef\xbb\xbf" + text.encode()),
    WRONG.map(str.encode),
    st.tuples(FILES, DIRT).map(b"".join),
    st.tuples(DIRT, FILES).map(b"".join),
)


@given(data=ANYTHING)
@example(data=b"[" * 10_000 + b"]" * 10_000)
@example(data=b"1" + b"0" * 1_000_000)
@example(data=b"1e400")
@example(data=b"\xef")
@example(data=b"\xef\xbb\xbf\xef\xbb\xbf{}")
@example(data=b"\xff\xfe{\0}\0")
def test_any_bytes_give_events_or_one_kind_of_error(data):
    """Nothing that lies in the directory can stop the server; and what is sent is strict JSON, always."""
    try:
        events = parse_events(data, "id", STAMP)
    except EventError as error:
        assert_is_a_sentence(str(error))
        return
    for event in events:
        seen = json.loads(event.text.decode("utf-8"), parse_constant=pytest.fail)
        assert list(seen) == ["event", "payload", "timestamp"]
        assert isinstance(seen["event"], str) and seen["event"] and isinstance(seen["timestamp"], int)
        assert all(isinstance(topic, str) and topic for topic in event.to)
