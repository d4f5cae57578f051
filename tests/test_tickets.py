"""Section 9, tickets: who gets in with one, as whom, and what is said to everyone else; PyJWT is the judge."""

import base64
import hashlib
import hmac
import json
import logging
import os
import random
import secrets
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from urllib.parse import quote

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import example, given
from hypothesis import strategies as st

import wsqueue
from clients import LIBRARIES, RawClient, enter, everybody_has_left, exchange, handshake, serving, still_reaches
from helpers import TIME_UNIT, WSQUEUE, eventually, run_cli, spawn_server, spelled
from wsqueue import LEEWAY_SECONDS, TICKET_BYTES, HandshakeError, SettingError, WebSocketServer, sign_ticket

SECRET, OTHER_SECRET = secrets.token_hex(32), secrets.token_hex(32)  # long enough for HS512, too
NOW = int(time.time())
HEADER = {"alg": "HS256", "typ": "JWT"}
CLAIMS = {"sub": "42", "topics": ["room:1", "room:2"], "iat": NOW, "exp": NOW + 3600}
BASE64URL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


# ---- Making tickets, also such as nobody should --------------------------------------------------------------


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed_text(header, claims, secret=SECRET):
    """A ticket with a good signature over any two texts."""
    signed = f"{base64url(header.encode())}.{base64url(claims.encode())}"
    return f"{signed}.{base64url(hmac.new(secret.encode(), signed.encode(), hashlib.sha256).digest())}"


def signed(header, claims, secret=SECRET):
    return signed_text(json.dumps(header), json.dumps(claims), secret)


def ticket_with(secret=SECRET, **changes):
    """What PyJWT makes of the usual claims; None leaves one out."""
    claims = {**CLAIMS, **changes}
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, secret, "HS256")


def verify(ticket, *more_secrets, path="/", now=NOW):
    return wsqueue.verify_ticket(ticket, (SECRET, *more_secrets), path, now)


def refusal(ticket, *more_secrets, path="/", now=NOW):
    """The sentence with which it is refused; neither it nor a header of the answer tells the ticket or the secret."""
    with pytest.raises(HandshakeError) as caught:
        verify(ticket, *more_secrets, path=path, now=now)
    assert caught.value.status == "401 Unauthorized"
    told = repr((str(caught.value), caught.value.headers))
    assert SECRET not in told and (len(ticket) < 10 or ticket not in told)
    return str(caught.value)


def outcome(ticket):
    """What it grants, or the status with which it is refused."""
    try:
        return verify(ticket)
    except HandshakeError as error:
        return error.status


# ---- sign_ticket, as PyJWT reads it --------------------------------------------------------------------------


def read_by_pyjwt(ticket):
    return jwt.decode(ticket, SECRET, algorithms=["HS256"], options={"require": ["exp", "iat"]})


def test_pyjwt_reads_every_claim():
    """sub, topics, path, and exp so many seconds after iat."""
    before = int(time.time())
    claims = read_by_pyjwt(sign_ticket(SECRET, user="José", topics=["room:1", "käse"], path="/chat", ttl=600))
    issued = claims["iat"]
    assert claims == {"sub": "José", "topics": ["room:1", "käse"], "path": "/chat", "iat": issued, "exp": issued + 600}
    assert before <= issued <= time.time()


def test_what_is_not_given_is_not_claimed():
    """A ticket without user and path has neither claim, and an hour is not its default life: a minute is."""
    claims = read_by_pyjwt(sign_ticket(SECRET))
    assert claims == {"topics": [], "iat": claims["iat"], "exp": claims["iat"] + 60}


def test_the_header_is_the_usual_one():
    """HS256 and JWT, and nothing else."""
    assert jwt.get_unverified_header(sign_ticket(SECRET)) == HEADER


def test_a_ticket_fits_into_a_url_as_it_is():
    """Nothing in it has to be quoted."""
    ticket = sign_ticket(SECRET, user="a/b?c=d&e+f", topics=["☕"], path="/p q")
    assert quote(ticket, safe="") == ticket


@pytest.mark.parametrize("user, sub", [(42, "42"), (0, "0"), ("0", "0"), (-1, "-1")])
def test_a_user_id_may_be_a_number(user, sub):
    """sub is text (RFC 7519), also for the user 0."""
    assert read_by_pyjwt(sign_ticket(SECRET, user=user))["sub"] == sub


@pytest.mark.parametrize("topics, claimed", [("room", ["room"]), (("a", "b"), ["a", "b"]), (iter("ab"), ["a", "b"])])
def test_topics_may_be_one_or_any_iterable(topics, claimed):
    """A single topic is no list of letters."""
    assert read_by_pyjwt(sign_ticket(SECRET, topics=topics))["topics"] == claimed


def test_any_of_the_servers_secrets_may_be_bytes():
    """Who keeps the secret as bytes can sign with it."""
    assert sign_ticket(SECRET.encode(), user=1).split(".")[0] == sign_ticket(SECRET, user=1).split(".")[0]
    assert read_by_pyjwt(sign_ticket(SECRET.encode(), user=1))["sub"] == "1"


@pytest.mark.parametrize("arguments", [
    {"user": ""}, {"topics": [""]}, {"topics": [1]}, {"path": ""}, {"path": "chat"}, {"path": 5},
    {"ttl": float("nan")}, {"ttl": float("inf")}, {"topics": ["x" * TICKET_BYTES]}], ids=spelled)
def test_a_ticket_that_no_server_would_accept_is_not_made(arguments):
    """SettingError, which does not show the secret."""
    with pytest.raises(SettingError) as caught:
        sign_ticket(SECRET, **arguments)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("secret", ["", b"", None, [], 0, [""], {}], ids=spelled)
def test_there_is_no_ticket_without_a_secret(secret):
    """An empty environment variable is an error, and never a key that everybody knows."""
    with pytest.raises(SettingError):
        sign_ticket(secret, user=1)


