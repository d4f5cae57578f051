"""Section 6, WebSocket frames: RFC 6455, sections 5 and 7, rule by rule, and against another implementation."""

import tracemalloc
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from clients import BINARY, CLOSE, MASK, PING, PONG, TEXT, client_frame, close_payload, frame_head
from wsqueue import FrameParser, ProtocolError, apply_mask, decode_close, encode_close, encode_frame

CONTINUATION = 0x0
LIMIT = 1 << 17  # max_bytes of every parser here that does not say otherwise


def run_parser(pieces, masked=True, max_bytes=LIMIT, deflate=False):
    """What comes out, and the close code of the error that ended it, if one did."""
    parser, out = FrameParser(masked=masked, max_bytes=max_bytes, deflate=deflate), []
    try:
        for piece in pieces:
            out.extend(parser.feed(piece))
    except ProtocolError as error:
        return out, error.code
    return out, None


def parse(data, **kw):
    out, code = run_parser([data], **kw)
    assert code is None
    return out


def refused(data, **kw):
    """The close code for data that must be refused before anything comes out."""
    out, code = run_parser([data], **kw)
    assert out == []
    return code


def one_by_one(data):
    return [data[index : index + 1] for index in range(len(data))]


def cut(data, places):
    """The pieces of data, cut at these places."""
    places = sorted(places)
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)])]


# ---- The bytes of the RFC ----------------------------------------------------------------------------------

EXAMPLES = {  # section 5.7
    "8105 48656c6c6f": (TEXT, b"Hello", b""),
    "8185 37fa213d 7f9f4d5158": (TEXT, b"Hello", MASK),
    "8905 48656c6c6f": (PING, b"Hello", b""),
    "8a85 37fa213d 7f9f4d5158": (PONG, b"Hello", MASK),
    "827e0100" + "2a" * 256: (BINARY, b"*" * 256, b""),
    "827f0000000000010000" + "2a" * 65536: (BINARY, b"*" * 65536, b""),
}


@pytest.mark.parametrize("text", EXAMPLES, ids=lambda text: text[:9])
def test_the_examples_of_the_rfc_are_written_and_read(text):
    """The frames of section 5.7 come out of the encoder byte for byte, and go into the parser."""
    opcode, payload, mask = EXAMPLES[text]
    data = bytes.fromhex(text)
    assert encode_frame(opcode, payload, mask=mask) == data
    message = payload.decode() if opcode == TEXT else payload
    assert parse(data, masked=bool(mask)) == [(opcode, message)]


def test_the_fragmented_example_of_the_rfc_is_one_message():
    """Section 5.7's two fragments of an unmasked "Hello" are written and read."""
    first, last = bytes.fromhex("0103 48656c"), bytes.fromhex("8002 6c6f")
    assert encode_frame(TEXT, b"Hel", fin=False) == first
    assert encode_frame(CONTINUATION, b"lo") == last
    assert parse(first + last, masked=False) == [(TEXT, "Hello")]


@pytest.mark.parametrize(
    "size, head",
    [
        (0, "8200"),
        (1, "8201"),
        (125, "827d"),
        (126, "827e 007e"),
        (127, "827e 007f"),
        (65535, "827e ffff"),
        (65536, "827f 0000000000010000"),
        (70000, "827f 0000000000011170"),
    ],
)
def test_every_length_is_written_in_its_shortest_form(size, head):
    """7, 16 or 64 bits, whichever is the shortest, with and without a mask, and the parser reads each of them."""
    payload, head = bytes(size), bytes.fromhex(head)
    assert encode_frame(BINARY, payload) == head + payload
    masked = encode_frame(BINARY, payload, mask=MASK)
    assert masked[: len(head) + 4] == bytes((head[0], head[1] | 0x80)) + head[2:] + MASK
    assert parse(head + payload, masked=False) == parse(masked) == [(BINARY, payload)]


# ---- Masks -------------------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_a_mask_is_applied_byte_by_byte_and_undoes_itself(data, mask):
    """Masking is XOR with the mask repeated (section 5.3), at any length."""
    masked = apply_mask(data, mask)
    assert masked == bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))
    assert apply_mask(masked, mask) == data


