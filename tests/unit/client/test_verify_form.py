from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from collections.abc import Callable

import pytest

from carnet.encoding import base64url
from carnet.errors import InvalidTokenError, InvalidTokenReason
from carnet.verify import MAX_HEADER_BYTES, MAX_TOKEN_BYTES, parse_unverified
from support.tokens import PEER, accept, compact, header, payload, refusal, split, token

MALFORMED, INVALID = InvalidTokenReason.MALFORMED, InvalidTokenReason.INVALID_CLAIM
HEAD, BODY, SIGNATURE = token().split(".")


def cost(text: str | bytes) -> tuple[float, int]:
    """Parse a token that is refused; return the least time of many tries in ms, and the peak of extra memory in bytes.

    The least time: what the machine does beside is not the parser's cost.
    """
    times = []
    tracer = sys.gettrace()
    sys.settrace(None)  # Measuring coverage costs more than parsing.
    try:
        for _ in range(20):
            begin = time.perf_counter()
            with pytest.raises(InvalidTokenError):
                parse_unverified(text)
            times.append(time.perf_counter() - begin)
    finally:
        sys.settrace(tracer)
    gc.collect()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidTokenError):
            parse_unverified(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return min(times) * 1000, peak


def of_length(length: int) -> str:
    """Return a right token of exactly `length` bytes, filled up with white space where JSON allows it."""
    for head_fill in range(3):
        head = compact(header()).replace(b"{", b"{" + b" " * head_fill)
        free = length - len(base64url(head)) - len(SIGNATURE) - 2
        body = compact(payload())
        if free % 4 != 1:  # No base64url text has such a length.
            return token(head, body.replace(b"{", b"{" + b" " * (free * 3 // 4 - len(body)), 1))
    raise AssertionError


@pytest.mark.parametrize("form", [str, str.encode], ids=["str", "bytes"])
def test_a_token_is_a_text_or_bytes(form: Callable[[str], str | bytes]) -> None:
    """Metadata gives either."""
    assert "payments" == accept(form(token())).audience


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "=." + BODY + "." + SIGNATURE,
        HEAD + "." + BODY + "=." + SIGNATURE,
        HEAD + "." + BODY + "." + SIGNATURE + "=",
        HEAD + "." + BODY + "." + SIGNATURE + "==",
        HEAD + "." + BODY + "." + SIGNATURE + "\n",
        HEAD + "." + BODY + "." + SIGNATURE + " ",
        " " + HEAD + "." + BODY + "." + SIGNATURE,
        "Bearer " + HEAD + "." + BODY + "." + SIGNATURE,
        HEAD + " ." + BODY + "." + SIGNATURE,
        HEAD + "." + BODY[:8] + "\n" + BODY[8:] + "." + SIGNATURE,
        HEAD + "." + BODY[:8] + "?" + BODY[8:] + "." + SIGNATURE,
        HEAD + "." + BODY + "." + SIGNATURE[:8] + " " + SIGNATURE[8:],
        HEAD + "." + BODY + "." + SIGNATURE[:-1] + chr(ord(SIGNATURE[-1]) + 1),
        "." + HEAD + "." + BODY + "." + SIGNATURE,
        HEAD + "." + BODY + "." + SIGNATURE + ".",
        "." + BODY + "." + SIGNATURE,
        HEAD + ".." + SIGNATURE,
        HEAD + "." + BODY + ".",
        HEAD + "." + BODY,
        HEAD,
        "",
        "..",
        "....",
        HEAD + "." + BODY + "." + SIGNATURE + "." + BODY,
        HEAD + "." + BODY + "." + SIGNATURE + "." + BODY + "." + BODY,
        "\N{ZERO WIDTH SPACE}" + token(),
        "\ufeff" + token(),
        token().replace("e", "\N{CYRILLIC SMALL LETTER IE}", 1),
    ],
)
def test_j12_a_token_in_another_spelling_is_refused(text: str) -> None:
    """Padding, white space, foreign signs, unused bits, empty parts, and any other number of parts."""
    assert MALFORMED is refusal(text)
    assert MALFORMED is refusal(text.encode())


def test_j12_the_standard_alphabet_is_refused() -> None:
    """A token that has both signs of the URL-safe alphabet, with either of them in its standard form."""
    jti = next(n for n in range(10_000) if {"-", "_"} <= set(token(None, payload(jti=f"{n:032}"))))
    text = token(None, payload(jti=f"{jti:032}"))
    assert accept(text)
    assert MALFORMED is refusal(text.replace("-", "+"))
    assert MALFORMED is refusal(text.replace("_", "/"))


def test_j12_the_signature_has_64_bytes() -> None:
    """Neither one more nor one less, whatever the bytes are."""
    right = split(token())[2]
    for wrong in (right[:-1], right + b"\0", b"\0" + right, right * 2, b"\0"):
        assert MALFORMED is refusal(token(signature=wrong))


@pytest.mark.parametrize(
    "text",
    [
        compact({"protected": HEAD, "payload": BODY, "signature": SIGNATURE}).decode(),
        compact({"payload": BODY, "signatures": [{"protected": HEAD, "signature": SIGNATURE}]}).decode(),
        compact({"payload": BODY, "signatures": []}).decode(),
        base64url(compact({"alg": "dir", "enc": "A256GCM"})).decode() + "..AAAA.AAAA.AAAA",
        base64url(compact({"alg": "RSA-OAEP", "enc": "A256GCM", "zip": "DEF"})).decode() + ".AA.AAAA.AAAA.AAAA",
        base64url(compact({"alg": "PBES2-HS256+A128KW", "enc": "A128GCM", "p2c": 2**31 - 1})).decode() + ".AA.AA.AA.AA",
        base64url(compact(header(alg="PBES2-HS256+A128KW", p2c=2**31 - 1, p2s="AAAA"))).decode()
        + f".{BODY}.{SIGNATURE}",
    ],
    ids=["flattened", "general", "no-signatures", "jwe-dir", "jwe-zip", "jwe-p2c", "jws-p2c"],
)
def test_j13_other_serialisations_are_refused_before_any_work(text: str) -> None:
    """JSON forms of a JWS, and every JWE, however much work its header asks for."""
    milliseconds, peak = cost(text)
    assert refusal(text) in {MALFORMED, InvalidTokenReason.BAD_ALGORITHM}
    assert milliseconds < 1
    assert peak < 1_000_000


@pytest.mark.parametrize("length", [MAX_TOKEN_BYTES - 1, MAX_TOKEN_BYTES])
def test_j14_a_token_up_to_8_kib_is_accepted(length: int) -> None:
    """The limit itself is allowed."""
    text = of_length(length)
    assert length == len(text)
    assert accept(text)


@pytest.mark.parametrize("length", [MAX_TOKEN_BYTES + 1, 1_000_001])
def test_j14_a_token_over_8_kib_is_refused_although_it_is_right(length: int) -> None:
    """One byte more, and much more."""
    text = of_length(length)
    assert length == len(text)
    assert MALFORMED is refusal(text)
    assert MALFORMED is refusal(text.encode())


def test_j14_a_header_up_to_1_kib_is_accepted_and_one_byte_more_is_not() -> None:
    """Measured before it is parsed."""
    head = compact(header())
    full = head.replace(b"{", b"{" + b" " * (MAX_HEADER_BYTES - len(head)))
    assert MAX_HEADER_BYTES == len(full)
    assert accept(token(full))
    assert MALFORMED is refusal(token(full.replace(b"{", b"{ ")))


HEAVY = {
    "16-mb": "A" * 16_000_000,
    "16-mb-in-parts": HEAD + "." + "A" * 16_000_000 + "." + SIGNATURE,
    "dots": "." * MAX_TOKEN_BYTES,
    "dots-16-mb": "." * 16_000_000,
    "nested-10^5": token(None, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "nested-in-limit": token(None, b'{"a":' + b"[" * 2500 + b"]" * 2500 + b"}"),
    "nested-objects": token(None, b'{"a":' * 900 + b"1" + b"}" * 900),
    "nested-header": token(b'{"a":' + b"[" * 400 + b"]" * 400 + b"}"),
    "lists-side-by-side": token(None, b'{"a":[' + b"[]," * 1500 + b"[]]}"),
    "members-10^5": token(None, compact({f"m{n}": 1 for n in range(100_000)})),
    "digits-10^6": token(None, b'{"exp":' + b"9" * 1_000_000 + b"}"),
    "digits-in-limit": token(None, b'{"exp":' + b"9" * 5000 + b"}"),
    "exponent": token(None, b'{"exp":1e' + b"9" * 5000 + b"}"),
    "audiences-10^5": token(None, payload(aud=["a"] * 100_000)),
    "not-ascii": "\xe9" * MAX_TOKEN_BYTES,
    "open-text": token(None, b'{"a":"' + b"a" * 5000 + b"}"),
    "same-member": token(None, b"{" + b'"a":1,' * 900 + b'"a":1}'),
}


@pytest.mark.parametrize("text", HEAVY.values(), ids=HEAVY)
def test_j14_what_is_heavy_is_refused_in_under_1_ms_and_1_mb(text: str) -> None:
    """Whoever can reach a service can send this: it must cost no more than any other call."""
    milliseconds, peak = cost(text)
    assert milliseconds < 1
    assert peak < 1_000_000
    assert MALFORMED is refusal(text)


@pytest.mark.parametrize(
    "body",
    [
        compact(payload(**{f"m{n}": 1 for n in range(500)})),
        compact(payload(aud=["a"] * 1000)),
        compact({"a": "b" * 5000}),
    ],
    ids=["members", "audiences", "long-text"],
)
def test_j14_what_fits_the_limits_but_not_the_profile_is_refused_for_its_claims(body: bytes) -> None:
    """With a right signature it gets as far as the claims, and no further."""
    assert refusal(token(None, body)) in {INVALID, InvalidTokenReason.MISSING_CLAIM}


RIGHT_BODY = compact(payload())


@pytest.mark.parametrize(
    "body",
    [
        b"\xef\xbb\xbf" + RIGHT_BODY,
        RIGHT_BODY.decode().encode("utf-16"),
        RIGHT_BODY.decode().encode("utf-16-le"),
        RIGHT_BODY.decode().encode("utf-32"),
        RIGHT_BODY.replace(b"charge", b"ch\xffrge"),
        RIGHT_BODY.replace(b"charge", b"ch\xc0\xafrge"),
        RIGHT_BODY.replace(b"charge", b"ch\xed\xa0\x80rge"),
        RIGHT_BODY.replace(b"charge", rb"ch\ud800rge"),
        RIGHT_BODY.replace(b"charge", rb"ch\u0000rge"),
        RIGHT_BODY.replace(b"charge", b"ch\x00rge"),
        RIGHT_BODY.replace(b"charge", b"ch\trge"),
        RIGHT_BODY.replace(b"charge", rb"ch\u0061rge"),
        RIGHT_BODY.replace(b"charge", "ch\N{CYRILLIC SMALL LETTER A}rge".encode()),
        RIGHT_BODY + b" ",
        b" " + RIGHT_BODY,
        RIGHT_BODY + b"\n",
        RIGHT_BODY + b"\0",
        RIGHT_BODY + RIGHT_BODY,
        RIGHT_BODY + b",{}",
        RIGHT_BODY[:-1] + b",}",
        RIGHT_BODY[:-1],
        b"[" + RIGHT_BODY + b"]",
        b'"' + base64url(RIGHT_BODY) + b'"',
        b"null",
        b"true",
        b"1",
        b"{",
        b"exp=1",
    ],
)
def test_j15_a_payload_that_is_not_one_plain_json_object_is_refused(body: bytes) -> None:
    """Signed, and still no token: byte order marks, other encodings, broken text, and other documents."""
    assert MALFORMED is refusal(token(None, body))


@pytest.mark.parametrize("name", ["iss", "sub", "aud", "client_id", "exp", "jti", "scope", "rv", "cnf"])
def test_j11_a_claim_that_stands_twice_is_refused(name: str) -> None:
    """First or last, the same value or another: two readers would see two tokens."""
    value = compact({name: payload()[name]})[1:-1]
    for twice in (RIGHT_BODY[:-1] + b"," + value + b"}", b"{" + value + b"," + RIGHT_BODY[1:]):
        assert MALFORMED is refusal(token(None, twice))
    assert MALFORMED is refusal(token(None, RIGHT_BODY[:-1] + b"," + compact({name: "other"})[1:]))


@pytest.mark.parametrize(
    "nested",
    [
        f'"cnf":{{"x5t#S256":"{PEER}","x5t#S256":"{PEER}"}}',
        r'"cnf":{"x5t#S256":"A","x5t\u0023S256":"B"}',
        '"act":{"sub":"a","sub":"b"}',
        '"act":{"sub":"a","act":{"sub":"a","sub":"b"}}',
    ],
)
def test_j11_a_member_that_stands_twice_inside_a_claim_is_refused(nested: str) -> None:
    """At every depth, also by another spelling."""
    assert MALFORMED is refusal(token(None, compact(payload(cnf=...))[:-1] + b"," + nested.encode() + b"}"))


def test_the_parts_of_a_token_are_shown_without_what_could_be_replayed() -> None:
    """An unverified token in a log or a traceback is not a token."""
    text = token()
    parts = parse_unverified(text)
    head, body, signature = text.split(".")
    assert f"{head}.{body}".encode() == parts.signing_input
    assert split(text)[2] == parts.signature
    assert payload() == parts.unverified_payload
    for part in (head, body, signature, repr(parts.signature)):
        assert part not in repr(parts)


def test_parsing_believes_nothing() -> None:
    """A signature that is not one, claims that are none: the form is right, and that is all that is said."""
    parts = parse_unverified(token(None, {"anything": ["goes", 1]}, signature=bytes(64)))
    assert {"anything": ["goes", 1]} == parts.unverified_payload
