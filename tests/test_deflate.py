"""permessage-deflate (RFC 7692) in section 6 and over real sockets; judged by zlib and by another implementation."""

import json
import os
import zlib
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory, PerMessageDeflate
from websockets.frames import Frame, Opcode
from websockets.headers import build_extension, parse_extension
from websockets.sync.client import connect as websockets_connect

from clients import (
    BINARY,
    CLOSE,
    PATIENCE,
    PING,
    PONG,
    TEXT,
    RawClient,
    client_frame,
    close_payload,
    frame_head,
    serving,
)
from helpers import eventually
from test_frames import CONTINUATION, LIMIT, WRONG_AT_LAST, cut, memory_below, one_by_one, read_elsewhere, run_parser
from wsqueue import FrameParser, accept_deflate, encode_frame, encode_message, queue_events

RSV1 = 0x40  # in a frame's first byte: the message is compressed
TAIL = b"\x00\x00\xff\xff"  # ends what zlib flushes, and is not sent


def deflate(data, *, level=-1, window=15, memory=8, strategy=zlib.Z_DEFAULT_STRATEGY):
    """The payload of a compressed message, as section 7.2.1 has it."""
    deflater = zlib.compressobj(level, zlib.DEFLATED, -window, memory, strategy)
    data = deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH)
    assert data.endswith(TAIL)
    return data[: -len(TAIL)]


def compressed_frame(payload, opcode=TEXT, fin=True):
    """A client's frame with the bit that says that its payload is compressed."""
    return client_frame(opcode | RSV1, payload, fin=fin)


def run_deflating_parser(pieces, **kw):
    return run_parser(pieces, deflate=True, **kw)


def parse(data, **kw):
    out, code = run_deflating_parser([data], **kw)
    assert code is None
    return out


def refused(data, **kw):
    """The close code for data that must be refused before anything comes out."""
    out, code = run_deflating_parser([data], **kw)
    assert out == []
    return code


# ---- Compressed messages are read --------------------------------------------------------------------------