# ---- verify_ticket, on what PyJWT makes ----------------------------------------------------------------------


@pytest.mark.parametrize("claims, user, topics", [
    ({}, "42", ("room:1", "room:2")),
    ({"sub": None}, None, ("room:1", "room:2")),
    ({"sub": 42}, "42", ("room:1", "room:2")),  # a number in many a database, though text by the RFC
    ({"topics": None}, "42", ()),
    ({"topics": []}, "42", ()),
    ({"iat": None}, "42", ("room:1", "room:2")),
    ({"iss": "https://example.com", "jti": "1", "anything": {"else": 1}}, "42", ("room:1", "room:2")),
    ({"sub": "ĵ ☕\n"}, "ĵ ☕\n", ("room:1", "room:2")),
    ({"exp": NOW + 0.5, "nbf": NOW - 0.5}, "42", ("room:1", "room:2")),
], ids=spelled)
def test_what_pyjwt_signed_grants_what_it_claims(claims, user, topics):
    """sub is the user and topics are the topics; claims that are for others do not matter."""
    assert verify(ticket_with(**claims)) == (user, topics)


def test_the_grant_has_names():
    """user and topics."""
    grant = verify(ticket_with())
    assert (grant.user, grant.topics) == ("42", ("room:1", "room:2"))


def test_what_sign_ticket_makes_is_accepted():
    """On its path, for its time."""
    ticket = sign_ticket(SECRET, user=7, topics=["a"], path="/chat")
    assert verify(ticket, path="/chat", now=time.time()) == ("7", ("a",))


@pytest.mark.parametrize("claims", [
    {"exp": NOW}, {"exp": NOW - LEEWAY_SECONDS}, {"nbf": NOW}, {"nbf": NOW + LEEWAY_SECONDS}], ids=spelled)
def test_clocks_may_differ_a_little(claims):
    """By half a minute, in both directions."""
    assert verify(ticket_with(**claims)).user == "42"


def test_the_leeway_is_half_a_minute():
    """As documented."""
    assert LEEWAY_SECONDS == 30


@pytest.mark.parametrize("claims, why", [
    ({"exp": NOW - 31}, "expired"),
    ({"exp": NOW - 30.5}, "expired"),
    ({"exp": 0}, "expired"),
    ({"exp": -(10**9)}, "expired"),
    ({"exp": 10**30}, '"exp"'),  # in no unit of time that anybody meant
    ({"aud": "https://example.com"}, "audience"),  # RFC 7519, section 4.1.3: who is not named must refuse it
    ({"aud": []}, "audience"),
    ({"nbf": NOW + 31}, "not valid yet"),
    ({"nbf": NOW + 30.5}, "not valid yet"),
    ({"exp": None}, '"exp"'),
    ({"path": "/other"}, "another path"),
    ({"path": "/Chat"}, "another path"),
    ({"path": "/chat/"}, "another path"),
    ({"path": "/ch"}, "another path"),
    ({"path": "/"}, "another path"),
    ({"path": "*"}, "another path"),
    ({"path": ""}, "another path"),
], ids=spelled)
def test_a_ticket_that_does_not_hold_here_and_now_is_refused(claims, why):
    """The sentence says which of its claims does not."""
    assert why in refusal(ticket_with(**claims), path="/chat")


NO_TIMES = ["1", "", True, False, [], [NOW + 60], {}, {"at": NOW + 60}, float("nan"), float("inf"), -float("inf")]
NO_USERS = ["", 1.5, True, False, [], ["42"], {}, {"id": 42}]
NO_TOPICS = ["room", 1, 1.5, True, {"room": 1}, [""], [1], [None], [["room"]], ["room", 1], [{}]]
NO_PATHS = [1, True, False, 0, ["/"], {"/": 1}, {}]


@pytest.mark.parametrize("name, value", [
    *(("exp", value) for value in [None, *NO_TIMES]), *(("nbf", value) for value in [None, *NO_TIMES]),
    *(("sub", value) for value in NO_USERS), *(("topics", value) for value in NO_TOPICS),
    *(("path", value) for value in NO_PATHS)], ids=spelled)
def test_a_claim_of_the_wrong_type_is_refused(name, value):
    """However well it is signed: it is not guessed what was meant."""
    assert refusal(signed(HEADER, {**CLAIMS, name: value}))


@pytest.mark.parametrize("exp", ["1e400", "9" * 400, "-" + "9" * 400, "1" + "0" * 5000])
def test_a_time_of_any_size_is_no_accident(exp):
    """A number that no float holds is granted or refused as any other, and is never an error of the server."""
    assert outcome(signed_text(json.dumps(HEADER), f'{{"sub":"42","exp":{exp}}}')) in (("42", ()), "401 Unauthorized")


@pytest.mark.parametrize("header, claims", [
    ("[]", json.dumps(CLAIMS)),
    ('"HS256"', json.dumps(CLAIMS)),
    ("null", json.dumps(CLAIMS)),
    ("", json.dumps(CLAIMS)),
    ("{", json.dumps(CLAIMS)),
    (json.dumps(HEADER), "[]"),
    (json.dumps(HEADER), "null"),
    (json.dumps(HEADER), "42"),
    (json.dumps(HEADER), ""),
    (json.dumps(HEADER), json.dumps(CLAIMS) + "}"),
    (json.dumps(HEADER), json.dumps(CLAIMS)[:-1]),
    (json.dumps(HEADER), json.dumps([CLAIMS])),
    (json.dumps(HEADER), "[" * 1500 + "]" * 1500),
], ids=lambda text: text[:12])
def test_what_is_not_two_json_objects_is_refused(header, claims):
    """However well it is signed."""
    assert refusal(signed_text(header, claims))


# ---- Algorithms ----------------------------------------------------------------------------------------------