def test_a_mask_of_zeros_is_a_mask():
    """The mask bit is what counts: a client that picked 00000000 is understood."""
    assert parse(client_frame(TEXT, b"plain", mask=bytes(4))) == [(TEXT, "plain")]


# ---- Fragments and control frames --------------------------------------------------------------------------


def test_fragments_are_joined_and_control_frames_pass_between_them():
    """A message in pieces is one message; pings and pongs in between come out at once and in order (section 5.4)."""
    data = b"".join(
        (
            client_frame(TEXT, b"one ", fin=False),
            client_frame(PING, b"?"),
            client_frame(CONTINUATION, b"two ", fin=False),
            client_frame(PONG, b"!"),
            client_frame(CONTINUATION, b"three"),
            client_frame(BINARY, b"next"),
        )
    )
    assert parse(data) == [(PING, b"?"), (PONG, b"!"), (TEXT, "one two three"), (BINARY, b"next")]


def test_empty_fragments_and_empty_messages_are_legal():
    """A message of no bytes is a message, whole or in pieces."""
    pieces = client_frame(BINARY, fin=False) + client_frame(CONTINUATION, fin=False) + client_frame(CONTINUATION)
    assert parse(client_frame(TEXT) + pieces) == [(TEXT, ""), (BINARY, b"")]


def test_a_character_may_be_cut_by_a_fragment_boundary():
    """UTF-8 is checked for the message and not for each fragment (section 5.6)."""
    text = "\N{EURO SIGN}\N{GRINNING FACE}".encode()
    data = client_frame(TEXT, text[:1], fin=False) + client_frame(CONTINUATION, text[1:5], fin=False)
    assert parse(data + client_frame(CONTINUATION, text[5:])) == [(TEXT, text.decode())]


def test_a_parser_is_at_rest_between_messages_only():
    """What is half received, be it a header, a payload or a fragment, keeps the parser from being thrown away."""
    parser = FrameParser(masked=True, max_bytes=LIMIT)
    whole = client_frame(TEXT, b"abc")
    states = [parser.at_rest]
    for piece in (whole[:1], whole[1:8], whole[8:], client_frame(TEXT, b"d", fin=False), client_frame(PING)):
        list(parser.feed(piece))
        states.append(parser.at_rest)
    list(parser.feed(client_frame(CONTINUATION)))
    assert [*states, parser.at_rest] == [True, False, False, True, False, False, True]


def test_what_came_before_an_error_is_not_lost():
    """Messages in front of a violation, in the same piece of data, come out."""
    assert run_parser([client_frame(TEXT, b"last words") + b"\xff\xff"]) == ([(TEXT, "last words")], 1002)


# ---- Every rule and its close code -------------------------------------------------------------------------

