#!/usr/bin/env python3
"""Gives wsqueue what hostile peers, careless producers and bad luck give it: valid input, mutated, by the million.

    python tests/fuzz.py                                 1,000,000 cases, each target with its share of them
    python tests/fuzz.py frames socket --cases 50000     so many cases, of these targets
    python tests/fuzz.py frames --seed 7 --only 4711     one case again: seed and number say all there is to a case

    request     HTTP heads into parse_request() and what looks at its result
    frames      frame streams into FrameParser, cut and read in four ways, and into another reader beside it
    close       close frames, there and back
    events      the bytes of event files into parse_events(), and into another reader beside it
    names       file names into name_stamp()
    directory   names, contents, links, pipes and crashes in a real directory that DirectoryQueue serves
    socket      handshakes and frame streams to a running server, over real sockets that end as they like

Each target makes valid input by itself, says what must come of it, and mutates most of it. A failure is printed with
its input as a Python literal, which can be looked at without the rest: fuzz.TARGETS["frames"].check(...). The last
lines are one for each target; the exit status is 1 if anything failed. Threads and descriptors are counted before and
after. Needs websocket-server from PyPI, and what tests/clients.py imports: websockets and websocket-client.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import faulthandler
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import shutil
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import zlib
from collections import deque
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple, Sequence
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import wsqueue
from clients import BINARY, CLOSE, KEY, MASK, PING, PONG, TEXT, RawClient, close_payload, frame_head, open_socket
from helpers import TIME_UNIT, eventually

CASES = 1_000_000
MOST_FAILURES = 10  # of one target: then there is enough to look at
PATIENCE = 60 * TIME_UNIT  # for one case; the largest take a tenth of a second
CONTINUATION = 0x0
KIB = 1024


class Finding(Exception):
    """Something that must hold does not."""


def expect(holds: Any, what: str, *values: Any) -> None:
    """The values are put into the text as logging does it: only if somebody will read it."""
    if not holds:
        raise Finding(what % values)


# ---- Chance ------------------------------------------------------------------------------------------------


class Dice(random.Random):
    """Random choices, by way of random() alone: randrange() and choice() are three times slower."""

    def below(self, limit: int) -> int:
        return int(self.random() * limit)

    def chance(self, share: float) -> bool:
        return self.random() < share

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.random() * len(options))]

    def blob(self, longest: int) -> bytes:
        size = self.below(longest + 1)
        return self.getrandbits(8 * size + 1).to_bytes(size + 1, "little")[:size]

    def span(self, data: bytes) -> tuple[int, int]:
        """Two places in the data, mostly close to each other."""
        start = self.below(len(data) + 1)
        return start, min(len(data), start + self.below(self.pick((2, 5, 20, 1000))))

    def cuts(self, scales: Sequence[int] = (4, 30, 400, 70_000)) -> list[int]:
        """Sizes of pieces, to be used over and over; now and then a piece of nothing."""
        sizes = [1 + self.below(self.pick(scales)) for _ in range(1 + self.below(4))]
        return [0, *sizes] if self.chance(0.1) else sizes


def dice_for(seed: int, target: str, number: int) -> Dice:
    """Each case has its own, so that it can be made without those before it."""
    return Dice(f"{seed} {target} {number}")


def pieces(data: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
    """The data in parts of these sizes, over and over."""
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(data):
            return
        yield data[start : start + size]
        start += size


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """The parts of the data between these places."""
    ordered = sorted(places)
    return [data[start:end] for start, end in zip([0, *ordered], [*ordered, len(data)])]


# ---- Mutations: of bytes, with values that are interesting to whoever reads them ---------------------------


def flip_a_bit(dice: Dice, data: bytes, values: Sequence[bytes]) -> bytes:
    place = dice.below(len(data))
    return data[:place] + bytes((data[place] ^ 1 << dice.below(8),)) + data[place + 1 :] if data else data


def cut_off(dice: Dice, data: bytes, values: Sequence[bytes]) -> bytes:
    return data[: dice.below(len(data) + 1)]


def leave_out(dice: Dice, data: bytes, values: Sequence[bytes]) -> bytes:
    start, end = dice.span(data)
    return data[:start] + data[end:]


def repeat(dice: Dice, data: bytes, values: Sequence[bytes]) -> bytes:
    start, end = dice.span(data)
    return data[:end] + data[start:end] * (1 + dice.below(3)) + data[end:]


def insert(dice: Dice, data: bytes, values: Sequence[bytes]) -> bytes:
    place = dice.below(len(data) + 1)
    return data[:place] + bytes(dice.pick(values)) + data[place:]


def overwrite(dice: Dice, data: bytes, values: Sequence[bytes]) -> bytes:
    place, value = dice.below(len(data) + 1), bytes(dice.pick(values))
    return data[:place] + value + data[place + len(value) :]


def scramble(dice: Dice, data: bytes, values: Sequence[bytes]) -> bytes:
    start, end = dice.span(data)
    return data[:start] + dice.blob(end - start) + data[end:]


MUTATIONS = (flip_a_bit, flip_a_bit, cut_off, leave_out, repeat, insert, insert, overwrite, scramble)


def mutated(dice: Dice, data: bytes, values: Sequence[bytes]) -> bytes:
    for _ in range(1 + dice.below(4)):
        data = dice.pick(MUTATIONS)(dice, data, values)
    return data


# ---- Targets -----------------------------------------------------------------------------------------------


class Target:
    """What is fuzzed.

    A case is a Python literal. make() may use chance but no state; check() raises for a failure, and may use what
    open() has made.
    """

    name: str
    weight: int  # its share of the cases, in thousandths
    batch = 64  # cases that check_all() gets at once
    current: Any = None  # what is being checked

    def open(self) -> None: ...
    def close(self) -> None: ...

    def make(self, dice: Dice) -> Any:
        raise NotImplementedError

    def check(self, case: Any) -> None:
        self.check_all([case])

    def check_all(self, cases: Iterable[Any]) -> None:
        for case in cases:
            self.current = case
            self.check(case)


# ---- request -----------------------------------------------------------------------------------------------

HTTP_VALUES = (
    b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"\r\n ", b"\r\n: x", b"\r\nHost:", b"%", b"%00",
    b"%zz", b"%2f%2e%2e", b"?", b"#", b"//", b"://", b"//[", b"[::1", b"]", b"*", b"@", b"&a=b", b";", b"=", b"\xff",
    b"\xc3\xa9", b"\xe2\x84\x80", "\N{FULLWIDTH SOLIDUS}".encode(), b"http://[", b"HTTP/1.0", b"HTTP/2",
    b" HTTP/1.1", b"POST ", b"\x16\x03\x01", b"\r\nOrigin: null", b"\r\nOrigin: http://[", b"\r\nOrigin: http://a:b",
    b"\r\nConnection: close", b"\r\nUpgrade: h2c", b"\r\nSec-WebSocket-Version: 8", b"\r\nSec-WebSocket-Key: x",
    b"\r\nContent-Length: 5", b"\r\nTransfer-Encoding: chunked", b"\r\nX: " + b"x" * 9000, b"&" * 2000, b"\r\na:" * 300,
    b"permessage-deflate; server_max_window_bits=7", b"9" * 400,
    b"\r\nSec-WebSocket-Extensions: permessage-deflate; client_max_window_bits=\"",
)
PATHS = ("/", "/echo", "/chat/room", "/%C3%A4%20b", "/a//b/../c", "/~x;v=1", "http://127.0.0.1:8081/absolute", "/?")
QUERIES = ("", "?a=b", "?a=b&c=&d", "?last_event_id=", "?q=%ff%00+%26", "?a=1&a=2")
HOSTS = ("127.0.0.1", "127.0.0.1:8081", "localhost:80", "example.com", "[::1]:8081", "EXAMPLE.com")
EXTRAS = (
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64)", "Cookie: a=b; c=\xe9", "Pragma: no-cache", "Accept-Encoding: br",
    "Sec-WebSocket-Protocol: chat, superchat", "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
    "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover, permessage-deflate", "X-Empty:",
    "Sec-WebSocket-Extensions: x-webkit-deflate-frame", "Accept-Language: de,en;q=0.5", "Cookie: second=1",
)
ALLOWED = ((), ("https://example.com", "https://shop.example"), ("*",))


def valid_head(dice: Dice, paths: Sequence[str] = PATHS) -> bytes:
    """A handshake as browsers, libraries and proxies write it: names in any case, any order, any spacing."""
    host = dice.pick(HOSTS)
    lines = [f"Host: {host}", "Upgrade: websocket", f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13",
             "Connection: " + dice.pick(("Upgrade", "keep-alive, Upgrade", "upgrade"))]
    if dice.chance(0.5):
        lines.append(f"Origin: {dice.pick(('http', 'https'))}://{host}")
    lines += [dice.pick(EXTRAS) for _ in range(dice.below(4))]
    if dice.chance(0.3):
        dice.shuffle(lines)
    if dice.chance(0.3):
        lines = [line.replace(": ", dice.pick((":", ":  \t", ": ")), 1) for line in lines]
    if dice.chance(0.2):
        lines = [line.partition(":")[0].upper() + "".join(line.partition(":")[1:]) for line in lines]
    return "\r\n".join((f"GET {dice.pick(paths)}{dice.pick(QUERIES)} HTTP/1.1", *lines)).encode("latin-1")


def admit(head: bytes, allowed: Sequence[str]) -> tuple[Any, str]:
    """The request and its key, as the module's own functions read them; raises the HandshakeError that they raise."""
    wsqueue.head_end(head + b"\r\n\r\n")
    request = wsqueue.parse_request(head)
    key: str = wsqueue.websocket_key(request)
    wsqueue.check_origin(request, allowed)
    return request, key