def test_an_unsigned_ticket_is_refused():
    """`none`, the algorithm that PyJWT makes too, and its spellings."""
    assert refusal(jwt.encode(CLAIMS, None, "none"))
    for name in ("none", "None", "NONE", "", None, 0):
        unsigned = f"{base64url(json.dumps({'alg': name}).encode())}.{base64url(json.dumps(CLAIMS).encode())}"
        assert refusal(unsigned) and refusal(f"{unsigned}.")


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
def test_another_hash_is_refused(algorithm):
    """Also with the right secret."""
    assert refusal(jwt.encode(CLAIMS, SECRET, algorithm))


@pytest.fixture(scope="module")
def private_key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.mark.parametrize("algorithm", ["RS256", "PS256"])
def test_a_public_key_algorithm_is_refused(private_key, algorithm):
    """This server has secrets, and no public keys."""
    assert refusal(jwt.encode(CLAIMS, private_key, algorithm))


def test_a_public_key_is_no_secret_by_accident(private_key):
    """Were one set as the secret, what its private key signed would still be refused: the header does not choose."""
    public = private_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    assert refusal(jwt.encode(CLAIMS, private_key, "RS256"), public)
    assert refusal(signed({"alg": "RS256"}, CLAIMS, public), public)


@pytest.mark.parametrize("header", [
    {}, {"typ": "JWT"}, {"alg": None}, {"alg": "hs256"}, {"alg": "HS512"}, {"alg": "none"}, {"alg": "RS256"},
    {"alg": ["HS256"]}, {"alg": {"HS256": 1}}, {"alg": "HS256 "}, {"Alg": "HS256"}], ids=spelled)
def test_a_header_that_does_not_say_hs256_is_refused(header):
    """Also where the signature would be right: a ticket has one reading."""
    assert "HS256" in refusal(signed(header, CLAIMS))


@pytest.mark.parametrize("critical", [["exp"], ["b64"], [], "exp", None, 0])
def test_a_critical_extension_is_refused(critical):
    """`crit` names what must be understood (RFC 7515, section 4.1.11), and nothing is."""
    assert refusal(signed({**HEADER, "crit": critical, "b64": True}, CLAIMS))


# ---- One spelling --------------------------------------------------------------------------------------------


def other_spellings(ticket):
    """What some decoder of base64 takes for the same bytes, or some parser for the same ticket."""
    header, claims, signature = ticket.split(".")
    last = BASE64URL.index(signature[-1])
    assert last % 4 == 0  # 43 characters hold 258 bits; the last two are no part of the hash
    yield from (ticket[:-1] + BASE64URL[last + bits] for bits in (1, 2, 3))
    for filler in ("=", "==", " ", "\n", "\r\n", "\t", "\0", "\x0b", "%", "!", ".", "\u00a0", "é", "☕", "\ufeff"):
        places = [0, 9, len(header), len(header) + 1, len(header) + 9, -len(signature) - 1, -len(signature), -9, -1]
        yield from (ticket[:place] + filler + ticket[place:] for place in places)
        yield ticket + filler
    yield from (f"{header}A.{claims}.{signature}", f"{header}.{claims}A.{signature}", f"{ticket}A")
    yield from (ticket.replace("-", "+").replace("_", "/"), quote(ticket.replace("-", "+"), safe=""))
    yield from (ticket.upper(), ticket.lower(), ticket[::-1], f'"{ticket}"', f"Bearer {ticket}", f"{ticket},{ticket}")
    yield from ("".join(chr(ord(character) + 0xFEE0) for character in ticket), ticket.encode("utf-16-le").decode())


def ticket_with_every_character():
    """A ticket whose signature holds both characters in which base64url differs from base64."""
    tickets = (ticket_with(jti=str(number)) for number in range(10_000))
    return next(ticket for ticket in tickets if {"-", "_"} <= set(ticket.rpartition(".")[2]))


def test_a_ticket_has_one_spelling():
    """Padding, other last bits, white space, other alphabets: refused, since they are not what was signed."""
    ticket = ticket_with_every_character()
    assert verify(ticket).user == "42"
    spellings = [spelling for spelling in other_spellings(ticket) if spelling != ticket]
    assert len(spellings) > 100
    for spelling in spellings:
        assert refusal(spelling)


def test_a_ticket_that_was_cut_is_refused():
    """At the end or at the start, by any number of characters."""
    ticket = ticket_with()
    for size in range(len(ticket)):
        assert refusal(ticket[:size]) and refusal(ticket[len(ticket) - size:])


@pytest.mark.parametrize("parts", [1, 2, 4, 5])
def test_a_ticket_has_three_parts(parts):
    """Less, or more, as an encrypted token has, is not one."""
    assert refusal(".".join((ticket_with().split(".") * 2)[:parts]))


def longest_ticket():
    """The last of growing tickets that has at most TICKET_BYTES, and the first that has more."""
    size = TICKET_BYTES * 3 // 4 - 300
    tickets = (ticket_with(jti="x" * filler) for filler in range(size, size + 300))
    fitting = next(tickets)
    for ticket in tickets:
        if len(ticket) > TICKET_BYTES:
            return fitting, ticket
        fitting = ticket
    raise AssertionError("no ticket is too long")


def test_a_ticket_may_be_long_but_not_endless():
    """4 KiB, as good as they may be beyond."""
    assert TICKET_BYTES == 4096
    fitting, too_long = longest_ticket()
    assert len(fitting) > TICKET_BYTES - 4 and verify(fitting).user == "42"
    assert str(TICKET_BYTES) in refusal(too_long)
    assert refusal("x" * 1_000_000) and refusal("." * 1_000_000)


# ---- Secrets -------------------------------------------------------------------------------------------------


def test_any_of_several_secrets_verifies():
    """While a secret is replaced, tickets of the old one and of the new one are good."""
    for secret in (SECRET, OTHER_SECRET):
        assert verify(ticket_with(secret), OTHER_SECRET).user == "42"
    assert "signature" in refusal(ticket_with(secrets.token_hex(32)), OTHER_SECRET)