OPEN_MESSAGE = client_frame(TEXT, b"begun", fin=False)
VIOLATIONS = {
    "reserved bit 1": bytes((0xC1, 0x80)),
    "reserved bit 2": bytes((0xA1, 0x80)),
    "reserved bit 3": bytes((0x91, 0x80)),
    **{f"reserved opcode {opcode:#x}": bytes((0x80 | opcode, 0x80)) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "unmasked text": frame_head(0x81, 5, masked=False),
    "unmasked close": frame_head(0x88, 0, masked=False),
    **{f"fragmented control {opcode:#x}": bytes((opcode, 0x80)) for opcode in (CLOSE, PING, PONG)},
    **{f"control {opcode:#x} of 126 bytes": bytes((0x80 | opcode, 0xFE)) for opcode in (CLOSE, PING, PONG)},
    "control of 65,536 bytes": bytes((0x89, 0xFF)),
    "stray continuation": bytes((0x80, 0x80)),
    "stray continuation that goes on": bytes((0x00, 0x80)),
    "text inside a fragmented message": OPEN_MESSAGE + bytes((0x81, 0x80)),
    "binary inside a fragmented message": OPEN_MESSAGE + bytes((0x02, 0x80)),
    **{f"{size} in 16 bits": frame_head(0x82, size, form=16) for size in (0, 125)},
    **{f"{size} in 64 bits": frame_head(0x82, size, form=64) for size in (0, 125, 126, 65535)},
    "2^63": frame_head(0x82, 1 << 63, form=64),
    "2^64-1": frame_head(0x82, (1 << 64) - 1, form=64),
    "close with half a code": client_frame(CLOSE, b"\x03"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_refused_with_1002(name):
    """Each rule of section 5 has its check, which needs no more than the bytes that break it."""
    assert refused(VIOLATIONS[name]) == 1002


def test_a_continuation_after_the_last_fragment_is_stray():
    """A message that is complete is not continued."""
    data = OPEN_MESSAGE + client_frame(CONTINUATION) + client_frame(CONTINUATION)
    assert run_parser([data]) == ([(TEXT, "begun")], 1002)


@pytest.mark.parametrize("frame", [client_frame(TEXT, b"x"), client_frame(CLOSE), client_frame(PONG)])
def test_a_server_that_masks_is_refused(frame):
    """A client's parser takes no masked frame (section 5.1)."""
    assert refused(frame, masked=False) == 1002


@pytest.mark.parametrize("opcode", [CLOSE, PING, PONG])
def test_a_control_frame_may_hold_125_bytes(opcode):
    """The largest control frame is legal, so that the limit is where section 5.5 has it."""
    payload = close_payload(1000, "x" * 123) if opcode == CLOSE else b"x" * 125
    assert parse(client_frame(opcode, payload))[0][0] == opcode


@pytest.mark.parametrize("size", [101, 126, 65536, 1 << 40, (1 << 63) - 1])
def test_a_message_too_big_is_refused_when_it_is_announced(size):
    """The header is enough for 1009: nobody is made to hold, or to wait for, the bytes that it threatens with."""
    assert refused(frame_head(0x82, size), max_bytes=100) == 1009


def test_the_limit_is_for_a_message_and_not_for_a_frame():
    """Fragments count together, the first too many is refused at its header, and control frames do not count."""
    begun = client_frame(BINARY, bytes(60), fin=False) + client_frame(PING, bytes(125))
    full = begun + client_frame(CONTINUATION, bytes(40))
    assert run_parser([full + full], max_bytes=100) == ([(PING, bytes(125)), (BINARY, bytes(100))] * 2, None)
    assert run_parser([begun + frame_head(0x00, 41)], max_bytes=100) == ([(PING, bytes(125))], 1009)


def test_a_limit_of_nothing_still_takes_control_frames():
    """max_bytes=0 is a client that may not speak, and may still ping and leave."""
    data = client_frame(PING, b"?") + client_frame(TEXT) + client_frame(CLOSE)
    assert parse(data, max_bytes=0) == [(PING, b"?"), (TEXT, ""), (CLOSE, (1005, ""))]
    assert refused(frame_head(0x81, 1), max_bytes=0) == 1009


NOT_UTF8 = {
    "a byte that never occurs": b"\xff",
    "a continuation byte alone": b"a\x80",
    "a cut character": "\N{EURO SIGN}".encode()[:-1],
    "an overlong slash": b"\xc0\xaf",
    "a surrogate": b"\xed\xa0\x80",
    "beyond U+10FFFF": b"\xf4\x90\x80\x80",
}


@pytest.mark.parametrize("name", NOT_UTF8)
def test_text_that_is_not_utf8_is_refused_with_1007(name):
    """In a frame, in fragments and in the reason of a close frame (sections 5.5.1 and 8.1); binary may be anything."""
    data = NOT_UTF8[name]
    assert refused(client_frame(TEXT, data)) == 1007
    assert refused(client_frame(TEXT, data[:1], fin=False) + client_frame(CONTINUATION, data[1:])) == 1007
    assert refused(client_frame(CLOSE, close_payload(1000) + data)) == 1007
    assert parse(client_frame(BINARY, data)) == [(BINARY, data)]


WRONG_AT_LAST = {  # the last byte, and not one before it, rules out that this is the beginning of a text
    "a byte that never occurs": b"\xff",
    "a continuation byte alone": b"a\x80",
    "a lead byte of what would be overlong": b"\xc1",
    "a lead byte beyond U+10FFFF": b"\xf5",
    "a character that is not continued": b"\xe2\x82a",
    "a character that another one interrupts": b"\xf0\x9f\xc3",
    "overlong, of three bytes": b"\xe0\x9f",
    "overlong, of four bytes": b"\xf0\x8f",
    "a surrogate": b"\xed\xa0",
    "beyond U+10FFFF": b"\xf4\x90",
}


def fragments_of_one_byte(text):
    """A text message whose every byte is a fragment, each followed by a ping; the last one is still to come."""
    frames = [client_frame(CONTINUATION if index else TEXT, byte, fin=False) for index, byte in enumerate(text)]
    return [frame + client_frame(PING, b"?") for frame in frames]


@pytest.mark.parametrize("name", WRONG_AT_LAST)
def test_text_fails_with_the_first_byte_that_makes_it_invalid(name):
    """1007 comes with that byte, however much of the frame is still to come (section 8.1), and not before it."""
    data = b"fine \xe2\x82\xac " + WRONG_AT_LAST[name]
    pieces = one_by_one(client_frame(TEXT, data + bytes(200))[: 8 + len(data)])
    assert run_parser(pieces[:-1]) == ([], None)
    assert run_parser(pieces) == ([], 1007)


@pytest.mark.parametrize("name", WRONG_AT_LAST)
def test_a_fragment_fails_with_the_first_byte_that_makes_the_text_invalid(name):
    """1007 comes before anything that stands behind the byte, be it the next fragment, a ping, or a violation."""
    *good, bad = fragments_of_one_byte(one_by_one(WRONG_AT_LAST[name]))
    pings = [(PING, b"?")] * len(good)
    assert run_parser(good) == (pings, None)
    assert run_parser([*good, bad]) == (pings, 1007)
    assert run_parser([b"".join([*good, bad, b"\xff\xff"])]) == (pings, 1007)


def decodes(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def may_become_text(data):
    """Whether something can follow that makes it UTF-8: no character needs more than three bytes of one kind."""
    return any(decodes(data + byte * count) for byte in (b"\x80", b"\xbf") for count in range(4))


TEXT_OR_NOT = st.lists(
    st.text(max_size=4).map(str.encode) | st.sampled_from(list(WRONG_AT_LAST.values())) | st.binary(max_size=3)
).map(b"".join)


@given(TEXT_OR_NOT)
def test_a_text_goes_on_for_as_long_as_it_may_become_one(data):
    """Byte after byte of an unfinished frame: an error comes when no continuation could be valid, and only then."""
    pieces = one_by_one(client_frame(TEXT, data + b"to come")[: -len(b"to come")])
    head = len(pieces) - len(data)
    wrong = next((size for size in range(len(data) + 1) if not may_become_text(data[:size])), None)
    if wrong is None:
        assert run_parser(pieces) == ([], None)
    else:
        assert run_parser(pieces[: head + wrong - 1]) == ([], None)
        assert run_parser(pieces[: head + wrong]) == ([], 1007)


def test_a_character_in_pieces_is_no_error():
    """Cut by reads, by frames, and by control frames between them: what is valid as a whole is valid in parts."""
    text = "a\u00fc\u0800\u20ac\ud7ff\ue000\uffff\U00010000\U0001f600\U0010ffff"
    stream = b"".join(fragments_of_one_byte(one_by_one(text.encode()))) + client_frame(CONTINUATION)
    pings = [(PING, b"?")] * len(text.encode())
    assert run_parser(one_by_one(stream)) == run_parser([stream]) == ([*pings, (TEXT, text)], None)


# ---- Close frames ------------------------------------------------------------------------------------------

VALID_CODES = [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3999, 4000, 4999]
INVALID_CODES = [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535]


@pytest.mark.parametrize("code", VALID_CODES)
def test_a_close_code_that_may_be_sent_is_read(code):
    """The codes of section 7.4.1, of IANA's registry, and those for applications."""
    assert parse(client_frame(CLOSE, close_payload(code, "so long"))) == [(CLOSE, (code, "so long"))]


@pytest.mark.parametrize("code", INVALID_CODES)
def test_a_close_code_that_must_not_be_sent_is_refused_with_1002(code):
    """Codes that are reserved, unassigned, or out of range."""
    assert refused(client_frame(CLOSE, close_payload(code))) == 1002


def test_a_close_frame_may_be_empty():
    """No code is reported as 1005, which is never on the wire: neither read from it nor written to it."""
    assert parse(client_frame(CLOSE)) == [(CLOSE, (1005, ""))]
    assert encode_close(1005) == bytes((0x88, 0))


@given(st.sampled_from(VALID_CODES), st.text(max_size=60))
def test_a_close_frame_is_read_as_it_was_written(code, reason):
    """Code and reason survive; a reason of more than 123 bytes is cut between two characters."""
    frame = encode_close(code, reason)
    assert frame[0] == 0x88 and frame[1] == len(frame) - 2 <= 125
    read_code, read_reason = decode_close(frame[2:])
    assert read_code == code and reason.startswith(read_reason)
    kept, whole = len(read_reason.encode()), len(reason.encode())
    assert kept == whole or 119 < kept <= 123


def test_a_long_reason_is_cut_between_characters():
    """A control frame holds 125 bytes: two of the code, and as many whole characters as fit."""
    assert decode_close(encode_close(1011, "\N{EURO SIGN}" * 50)[2:]) == (1011, "\N{EURO SIGN}" * 41)
    assert decode_close(encode_close(1011, "a" + "\N{EURO SIGN}" * 50)[2:]) == (1011, "a" + "\N{EURO SIGN}" * 40)


# ---- In any pieces -----------------------------------------------------------------------------------------


@st.composite
def messages(draw):
    """A message in one to four frames, with control frames between them; some texts are not UTF-8."""
    text = draw(st.booleans())
    payload = draw(st.text(max_size=80).map(str.encode) | TEXT_OR_NOT if text else st.binary(max_size=400))
    parts = cut(payload, draw(st.lists(st.integers(0, len(payload)), max_size=3)))
    frames = []
    for index, part in enumerate(parts):
        opcode = CONTINUATION if index else TEXT if text else BINARY
        frames.append(client_frame(opcode, part, fin=index == len(parts) - 1))
        if draw(st.booleans()):
            frames.append(client_frame(draw(st.sampled_from((PING, PONG))), draw(st.binary(max_size=125))))
    return b"".join(frames)


@st.composite
def odd_frames(draw):
    """Frames that break a rule as often as not: any first byte, any length in any form, masked or not."""
    first = draw(st.sampled_from((0x01, 0x02, 0x80, 0x81, 0x82, 0x88, 0x89)) | st.integers(0, 255))
    payload = draw(st.binary(max_size=140))
    size = draw(st.just(len(payload)) | st.integers(0, (1 << 64) - 1))
    form = draw(st.sampled_from((None, 16, 64))) if size < 126 else 16 if size < 65536 else 64
    return frame_head(first, size, draw(st.integers(0, 9)) > 0, form) + MASK + payload


STREAMS = st.lists(messages() | odd_frames() | st.binary(max_size=40), max_size=6).map(b"".join)


@given(STREAMS)
def test_bytes_one_at_a_time_say_the_same_as_all_at_once(data):
    """What comes out, and the error if there is one, do not depend on how the stream was cut."""
    assert run_parser(one_by_one(data)) == run_parser([data])


@given(STREAMS, st.lists(st.integers(0, 400), max_size=5))
def test_pieces_of_any_size_say_the_same_as_all_at_once(data, places):
    """The same for cuts anywhere, among them cuts that leave an empty piece."""
    assert run_parser(cut(data, places)) == run_parser([data])


def is_sound(item):
    opcode, payload = item
    kinds = {TEXT: str, BINARY: bytes, PING: bytes, PONG: bytes, CLOSE: tuple}
    return type(payload) is kinds[opcode]


@given(STREAMS | st.binary(max_size=2000), st.booleans())
def test_any_bytes_give_messages_or_a_protocol_error_and_nothing_else(data, masked):
    """Whatever a peer sends, what comes out is well formed, and the only exception has a close code to answer with."""
    out, code = run_parser([data], masked=masked)
    assert all(map(is_sound, out))
    assert code in (None, 1002, 1007, 1009)


# ---- Against another implementation ------------------------------------------------------------------------


def read_elsewhere(data, masked, extensions=()):
    """The frame that the `websockets` package reads, which must be all there is."""
    reader = StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    coroutine = Frame.parse(reader.read_exact, mask=masked, max_size=LIMIT, extensions=extensions)
    with pytest.raises(StopIteration) as done:
        next(coroutine)
    assert not len(reader.buffer)
    return done.value.value


MASKS = st.just(b"") | st.binary(min_size=4, max_size=4)
PAYLOADS = st.binary(max_size=125) | st.integers(0, 70_000).map(lambda size: b"0123456789" * (size // 10))


@given(st.sampled_from((TEXT, BINARY, CONTINUATION)), PAYLOADS, st.booleans(), MASKS)
def test_another_implementation_reads_what_we_write(opcode, payload, fin, mask):
    """Every frame that the encoder makes means the same to the `websockets` package."""
    frame = read_elsewhere(encode_frame(opcode, payload, fin=fin, mask=mask), bool(mask))
    assert (frame.opcode, bytes(frame.data), frame.fin) == (opcode, payload, fin)
    assert not (frame.rsv1 or frame.rsv2 or frame.rsv3)


@given(st.sampled_from((BINARY, PING, PONG)), PAYLOADS, st.booleans())
def test_we_read_what_another_implementation_writes(opcode, payload, masked):
    """Every frame that the `websockets` package makes, masked at random, comes out of the parser."""
    payload = payload if opcode == BINARY else payload[:125]
    data = Frame(Opcode(opcode), payload).serialize(mask=masked)
    assert parse(data, masked=masked) == [(opcode, payload)]


@given(st.text(max_size=200), st.lists(st.integers(0, 600), max_size=3))
def test_we_read_fragments_that_another_implementation_writes(text, places):
    """A text that the `websockets` package sends in pieces, cut anywhere, is the text."""
    opcode, data = Opcode.TEXT, b""
    for part in cut(text.encode(), places):
        data += Frame(opcode, part, fin=False).serialize(mask=True)
        opcode = Opcode.CONT
    assert parse(data + Frame(opcode, b"").serialize(mask=True)) == [(TEXT, text)]


# ---- What a peer can make us hold --------------------------------------------------------------------------


@contextmanager
def memory_below(most):
    """Python must not hold more than so many bytes at any time in the block, beyond what it held before."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most


def test_fragments_without_a_byte_cost_no_memory():
    """A message of nothing, in ever more fragments, never reaches max_bytes: it must not grow elsewhere either."""
    parser = FrameParser(masked=True, max_bytes=1000)
    list(parser.feed(client_frame(TEXT, fin=False)))
    fragments = client_frame(CONTINUATION, fin=False) * 10_000
    list(parser.feed(fragments))
    with memory_below(2 * len(fragments)):
        for _ in range(10):
            list(parser.feed(fragments))


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_fragments_of_a_byte_cost_what_the_message_costs(opcode):
    """A message in as many pieces as it has bytes is no more to hold than the message, and ends at max_bytes."""
    parser, fragment = FrameParser(masked=True, max_bytes=20_000), client_frame(CONTINUATION, b"x", fin=False)
    with memory_below(120_000):
        list(parser.feed(client_frame(opcode, fin=False)))
        for _ in range(20_000):
            assert list(parser.feed(fragment)) == []
        with pytest.raises(ProtocolError, match="20000") as refusal:
            list(parser.feed(fragment))
    assert refusal.value.code == 1009


def test_an_announced_length_costs_nothing_until_its_bytes_come():
    """A header that promises a gigabyte takes no memory for it, and yields nothing when only a part comes."""
    parser = FrameParser(masked=True, max_bytes=1 << 31)
    with memory_below(100_000):
        assert list(parser.feed(frame_head(0x82, 1 << 30) + MASK + bytes(10_000))) == []
    assert not parser.at_rest


def test_bytes_beyond_an_announced_length_are_the_next_frame():
    """A length is believed to the byte: what is there too much is no part of the message."""
    assert parse(frame_head(0x81, 2) + bytes(4) + b"ab" + client_frame(PING, b"c")) == [(TEXT, "ab"), (PING, b"c")]
    assert run_parser([frame_head(0x81, 2) + bytes(4) + b"abcd"]) == ([(TEXT, "ab")], 1002)


def test_a_length_beyond_its_frame_takes_what_follows():
    """Too long a length makes payload of the next frame: no message comes out of the middle of another."""
    inside = b"ab" + client_frame(TEXT, b"hidden")
    data = frame_head(0x82, len(inside) + 6) + bytes(4) + inside
    assert run_parser([data]) == ([], None)
    assert run_parser([data, b"behind"]) == ([(BINARY, inside + b"behind")], None)