class RequestTarget(Target):
    name, weight = "request", 230

    def make(self, dice: Dice) -> tuple[bytes, tuple[str, ...], bool]:
        """(head, allowed origins, whether it must be let in)."""
        valid = dice.chance(0.15)
        head = valid_head(dice)
        return head if valid else mutated(dice, head, HTTP_VALUES), dice.pick(ALLOWED), valid

    def check(self, case: tuple[bytes, tuple[str, ...], bool]) -> None:
        head, allowed, valid = case
        try:
            self._check_request(wsqueue.parse_request(head))
            admit(head, allowed)  # after the other, because most is refused only here
        except wsqueue.HandshakeError as error:
            expect(not valid, "a valid request was refused: %s", error)
            self._check_refusal(error)

    def _check_request(self, request: Any) -> None:
        expect(request.path.startswith("/"), "the path is not absolute")
        for name, value in request.headers.items():
            expect(name == name.lower() and not set("\0\r\n") & set(name + value), "header %r: %r", name, value)
        answer, window = wsqueue.accept_deflate(request.headers.get("sec-websocket-extensions", ""))
        expect(re.fullmatch("[ -~]*", answer), "the extension's answer %r", answer)
        expect(window in (range(9, 16) if answer else (0,)), "a window of %s for %r", window, answer)

    def _check_refusal(self, error: Any) -> None:
        """It becomes the head of an answer, where a line break would be somebody else's header."""
        expect(re.fullmatch(r"[45]\d\d [ -~]+", error.status), "status %r", error.status)
        expect(all(map(str.isprintable, [*error.headers, *error.headers.values()])), "headers %r", error.headers)
        data = wsqueue.encode_response(error.status, str(error).encode(), **error.headers)
        expect(data.partition(b"\r\n\r\n")[2] == str(error).encode(), "the answer %r", data)


# ---- frames ------------------------------------------------------------------------------------------------