EXAMPLES = {  # section 7.2.3, each with the "Hello" that it stands for; frames of a server
    "7.2.3.1 one block": ("c107 f248cdc9c90700", "Hello"),
    "7.2.3.1 in two fragments": ("4103 f248cd 8004 c9c90700", "Hello"),
    "7.2.3.3 a block without compression": ("c10b 000500faff48656c6c6f00", "Hello"),
    "7.2.3.4 a final block": ("c108 f348cdc9c9070000", "Hello"),
    "7.2.3.5 two blocks": ("c10d f248050000 00ffff cac9c90700", "Hello"),
    "7.2.3.6 nothing": ("c101 00", ""),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_rfc_are_read(name):
    """The payloads of section 7.2.3, in one piece and byte after byte."""
    text, message = EXAMPLES[name]
    data = bytes.fromhex(text)
    assert parse(data, masked=False) == [(TEXT, message)]
    assert run_deflating_parser(one_by_one(data), masked=False) == ([(TEXT, message)], None)


def test_a_message_does_not_know_the_one_before_it():
    """We agree to no context takeover: a reference to an earlier message, as in section 7.2.3.2, is damage."""
    data = bytes.fromhex("c107 f248cdc9c90700" + "c105 f200110000")
    assert run_deflating_parser([data], masked=False) == ([(TEXT, "Hello")], 1007)


class OtherClient:
    """Frames as the `websockets` package's client sends them, once we have answered as we do."""

    def __init__(self, window=15):
        self.extension = PerMessageDeflate(True, True, 15, window)

    def frame(self, opcode, payload, fin=True):
        return Frame(Opcode(opcode), payload, fin).serialize(mask=True, extensions=[self.extension])

    def message(self, opcode, parts, between=b""):
        frames = [self.frame(CONTINUATION if i else opcode, part, i == len(parts) - 1) for i, part in enumerate(parts)]
        return between.join(frames)


REPEATED = st.builds(lambda data, count: data * count, st.binary(max_size=30), st.integers(0, 900))
PAYLOADS = st.binary(max_size=300) | REPEATED


@given(PAYLOADS, st.lists(st.integers(0, 3000), max_size=3), st.integers(9, 15), st.booleans())
def test_we_read_what_another_implementation_compresses(payload, places, window, control):
    """A message of any content, in any fragments and any window, with or without pings between, and a plain one."""
    ping = client_frame(PING, b"?") if control else b""
    parts = cut(payload, places)
    data = OtherClient(window).message(BINARY, parts, ping) + client_frame(TEXT, b"plain")
    pings = [(PING, b"?")] * (len(parts) - 1) * control
    assert parse(data) == [*pings, (BINARY, payload), (TEXT, "plain")]


@given(st.text(max_size=400), st.lists(st.integers(0, 900), max_size=3), st.lists(st.integers(0, 900), max_size=6))
def test_a_compressed_text_may_be_cut_anywhere(text, frames, reads):
    """Characters are cut by fragments, their compressed bytes by reads: the text is the text."""
    data = OtherClient().message(TEXT, cut(text.encode(), frames), client_frame(PONG, b"!"))
    pongs = [(PONG, b"!")] * len(frames)
    assert run_deflating_parser(cut(data, reads)) == run_deflating_parser(one_by_one(data))
    assert parse(data) == [*pongs, (TEXT, text)]


def test_a_compressed_message_may_be_cut_within_its_blocks():
    """Fragments are pieces of the compressed message (section 6.1), and not compressed pieces, as some make them."""
    whole = deflate(b"to be or not to be, that is the question " * 20)
    for place in range(len(whole) + 1):
        data = compressed_frame(whole[:place], BINARY, fin=False) + client_frame(CONTINUATION, whole[place:])
        assert parse(data) == [(BINARY, b"to be or not to be, that is the question " * 20)]


def test_a_parser_is_at_rest_between_compressed_messages_only():
    """What is half inflated keeps the parser from being thrown away."""
    parser, states = FrameParser(masked=True, max_bytes=LIMIT, deflate=True), []
    for piece in one_by_one(compressed_frame(deflate(b"x" * 9))):
        list(parser.feed(piece))
        states.append(parser.at_rest)
    assert states.index(True) == len(states) - 1


def final_blocks(*texts):
    """Each text in a block that says that it is the last one."""
    deflaters = [zlib.compressobj(wbits=-15) for _ in texts]
    return b"".join(deflater.compress(text) + deflater.flush() for deflater, text in zip(deflaters, texts))


def test_blocks_behind_a_final_one_belong_to_the_message():
    """A sender may mark any block as final and go on behind it (section 7.2.1): none of them is lost."""
    data = compressed_frame(final_blocks(b"one ", b"two ", b"three ") + deflate(b"four"))
    assert parse(data) == [(TEXT, "one two three four")]
    assert run_deflating_parser(one_by_one(data)) == ([(TEXT, "one two three four")], None)


def test_a_final_block_may_be_the_last_byte():
    """Some senders leave out the empty block that should follow a final one: nothing is missing then."""
    data = compressed_frame(final_blocks(b"all of it")) + client_frame(PING)
    assert parse(data) == [(TEXT, "all of it"), (PING, b"")]


@pytest.mark.parametrize("payload", [b"", b"\x00", b"\x03\x00", b"\x02\x00", b"\x00" + TAIL + b"\x00"])
def test_an_empty_message_is_compressed_in_more_ways_than_one(payload):
    """Nothing at all, a stored, a final, a fixed block without a byte, or two of them."""
    assert parse(compressed_frame(payload)) == [(TEXT, "")]
    assert parse(compressed_frame(payload), max_bytes=0) == [(TEXT, "")]


# ---- The bit that says so ----------------------------------------------------------------------------------

HELLO = deflate(b"Hello")
COMPRESSED = compressed_frame(HELLO[:3], fin=False)
PLAIN = client_frame(TEXT, b"begun", fin=False)
MISPLACED = {
    **{f"in control frame {opcode:#x}": client_frame(opcode | RSV1, b"") for opcode in (CLOSE, PING, PONG)},
    "in a ping inside a compressed message": COMPRESSED + client_frame(PING | RSV1, b""),
    "in a later fragment of a compressed message": COMPRESSED + compressed_frame(HELLO[3:], CONTINUATION),
    "in a later fragment of a plain message": PLAIN + compressed_frame(HELLO, CONTINUATION),
    "in a continuation of nothing": compressed_frame(HELLO, CONTINUATION),
    "with a reserved opcode": compressed_frame(HELLO, 0x3),
    "with reserved bit 2": compressed_frame(HELLO, TEXT | 0x20),
    "with reserved bit 3": compressed_frame(HELLO, TEXT | 0x10),
    "in a new message inside a compressed one": COMPRESSED + compressed_frame(HELLO),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_the_bit_is_for_the_first_frame_of_a_message(name):
    """1002, as for any reserved bit (section 6.1 has it on the first frame of a data message, and nowhere else)."""
    assert refused(MISPLACED[name]) == 1002


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("fin", [True, False])
def test_the_bit_is_refused_where_it_was_not_agreed_on(opcode, fin):
    """1002, at the frame's first bytes."""
    frame = compressed_frame(HELLO, opcode, fin)
    assert run_parser([frame[:2]]) == ([], 1002)


def test_compression_is_for_each_message_to_choose():
    """Plain messages, whole and in fragments, stand between compressed ones, and each is what it says."""
    plain = client_frame(TEXT, b"raw") + PLAIN + client_frame(CONTINUATION, b", done")
    stream = compressed_frame(HELLO) + plain + compressed_frame(HELLO, BINARY)
    assert parse(stream) == [(TEXT, "Hello"), (TEXT, "raw"), (TEXT, "begun, done"), (BINARY, b"Hello")]


def test_control_frames_are_as_ever():
    """With compression agreed on, pings, pongs and close frames are what they are without."""
    data = client_frame(PING, b"1") + client_frame(PONG, b"2") + client_frame(CLOSE, close_payload(1000, "bye"))
    assert parse(data) == [(PING, b"1"), (PONG, b"2"), (CLOSE, (1000, "bye"))]


# ---- What is wrong with it ---------------------------------------------------------------------------------

LONG = deflate(bytes(range(256)) * 20)
DAMAGED = {
    "a reserved block type": b"\x07",
    "a stored block whose lengths disagree": b"\x00\x05\x00\x00\x00Hello",
    "a distance before the beginning": bytes.fromhex("f200110000"),
    "code lengths that make no code": b"\x04" + b"\xff" * 20,
    "noise": b"\xff" * 50,
    "a zlib header": zlib.compress(b"Hello"),
    "the tail that is not to be sent, cut": HELLO + b"\x00\x00",
    "noise behind a final block": b"\x03\x00" + b"\xff" * 9,
    "cut in a stored block": b"\x00\x05\x00\xfa\xffHel",
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_damaged_data_is_refused_with_1007(opcode, name):
    """Whole, in fragments, and byte after byte."""
    payload = DAMAGED[name]
    frames = compressed_frame(payload[:1], opcode, fin=False) + client_frame(CONTINUATION, payload[1:])
    assert refused(compressed_frame(payload, opcode)) == 1007
    assert refused(frames) == 1007
    assert run_deflating_parser(one_by_one(frames)) == ([], 1007)


def test_a_message_that_was_cut_short_is_not_a_shorter_one():
    """However much is missing at the end of a compressed message: it is 1007, and never what happens to inflate."""
    cut_short = [compressed_frame(LONG[:size], BINARY) for size in range(1, len(LONG))]
    assert [run_deflating_parser([data]) for data in cut_short] == [([], 1007)] * len(cut_short)


def test_damage_is_noticed_before_the_frame_is_whole():
    """What cannot be inflated is refused when it comes, however much is still announced."""
    assert run_deflating_parser([frame_head(0xC2, 1000) + bytes(4) + b"\x07"]) == ([], 1007)


@pytest.mark.parametrize("name", WRONG_AT_LAST)
def test_compressed_text_that_is_not_utf8_is_refused_at_once(name):
    """1007 when the wrong byte is inflated, in a frame and in a message that both go on, and not before it."""
    deflater = zlib.compressobj(wbits=-15)
    good, bad = (
        deflater.compress(part) + deflater.flush(zlib.Z_SYNC_FLUSH)
        for part in (b"fine " + WRONG_AT_LAST[name][:-1], WRONG_AT_LAST[name][-1:])
    )
    for head in (frame_head(0xC1, 1000), frame_head(0x41, 1000)):
        assert run_deflating_parser([head + bytes(4) + good]) == ([], None)
        assert run_deflating_parser([head + bytes(4) + good, bad]) == ([], 1007)
    assert refused(compressed_frame(good + bad)) == 1007


def test_compressed_binary_may_be_anything():
    """UTF-8 is a matter of text alone."""
    assert parse(compressed_frame(deflate(b"\xff\xfe"), BINARY)) == [(BINARY, b"\xff\xfe")]


@st.composite
def odd_messages(draw):
    """Frames of a compressed message, whole, damaged, cut short, or with the bit where it does not belong."""
    payload = deflate(draw(st.binary(max_size=200)), level=draw(st.integers(0, 9)))
    if draw(st.booleans()):
        place = draw(st.integers(0, len(payload)))
        payload = payload[:place] + draw(st.binary(max_size=4)) + payload[place + draw(st.integers(0, 3)) :]
    parts = cut(payload, draw(st.lists(st.integers(0, len(payload)), max_size=2)))
    firsts = [draw(st.sampled_from((TEXT, BINARY))) | RSV1, *[CONTINUATION] * (len(parts) - 1)]
    if draw(st.integers(0, 9)) == 0:
        firsts[-1] ^= RSV1
    return b"".join(client_frame(first, part, fin=part is parts[-1]) for first, part in zip(firsts, parts))


STREAMS = st.lists(odd_messages() | st.just(client_frame(PING, b"?")), max_size=4).map(b"".join)


@given(STREAMS, st.lists(st.integers(0, 400), max_size=5))
def test_pieces_of_any_size_say_the_same_as_all_at_once(data, places):
    """What comes out, and the error if there is one, do not depend on how the stream was cut."""
    assert run_deflating_parser(cut(data, places)) == run_deflating_parser([data])
    assert run_deflating_parser(one_by_one(data)) == run_deflating_parser([data])


@given(STREAMS)
def test_any_bytes_give_what_zlib_gives_or_a_protocol_error(data):
    """Whatever is done to compressed data, the only exception has a close code to answer with."""
    out, code = run_deflating_parser([data])
    assert {opcode: type(payload) for opcode, payload in out}.items() <= {TEXT: str, BINARY: bytes, PING: bytes}.items()
    assert code in (None, 1002, 1007, 1009)


# ---- How large it may become -------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("pieces", [1, 7, 5000])
def test_a_bomb_is_refused_with_1009_and_never_inflated(opcode, pieces):
    """100 MB in 100 KB, in one frame or many: what it would become is never in memory, whole or in part."""
    bomb = deflate(bytes(100_000_000))
    assert len(bomb) < LIMIT
    parts = cut(bomb, range(0, len(bomb), len(bomb) // pieces))
    begin, rest = compressed_frame(b"", opcode, fin=False), [client_frame(CONTINUATION, p, fin=False) for p in parts]
    with memory_below(1_000_000):
        assert run_deflating_parser([begin, *rest]) == ([], 1009)


def test_one_byte_beyond_the_limit_is_too_big():
    """max_bytes is for what a message inflates to, and counts over its fragments."""
    assert parse(compressed_frame(deflate(bytes(1000)), BINARY), max_bytes=1000) == [(BINARY, bytes(1000))]
    assert refused(compressed_frame(deflate(bytes(1001)), BINARY), max_bytes=1000) == 1009
    frames = OtherClient().message(BINARY, [bytes(600), bytes(400), b"x"])
    assert refused(frames, max_bytes=1000) == 1009
    assert parse(frames, max_bytes=1001) == [(BINARY, bytes(1000) + b"x")]


def test_final_blocks_without_end_are_refused():
    """Two bytes cost the server a new zlib stream: 64 of them in a message are plenty, and 1008 is for more."""
    few, many = (compressed_frame(final_blocks(*[b""] * count), BINARY) for count in (60, 70))
    assert parse(few) == [(BINARY, b"")]
    assert refused(many) == 1008


def test_final_blocks_add_up_to_the_limit():
    """Who starts over behind a final block does not start over with max_bytes."""
    two, three = (compressed_frame(final_blocks(*[bytes(400)] * count), BINARY) for count in (2, 3))
    assert parse(two, max_bytes=1000) == [(BINARY, bytes(800))]
    assert refused(three, max_bytes=1000) == 1009


@pytest.mark.parametrize("text, code", [(b"\xff" + b"a" * 2000, 1007), (b"a" * 2000 + b"\xff", 1009)])
def test_what_is_wrong_first_is_what_counts(text, code):
    """A text that is not UTF-8 and too big is refused for what comes first in it, in whatever pieces it comes."""
    data = compressed_frame(deflate(text))
    assert refused(data, max_bytes=1000) == code
    assert run_deflating_parser(one_by_one(data), max_bytes=1000) == ([], code)


def test_a_limit_is_for_each_message():
    """What one message inflated to is not held against the next."""
    frame = compressed_frame(deflate(bytes(1000)), BINARY)
    assert parse(frame * 5, max_bytes=1000) == [(BINARY, bytes(1000))] * 5


@pytest.mark.parametrize("size", [200, 40_000, 1 << 40])
def test_compressed_data_too_long_for_any_message_is_refused_when_it_is_announced(size):
    """No encoder needs so much for max_bytes: the header is enough for 1009."""
    assert refused(frame_head(0xC2, size), max_bytes=100) == 1009
    assert refused(compressed_frame(b"", BINARY, fin=False) + frame_head(0x80, size), max_bytes=100) == 1009


NOISE = os.urandom(1 << 16)


STRATEGIES = (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_FIXED)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_what_does_not_compress_may_have_the_largest_size(level, strategy):
    """Noise of exactly max_bytes is longer compressed; a client that compresses it nevertheless may send it."""
    for window, memory, size in ((15, 8, 1 << 16), (9, 1, 1 << 16), (15, 9, 1000), (9, 1, 1), (15, 8, 0)):
        payload = deflate(NOISE[:size], level=level, window=window, memory=memory, strategy=strategy)
        assert len(payload) > size
        assert parse(compressed_frame(payload, BINARY), max_bytes=size) == [(BINARY, NOISE[:size])]
        fragments = compressed_frame(payload[:9], BINARY, fin=False) + client_frame(CONTINUATION, payload[9:])
        assert parse(fragments, max_bytes=size) == [(BINARY, NOISE[:size])]


def fixed_block(data):
    """What the simplest encoder makes of bytes from 144 on: the fixed code, nine bits for each (RFC 1951, 3.2.6)."""
    bits = "010" + "".join(f"{0b110010000 + byte - 144:09b}" for byte in data) + "0" * 7 + "000"
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[place : place + 8][::-1], 2) for place in range(0, len(bits), 8))


def test_the_longest_that_a_plain_encoder_makes_is_taken():
    """Nine bits for each byte of a message of exactly max_bytes are no reason for 1009."""
    message = b"\xff\x90" * (LIMIT // 2)
    payload = fixed_block(message)
    assert zlib.decompressobj(-15).decompress(payload + TAIL) == message and len(payload) > LIMIT * 9 // 8
    assert parse(compressed_frame(payload, BINARY)) == [(BINARY, message)]


# ---- Offers and answers (section 7.1) ----------------------------------------------------------------------

NAME = "permessage-deflate"
ANSWER = f"{NAME}; server_no_context_takeover; client_no_context_takeover"
ACCEPTED = {  # -> the window in the answer; None: none was asked for. Any but the largest is answered with 9
    f"{NAME}": None,  # Firefox
    f"{NAME}; client_max_window_bits": None,  # Chrome, Safari, the `websockets` package
    f"{NAME}; server_max_window_bits=12; client_max_window_bits=12": 9,
    f"{NAME}; client_no_context_takeover; client_max_window_bits": None,
    f"{NAME}; server_no_context_takeover; client_no_context_takeover": None,
    f"{NAME}; client_max_window_bits=8": None,  # what a client limits itself to is its own matter
    f"{NAME}; client_max_window_bits=15; server_max_window_bits=10; server_no_context_takeover": 9,
    f'{NAME}; server_max_window_bits="10"': 9,
    f'{NAME}; client_max_window_bits="10"': None,
    f"{NAME};server_max_window_bits=11;client_no_context_takeover": 9,
    f"  {NAME} ;\tserver_max_window_bits=9 ;  client_max_window_bits  ": 9,
    **{f"{NAME}; server_max_window_bits={bits}": 15 if bits == 15 else 9 for bits in range(9, 16)},
    # Several offers: the first that can be met.
    f"{NAME}; server_max_window_bits=10, {NAME}": 9,
    f"{NAME}, {NAME}; server_max_window_bits=10": None,
    f"{NAME}; server_max_window_bits=8, {NAME}; server_max_window_bits=9": 9,
    f"{NAME}; unheard_of, {NAME}; client_max_window_bits": None,
    f"{NAME}; unheard_of=1, {NAME}; mode=best; server_max_window_bits=9, {NAME}": None,
    # Other extensions, before and behind.
    f"x-webkit-deflate-frame, {NAME}; client_max_window_bits": None,
    f'bbf-usp-protocol; eid="x", {NAME}; server_max_window_bits=13, permessage-bzip2': 9,
    f", ,{NAME},": None,
}
NO_WINDOWS = ("", "0", "7", "16", "-9", "09", "+9", "9.0", "x", "\u0661\u0661", '""', '"9', '9"', "'9'")
SENSELESS = [  # parameters; section 7.1 names what may be in them, and how often
    "",
    "unheard_of",
    "server_max_window_bits=10; unheard_of",
    "Server_Max_Window_Bits=10",
    "server_max_window_bits",  # without a value
    "server_max_window_bits=8",  # legal, but zlib cannot
    *(f"server_max_window_bits={value}" for value in NO_WINDOWS),
    *(f"client_max_window_bits={value}" for value in NO_WINDOWS),
    "server_no_context_takeover=",
    "server_no_context_takeover=true",
    'client_no_context_takeover=""',
    "client_no_context_takeover=1",
    "server_max_window_bits=10; server_max_window_bits=10",
    "client_max_window_bits; client_max_window_bits=10",
    "server_no_context_takeover; server_no_context_takeover",
    "client_no_context_takeover; client_no_context_takeover",
]
OTHERS = ["", ",", ";", "x-webkit-deflate-frame", "permessage-bzip2; client_max_window_bits", "permessage-deflate-2"]
DECLINED = [*OTHERS, f'"{NAME}"', f"x{NAME}", *(f"{NAME}; {parameters}" for parameters in SENSELESS)]


@pytest.mark.parametrize("offers", ACCEPTED)
def test_an_offer_is_answered_with_what_it_asks_for(offers):
    """Neither side keeps a context, which a server may demand; who asks for a small window gets the smallest.

    A server may choose a smaller one than it was asked for (section 7.1.2.1): with two windows in all, a client that
    asks for an odd one does not cost another compression of each event.
    """
    bits = ACCEPTED[offers]
    assert accept_deflate(offers) == (ANSWER + (f"; server_max_window_bits={bits}" if bits else ""), bits or 15)


@pytest.mark.parametrize("offers", DECLINED)
def test_an_offer_that_cannot_be_met_is_declined(offers):
    """Section 7.1: what is unknown, wrong or doubled makes an offer one to decline, and the connection goes on."""
    assert accept_deflate(offers) == ("", 0)


CHOICE = st.booleans()
FACTORIES = st.builds(
    ClientPerMessageDeflateFactory,
    server_no_context_takeover=CHOICE,
    client_no_context_takeover=CHOICE,
    server_max_window_bits=st.none() | st.integers(9, 15),
    client_max_window_bits=st.none() | st.just(True) | st.integers(9, 15),
)


@given(st.lists(FACTORIES, min_size=1, max_size=3))
def test_another_implementation_accepts_our_answer(factories):
    """Whatever the `websockets` package can offer, it agrees to the answer, and to the same window."""
    offers = build_extension([(NAME, factory.get_request_params()) for factory in factories])
    answer, bits = accept_deflate(offers)
    [(name, parameters)] = parse_extension(answer)
    agreed = factories[0].process_response_params(parameters, [])
    assert (name, agreed.remote_max_window_bits) == (NAME, bits)
    assert agreed.remote_no_context_takeover and agreed.local_no_context_takeover


PARAMETERS = ("server_no_context_takeover", "server_max_window_bits", "client_max_window_bits")
WORDS = (NAME, f"{NAME}; server_max_window_bits=", *PARAMETERS, *',;="9', "15", " ")


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=2), max_size=12).map("".join))
def test_any_header_is_answered_or_declined(offers):
    """Nothing that stands in the header is an error, and an answer is always one of ours."""
    answer, bits = accept_deflate(offers)
    assert (answer, bits) == ("", 0) or (answer.startswith(ANSWER) and 9 <= bits <= 15)


# ---- Messages are compressed -------------------------------------------------------------------------------


def written(frame):
    """(first byte, payload) of a server's frame, read by the `websockets` package's rules of the header alone."""
    data = bytes((frame[0] & ~RSV1,)) + frame[1:]
    return frame[0], bytes(read_elsewhere(data, masked=False).data)


def far_apart(bits):
    """A text that repeats itself at a distance of just what a window of so many bits holds, but for zlib's reserve."""
    noise = NOISE.hex().encode()[: (1 << bits) - 300]
    return noise + noise


@pytest.mark.parametrize("bits", range(9, 16))
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_a_message_is_compressed_for_the_window_that_was_agreed_on(bits, opcode):
    """A decoder of just that window inflates it, and one message does not depend on another."""
    for text in (b"a" * 100_000, far_apart(bits), far_apart(15)):
        first, payload = written(encode_message(opcode, text, bits))
        assert first == 0x80 | RSV1 | opcode
        assert len(payload) < len(text)
        decoder = zlib.decompressobj(-bits)
        assert decoder.decompress(payload + TAIL) == text
        assert not payload.endswith(TAIL) and not decoder.eof


def test_a_window_too_large_is_noticed_by_these_tests():
    """zlib refuses what a larger window was used for: the test above can fail."""
    _, payload = written(encode_message(TEXT, far_apart(15), 15))
    with pytest.raises(zlib.error, match="distance"):
        zlib.decompressobj(-14).decompress(payload + TAIL)


@pytest.mark.parametrize("least", [0, 1, 100, 512])
def test_only_what_is_large_enough_is_compressed(least):
    """deflate_min_bytes is the smallest message that is compressed; smaller ones are sent as they are."""
    for size in {0, 50, max(0, least - 1), least, least + 1, 5000}:
        first, payload = written(encode_message(TEXT, b"a" * size, 15, least))
        small = size < least or size < 5
        assert (first, len(payload) == size) == (0x81 if small else 0xC1, small)


@given(st.binary(max_size=600), st.integers(9, 15))
def test_only_what_becomes_smaller_is_compressed(data, bits):
    """Noise is sent as it is: a compressed message is never longer than a plain one."""
    first, payload = written(encode_message(BINARY, data, bits))
    assert payload == data if first == 0x82 else len(payload) < len(data)


@pytest.mark.parametrize("size", [600, 70_000])
def test_what_does_not_compress_is_sent_as_it_is(size):
    """The frame is the one that a client without compression gets."""
    assert encode_message(BINARY, NOISE[:size], 15) == encode_frame(BINARY, NOISE[:size])


def test_a_client_that_did_not_agree_gets_plain_messages():
    """No window means no compression, whatever the message."""
    assert encode_message(TEXT, b"a" * 5000) == encode_frame(TEXT, b"a" * 5000)


@given(PAYLOADS, st.integers(9, 15))
def test_another_implementation_reads_what_we_compress(data, bits):
    """The `websockets` package inflates every message, with the window that it asked for."""
    extension = PerMessageDeflate(True, True, bits, 15)
    frame = read_elsewhere(encode_message(BINARY, data, bits), masked=False, extensions=[extension])
    assert (frame.opcode, bytes(frame.data), frame.fin) == (BINARY, data, True)


# ---- Over real sockets -------------------------------------------------------------------------------------

BIG = "to every client the same event, compressed once " * 200


class DeflatingClient(RawClient):
    """A client that asks for compression, and remembers which frames came compressed."""

    def __init__(self, url, target="/", offer=NAME, window=15):
        super().__init__(url, target, Sec_WebSocket_Extensions=offer)
        self.window, self.compressed = window, []

    def read_frame(self):
        first = self._take(1)[0]
        self._data[:0] = bytes((first & ~RSV1,))
        opcode, payload = super().read_frame()
        self.compressed.append(bool(first & RSV1))
        if self.compressed[-1]:
            payload = zlib.decompressobj(-self.window).decompress(payload + TAIL)
        return opcode, payload


@contextmanager
def connected(url, **compression):
    """The `websockets` package's client."""
    with websockets_connect(url, open_timeout=PATIENCE, close_timeout=PATIENCE, **compression) as client:
        yield client


def echo(conn, message):
    conn.send(message)


def agreed_window(client):
    """The bits of what the client agreed on for what we send."""
    [extension] = client.protocol.extensions
    assert extension.remote_no_context_takeover and extension.local_no_context_takeover
    return extension.remote_max_window_bits


OFFERS = {
    "as it comes": ({"compression": "deflate"}, 15),
    "as Firefox does": ({"extensions": [ClientPerMessageDeflateFactory(client_max_window_bits=None)]}, 15),
    "as Chrome does": ({"extensions": [ClientPerMessageDeflateFactory()]}, 15),
    "the smallest windows": ({"extensions": [ClientPerMessageDeflateFactory(False, False, 9, 9)]}, 9),
    "the largest windows": ({"extensions": [ClientPerMessageDeflateFactory(True, True, 15, 15)]}, 15),
}


@pytest.mark.parametrize("name", OFFERS)
def test_another_client_talks_with_us_compressed(name):
    """Greetings, echoes of text and bytes, whole and in fragments, small and large, and events arrive as sent."""
    settings, window = OFFERS[name]
    messages = ["small", "", BIG, BIG.encode(), NOISE[:20_000], [BIG, "", "in fragments"], [NOISE[:999], b"", b"x"]]
    with serving({"/": lambda conn: conn.send({"hello": BIG})}, {"/": echo}) as server:
        with connected(server.url, **settings) as client:
            assert agreed_window(client) == window
            assert json.loads(client.recv(PATIENCE)) == {"hello": BIG}
            for message in messages:
                client.send(message)
                whole = message[0][:0].join(message) if isinstance(message, list) else message
                assert client.recv(PATIENCE) == whole
            server.broadcast("news", BIG)
            assert json.loads(client.recv(PATIENCE))["payload"] == BIG


def test_clients_with_and_without_compression_get_the_same_event():
    """The text is the same to the byte; only the client that asked gets it compressed."""
    with serving() as server, DeflatingClient(server.url) as one, RawClient(server.url) as other:
        assert NAME in one.head and NAME not in other.head
        eventually(lambda: server.get_connection_count() == 2)
        server.broadcast("news", [BIG, "\N{EURO SIGN}"])
        text = one.recv()
        assert text == other.recv()
        assert json.loads(text)["payload"] == [BIG, "\N{EURO SIGN}"]
        assert one.compressed == [True]


def test_a_server_without_compression_declines():
    """deflate=False: clients that ask are served without it, and the bit is a violation."""
    with serving(callbacks={"/": echo}, deflate=False) as server:
        with connected(server.url, compression="deflate") as client:
            assert client.protocol.extensions == []
            client.send(BIG)
            assert client.recv(PATIENCE) == BIG
        with RawClient(server.url, Sec_WebSocket_Extensions=NAME) as client:
            assert "extensions" not in client.head.lower()
            client.socket.sendall(compressed_frame(HELLO))
            assert client.close_code() == 1002


WRONG = {
    "damaged": (b"\x07", 1007),
    "not UTF-8": (deflate(b"\xff"), 1007),
    "a bomb": (deflate(bytes(10_000_000)), 1009),
    "a byte too many": (deflate(bytes((1 << 16) + 1)), 1009),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_compressed_data_closes_its_connection_only(name):
    """The client is told the close code, and others are served."""
    payload, code = WRONG[name]
    with serving(callbacks={"/": echo}) as server:
        with DeflatingClient(server.url) as bad, DeflatingClient(server.url) as good:
            bad.socket.sendall(compressed_frame(payload))
            assert bad.close_code() == code
            assert bad.ended()
            good.socket.sendall(compressed_frame(deflate(BIG.encode())))
            assert good.recv() == BIG
            assert good.compressed == [True]


def test_an_answer_is_compressed_where_it_is_large_enough():
    """conn.send() goes by deflate_min_bytes, and by whether the client asked."""
    with serving(callbacks={"/": echo}, deflate_min_bytes=1000) as server, DeflatingClient(server.url) as client:
        for size in (999, 1000, 1001, 0):
            client.send("a" * size)
            assert client.recv() == "a" * size
        assert client.compressed == [False, True, True, False]


def test_small_and_large_events_keep_their_order(tmp_path):
    """What is sent as it is does not overtake what is compressed, nor the other way round, whoever sends it."""
    queue, count = str(tmp_path / "q"), 100
    events = [("e", [number, BIG if number % 2 else ""]) for number in range(count)]
    with serving(queue=queue) as server, DeflatingClient(server.url) as one, RawClient(server.url) as other:
        eventually(lambda: server.get_connection_count() == 2)
        for start in range(0, count, 10):
            assert queue_events(queue, events[start : start + 10])
        for client in (one, other):
            assert client.payloads(count) == [payload for _, payload in events]
        assert one.compressed == [False, True] * (count // 2)


# ---- Once for all ------------------------------------------------------------------------------------------


@pytest.fixture
def compressions(monkeypatch):
    """Begins to count when it is called, and returns the list that grows with each use of zlib's compressor."""
    made, compressobj = [], zlib.compressobj

    def counting(*args, **kw):
        made.append(args)
        return compressobj(*args, **kw)

    def count():
        monkeypatch.setattr(zlib, "compressobj", counting)
        return made

    return count


def small_window(url):
    return DeflatingClient(url, offer=f"{NAME}; server_max_window_bits=10", window=10)


@pytest.mark.parametrize(
    "kinds, payload, times",
    [
        ([DeflatingClient] * 20, BIG, 1),
        ([DeflatingClient, small_window] * 10, BIG, 2),
        ([DeflatingClient] * 19 + [RawClient], BIG, 1),
        ([RawClient] * 20, BIG, 0),
        ([DeflatingClient] * 20, "small", 0),
    ],
    ids=["one window", "two windows", "one without", "all without", "a small event"],
)
def test_an_event_is_compressed_once_for_each_window(compressions, kinds, payload, times):
    """However many clients there are, and not at all where nobody would get it."""
    with serving() as server, ExitStack() as stack:
        clients = [stack.enter_context(kind(server.url)) for kind in kinds]
        eventually(lambda: server.get_connection_count() == len(clients))
        made = compressions()
        server.broadcast("news", payload)
        assert [client.payloads(1) for client in clients] == [[payload]] * len(clients)
        assert len(made) == times


def test_events_for_nobody_are_not_compressed(compressions):
    """A topic that no client is on costs no compression."""
    with serving() as server, DeflatingClient(server.url, "/here") as client:
        eventually(lambda: server.get_connection_count() == 1)
        made = compressions()
        server.broadcast("news", BIG, to="/elsewhere")
        server.broadcast("news", "small")
        assert client.payloads(1) == ["small"]
        assert made == []
