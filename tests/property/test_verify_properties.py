"""The verifier, for all tokens rather than for some: nothing near a right token passes, and all right tokens do."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carnet.claims import MAX_SCOPES, Claims
from carnet.errors import InvalidTokenError
from carnet.spiffe import SpiffeID
from carnet.verify import Binding, Expectations, assemble, encode_unsigned, parse_unverified
from support.counts import count
from support.measurements import record
from support.tokens import (
    AUDIENCE,
    EXPECTED,
    ISSUER,
    JWK,
    NOW,
    OTHER_PEER,
    PEER,
    accept,
    payload,
    sign,
    token,
)

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
RIGHT = token()

PLAIN = "".join(map(chr, range(0x21, 0x7F))).replace('"', "").replace("\\", "")

spiffe_ids = st.builds(
    SpiffeID,
    st.sampled_from(["prod.example", "staging.example", "a", "a-b_c.9"]),
    st.lists(st.text("azAZ09-_", min_size=1, max_size=6), min_size=1, max_size=4).map(tuple),
)
scope_lists = st.sets(st.text(PLAIN, min_size=1, max_size=9), min_size=1, max_size=5).map(lambda s: tuple(sorted(s)))
token_ids = st.text(ALPHABET, min_size=16, max_size=64)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([ISSUER, AUDIENCE, PEER]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def passes(
    text: str | bytes, *, peer: str | None = PEER, expectations: Expectations = EXPECTED, now: datetime = NOW
) -> bool:
    """Say whether our verifier accepts `text`. It raises nothing but its own error."""
    try:
        accept(text, peer=peer, expectations=expectations, now=now)
    except InvalidTokenError:
        return False
    return True


def accepted_of(changes: list[Callable[[], str]], name: str) -> list[str]:
    """Return which of the changed tokens pass: of all for `make prove`, of some, always the same, for `make test`."""
    taken = count(name, of=len(changes))
    tried = [change() for change in random.Random(name).sample(changes, taken)]  # noqa: S311 - no secret
    accepted = [text for text in tried if passes(text)]
    record(name, {"tried": taken, "of": len(changes), "accepted": len(accepted)})
    return accepted


# --- near a right token ----------------------------------------------------------------------------------------------


def test_j29_every_single_bit_flip_is_refused() -> None:
    """All of them, each time: a token is its bits, all of its bits, and nothing but its bits."""
    raw = RIGHT.encode()
    assert passes(raw)
    accepted = []
    for place in range(len(raw)):
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[place] ^= 1 << bit
            if passes(bytes(flipped)):
                accepted.append((place, bit))
    record("single_bit_flips", {"tried": len(raw) * 8, "of": len(raw) * 8, "accepted": len(accepted)})
    assert [] == accepted


def test_j29_every_single_character_substitution_is_refused() -> None:
    """Every place, every other sign of the alphabet."""
    changes = [
        lambda place=place, sign=sign: RIGHT[:place] + sign + RIGHT[place + 1 :]
        for place in range(len(RIGHT))
        for sign in ALPHABET + "."
        if sign != RIGHT[place]
    ]
    assert [] == accepted_of(changes, "single_substitutions")


def test_j29_every_single_character_insertion_is_refused() -> None:
    """Every place, every sign. Doubling a sign gives one text for both places: it is another token all the same."""
    changes = [
        lambda place=place, sign=sign: RIGHT[:place] + sign + RIGHT[place:]
        for place in range(len(RIGHT) + 1)
        for sign in ALPHABET + ".= \n"
    ]
    assert [] == accepted_of(changes, "single_insertions")


def test_j29_every_single_character_deletion_is_refused() -> None:
    """And every cut: from the front, from the end, and down to nothing."""
    for place in range(len(RIGHT)):
        assert not passes(RIGHT[:place] + RIGHT[place + 1 :])
        assert not passes(RIGHT[:place])
        assert not passes(RIGHT[place + 1 :])


def test_j29_every_swap_of_neighbours_is_refused() -> None:
    """Unless they are the same, when nothing has changed."""
    for place in range(len(RIGHT) - 1):
        swapped = RIGHT[:place] + RIGHT[place + 1] + RIGHT[place] + RIGHT[place + 2 :]
        assert (swapped == RIGHT) is passes(swapped)


# --- any input -------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=400) | st.text(max_size=400) | st.text(ALPHABET + ".=", max_size=400))
@settings(max_examples=count("any_input"), deadline=None)
def test_any_input_gives_an_answer(raw: bytes | str) -> None:
    """No input makes the verifier fail in another way than by saying no."""
    assert not passes(raw)


@given(
    st.dictionaries(st.sampled_from(["alg", "typ", "kid", "crit", ""]), json_values),
    json_values,
    st.binary(max_size=70),
)
@settings(max_examples=count("any_parts"), deadline=None)
def test_any_json_in_the_right_places_gives_an_answer(head: dict[str, Any], body: object, signature: bytes) -> None:
    """Whatever the parts hold, also if the signature over them is right."""
    body_text = json.dumps(body).encode()
    for text in (token(head, body_text), token(None, body_text), token(None, body_text, signature=signature)):
        assert not passes(text)


@given(st.sampled_from(sorted(payload())), json_values)
@settings(max_examples=count("any_claim"), deadline=None)
def test_any_value_of_a_claim_gives_an_answer(name: str, value: object) -> None:
    """A signed token with one claim of any kind: refused, or its claims are what was signed."""
    body = json.dumps(payload() | {name: value}).encode()
    try:
        claims = accept(token(None, body))
    except InvalidTokenError:
        return
    assert json.loads(body) == claims.to_payload()


# --- there and back --------------------------------------------------------------------------------------------------


@st.composite
def right_claims(draw: st.DrawFn, now: datetime = NOW) -> Claims:
    """Claims that a verifier of `EXPECTED` accepts at `now`, and for a minute after it."""
    issued_at = now + timedelta(seconds=draw(st.integers(-3600, 30)))
    return Claims(
        issuer=ISSUER,
        subject=draw(spiffe_ids),
        audience=AUDIENCE,
        client_id=draw(spiffe_ids),
        expires_at=now + timedelta(seconds=draw(st.integers(60, 3600))),
        issued_at=issued_at,
        not_before=now + timedelta(seconds=draw(st.integers(-7200, 30))),
        token_id=draw(token_ids),
        scopes=draw(scope_lists),
        confirmation=draw(st.sampled_from([PEER, OTHER_PEER])),
        revocation_version=draw(st.integers(0, 2**53 - 1)),
    )


@given(right_claims())
@settings(max_examples=count("round_trip"), deadline=None)
def test_what_is_minted_comes_back_as_it_was(claims: Claims) -> None:
    """Encode, sign, assemble, verify."""
    signing_input = encode_unsigned(claims, JWK.kid)
    text = assemble(signing_input, sign(signing_input))
    assert claims == accept(text, peer=claims.confirmation)
    assert claims.to_payload() == parse_unverified(text).unverified_payload


@given(
    right_claims(),
    st.sampled_from(Binding),
    st.sampled_from([None, PEER, OTHER_PEER]),
    st.sampled_from(["bound", "unbound"]),
)
@settings(max_examples=count("binding"), deadline=None)
def test_a_bound_token_never_passes_on_a_connection_that_is_known_to_be_another(
    claims: Claims, binding: Binding, peer: str | None, form: str
) -> None:
    """Whatever the verifier was built for; and one that wants binding accepts nothing but a match."""
    bound = form == "bound"
    claims = claims if bound else replace(claims, confirmation=None)
    signing_input = encode_unsigned(claims, JWK.kid)
    text = assemble(signing_input, sign(signing_input))
    passed = passes(text, peer=peer, expectations=replace(EXPECTED, binding=binding))
    match = bound and peer == claims.confirmation
    assert (match or (binding is Binding.NONE and (not bound or peer is None))) is passed


@given(right_claims(), st.integers(-(10**9), 10**9))
@settings(max_examples=count("times"), deadline=None)
def test_a_token_is_good_from_its_begin_to_its_end_and_at_no_other_time(claims: Claims, microseconds: int) -> None:
    """Begin less 30 seconds, included; end, excluded."""
    signing_input = encode_unsigned(claims, JWK.kid)
    text = assemble(signing_input, sign(signing_input))
    begin = max(claims.issued_at, claims.not_before) - timedelta(seconds=30)
    for moment in (begin, claims.expires_at):
        now = moment + timedelta(microseconds=microseconds)
        assert (begin <= now < claims.expires_at) is passes(text, peer=claims.confirmation, now=now)


@pytest.mark.parametrize("scopes", [1, MAX_SCOPES])
def test_the_number_of_scopes_at_its_limits_survives(scopes: int) -> None:
    """One, and as many as there may be."""
    wanted = tuple(sorted(f"scope-{n:03}" for n in range(scopes)))
    assert wanted == accept(token(None, payload(scope=" ".join(wanted)))).scopes