LANES = [bytes(byte ^ key for byte in range(256)) for key in MASK]
LIMITS = (0, 1, 125, 126, 1000, 1000, 65_535, 65_536, 1 << 17)
ROOMY = 1 << 17  # a limit that no valid stream exceeds
BAD_UTF8 = (
    b"\xff", b"\x80", b"\xe2\x82", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"ok\xf0\x9f\x98",
    b"\xf8\x88\x80\x80",
)
TEXTS = (
    b"", b"a", b"Hello", "\N{EURO SIGN}\N{GRINNING FACE}\0\N{COMBINING DIAERESIS}".encode(),
    b'{"event":"x","payload":[1]}', b"x" * 125, b"y" * 126, b"z" * 127, "\N{GREEK SMALL LETTER ALPHA}".encode() * 300,
)
LARGE = tuple((b"0123456789" * 7001)[:size] for size in (65_535, 65_536, 70_001))
FIRSTS = (
    0x00, 0x01, 0x02, 0x80, 0x81, 0x82, 0x88, 0x89, 0x8A, 0x08, 0x09, 0x83, 0x8B, 0xC1, 0xC2, 0x41, 0xC0, 0xC8, 0xA1,
    0xF1,
)
SIZES = (0, 1, 2, 124, 125, 126, 127, 128, 65_535, 65_536, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
CLOSE_CODES = (1000, 1001, 1002, 1003, 1007, 1011, 1014, 3000, 4999)
BAD_CLOSE_CODES = (0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65_535)


def masked(payload: bytes) -> bytes:
    """With MASK, which is as good as any; each lane by a table, 50 times faster than byte by byte."""
    data = bytearray(payload)
    for lane, table in enumerate(LANES):
        data[lane::4] = payload[lane::4].translate(table)
    return bytes(data)


def frame(first: int, payload: bytes, mask: bool = True, size: int | None = None, form: int | None = None) -> bytes:
    """A frame, which may lie about its size, and write it in the wrong form."""
    head: bytes = frame_head(first, len(payload) if size is None else size, mask, form)
    return head + MASK + masked(payload) if mask else head + payload


FRAME_VALUES = (
    *(frame_head(first, size) for first in (0x01, 0x82, 0x89) for size in SIZES),
    *(frame_head(0x82, size, form=form) for size in (0, 125, 126, 65_535) for form in (16, 64)),
    *(bytes((first, 0x80)) + MASK for first in FIRSTS),
    *(frame(0x88, struct.pack("!H", code)) for code in BAD_CLOSE_CODES),
    *map(masked, BAD_UTF8), bytes(4), MASK, b"\xff" * 4, b"\0\0\xff\xff",
    b"\x7d", b"\x7e", b"\x7f", b"\xfd", b"\xfe", b"\xff",
)


def deflated(dice: Dice, payload: bytes) -> bytes:
    """As RFC 7692, section 7.2.1, has it, at any level and with any strategy."""
    strategy = dice.pick((zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE))
    squeeze = zlib.compressobj(dice.pick((0, 1, 6, 9)), zlib.DEFLATED, -dice.pick((9, 12, 15)), 8, strategy)
    parts = cut(payload, [dice.below(len(payload) + 1)] if dice.chance(0.2) else [])
    return b"".join(squeeze.compress(part) + squeeze.flush(zlib.Z_SYNC_FLUSH) for part in parts)[:-4] or b"\0"


def finished(dice: Dice, payload: bytes) -> bytes:
    """The same in final blocks, which are legal, too (section 7.2.3.4)."""
    body = b""
    for part in cut(payload, [dice.below(len(payload) + 1) for _ in range(dice.below(3))]):
        squeeze = zlib.compressobj(6, zlib.DEFLATED, -15)
        body += squeeze.compress(part) + squeeze.flush()
    return body + b"\0"


@functools.lru_cache(maxsize=None)
def bomb(mebibytes: int) -> bytes:
    """So much zero in a thousandth of the space."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = bytes(KIB * KIB)
    return b"".join(squeeze.compress(zeros) for _ in range(mebibytes)) + squeeze.flush(zlib.Z_SYNC_FLUSH)[:-4]


FINAL_BLOCK = b"\x03\x00"  # an empty one
BAD_DEFLATE = (
    b"", b"\0", b"\x07", b"\xff\xff\xff\xff", b"\x00\x05\x00\xfa\xff", b"\x01\x01\x00\xfe\xff", b"\x02", b"\x03\x00",
    b"\x00\x00\x00\xff\xff", b"\x4b\x04\x22\x00\x00", b"\x4b\x4c\x04\x62\x00",
    b"\x05\xc0\x81\x00\x00\x00\x00\x00\x90\xff\x6b\x04\x00", FINAL_BLOCK * 3, FINAL_BLOCK * 100,
)


class Stream:
    """A stream of frames as a peer would send it, and what a parser must make of it, as long as all of it is valid."""

    def __init__(self, dice: Dice, *, mask: bool = True, deflate: bool = False) -> None:
        self._dice, self._mask, self._deflate = dice, mask, deflate
        self._frames: list[bytes] = []
        self.messages: list[Any] = []

    @property
    def data(self) -> bytes:
        return b"".join(self._frames)

    def add(self, first: int, payload: bytes, **lies: Any) -> None:
        self._frames.append(frame(first, payload, **{"mask": self._mask, **lies}))

    def message(self) -> None:
        dice = self._dice
        payload = dice.pick(LARGE) if dice.chance(0.01) else dice.pick(TEXTS) if dice.chance(0.7) else dice.blob(40)
        opcode = TEXT if payload in TEXTS and dice.chance(0.6) else BINARY
        if self._deflate and dice.chance(0.7):
            body = finished(dice, payload) if dice.chance(0.05) else deflated(dice, payload)
            self.fragments(opcode | 0x40, body)
        else:
            self.fragments(opcode, payload)
        self.messages.append((opcode, payload.decode() if opcode == TEXT else payload))

    def fragments(self, first: int, body: bytes) -> None:
        dice = self._dice
        count = dice.pick((0, 0, 1, 2, 3))
        parts = cut(body, [dice.below(len(body) + 1) for _ in range(count)])
        for number, part in enumerate(parts):
            if number and dice.chance(0.2):
                self.control()
            self.add((0 if number else first) | (0x80 if number == count else 0), part)

    def control(self) -> None:
        opcode, payload = self._dice.pick((PING, PONG)), self._dice.pick((b"", b"?", bytes(125)))
        self.add(opcode | 0x80, payload)
        self.messages.append((opcode, payload))

    def close(self) -> None:
        dice = self._dice
        code, reason = dice.pick(CLOSE_CODES), dice.pick(("", "bye", "\N{EURO SIGN}" * 41))
        self.add(CLOSE | 0x80, close_payload(code, reason))
        self.messages.append((CLOSE, (code, reason)))

    # What is not valid.

    def odd_frame(self) -> None:
        dice = self._dice
        size = dice.pick((None, *SIZES))
        form = dice.pick((None, 16, 64)) if (size or 0) < 126 else 64 if (size or 0) > 65_535 else dice.pick((16, 64))
        first = dice.pick(FIRSTS) if dice.chance(0.7) else dice.below(256)
        self.add(first, dice.blob(30), size=size, form=form, mask=self._mask ^ dice.chance(0.1))

    def bad_message(self) -> None:
        dice = self._dice
        payload = dice.pick(TEXTS)[: dice.below(10)] + dice.pick(BAD_UTF8) + dice.blob(2)
        if self._deflate and dice.chance(0.5):
            self.fragments(TEXT | 0x40, deflated(dice, payload))
        else:
            self.fragments(TEXT, payload)

    def bad_close(self) -> None:
        dice = self._dice
        code = struct.pack("!H", dice.pick(BAD_CLOSE_CODES + CLOSE_CODES))
        reason = dice.pick((b"", dice.pick(BAD_UTF8), bytes(124), dice.blob(9)))
        self.add(CLOSE | 0x80, code[:1] if dice.chance(0.1) else code + reason)

    def bad_deflate(self) -> None:
        dice = self._dice
        bad = dice.pick((*BAD_DEFLATE, bomb(4), bomb(16)))
        body = bad if dice.chance(0.2) else deflated(dice, dice.pick(TEXTS))
        body = mutated(dice, body, BAD_DEFLATE) if dice.chance(0.7) else body
        self.fragments(dice.pick((TEXT, BINARY)) | 0x40, body)

    def flood(self) -> None:
        """Much of nothing: what is kept for each frame, or for each message, adds up."""
        dice = self._dice
        firsts = dice.pick(((0x01, 0x00), (0x02, 0x00), (0x82,), (0x89,)))
        self._frames += [frame(first, b"", self._mask) for first in firsts]
        self._frames += self._frames[-1:] * (2000 + dice.below(4000))

    def valid(self) -> Stream:
        for _ in range(1 + self._dice.below(4)):
            self._dice.pick((self.message, self.message, self.control))()
        if self._dice.chance(0.2):
            self.close()
        return self

    def hostile(self) -> Stream:
        steps = [self.message, self.message, self.control, self.odd_frame, self.bad_message, self.bad_close, self.close]
        if self._deflate:
            steps += [self.bad_deflate] * 3
        for _ in range(1 + self._dice.below(4)):
            self._dice.pick(steps)()
        if self._dice.chance(0.0005):
            self.flood()
        return self


def is_text(data: bytes, whole: bool) -> bool:
    """Whether it is UTF-8, or may become so: one of these ends goes with whatever a character begins with."""
    for end in (b"",) if whole else (b"", b"\x80", b"\xbf", b"\x80" * 2, b"\xbf" * 2, b"\x80" * 3, b"\xbf" * 3):
        with contextlib.suppress(UnicodeDecodeError):
            (data + end).decode()
            return True
    return False


class Ended(Exception):
    """A stream is at its end, with one of these close codes, or (None) with what is still to come."""

    def __init__(self, *codes: int | None) -> None:
        super().__init__()
        self.codes = codes


class Reference:
    """Another reader of frames, in the words of RFC 6455 and RFC 7692: as slow as it likes, with all of the data."""

    def __init__(self, data: bytes, max_bytes: int, mask: bool, deflate: bool) -> None:
        self._stream, self._max_bytes, self._mask, self._deflate = io.BytesIO(data), max_bytes, mask, deflate
        self._first = 0  # byte of the message in hand; 0: there is none
        self._announced, self._body = 0, b""
        self._bloated = False
        self.messages: list[Any] = []
        self.codes: tuple[int | None, ...] = ()
        try:
            while True:
                self._read_frame()
        except Ended as end:
            self.codes = end.codes

    def agrees(self, messages: list[Any], code: int | None) -> bool:
        if self._bloated and code == 1009:  # what grows when it is compressed may be too big, or not
            return messages == self.messages[: len(messages)]
        return messages == self.messages and code in self.codes

    def _need(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) < count:
            raise Ended(None)
        return data

    def _read_frame(self) -> None:
        first, second = self._need(2)
        opcode = first & 0x0F
        self._check_start(first, opcode, second)
        size = self._read_size(second & 0x7F)
        if opcode in (TEXT, BINARY):
            self._first, self._announced, self._body = first, 0, b""
        if opcode < CLOSE:
            self._announce(size)
        key = self._need(4) if self._mask else bytes(4)
        payload = self._stream.read(size)
        whole, payload = len(payload) == size, bytes(map(operator.xor, payload, itertools.cycle(key)))
        if opcode < CLOSE:
            self._extend(payload, whole and first & 0x80 > 0)
        elif whole:
            self.messages.append((opcode, self._read_close(payload) if opcode == CLOSE else payload))
        if not whole:
            raise Ended(None)

    def _check_start(self, first: int, opcode: int, second: int) -> None:
        begins = opcode in (TEXT, BINARY)
        if (first & 0x30 or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG)
                or (first & 0x40 and not (self._deflate and begins))
                or (second >= 0x80) != self._mask
                or (opcode >= CLOSE and (first < 0x80 or second & 0x7F > 125))
                or (opcode == CONTINUATION and not self._first) or (begins and self._first)):
            raise Ended(1002)

    def _read_size(self, size: int) -> int:
        if size < 126:
            return size
        least, width = (126, 2) if size == 126 else (65_536, 8)
        size = int.from_bytes(self._need(width), "big")
        if not least <= size < 1 << 63:
            raise Ended(1002)
        return size

    def _announce(self, size: int) -> None:
        self._announced += size
        too_big = self._announced > self._max_bytes
        if too_big and not self._first & 0x40:
            raise Ended(1009)
        self._bloated = self._bloated or too_big

    def _extend(self, payload: bytes, last: bool) -> None:
        self._body += payload
        body = self._inflated(last) if self._first & 0x40 else self._body
        opcode, too_big = self._first & 0x0F, len(body) > self._max_bytes
        if opcode == TEXT and not is_text(body, whole=last and not too_big):
            raise Ended(1007, *[1009] * too_big)
        if too_big:
            raise Ended(1009)
        if last:
            self.messages.append((opcode, body.decode() if opcode == TEXT else body))
            self._first = 0

    def _inflated(self, last: bool) -> bytes:
        """A final block ends a stream of zlib's, of which a message may have some; and blocks must be whole."""
        rest, inflated = self._body, b""
        try:
            for _ in range(wsqueue.FINAL_BLOCKS):
                stream = zlib.decompressobj(-15)
                inflated += stream.decompress(rest, self._max_bytes + 1 - len(inflated))
                rest = stream.unused_data
                if not rest or len(inflated) > self._max_bytes:
                    break
            else:
                raise Ended(1008)
            if last and self._body and not stream.eof and len(inflated) <= self._max_bytes:
                more = stream.decompress(b"\0\0\xff\xff" + FINAL_BLOCK, 1)
                if more or not stream.eof or stream.unused_data not in (b"", FINAL_BLOCK):
                    raise Ended(1007)  # no block ends with what section 7.2.2 has us append
        except zlib.error:
            raise Ended(1007, 1009) from None
        return inflated

    def _read_close(self, payload: bytes) -> tuple[int, str]:
        if not payload:
            return 1005, ""
        code = int.from_bytes(payload[:2], "big")
        if len(payload) < 2 or code not in (1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)):
            raise Ended(1002)
        try:
            return code, payload[2:].decode()
        except UnicodeDecodeError:
            raise Ended(1007) from None