def test_without_a_secret_nothing_verifies():
    """No secret is not an empty one."""
    with pytest.raises(HandshakeError):
        wsqueue.verify_ticket(signed(HEADER, CLAIMS, ""), (), "/", NOW)


@pytest.mark.parametrize("secret", ["x", SECRET + "\n", SECRET[:-1], SECRET.upper(), f" {SECRET}", "", "null"],
                         ids=spelled)
def test_a_secret_that_is_nearly_right_is_wrong(secret):
    """The signature is that of this very secret."""
    assert "signature" in refusal(signed(HEADER, CLAIMS, secret))


def test_a_secret_may_be_any_text():
    """It is used as UTF-8, whatever its length."""
    for secret in ("s", "pä☕ss", "two words", "x" * 1000):
        assert wsqueue.verify_ticket(signed(HEADER, CLAIMS, secret), (secret,), "/", NOW).user == "42"
        assert wsqueue.verify_ticket(sign_ticket(secret, user=1), (secret,), "/", NOW).user == "1"


# ---- Whatever comes ------------------------------------------------------------------------------------------

GOOD = [ticket_with(), ticket_with(sub="admin"), ticket_with(topics=["x"], path="/"), signed({"alg": "HS256"}, CLAIMS)]


def _replace_one(chance, ticket):
    at = chance.randrange(len(ticket))
    return ticket[:at] + chance.choice(BASE64URL + ".=+/ \0é") + ticket[at + 1:]


def _remove_some(chance, ticket):
    start, end = sorted(chance.sample(range(len(ticket) + 1), 2))
    return ticket[:start] + ticket[end:]


def _insert_some(chance, ticket):
    at = chance.randrange(len(ticket) + 1)
    return ticket[:at] + "".join(chance.choices(BASE64URL + ".", k=chance.randrange(1, 5))) + ticket[at:]


def _swap_two(chance, ticket):
    first, second = sorted(chance.sample(range(len(ticket)), 2))
    return (ticket[:first] + ticket[second] + ticket[first + 1:second] + ticket[first] + ticket[second + 1:])


def _splice(chance, ticket):
    """Parts of several good tickets."""
    return ".".join(chance.choice(GOOD).split(".")[part] for part in range(3))


def _flip_a_bit(chance, ticket):
    """In the bytes that base64 stands for."""
    parts = ticket.split(".")
    number = chance.randrange(3)
    data = bytearray(base64.urlsafe_b64decode(parts[number] + "=="))
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    parts[number] = base64url(data)
    return ".".join(parts)


def _claim_more(chance, ticket):
    """The same signature for other claims."""
    header, _, signature = ticket.split(".")
    claims = {**CLAIMS, **chance.choice([{"sub": "root"}, {"exp": NOW + 10**9}, {"topics": ["secrets"]}, {"x": 1}])}
    return f"{header}.{base64url(json.dumps(claims).encode())}.{signature}"


MUTATIONS = [_replace_one, _remove_some, _insert_some, _swap_two, _splice, _flip_a_bit, _claim_more]


@pytest.mark.parametrize("seed", range(10))
def test_no_mutation_of_a_ticket_is_one(seed):
    """A thousand each: every one is refused with 401, and with nothing else."""
    chance = random.Random(seed)
    refused = 0
    while refused < 1000:
        mutant = chance.choice(MUTATIONS)(chance, chance.choice(GOOD))
        if mutant not in GOOD:
            assert refusal(mutant)
            refused += 1


@given(st.text() | st.from_regex(r"[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*", fullmatch=True))
def test_no_text_is_a_ticket(text):
    """Nor is it an accident."""
    assert refusal(text)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(NOW),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=5)


@given(st.dictionaries(st.sampled_from(["alg", "crit", "typ"]), JSON_VALUES | st.just("HS256")),
       st.dictionaries(st.sampled_from(["exp", "nbf", "iat", "sub", "topics", "path"]), JSON_VALUES))
@example(HEADER, {"exp": 10**400})
@example(HEADER, {"exp": NOW, "nbf": -(10**400)})
@example(HEADER, {"exp": NOW, "sub": "\ud800", "topics": ["\ud800"], "path": "/"})
def test_whatever_is_signed_is_granted_or_refused(header, claims):
    """Who has the secret may still be wrong: never an exception of another kind, never a grant of another shape."""
    granted = outcome(signed(header, claims))
    if granted != "401 Unauthorized":
        user, topics = granted
        assert user is None or (isinstance(user, str) and user)
        assert all(isinstance(topic, str) and topic for topic in topics)
        assert header["alg"] == "HS256" and "crit" not in header
        assert NOW - 30 <= claims["exp"] < float("inf")


# ---- Over real connections -----------------------------------------------------------------------------------


def in_url(ticket, path="/"):
    return handshake(f"{path}?ticket={quote(ticket, safe='')}")


def in_header(ticket, path="/"):
    return handshake(path, Authorization=f"Bearer {ticket}")


def in_both(ticket, path="/"):
    return handshake(f"{path}?ticket={quote(ticket, safe='')}", Authorization=f"Bearer {ticket}")


CARRIERS = [in_url, in_header, in_both]


def parts(request):
    """Of a request of ours, given as bytes: its target, and the header of its ticket."""
    head, *lines = request.decode().split("\r\n")
    authorization = [line.partition(": ")[2] for line in lines if line.startswith("Authorization: ")]
    return head.split(" ")[1], {"Authorization": authorization[0]} if authorization else {}


def entering(server, request):
    target, headers = parts(request)
    return enter(server, target, **headers)


@pytest.fixture(scope="module")
def server():
    """One server with a secret, for all that need no settings of their own."""
    with serving(secret=SECRET) as server:
        yield server