KINDS = {TEXT: str, BINARY: bytes, PING: bytes, PONG: bytes, CLOSE: tuple}


def run_parser(parser: Any, feeds: Iterable[bytes]) -> tuple[list[Any], int | None]:
    """([(opcode, payload), ...], the close code of the error that ended it, or None)."""
    messages: list[Any] = []
    for piece in feeds:
        iterator = parser.feed(piece)
        try:
            messages.extend(iterator)
        except wsqueue.ProtocolError as error:
            expect(next(iterator, None) is None, "a message after the error")
            return messages, error.code
    return messages, None


def run_haltingly(parser: Any, data: bytes) -> tuple[list[Any], int | None]:
    """The same, by a caller that stops at each message and asks for more of it later."""
    messages: list[Any] = []
    try:
        message = next(parser.feed(data), None)
        while message is not None:
            messages.append(message)
            message = next(parser.feed(b""), None)
    except wsqueue.ProtocolError as error:
        return messages, error.code
    return messages, None


def same_code(whole: int | None, other: int | None, deflate: bool) -> bool:
    """What stood before the fault is lost with it, if it is inflated together; alone, it may be at fault first."""
    return other == whole or (deflate and whole in (1007, 1008) and other in (1007, 1009))


class FramesTarget(Target):
    name, weight = "frames", 180
    PART = 300  # bytes of a stream that are fed one by one
    HELD = 8 * KIB  # beyond twice max_bytes, which is what a bytearray that has shrunk may keep
    WINDOW = 56 * KIB  # what zlib needs to inflate
    PEAK = 2 * KIB * KIB  # beyond the copies that it takes to unmask, join and decode a message

    def make(self, dice: Dice) -> tuple[Any, ...]:
        """(data, sizes of the pieces, max_bytes, masked, deflate, the messages or None if it is not valid)."""
        mask, deflate = dice.chance(0.9), dice.chance(0.5)
        stream = Stream(dice, mask=mask, deflate=deflate)
        if dice.chance(0.25):
            return stream.valid().data, dice.cuts(), ROOMY, mask, deflate, stream.messages
        data = stream.hostile().data
        data = mutated(dice, data, FRAME_VALUES) if dice.chance(0.6) else data
        return data, dice.cuts(), dice.pick(LIMITS), mask, deflate, None

    def check(self, case: tuple[Any, ...]) -> None:
        data, sizes, max_bytes, mask, deflate, messages = case
        options = {"masked": mask, "max_bytes": max_bytes, "deflate": deflate}
        whole = run_parser(wsqueue.FrameParser(**options), [data])
        expect(messages is None or whole == (messages, None), "of a valid stream came %r", whole)
        reference = Reference(data, max_bytes, mask, deflate)
        expect(reference.agrees(*whole), "%r, but should be %r, %s", whole, reference.messages, reference.codes)
        expect(all(type(payload) is KINDS[opcode] for opcode, payload in whole[0]), "of a wrong kind: %r", whole[0])
        for way, other in (
                ("in pieces", run_parser(wsqueue.FrameParser(**options), pieces(data, sizes))),
                ("byte by byte", run_parser(wsqueue.FrameParser(**options), self._bytes(data))),
                ("haltingly", run_haltingly(wsqueue.FrameParser(**options), data))):
            same = other[0] == whole[0] and same_code(whole[1], other[1], deflate)
            expect(same, "at once %r, %s %r", whole, way, other)
        if len(data) > 3000 or zlib.crc32(data) % 16 == 0:
            feeds = list(pieces(data, [64 * KIB]))
            self._check_memory(wsqueue.FrameParser(**options), feeds, max_bytes, self.HELD + deflate * self.WINDOW)

    def _bytes(self, data: bytes) -> Iterator[bytes]:
        return itertools.chain(pieces(data[: self.PART], [1]), (data[self.PART :],) if len(data) > self.PART else ())

    def _check_memory(self, parser: Any, feeds: list[bytes], max_bytes: int, more: int) -> None:
        tracemalloc.start()
        try:
            for piece in feeds:
                ended = not self._drain(parser, piece)
                held, peak = tracemalloc.get_traced_memory()
                expect(peak < 16 * max_bytes + self.PEAK, "%d bytes used, with max_bytes=%d", peak, max_bytes)
                if ended:  # then it is given up with all it holds
                    break
                expect(held < 2 * max_bytes + more, "%d bytes held, with max_bytes=%d", held, max_bytes)
        finally:
            tracemalloc.stop()

    def _drain(self, parser: Any, piece: bytes) -> bool:
        try:
            deque(parser.feed(piece), maxlen=0)
        except wsqueue.ProtocolError:
            return False
        return True


# ---- close -------------------------------------------------------------------------------------------------


class CloseTarget(Target):
    name, weight = "close", 100
    ALPHABET = "az09 \0\n\x7f\N{EURO SIGN}\N{GRINNING FACE}\N{GREEK SMALL LETTER ALPHA}\N{COMBINING DIAERESIS}\uffff"

    def make(self, dice: Dice) -> tuple[Any, ...]:
        """(code, reason) to be written and read, or (payload,) to be read and, if that works, written."""
        if dice.chance(0.5):
            code = dice.pick((1005, *CLOSE_CODES, 3000 + dice.below(2000)))
            return code, "".join(dice.pick(self.ALPHABET) for _ in range(dice.pick((0, 1, 10, 40, 125, 200))))
        code = dice.pick((*CLOSE_CODES, *BAD_CLOSE_CODES, dice.below(65_536)))
        payload = close_payload(code, dice.pick(("", "bye", "\N{EURO SIGN}" * 41)))
        return (mutated(dice, payload, BAD_UTF8)[:125] if dice.chance(0.7) else payload,)

    def check(self, case: tuple[Any, ...]) -> None:
        if len(case) == 2:
            self._check_writing(*case)
        else:
            self._check_reading(*case)

    def _check_writing(self, code: int, reason: str) -> None:
        data = wsqueue.encode_close(code, reason)
        expect(data[0] == 0x88 and data[1] == len(data) - 2 <= 125, "not a close frame: %r", data)
        read_code, read_reason = wsqueue.decode_close(data[2:])
        expect(read_code == code, "code %s became %s", code, read_code)
        if code == 1005:  # never on the wire, and nothing can stand behind it
            expect(len(data) == 2, "1005 is written as %r", data)
            return
        kept, whole = len(read_reason.encode()), len(reason.encode())
        fits = kept == whole or 119 < kept <= 123
        expect(reason.startswith(read_reason) and fits, "%r became %r", reason, read_reason)

    def _check_reading(self, payload: bytes) -> None:
        try:
            code, reason = wsqueue.decode_close(payload)
        except wsqueue.ProtocolError as error:
            expect(error.code in (1002, 1007), "close code %s", error.code)
            return
        again = wsqueue.encode_close(code, reason)
        expect(again[2:] == payload, "%r became %r", payload, again)


# ---- events ------------------------------------------------------------------------------------------------

JSON_VALUES = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u", b"\\ud800", b"\\udc00\\ud800", b"null", b"true", b"NaN",
    b"Infinity", b"-Infinity", b"1e400", b"-0", b"01", b"1.", b".5", b"1e5", b"9" * 400, b"9" * 5000, b"---", b"\0",
    b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\x80", b"//", b"/**/", b"'", b"\n", b"\x0b",
    b'"event":', b'"event":"",', b'"event":1,', b'"to":[],', b'"to":"",', b'"to":[1],', b'"to":{},', b'"queued_at":[],',
    b'"timestamp":true,', b'"timestamp":"1",', b'"timestamp":1e308,', b'"timestamp":123456789012345678901234567890,',
    b'{"event":"x"}', b'[{"event":"x"}]', b"[" * 100, b'{"a":' * 100, b"]" * 100, b"[" * 5000, b'{"":' * 5000,
)
SCALARS = (
    None, True, False, 0, -1, 42, 10**25, 0.1, -1e-300, 1e300, "", "x", "\0\x7f\u2028", "\N{GRINNING FACE}",
    'a"b\\c', "x" * 300,
)
JUNK: tuple[Any, ...] = (*SCALARS, [], {}, [""], ["/a", 1], ["/a", None], [[]], {"/a": 1}, 1e308, -(10**400))
STAMP = 1500000000.25


def some_json(dice: Dice, depth: int = 3) -> Any:
    kind = dice.below(6) if depth else 0
    if kind == 4:
        return [some_json(dice, depth - 1) for _ in range(dice.below(4))]
    if kind == 5:
        keys = [dice.pick(("a", "", "event", "\N{EURO SIGN}")) for _ in range(dice.below(4))]
        return {key: some_json(dice, depth - 1) for key in keys}
    return dice.pick(SCALARS)


def some_record(dice: Dice) -> dict[str, Any]:
    record = {
        "event": dice.pick(("x", "order_paid", "\N{EURO SIGN}\0", "e" * 200)),
        "payload": some_json(dice),
        "timestamp": dice.pick((None, 0, -5, 1763890123, 1763890123.75, 10**30)),
        "queued_at": dice.pick((None, 1.5, 7)),
        "to": dice.pick((None, "/chat", ["/a", "user:1"])),
        "more": dice.pick(SCALARS),
    }
    keys = [key for key in record if key == "event" or dice.chance(0.6)]
    return {key: record[key] for key in keys}


def event_file(dice: Dice, junk: bool = False) -> bytes:
    """A valid one, as any JSON library may have written it; or one with something where something else belongs."""
    records = [some_record(dice) for _ in range(dice.below(4) if dice.chance(0.3) else 1)]
    if junk and records:
        dice.pick(records)[dice.pick(("event", "to", "timestamp", "queued_at"))] = dice.pick(JUNK)
    value: Any = records[0] if len(records) == 1 and dice.chance(0.9) else records
    indent, separators = dice.pick(((None, None), (None, (",", ":")), (1, None)))
    text = json.dumps(value, ensure_ascii=dice.chance(0.5), indent=indent, separators=separators)
    before: bytes = dice.pick((b"", b"", b" \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\t"))
    return bytes(before + text.encode() + dice.pick((b"", b"\n", b"\r\n ")))


def refuse(constant: str) -> None:
    raise ValueError(constant)