def assert_unauthorized(answer, *told):
    """401 with a sentence, which is a whole one and holds neither ticket nor secret."""
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.body.endswith(".\n") and len(answer.body.split()) > 3
    assert all(word in answer.body for word in told), answer.body
    assert SECRET not in answer.body
    return answer


@pytest.mark.parametrize("carry", CARRIERS)
def test_a_client_with_a_ticket_is_on_its_topics(server, carry):
    """On user:ID, on what the ticket grants and on that of its path; and on no other."""
    client, conn = entering(server, carry(ticket_with(), "/chat"))
    with client:
        assert (conn.user, conn.path) == ("42", "/chat")
        for number, topic in enumerate(["user:4", "room:1", "user:42", "room", "/", "room:2", "/chat", "42"]):
            server.broadcast("hello", number, to=topic)
        assert client.payloads(4) == [1, 2, 5, 6]
        assert still_reaches(server, client)


def test_a_ticket_without_a_user_makes_an_anonymous_client(server):
    """conn.user is None, and user:None is nobody."""
    client, conn = entering(server, in_url(ticket_with(sub=None)))
    with client:
        assert conn.user is None
        server.broadcast("hello", 1, to=["user:None", "user:", "user:null"])
        server.broadcast("hello", 2, to="room:1")
        assert client.payloads(1) == [2]


def test_a_ticket_may_be_used_again(server):
    """Two tabs of one user are two clients with the same ticket, and both get what is sent to the user."""
    with ExitStack() as stack:
        clients = [stack.enter_context(entering(server, in_url(ticket_with()))[0]) for _ in range(2)]
        server.broadcast("hello", 1, to="user:42")
        assert [client.payloads(1) for client in clients] == [[1], [1]]


def test_a_handler_knows_the_user():
    """And may take the client off a topic that the ticket granted."""
    def greet(conn):
        conn.leave("room:1")
        conn.send({"user": conn.user})

    with serving({"/": greet}, secret=SECRET) as server:
        with entering(server, in_header(sign_ticket(SECRET, user=7, topics=["room:1"])))[0] as client:
            assert client.events(1) == [{"user": "7"}]
            server.broadcast("hello", 1, to="room:1")
            assert still_reaches(server, client)


@pytest.mark.parametrize("library", LIBRARIES)
def test_clients_that_others_wrote_get_in(server, library):
    """The ticket in the URL is all that it takes."""
    known = server.get_connection_count()
    with LIBRARIES[library](f"{server.url}/?ticket={ticket_with()}") as client:
        eventually(lambda: server.get_connection_count() > known, what="the client")
        server.broadcast("hello", 1, to="user:42")
        assert json.loads(client.recv())["payload"] == 1


@pytest.mark.parametrize("carry", CARRIERS)
@pytest.mark.parametrize("ticket, told", [
    (ticket_with(exp=NOW - 3600), "expired"),
    (ticket_with(nbf=NOW + 7200, exp=NOW + 9000), "not valid yet"),
    (ticket_with(exp=None), "exp"),
    (ticket_with(path="/elsewhere"), "another path"),
    (ticket_with(OTHER_SECRET), "signature"),
    (jwt.encode(CLAIMS, None, "none"), ""),
    ("nonsense", "JSON Web Token"),
    ("x" * 5000, "4096"),
    ("." * 2000, ""),
], ids=["expired", "not yet", "no exp", "path", "signature", "none", "malformed", "long", "dots"])
def test_a_client_whose_ticket_is_no_good_is_told_why(server, carry, ticket, told):
    """401, and a sentence that says what is wrong with it and does not repeat it."""
    answer = assert_unauthorized(exchange(server.url, carry(ticket)), told)
    assert ticket not in answer.body


@pytest.mark.parametrize("target, headers", [
    ("/", {}),
    ("/chat?Ticket=TICKET", {}),
    ("/?ticket=", {}),
    ("/?x=1;ticket=TICKET", {}),
    ("/TICKET", {}),
    ("/#ticket=TICKET", {}),
    ("/", {"Authorization": ""}),
    ("/", {"Authorization": "Bearer"}),
    ("/", {"Authorization": "TICKET"}),
    ("/", {"Authorization": "Basic dTpw"}),
    ("/", {"Authorization": "Basic TICKET"}),
    ("/", {"Cookie": "ticket=TICKET"}),
])
def test_a_client_without_a_ticket_is_told_to_bring_one(server, target, headers):
    """401: in none of these places is a ticket looked for."""
    headers = {name: value.replace("TICKET", ticket_with()) for name, value in headers.items()}
    assert_unauthorized(exchange(server.url, handshake(target.replace("TICKET", ticket_with()), **headers)), "ticket")


@pytest.mark.parametrize("authorization", ["bearer {}", "BEARER {}", "Bearer   {}"])
def test_the_scheme_is_in_any_case(server, authorization):
    """RFC 9110, section 11.1: Bearer, bearer and BEARER are one."""
    with RawClient(server.url, Authorization=authorization.format(ticket_with())):
        pass


def test_two_tickets_in_one_url_are_one_at_most(server):
    """Whichever is read, a client never gets what the two grant together."""
    target = f"/?ticket={ticket_with(sub='a', topics=['a'])}&ticket={ticket_with(sub='b', topics=['b'])}"
    with suppress(AssertionError):  # it may as well be refused
        client, conn = enter(server, target)
        with client:
            assert conn.user in ("a", "b")
            server.broadcast("hello", 1, to={"a": "b", "b": "a"}[conn.user])
            assert still_reaches(server, client)