def messages_in(data: bytes) -> list[Any] | None:
    """[(what clients must get, who must get it), ...] by another reading of a file; None if it holds no events."""
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=refuse)
        return [message_of(record) for record in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return None


def message_of(record: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    record = record if isinstance(record, dict) else {}
    name, topics, timestamp = record.get("event"), record.get("to"), record.get("timestamp")
    topics = [] if topics is None else topics if isinstance(topics, list) and topics else [topics]
    if not all(isinstance(text, str) and text for text in (name, *topics)):
        raise ValueError
    if not all(value is None or type(value) is int or (type(value) is float and math.isfinite(value))
               for value in (timestamp, record.get("queued_at"))):
        raise ValueError
    json.dumps(record.get("payload"), allow_nan=False)
    timestamp = int(STAMP if timestamp is None else timestamp)
    return {"event": name, "payload": record.get("payload"), "timestamp": timestamp}, tuple(topics)


def nested(dice: Dice) -> bytes:
    """As deep as Python can just read, or just not write."""
    depth: int = dice.pick((50, 5000, *[900 + dice.below(110)] * 4))
    return b'{"event":"x","payload":' + b"[" * depth + b"]" * depth + b"}"


class EventsTarget(Target):
    name, weight = "events", 180

    def make(self, dice: Dice) -> tuple[bytes, list[float], bool]:
        """(data, where to cut it, as shares of its length, whether it must be understood)."""
        valid = dice.chance(0.25)
        data, places = event_file(dice, junk=not valid and dice.chance(0.3)), [dice.random() for _ in range(4)]
        if valid or dice.chance(0.3):
            return data, places, valid
        return nested(dice) if dice.chance(0.02) else mutated(dice, data, JSON_VALUES), places, valid

    def check(self, case: tuple[bytes, list[float], bool]) -> None:
        data, places, valid = case
        wanted = messages_in(data)
        expect(not valid or wanted is not None, "the generator makes no valid files")
        try:
            events = wsqueue.parse_events(data, "id", STAMP)
        except wsqueue.EventError as error:
            expect(wanted is None or data.count(b"[") > 500, "a valid file was refused: %s", error)
            return
        expect(all(type(event.text) is bytes for event in events), "text that is not bytes")
        found = [(json.loads(event.text), event.to) for event in events]
        expect(found == wanted, "clients get %r", found)
        self._check_prefixes(data.rstrip(b" \t\r\n"), places)

    def _check_prefixes(self, data: bytes, places: list[float]) -> None:
        """Whoever reads a file while it is written must not take a part for the whole, nor give it up."""
        for end in range(len(data)) if len(data) < 20 else [int(place * len(data)) for place in places]:
            try:
                wsqueue.parse_events(data[:end], "id", STAMP)
            except wsqueue.UnfinishedError:
                continue
            raise Finding(f"the first {end} bytes are understood")


# ---- names -------------------------------------------------------------------------------------------------

NAME_VALUES = (
    b"_", b".", b"-", b"+", b"e9", b"_6922d3cb6f7fc", b"_ffffffffffffff", b"0", b"1763890123", b"9" * 100, b"9" * 245,
    b"1e400", b"0x", b"\xff", b"\xed\xa0\x80", "\N{ARABIC-INDIC DIGIT THREE}".encode() * 5,
    "\N{SUPERSCRIPT TWO}".encode(), "\N{FULLWIDTH DIGIT ONE}".encode(), b"\n", b" ", b"*", b"~", b".json", b".tmp",
    b".reason", b"x" * 240, b"\xc3\xa9" * 120, b"..", b"NaN", b"inf",
)
NAMES = (
    b"1763890123.4567_6922d3cb6f7fc1a2f0001.json", b"1763890123.4567_6922d3cb6f7fc.json",
    b"1763890123_6922d3cb6f7fc.json", b"1763890123.json", b"1763890123456.json", b"1763890123456789012-17.json",
    b"a.json", b"0.json", b"note.txt", b".1763890123_x.json.tmp", b".hidden.json", b"x.json.reason",
    "\N{EURO SIGN}.json".encode(), b"\xff\xfe.json", b"failed.json", b".json", b"..json", b"-.json",
)
LONGEST_NAME = 255  # NAME_MAX of every common file system


def some_name(dice: Dice) -> bytes:
    """A valid file name: no slash, no NUL, not too long."""
    name = mutated(dice, dice.pick(NAMES), NAME_VALUES)
    if dice.chance(0.3):
        name += b".json"
    name = name.replace(b"/", b"_").replace(b"\0", b"_")
    name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 5] + name[-5:]
    return b"x.json" if name in (b"", b".", b"..") else name


def without_time(event: Any) -> Any:
    """An event as it would be if its file had no mtime: names without uniqid() carry it in their ids."""
    return event._replace(source=None, id=re.sub(r"~[0-9a-f]+(?=:|$)", "", event.id))


class NamesTarget(Target):
    name, weight = "names", 220

    def make(self, dice: Dice) -> str:
        return os.fsdecode(some_name(dice))

    def check(self, case: str) -> None:
        stamp = wsqueue.name_stamp(case)
        expect(stamp is None or type(stamp) is int, "the stamp is %r", stamp)


# ---- Logs --------------------------------------------------------------------------------------------------


class Log(logging.Handler):
    """What is logged, and to nobody else: formatted, because a wrong format string is found in no other way."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.errors: list[str] = []
        self._logger = logging.getLogger("wsqueue")
        self._before = self._logger.level, self._logger.propagate

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.ERROR:
            self.errors.append(text)

    def open(self) -> None:
        self._logger.addHandler(self)
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False

    def close(self) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._before[0])
        self._logger.propagate = self._before[1]
        super().close()


# ---- directory ---------------------------------------------------------------------------------------------

TICK = 0.125  # exact in binary
LARGEST_FILE = 2000
SETTLING = (TICK, TICK, TICK, 1.0, 1.0, 1.0, TICK)  # an unfinished file is waited for 2 s; then, those behind it


class Folder:
    """A queue directory with a server that has its own time, and what producers have done to it so far."""

    def __init__(self, path: str, wakeup: bool) -> None:
        self.path, self._wakeup = path, wakeup
        self.passed = 0.0
        self._files: dict[str, bytes] = {}  # regular files: name -> what is in it
        self._stamps: dict[str, set[int]] = {}  # that they have, or had when the queue may have looked
        self._inodes: dict[str, int] = {}  # of everything
        self._lasting: dict[int, str] = {}  # inode -> name of what had its name before and must be somewhere, too
        self._sent: set[str] = set()
        self.queue = self._opened()

    def _opened(self) -> Any:
        queue = wsqueue.DirectoryQueue(self.path, poll_interval=TICK, wakeup=self._wakeup, max_event_bytes=LARGEST_FILE,
                                       clock=self._clock, monotonic=lambda: 1000.0 + self.passed)
        queue.open()
        return queue

    def _clock(self) -> float:
        return 1763890123.0 + self.passed

    # The steps of a case.

    def file(self, name: str, data: bytes, age: float) -> None:
        try:
            open(f"{self.path}/{name}", "xb").close()
        except OSError:  # it is there, or no name for this file system
            return
        self._enter(name)
        self._files[name] = b""
        self._write(name, data, age)

    def _enter(self, name: str) -> None:
        """Something new has this name."""
        if name in self._inodes and self._count_events(name) is None:
            self._lasting[self._inodes[name]] = name
        self._files.pop(name, None)
        self._stamps[name] = set()
        self._inodes[name] = os.lstat(f"{self.path}/{name}").st_ino
        self._sent.discard(name)

    def _write(self, name: str, data: bytes, age: float = 0.0) -> None:
        path, time_of_day = f"{self.path}/{name}", self._clock() - age
        with open(path, "ab") as file:
            file.write(data)
        os.utime(path, (time_of_day, time_of_day))
        stamp: int | None = wsqueue.name_stamp(name)
        self._stamps[name].add(os.lstat(path).st_mtime_ns // 1000 if stamp is None else stamp)
        self._files[name] += data

    def append(self, number: int, data: bytes) -> None:
        """A producer goes on writing, if its file is still there."""
        here = sorted(self._present())
        if here:
            self._write(here[number % len(here)], data)

    def other(self, name: str, kind: str, target: str) -> None:
        make = {"link": lambda path: os.symlink(target, path), "directory": os.mkdir, "pipe": os.mkfifo,
                "socket": lambda path: os.mknod(path, 0o600 | stat.S_IFSOCK)}[kind]
        try:
            make(f"{self.path}/{name}")
        except OSError:
            return
        self._enter(name)

    def unlock(self) -> None:
        """Somebody tidies up."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.path}/.wsqueue.lock")

    def crash(self) -> None:
        """The server ends between sending and removing, and another one begins."""
        self._take(LARGEST_FILE)
        self.queue.close()
        self.queue = self._opened()

    def turn(self, seconds: float, max_bytes: int) -> None:
        self.queue.done(self._take(max_bytes))
        self.queue.wait(0.0)
        self.passed += seconds

    def slowly(self, name: str, data: bytes, place: float, seconds: float) -> None:
        """A producer takes its time, but not too much of it."""
        part = int(place * len(data.rstrip(b" \r\n")))
        self.file(name, data[:part], 0.0)
        if self._files.get(name) == data[:part]:  # else the name is taken
            self.turn(seconds, LARGEST_FILE)
            self.turn(TICK, LARGEST_FILE)
            expect(os.path.lexists(f"{self.path}/{name}"), "%r was given up", name)
            self._write(name, data[part:])

    def replace(self, data: bytes) -> None:
        """A producer replaces a file that is just being sent."""
        before, self._sent = self._sent, set()
        events = self._take(LARGEST_FILE)
        name = min(self._sent, default="")
        self._sent |= before
        if name:
            with open(f"{self.path}/.new", "wb") as file:
                file.write(data)
            os.replace(f"{self.path}/.new", f"{self.path}/{name}")
            self._enter(name)
            self._files[name] = data
            self._write(name, b"")
        self.queue.done(events)

    def _present(self) -> set[str]:
        return {name for name in self._files if os.path.lexists(f"{self.path}/{name}")}

    # What must hold.

    def _take(self, max_bytes: int) -> list[Any]:
        events: list[Any] = self.queue.take(max_bytes)
        rest, last = [without_time(event) for event in events], (-1 << 63, "")
        files = self._contents() if events else {}
        while rest:
            owners = [owner for owner, held in files.items() if held and rest[: len(held)] == held]
            expect(owners, "not what a file holds: %r", rest)
            expect(max(owners) > last, "out of order: %r after %r", owners, last)
            last = min(owner for owner in owners if owner > last)
            rest = rest[len(files[last]) :]
            self._sent.add(last[1])
        return events

    def _contents(self) -> dict[tuple[int, str], list[Any]]:
        """(stamp, name) -> the events that are to be sent under this stamp."""
        owners = [(stamp, name) for name in self._files if is_ready(name) for stamp in self._stamps[name]]
        return {owner: self._events_of(*owner) for owner in owners}

    def _events_of(self, stamp: int, name: str) -> list[Any]:
        try:
            stem = quote(os.fsencode(name[:-5]), safe="")
            return [without_time(event) for event in wsqueue.parse_events(self._files[name], stem, stamp / 1e6)]
        except wsqueue.EventError:
            return []

    def settle(self) -> None:
        """Let time pass until nothing changes any more, and look at what has become of everything."""
        for seconds in SETTLING:
            self.turn(seconds, LARGEST_FILE)
        here, failed = self._entries(""), self._entries("/failed")
        for name, inode in self._inodes.items():
            count = self._count_events(name)
            expect(name in self._sent or not count, "%r was not sent", name)
            expect(name not in here or count is None, "%r was sent and is still there", name)
            expect(inode in (*here.values(), *failed.values()) or count is not None, "%r is lost", name)
        lost = set(self._lasting) - {*here.values(), *failed.values(), *self._inodes.values()}
        expect(not lost, "lost of those whose names were taken again: %s", [self._lasting[inode] for inode in lost])
        waiting, rejected = sum(map(is_ready, here)), sum(not name.endswith(".reason") for name in failed)
        backlog = self.queue.backlog()
        expect((backlog.waiting, backlog.failed) == (waiting, rejected), "%s of %s and %s", backlog, waiting, rejected)

    def _entries(self, where: str) -> dict[str, int]:
        try:
            return {entry.name: entry.inode() for entry in os.scandir(self.path + where)}
        except OSError:
            return {}

    def _count_events(self, name: str) -> int | None:
        """None: it is no event file, and must never be taken for one."""
        data = self._files.get(name)
        if data is None or not is_ready(name) or len(data) > LARGEST_FILE:
            return None
        try:
            return len(wsqueue.parse_events(data, "", 0.0))
        except wsqueue.EventError:
            return None


def is_ready(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(".")


class DirectoryTarget(Target):
    name, weight = "directory", 35
    KINDS = ("link", "pipe", "socket", "directory")
    LINKS = (".", "/dev/null", "nowhere", "x.json", "failed", "/proc/self/mem")

    def open(self) -> None:
        self._log = Log()
        self._log.open()
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # ten times as many cases as on a disk
        self._base = tempfile.mkdtemp(prefix="wsqueue-fuzz-", dir=os.environ.get("TMPDIR", memory))
        self._numbers = itertools.count()

    def close(self) -> None:
        self._log.close()
        shutil.rmtree(self._base)

    def make(self, dice: Dice) -> tuple[bool, list[tuple[Any, ...]]]:
        """(whether the kernel wakes the queue, steps: the name of one of Folder's methods, and its arguments)."""
        wakeup = dice.chance(0.02)  # the kernel takes ten milliseconds to end it
        return wakeup, [self._step(dice) for _ in range(3 + dice.below(8))]

    def _step(self, dice: Dice) -> tuple[Any, ...]:
        name = os.fsdecode(some_name(dice))
        if dice.chance(0.2):  # the same one again
            name = dice.pick(("failed", "history", *["x.json", "1763890123.json"] * 4))
        kind = dice.random()
        if kind < 0.05:
            return "slowly", name, event_file(dice), dice.random(), dice.pick((0.0, TICK, 1.0, 1.5))
        if kind < 0.1:
            return "replace", self._content(dice)
        if kind < 0.6:
            return "file", name, self._content(dice), dice.pick((0.0, 1.0, 100.0, -5.0))
        if kind < 0.7:
            return "other", name, dice.pick(self.KINDS), dice.pick(self.LINKS)
        if kind < 0.8:
            more = (b"}", b"]", b'"x"}', b" ", b"\0", b"x" * 2000, event_file(dice))
            return "append", dice.below(10), dice.pick(more)
        if kind < 0.95:
            return "turn", dice.pick((0.0, TICK, TICK, 1.0, 3.0)), dice.pick((1, 100, LARGEST_FILE))
        return (dice.pick(("crash", "unlock")),)

    def _content(self, dice: Dice) -> bytes:
        data = event_file(dice)
        others = mutated(dice, data, JSON_VALUES), data[: dice.below(len(data))], data + b" " * LARGEST_FILE
        return bytes(dice.pick((*others, *[data] * 5)))

    def check(self, case: tuple[bool, list[tuple[Any, ...]]]) -> None:
        path, before = f"{self._base}/{next(self._numbers)}", descriptors()
        os.mkdir(path)
        folder = Folder(path, case[0])
        try:
            for step, *arguments in case[1]:
                getattr(folder, step)(*arguments)
            folder.settle()
        finally:
            folder.queue.close()
            shutil.rmtree(path)
        expect(descriptors() == before, "%s descriptors have become %s", before, descriptors())


# ---- socket ------------------------------------------------------------------------------------------------

MESSAGE_BYTES = 4 * KIB
PATIENCE_OF_CLIENTS = 10 * TIME_UNIT
LINGER_SECONDS = 0.9  # the server drops who breaks the rules after a second; who sends on then may lose the answer
ROUTES = ("/", "/echo", "/echo", "/keep", "/leave", "/healthz")
PAGES = (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /metrics HTTP/1.0\r\n\r\n")


def accept_of(key: str) -> bytes:
    """RFC 6455, section 4.2.2, number 5.4."""
    return base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest())


class Promise(NamedTuple):
    """What a server must make of what a client sent."""

    path: str | None  # None: it is not let in
    accept: bytes
    deflate: bool
    messages: list[Any]
    code: int | None  # of the close frame that it is to send, unless the stream ends before

    @property
    def server_ends(self) -> bool:
        return self.code is not None


NOTHING = Promise(None, b"", False, [], None)


def promise(data: bytes, answer: bytes = b"") -> Promise:
    """By the module's own functions, each of which is a target of its own. The answer says what was agreed upon."""
    head, blank, rest = data.partition(b"\r\n\r\n")
    try:
        request, key = admit(head, ())
    except wsqueue.HandshakeError:
        return NOTHING
    if not blank or len(head) > wsqueue.HEAD_BYTES:
        return NOTHING
    deflate = b"permessage-deflate" in answer.lower()
    messages, code = run_parser(wsqueue.FrameParser(masked=True, max_bytes=MESSAGE_BYTES, deflate=deflate), [rest])
    closes = [place for place, (opcode, _) in enumerate(messages) if opcode == CLOSE]
    if closes:  # what follows a close frame is nobody's business
        messages, code = messages[: closes[0]], messages[closes[0]][1][0]
    return Promise(request.path, accept_of(key), deflate, messages, code)


def read_frames(data: bytes) -> list[Any]:
    """(opcode, payload) of a server's frames, which must be whole, unmasked and not in fragments."""
    stream, found = io.BytesIO(data), []
    while stream.tell() < len(data):
        first, size = stream.read(1)[0], stream.read(1)[0]
        size = int.from_bytes(stream.read(2 if size == 126 else 8), "big") if size in (126, 127) else size
        payload = stream.read(size)
        expect(first & 0x80 and not first & 0x30 and len(payload) == size, "not a frame of a server: %r", data)
        if first & 0x40:
            payload = zlib.decompressobj(-15).decompress(payload + b"\0\0\xff\xff")
        opcode = first & 0x0F
        found.append((opcode, payload.decode() if opcode == TEXT else payload))
    return found


class Caller:
    """A client that sends what its case says, in pieces, and ends as its case says."""

    def __init__(self, url: str, case: tuple[bytes, list[int], str]) -> None:
        self.data, sizes, self.ending = case
        self.answer = b""
        self.error: OSError | None = None
        self._pieces = pieces(self.data, sizes)
        self._started = self._sent = time.monotonic()
        self._deadline = self._started + PATIENCE_OF_CLIENTS
        self._socket = open_socket(url)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def step(self) -> bool:
        """Send a piece; whether there may be more."""
        piece = next(self._pieces, None)
        try:
            self._socket.sendall(piece or b"")
        except OSError:  # the server has had enough
            return False
        self._sent = time.monotonic()
        return piece is not None

    def end(self) -> None:
        if self.ending == "reset":
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif self.ending == "orderly":
            self._read_to_end()
        self._socket.close()

    def _read_to_end(self) -> None:
        """Who waits for the other to end depends on what was sent, and on what was agreed upon."""
        try:
            if promise(self.data).path is not None:
                self._read(until=b"\r\n\r\n")
            if not promise(self.data, self.answer).server_ends:
                self._socket.shutdown(socket.SHUT_WR)
            self._read()
        except OSError as error:
            self.error = error

    def _read(self, until: bytes | None = None) -> None:
        while until is None or until not in self.answer:
            self._socket.settimeout(max(0.01, self._deadline - time.monotonic()))
            data = self._socket.recv(64 * KIB)
            if not data:
                return
            self.answer += data

    def judge(self) -> None:
        """Whether the server did what it must; nobody can tell if this machine was too slow to say all in time."""
        expect(not isinstance(self.error, socket.timeout), "the server neither answers nor ends")
        if self.ending != "orderly" or self._sent - self._started > LINGER_SECONDS:
            return
        expect(self.error is None, "the stream ended with %r after %r", self.error, self.answer)
        promised = promise(self.data, self.answer)
        if promised.path is None:
            expect(re.match(rb"\Z|HTTP/1\.1 (?!101)\d{3} [ -~]+\r\n", self.answer), "answer %r", self.answer)
            return
        head, _, rest = self.answer.partition(b"\r\n\r\n")
        expect(head.startswith(b"HTTP/1.1 101 ") and promised.accept in head, "answer %r", self.answer)
        self._judge_frames(read_frames(rest), promised)

    def _judge_frames(self, frames: list[Any], promised: Promise) -> None:
        frames = [m for m in frames if not str(m[1]).startswith('{"event":"wsqueue.')]  # it asked to resume
        # A frame of a client has six bytes at least; fragments count among those that nobody has to bear.
        flood = (CLOSE, struct.pack("!H", wsqueue.POLICY_VIOLATION)) in [(op, text[:2]) for op, text in frames]
        if promised.path == "/leave" or (flood and len(self.data) > 6 * wsqueue.IDLE_FRAMES):
            return  # its handler may be faster than the client, or slower
        pongs = [(PING, payload) for opcode, payload in frames if opcode == PONG]
        expect(pongs == [m for m in promised.messages if m[0] == PING], "pongs %r", pongs)
        echoes = [m for m in frames if m[0] in (TEXT, BINARY) and not str(m[1]).startswith('{"event":"fuzz"')]
        wanted = [m for m in promised.messages if m[0] in (TEXT, BINARY)] if promised.path in ("/echo", "/keep") else []
        complete = promised.server_ends and promised.path == "/echo"  # callbacks are waited for, handlers are not
        expect(echoes == (wanted if complete else wanted[: len(echoes)]), "echoes %r of %r", echoes, wanted)
        closes = [payload for opcode, payload in frames if opcode == CLOSE]
        codes = [int.from_bytes(payload[:2], "big") if payload else 1005 for payload in closes]
        wanted_codes = [promised.code] * promised.server_ends
        fits = len(codes) == len(wanted_codes) and all(map(same_code, wanted_codes, codes, [promised.deflate]))
        expect(fits, "close codes %s, not %s", codes, wanted_codes)
        expect(not codes or frames[-1][0] == CLOSE, "something follows the close frame")


class SocketTarget(Target):
    name, weight, batch = "socket", 55, 32

    def open(self) -> None:
        self._log = Log()
        self._log.open()
        self._server = wsqueue.WebSocketServer(port=0, max_message_bytes=MESSAGE_BYTES)
        self._server.on_message("/echo", lambda conn, message: conn.send(message))
        self._server.on("/keep", lambda conn: [conn.send(message) for message in conn])
        self._server.on("/leave", lambda conn: conn.close(4000, "leave"))
        self._server.start(background=True)
        self._serve_properly(count=50)  # what threads a server has for its work, it has afterwards
        self._usual = resources()

    def close(self) -> None:
        self._server.stop()
        self._log.close()

    def make(self, dice: Dice) -> tuple[bytes, list[int], str]:
        """(data, sizes of the pieces, how it ends)."""
        head = dice.pick(PAGES) if dice.chance(0.05) else valid_head(dice, ROUTES) + b"\r\n\r\n"
        head = head if dice.chance(0.75) else mutated(dice, head, HTTP_VALUES)
        stream = Stream(dice, deflate=b"permessage-deflate" in head)
        data = head + (stream.valid() if dice.chance(0.3) else stream.hostile()).data
        data = data if dice.chance(0.7) else mutated(dice, data, FRAME_VALUES)
        sizes = dice.cuts((4,) if dice.chance(0.02) else (100, 1000, 70_000))
        ending = dice.pick(("orderly", "orderly", "close", "reset"))
        return data if ending == "orderly" else data[: dice.below(len(data) + 1)], sizes, ending

    def check(self, case: tuple[bytes, list[int], str]) -> None:
        self.check_all([case])

    def check_all(self, cases: Iterable[tuple[bytes, list[int], str]]) -> None:
        """All at once, because clients of a server are not alone."""
        self.current = list(cases)
        callers = []
        try:
            for case in self.current:
                callers.append(Caller(self._server.url, case))
            self._call(callers)
        finally:
            for caller in callers:
                caller._socket.close()
        self._check_log()  # says more than what the clients saw of it
        for caller in callers:
            caller.judge()
        self._serve_properly()
        eventually(self._is_calm, 5.0, f"threads and descriptors to be {self._usual} again, and nobody connected")
        self._check_log()

    def _call(self, callers: list[Caller]) -> None:
        sending = callers
        while sending:
            sending = [caller for caller in sending if caller.step()]
        self._server.broadcast("fuzz")
        for caller in callers:
            caller.end()

    def _check_log(self) -> None:
        expect(not self._log.errors, "the server logged: %s", "\n".join(self._log.errors))

    def _is_calm(self) -> bool:
        return self._server.get_connection_count() == 0 and not grown(self._usual)

    def _serve_properly(self, count: int = 1) -> None:
        with RawClient(self._server.url, "/echo") as client:
            for number in range(count):
                client.send(f"message {number}")
                expect(client.recv() == f"message {number}", "another message than the one that was sent")
            expect(client.close(1000) == 1000, "another close code than the one that was sent")


# ---- Running -----------------------------------------------------------------------------------------------


def descriptors() -> int:
    """How many are open, as far as the system tells; one of them is for reading that."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


def resources() -> tuple[int, int]:
    """Threads and descriptors."""
    return threading.active_count(), descriptors()


def grown(before: tuple[int, int]) -> bool:
    return any(now > then for now, then in zip(resources(), before))


KINDS_OF_TARGETS = (
    RequestTarget, FramesTarget, CloseTarget, EventsTarget, NamesTarget, DirectoryTarget, SocketTarget,
)
TARGETS: dict[str, Target] = {kind.name: kind() for kind in KINDS_OF_TARGETS}


class Failure(NamedTuple):
    target: str
    seed: int
    number: int | None  # None: it takes more than one case, or none
    case: Any
    error: Exception

    def __str__(self) -> str:
        where = f"case {self.number}" if self.number is not None else "cases that only fail together, or what they left"
        again = f"\nagain: python tests/fuzz.py {self.target} --seed {self.seed} --only {self.number}"
        trace = "".join(traceback.format_exception(type(self.error), self.error, self.error.__traceback__))
        return (f"FAILURE: {self.target}, seed {self.seed}, {where}\n{trace}input: {self.case!r}"
                + (again if self.number is not None else ""))


class Report(NamedTuple):
    target: str
    cases: int
    seconds: float
    failures: list[Failure]

    def __str__(self) -> str:
        rate = self.cases / self.seconds if self.seconds else 0.0
        return (f"{self.target:9} {self.cases:9} cases {self.seconds:8.1f} s {rate:9.0f}/s"
                f" {len(self.failures):4} failures")


def fuzz(target: Target, numbers: range, seed: int) -> Report:
    """Check the cases with these numbers, and that nothing is left of them."""
    started, before, failures, done = time.perf_counter(), resources(), [], 0
    target.open()
    try:
        for first in numbers[:: target.batch]:
            batch = range(first, min(first + target.batch, numbers.stop))
            failures += check_batch(target, batch, seed)
            done += len(batch)
            if len(failures) >= MOST_FAILURES:
                break
    finally:
        target.close()
        target.current = None
    failures += [] if failures else leaks(target, seed, before)
    return Report(target.name, done, time.perf_counter() - started, failures)


def leaks(target: Target, seed: int, before: tuple[int, int]) -> list[Failure]:
    try:
        eventually(lambda: not grown(before), what=f"the {before} threads and descriptors from before")
    except AssertionError as error:
        return [Failure(target.name, seed, None, None, error)]
    return []


def check_batch(target: Target, numbers: range, seed: int) -> list[Failure]:
    """Where one of them fails, each is checked by itself, in a fresh environment, to find out which."""
    cases = [target.make(dice_for(seed, target.name, number)) for number in numbers]
    together = error_of(target, cases)
    if together is None:
        return []
    found: list[Failure] = []
    for number, case in zip(numbers, cases):
        renew(target)
        error = error_of(target, [case])
        found += [Failure(target.name, seed, number, case, error)] if error else []
        if len(found) >= MOST_FAILURES:
            break
    renew(target)
    return found or [Failure(target.name, seed, None, cases, together)]


def renew(target: Target) -> None:
    target.close()
    target.open()


def error_of(target: Target, cases: list[Any]) -> Exception | None:
    try:
        target.check_all(cases)
    except Exception as error:  # whatever it is: that it came is the finding
        return error
    return None


def shares(names: Sequence[str], cases: int) -> dict[str, int]:
    total = sum(TARGETS[name].weight for name in names)
    return {name: -(-cases * TARGETS[name].weight // total) for name in names}


class Watchdog(threading.Thread):
    """Ends the program, with the case that hangs: a loop or a lock gives the main thread no chance to."""

    def __init__(self, targets: Sequence[Target], patience: float) -> None:
        super().__init__(name="fuzz-watchdog", daemon=True)
        self._targets, self._patience = targets, patience
        self._over = threading.Event()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        before = None
        while not self._over.wait(self._patience):
            running = [target for target in self._targets if target.current is not None]
            if running and running[0].current is before:
                print(f"FAILURE: {running[0].name} hangs, or is slower than {self._patience:g} s")
                print(f"input: {before!r}", flush=True)
                faulthandler.dump_traceback()
                os._exit(1)
            before = running[0].current if running else None


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)}; all if none is given")
    parser.add_argument("--cases", type=int, default=CASES, metavar="N", help=f"altogether ({CASES})")
    parser.add_argument("--seed", type=int, default=None, metavar="S", help="another one each time, and printed")
    parser.add_argument("--only", type=int, default=None, metavar="NUMBER", help="of the case to check; no other is")
    given = parser.parse_args(arguments)
    unknown = set(given.targets) - set(TARGETS)
    if unknown:
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there are: {', '.join(TARGETS)}")
    given.targets = given.targets or list(TARGETS)
    given.seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    return given


def main(arguments: Sequence[str] | None = None, patience: float = PATIENCE) -> int:
    given = parse_arguments(arguments)
    print(f"seed {given.seed}", flush=True)
    reports = []
    with Watchdog([TARGETS[name] for name in given.targets], patience):
        for name, count in shares(given.targets, given.cases).items():
            numbers = range(count) if given.only is None else range(given.only, given.only + 1)
            reports.append(fuzz(TARGETS[name], numbers, given.seed))
            print(*reports[-1].failures, sep="\n\n", end="\n" if reports[-1].failures else "", flush=True)
    print(*reports, sep="\n", flush=True)
    return 1 if any(report.failures for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