def test_who_is_refused_leaves_no_trace():
    """No client is counted, no handler runs, and the refusal is in the metrics."""
    met = []
    with serving({"/": met.append}, secret=SECRET) as server:
        for _ in range(20):
            assert_unauthorized(exchange(server.url, in_url("nonsense")))
        everybody_has_left(server)
        assert met == []
        metrics = exchange(server.url, b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").body
        assert 'wsqueue_refused_total{status="401"} 20' in metrics


def test_what_came_behind_a_refused_request_is_not_read():
    """A frame that was sent along reaches no callback."""
    met = []
    with serving(callbacks={"/": lambda conn, message: met.append(message)}, secret=SECRET) as server:
        assert_unauthorized(exchange(server.url, in_url("nonsense") + b"\x81\x82\0\0\0\0hi"))
        with RawClient(server.url, f"/?ticket={ticket_with()}") as client:
            client.send("let in")
            eventually(lambda: met, what="a message")
    assert met == ["let in"]


def test_health_needs_no_ticket(server):
    """Who watches the server on its own machine is no client."""
    assert exchange(server.url, b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").status == 200


def test_without_a_secret_a_ticket_says_nothing():
    """An open server takes nobody for the user that an unchecked ticket claims."""
    with serving() as server:
        client, conn = entering(server, in_both(ticket_with()))
        with client:
            assert conn.user is None
            server.broadcast("hello", 1, to=["user:42", "room:1"])
            assert still_reaches(server, client)


def test_a_server_may_have_several_secrets():
    """What any of them signed is good."""
    with serving(secret=[OTHER_SECRET, SECRET]) as server:
        for secret in (SECRET, OTHER_SECRET):
            with RawClient(server.url, f"/?ticket={sign_ticket(secret)}"):
                pass
        assert_unauthorized(exchange(server.url, in_url(sign_ticket(secrets.token_hex(32)))), "signature")


# ---- Nothing is given away -----------------------------------------------------------------------------------


def test_no_log_record_and_no_answer_holds_a_secret_or_a_ticket(caplog):
    """At DEBUG, of good clients, bad ones, failing handlers and slow clients."""
    def fail(conn):
        raise RuntimeError("on purpose")

    tickets = [ticket_with(), ticket_with(exp=1), ticket_with(OTHER_SECRET), ticket_with(path="/elsewhere"),
               signed(HEADER, {**CLAIMS, "sub": []}), ticket_with()[:-1]]
    answers = []
    with caplog.at_level(logging.DEBUG), serving({"/fails": fail}, secret=[SECRET, OTHER_SECRET]) as server:
        for ticket in tickets[1:2] + tickets[3:]:
            answers += [exchange(server.url, carry(ticket)).body for carry in CARRIERS]
        for path in ("/", "/fails"):
            target, headers = parts(in_both(tickets[0], path))
            with RawClient(server.url, target, **headers) as client:
                client.send_frame(0x3)  # an opcode that does not exist
                client.read_close()
        everybody_has_left(server)
    told = "\n".join([*answers, *(caplog.handler.format(record) for record in caplog.records)])
    assert "RuntimeError: on purpose" in told and "refused" in told
    for confidence in (SECRET, OTHER_SECRET, *tickets, *(ticket.split(".")[2] for ticket in tickets)):
        assert confidence not in told


def start_and_stop(**settings):
    with WebSocketServer(**settings):
        pass


def failure(**settings):
    """Why a server does not start."""
    with pytest.raises(SettingError) as caught:
        start_and_stop(**settings)
    return str(caught.value)


@pytest.mark.parametrize("settings", [
    {"secret": [SECRET, ""]}, {"secret": [SECRET, None]}, {"secret": SECRET.encode()}, {"secret": {SECRET: 1}},
    {"secret": SECRET, "port": -1}, {"secret": SECRET, "host": ""}, {"secret": SECRET, "secret_file": "/nowhere"}],
    ids=["empty", "None", "bytes", "dict", "port", "host", "file"])
def test_an_error_about_settings_does_not_show_the_secret(settings):
    """Whichever of them is wrong."""
    assert SECRET not in failure(**{"port": 0, **settings})


# ---- The setting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["", [], [""], [SECRET, ""], None, 0, False, b"", [None], {}, " ", "\n", [" "]],
                         ids=spelled)
def test_a_secret_that_is_missing_is_an_error_and_never_an_open_server(secret):
    """`secret=os.environ.get(...)` of what is not set must not let everybody in."""
    assert failure(port=0, secret=secret)


SECRETS_THAT_ARE_NONE = {"empty": b"", "newline": b"\n", "blank": b" \n\t\r\n\n"}


@contextmanager
def unusable_file(directory, kind):
    """A file of secrets that holds none, or cannot be read by anybody."""
    path = directory / "secrets"
    if kind == "directory":
        path.mkdir()
    elif kind in SECRETS_THAT_ARE_NONE:
        path.write_bytes(SECRETS_THAT_ARE_NONE[kind])
    yield path if kind != "under a file" else __file__ + "/secrets"


UNUSABLE = [*SECRETS_THAT_ARE_NONE, "missing", "directory", "under a file"]


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_file_without_secrets_is_an_error_and_never_an_open_server(tmp_path, kind):
    """SettingError, which names the file."""
    with unusable_file(tmp_path, kind) as path:
        assert str(path) in failure(port=0, secret_file=str(path))


@pytest.mark.parametrize("text", ["{0}\n{1}\n", "{0}\n{1}", "{0}\r\n{1}\r\n", "\n{0}\n\n{1}\n\n", "{0}  \n{1}\t\n"],
                         ids=spelled)
def test_a_file_has_one_secret_a_line(tmp_path, text):
    """The ends of lines are no part of a secret, whoever wrote them; empty lines are none."""
    path = tmp_path / "secrets"
    path.write_bytes(text.format(SECRET, OTHER_SECRET).encode())
    with serving(secret_file=str(path)) as server:
        for secret in (SECRET, OTHER_SECRET):
            with RawClient(server.url, f"/?ticket={sign_ticket(secret)}"):
                pass
        for secret in ("", "\n", " ", SECRET + "\n", f"{SECRET}\n{OTHER_SECRET}"):
            assert_unauthorized(exchange(server.url, in_url(signed(HEADER, CLAIMS, secret))), "signature")


# ---- Real processes ------------------------------------------------------------------------------------------


def environment(**more):
    return {**os.environ, **more}


def serve_and_fail(directory, *options, **variables):
    """What serve says that must not start; an open server would run on, and end the test at its deadline."""
    done = run_cli("serve", "--port", "0", "--queue", directory / "queue", *options, env=environment(**variables))
    assert done.returncode in (1, 2) and "listening" not in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("value", ["", " ", "\n", "\n \r\n\t"])
def test_serve_does_not_start_with_an_empty_secret(tmp_path, value):
    """`WS_SECRET=` in an environment file is a mistake, not a wish for an open server."""
    assert "WS_SECRET" in serve_and_fail(tmp_path, WS_SECRET=value)


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("option", [True, False])
def test_serve_does_not_start_with_a_file_without_secrets(tmp_path, kind, option):
    """Whether the option or the environment names it."""
    with unusable_file(tmp_path, kind) as path:
        said = serve_and_fail(tmp_path, "--secret-file", path) if option else serve_and_fail(
            tmp_path, WS_SECRET_FILE=str(path))
    assert str(path) in said


def test_serve_does_not_start_with_an_unnamed_file(tmp_path):
    """`WS_SECRET_FILE=`, or `--secret-file "$NOT_SET"`: never an open server instead."""
    assert serve_and_fail(tmp_path, WS_SECRET_FILE="")
    assert serve_and_fail(tmp_path, "--secret-file", "")


@pytest.mark.parametrize("option", [["--secret", SECRET], [f"--secret={SECRET}"]], ids=["two words", "one word"])
@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["ticket", "--user", "1"]], ids=lambda words: words[0])
def test_a_secret_is_not_taken_from_the_command_line(tmp_path, command, option):
    """Where `ps` and the shell's history show it: there is no such option, nor is it short for another."""
    done = run_cli(*command, *option, cwd=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert not (tmp_path / SECRET).exists() and "cannot be read" not in done.stderr
    shown = run_cli(command[0], "--help").stdout
    assert "--secret-file" in shown and "--secret " not in shown


def said_by(server):
    return server.stdout_text() + server.stderr_text()


@pytest.mark.parametrize("way", ["WS_SECRET", "WS_SECRET_FILE", "--secret-file"])
def test_serve_lets_in_who_has_a_ticket_and_says_nothing_about_it(tmp_path, way):
    """From each source, of several secrets each; neither they nor a ticket are in what the process prints."""
    path = tmp_path / "secrets"
    path.write_text(f"{SECRET}\n{OTHER_SECRET}\n")
    variables = {"WS_SECRET": {"WS_SECRET": path.read_text()}, "WS_SECRET_FILE": {"WS_SECRET_FILE": str(path)}}
    options = ["--secret-file", path] if way == "--secret-file" else []
    tickets = [sign_ticket(secret, user="42") for secret in (SECRET, OTHER_SECRET)]
    bad = [ticket_with(exp=1), sign_ticket(secrets.token_hex(32))]
    with spawn_server("--queue", tmp_path / "queue", *options, env=environment(**variables.get(way, {}))) as server:
        for ticket in tickets:
            with RawClient(server.url, f"/?ticket={ticket}") as client:
                assert wsqueue.queue_event(str(tmp_path / "queue"), "hello", 1, to="user:42")
                assert client.payloads(1) == [1]
        for request in [handshake(), *(carry(ticket) for carry in CARRIERS for ticket in bad)]:
            assert_unauthorized(exchange(server.url, request))
        eventually(lambda: said_by(server).count("401") >= 7, what="the refusals in the log")
        for confidence in (SECRET, OTHER_SECRET, *tickets, *bad):
            assert confidence not in said_by(server)


def make_ticket(*options, **variables):
    """What `wsqueue ticket` prints."""
    done = run_cli("ticket", *options, env=environment(**variables))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n") and done.stdout.count("\n") == 1
    return done.stdout.strip()


def test_the_ticket_command_makes_what_pyjwt_reads():
    """Every option is a claim."""
    options = ("--user", "42", "--topic", "room:1", "--topic", "room:2", "--path", "/chat", "--ttl", "600")
    claims = read_by_pyjwt(make_ticket(*options, WS_SECRET=SECRET))
    assert claims == {"sub": "42", "topics": ["room:1", "room:2"], "path": "/chat", "iat": claims["iat"],
                      "exp": claims["iat"] + 600}


def test_the_ticket_command_needs_no_option():
    """Then the ticket says nothing, for a minute."""
    claims = read_by_pyjwt(make_ticket(WS_SECRET=SECRET))
    assert claims == {"topics": [], "iat": claims["iat"], "exp": claims["iat"] + 60}


@pytest.mark.parametrize("way", ["WS_SECRET", "WS_SECRET_FILE", "--secret-file"])
def test_what_the_ticket_command_prints_is_accepted(server, tmp_path, way):
    """With the secret from each source; the first of several is the one to sign with."""
    path = tmp_path / "secrets"
    path.write_text(f"{SECRET}\n{OTHER_SECRET}\n")
    variables = {"WS_SECRET": {"WS_SECRET": path.read_text()}, "WS_SECRET_FILE": {"WS_SECRET_FILE": str(path)}}
    options = ["--secret-file", path] if way == "--secret-file" else []
    client, conn = entering(server, in_url(make_ticket("--user", "7", *options, **variables.get(way, {}))))
    with client:
        assert conn.user == "7"


@pytest.mark.parametrize("variables", [{}, {"WS_SECRET": ""}, {"WS_SECRET": "\n"}, {"WS_SECRET_FILE": "/nowhere"}],
                         ids=spelled)
def test_the_ticket_command_says_which_secret_is_missing(variables):
    """One sentence, and no ticket that anybody could make."""
    done = run_cli("ticket", "--user", "1", env=environment(**variables))
    assert done.returncode in (1, 2) and done.stdout == ""
    assert "Traceback" not in done.stderr and ("WS_SECRET" in done.stderr or "/nowhere" in done.stderr)


@pytest.mark.parametrize("options", [["--user", ""], ["--topic", ""], ["--path", "chat"], ["--ttl", "soon"],
                                     ["--ttl", "nan"], ["--ttl", "inf"], ["--topic", "x" * 5000]],
                         ids=lambda words: " ".join(words)[:20])
def test_the_ticket_command_refuses_what_no_server_accepts(options):
    """With a sentence, which does not show the secret."""
    done = run_cli("ticket", *options, env=environment(WS_SECRET=SECRET))
    assert done.returncode in (1, 2) and done.stdout == ""
    assert "Traceback" not in done.stderr and SECRET not in done.stderr


def listen(url, *options, **variables):
    return run_cli("listen", url, *options, env=environment(**variables))


def test_listen_brings_the_ticket_of_its_environment(tmp_path):
    """$WS_TICKET, where neither `ps` nor the shell's history shows it; a line's end belongs to no ticket."""
    with spawn_server("--queue", tmp_path / "queue", env=environment(WS_SECRET=SECRET)) as server:
        for ticket in (sign_ticket(SECRET, user="42"), sign_ticket(SECRET, user="42") + "\n"):
            with subprocess.Popen([sys.executable, WSQUEUE, "listen", f"{server.url}/", "--count", "1"],
                                  env=environment(WS_TICKET=ticket), stdout=subprocess.PIPE) as process:
                try:
                    send_until_it_ends(tmp_path / "queue", process)
                    assert json.loads(process.stdout.read())["event"] == "hello"
                    assert process.wait(10 * TIME_UNIT) == 0
                finally:
                    process.kill()


def send_until_it_ends(directory, process):
    """It does not say when it is connected."""
    def done():
        assert wsqueue.queue_event(str(directory), "hello", 1, to="user:42")
        return process.poll() is not None

    eventually(done, what="a client that got its message")


@pytest.mark.parametrize("ticket", [None, "", "nonsense", ticket_with(exp=1), ticket_with(OTHER_SECRET)],
                         ids=["none", "empty", "malformed", "expired", "signature"])
def test_listen_says_why_it_is_refused(server, ticket):
    """Status 1, and the server's sentence."""
    done = listen(f"{server.url}/", **({} if ticket is None else {"WS_TICKET": ticket}))
    assert (done.returncode, done.stdout) == (1, "")
    assert "401" in done.stderr and "icket" in done.stderr and "Traceback" not in done.stderr
    assert not ticket or ticket not in done.stderr


@pytest.mark.parametrize("ticket", ["Xy\r\nX-Injected: 1", "Xy\nXy", "Xy\x7fXy", "Xy☕"], ids=spelled)
def test_listen_does_not_print_a_ticket_that_is_no_header(server, ticket):
    """What cannot be sent is an error, in a sentence that does not show it."""
    done = listen(f"{server.url}/", WS_TICKET=ticket)
    assert (done.returncode, done.stdout) in ((1, ""), (2, ""))
    assert "Traceback" not in done.stderr and "Xy" not in done.stderr


def test_listen_does_not_print_a_ticket_of_its_url(server):
    """Its errors name the server, and end up in logs."""
    for url in (server.url, "ws://127.0.0.1:1"):
        ticket = ticket_with(exp=1)
        done = listen(f"{url}/?ticket={ticket}")
        assert done.returncode == 1 and ticket not in done.stderr


# ---- PHP -----------------------------------------------------------------------------------------------------

# Also with several secrets, and with none.
PHP = r"""
$base64url = fn(string $data) => rtrim(strtr(base64_encode($data), '+/', '-_'), '=');
$secret = strtok(getenv('WS_SECRET') ?: exit('WS_SECRET is not set'), "\n");   // the first, of several
$claims = json_encode(['sub' => (string) $userId, 'topics' => ['room:7'], 'exp' => time() + 60]);
$signed = $base64url('{"alg":"HS256","typ":"JWT"}') . '.' . $base64url($claims);
$ticket = $signed . '.' . $base64url(hash_hmac('sha256', $signed, $secret, true));
"""

needs_php = pytest.mark.skipif(shutil.which("php") is None, reason="needs PHP's command line (Debian: php-cli)")


def ticket_of_php(user, secret):
    command = ["php", "-d", "error_reporting=-1", "-d", "display_errors=stderr", "-r",
               f"$userId = $argv[1]; {PHP} echo $ticket;", "--", user]
    done = subprocess.run(command, env=environment(WS_SECRET=secret), check=False, capture_output=True,
                          encoding="utf-8", timeout=30 * TIME_UNIT)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@needs_php
@pytest.mark.parametrize("user", ["42", "José", "a/b+c", "long" * 25, '"}{'])
def test_a_ticket_that_php_made_is_accepted(server, user):
    """Five lines of PHP, with nothing installed; and PyJWT reads it, too."""
    ticket = ticket_of_php(user, f"{SECRET}\n{OTHER_SECRET}\n")
    claims = read_by_pyjwt_without_iat(ticket)
    assert (claims["sub"], claims["topics"]) == (user, ["room:7"])
    client, conn = entering(server, in_url(ticket))
    with client:
        assert conn.user == user
        server.broadcast("hello", 1, to="room:7")
        assert client.payloads(1) == [1]


def read_by_pyjwt_without_iat(ticket):
    return jwt.decode(ticket, SECRET, algorithms=["HS256"], options={"require": ["exp", "sub"]})


@needs_php
def test_php_without_a_secret_makes_no_ticket():
    """It says so instead of signing with nothing."""
    assert ticket_of_php("42", "") == "WS_SECRET is not set"
