from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from carnet.claims import Claims, claims_of_payload
from carnet.encoding import base64url, encode_json
from carnet.errors import CarnetError, ConfigError, InvalidTokenError, InvalidTokenReason
from carnet.verify import (
    MAX_TOKEN_BYTES,
    SIGNATURE_BYTES,
    Binding,
    Expectations,
    assemble,
    encode_unsigned,
    parse_unverified,
    verify_token,
)
from support.tokens import (
    AUDIENCE,
    EXPECTED,
    ISSUER,
    JWK,
    KEYS,
    LIFE,
    NOW,
    ORDERS,
    OTHER_JWK,
    OTHER_KEY,
    OTHER_PEER,
    PEER,
    UNBOUND,
    accept,
    compact,
    header,
    payload,
    refusal,
    seconds,
    sign,
    token,
)

Reason = InvalidTokenReason
SECOND = timedelta(seconds=1)
LEEWAY = timedelta(seconds=30)


def claims(**changes: object) -> Claims:
    """Return right claims with `changes` to the payload."""
    return claims_of_payload(payload(**changes))


def test_a_right_token_gives_its_claims() -> None:
    """All of them, typed."""
    assert claims() == accept(token())


# --- what the token is for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "iss",
    [
        "https://tokens.prod.example/",
        "https://tokens.prod.exampl",
        "https://tokens.prod.example.evil",
        "https://TOKENS.prod.example",
        "HTTPS://tokens.prod.example",
        "http://tokens.prod.example",
        "https://tokens.prod.example:443",
        "https://user@tokens.prod.example",
        "https://tokens.prod.example#x",
        "https://tokens.staging.example",
        "tokens.prod.example",
        "*",
    ],
)
def test_j21_another_issuer_is_refused(iss: str) -> None:
    """CVE-2024-53861: no prefix, no suffix, no case, no second spelling of one URL."""
    assert Reason.WRONG_ISSUER is refusal(token(None, payload(iss=iss)))


@pytest.mark.parametrize("iss", [..., None, 7, [ISSUER], {"iss": ISSUER}, "", ISSUER + " ", ISSUER + "\x7f"])
def test_j21_an_issuer_that_is_no_name_is_refused(iss: object) -> None:
    """A list that contains the right one is not the right one."""
    assert refusal(token(None, payload(iss=iss))) in {Reason.INVALID_CLAIM, Reason.MISSING_CLAIM, Reason.MALFORMED}


def test_j25_staging_is_not_production_even_with_the_same_key() -> None:
    """The same key and the same kid: the issuer tells them apart, and each verifier trusts one."""
    staging = token(None, payload(iss="https://tokens.staging.example"))
    assert Reason.WRONG_ISSUER is refusal(staging)
    assert accept(staging, expectations=replace(EXPECTED, issuer="https://tokens.staging.example"))


@pytest.mark.parametrize(
    "aud",
    ["bank", "payment", "paymentss", "payments-eu", "payments-", "PAYMENTS", "Payments", "payments/", "*", "pay*"],
)
def test_j20_another_audience_is_refused(aud: str) -> None:
    """Compared whole, and letter by letter."""
    assert Reason.WRONG_AUDIENCE is refusal(token(None, payload(aud=aud)))


@pytest.mark.parametrize(
    "aud",
    [
        ...,
        None,
        "",
        [],
        ["payments"],
        ["payments", "bank"],
        [["payments"]],
        [1, "payments"],
        {"payments": 1},
        7,
        True,
        "payments ",
        "payments\x00",
        "p\N{CYRILLIC SMALL LETTER A}yments",
        "paym\N{LATIN SMALL LETTER E WITH ACUTE}nts",
        "payme\N{COMBINING ACUTE ACCENT}nts",
    ],
)
def test_j20_an_audience_that_is_not_one_plain_name_is_refused(aud: object) -> None:
    """No list, even of one; nothing that only looks the same."""
    assert refusal(token(None, payload(aud=aud))) in {Reason.INVALID_CLAIM, Reason.MISSING_CLAIM, Reason.MALFORMED}


@pytest.mark.parametrize("name", ["sub", "client_id"])
@pytest.mark.parametrize(
    "value", [..., 7, [ORDERS], "orders", "spiffe://prod.example/a/../admin", "spiffe://prod.example/%61"]
)
def test_j22_a_subject_or_client_that_is_no_spiffe_id_is_refused(name: str, value: object) -> None:
    """Who it is from is as strict as in a certificate."""
    assert refusal(token(None, payload(**{name: value}))) in {Reason.INVALID_CLAIM, Reason.MISSING_CLAIM}


# --- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ahead", "good"), [(-31, False), (-30, False), (-1, False), (0, False), (1, True), (2, True)])
def test_j19_exp_has_no_leeway(ahead: int, good: bool) -> None:
    """RFC 7519 section 4.1.4: on or after exp the token is over; 30 seconds of grace would be 30 seconds more."""
    text = token(None, payload(exp=seconds(NOW) + ahead, iat=seconds(NOW) - 60, nbf=seconds(NOW) - 60))
    if good:
        assert accept(text)
    else:
        assert Reason.EXPIRED is refusal(text)


def test_j19_a_token_is_good_to_the_last_microsecond() -> None:
    """Between two seconds it is not rounded in anybody's favour."""
    end = NOW + LIFE
    assert accept(token(), now=end - timedelta(microseconds=1))
    assert Reason.EXPIRED is refusal(token(), now=end)


@pytest.mark.parametrize("name", ["nbf", "iat"])
@pytest.mark.parametrize(("ahead", "good"), [(-1, True), (0, True), (29, True), (30, True), (31, False), (3600, False)])
def test_j19_nbf_and_iat_have_30_seconds_of_leeway(name: str, ahead: int, good: bool) -> None:
    """Clocks differ; at the leeway itself the token is good."""
    text = token(None, payload(exp=seconds(NOW) + 7200, **{name: seconds(NOW) + ahead}))
    if good:
        assert accept(text)
    else:
        assert Reason.NOT_YET_VALID is refusal(text)


def test_j19_the_leeway_is_exact_and_settable() -> None:
    """One microsecond over it is over it; none is none."""
    text = token()
    assert accept(text, now=NOW - LEEWAY)
    assert Reason.NOT_YET_VALID is refusal(text, now=NOW - LEEWAY - timedelta(microseconds=1))
    strict = replace(EXPECTED, leeway=timedelta())
    assert accept(text, now=NOW, expectations=strict)
    assert Reason.NOT_YET_VALID is refusal(text, now=NOW - timedelta(microseconds=1), expectations=strict)


def test_j19_an_old_token_with_a_late_end_is_refused_for_its_life() -> None:
    """Issued ten years ago and over in a second: no token of ours lives so long, whoever signed it."""
    ten_years_ago = seconds(NOW - timedelta(days=3650))
    assert Reason.INVALID_CLAIM is refusal(
        token(None, payload(iat=ten_years_ago, nbf=ten_years_ago, exp=seconds(NOW) + 1))
    )


@pytest.mark.parametrize(("life", "good"), [(86_399, True), (86_400, True), (86_401, False), (10**5, False)])
def test_j18_a_life_over_the_limit_is_refused(life: int, good: bool) -> None:
    """24 hours by default, with no leeway on top."""
    text = token(None, payload(exp=seconds(NOW) + life))
    if good:
        assert accept(text)
    else:
        assert Reason.INVALID_CLAIM is refusal(text)


def test_the_longest_life_is_settable() -> None:
    """A verifier may want less than the issuer would give."""
    assert accept(token(), expectations=replace(EXPECTED, max_life=LIFE))
    assert Reason.INVALID_CLAIM is refusal(token(), expectations=replace(EXPECTED, max_life=LIFE - SECOND))


@pytest.mark.parametrize(
    "exp",
    [
        b'"123"',
        b"1.5",
        b"1e400",
        b"1e3",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"true",
        b"null",
        b"-1",
        b"[1]",
        b"{}",
        b"1.0",
        b"9007199254740993",
        b"9223372036854775808",
        b"1" + b"0" * 5000,
        b"0x1",
        b"+1",
        b"01",
        b'""',
        b"253402300800",
    ],
)
def test_j18_an_end_that_is_no_time_is_refused(exp: bytes) -> None:
    """By the text as it was sent: Python would read several of these as numbers."""
    right = b'"exp":%d' % (seconds(NOW) + 300)
    body = compact(payload())
    assert right in body
    assert refusal(token(None, body.replace(right, b'"exp":' + exp))) in {Reason.MALFORMED, Reason.INVALID_CLAIM}


def test_j18_zero_and_missing_ends_are_refused() -> None:
    """The epoch is a time, and a long time ago."""
    assert Reason.EXPIRED is refusal(token(None, payload(exp=1, iat=0, nbf=0)))
    assert Reason.INVALID_CLAIM is refusal(token(None, payload(exp=0, iat=0, nbf=0)))
    assert Reason.MISSING_CLAIM is refusal(token(None, payload(exp=...)))


@pytest.mark.parametrize("offset", [-12, 5, 14])
def test_the_time_is_a_moment_not_a_clock_face(offset: int) -> None:
    """An aware time of any zone means the same."""
    local = (NOW + LIFE - SECOND).astimezone(timezone(timedelta(hours=offset)))
    assert accept(token(), now=local)
    assert Reason.EXPIRED is refusal(token(), now=local + SECOND)


def test_a_time_without_zone_is_an_error_of_the_caller() -> None:
    """It is not taken for UTC, and not for the machine's zone either."""
    with pytest.raises(TypeError, match="naive"):
        accept(token(), now=NOW.replace(tzinfo=None))


# --- who holds it ----------------------------------------------------------------------------------------------------

UNBOUND_TOKEN = token(None, payload(cnf=...))


def test_j26_a_bound_token_is_good_on_the_connection_of_its_holder() -> None:
    """The certificate that TLS saw is the one that the token names."""
    assert PEER == accept(token(), peer=PEER).confirmation


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (None, Reason.NO_PEER_CERTIFICATE),
        (OTHER_PEER, Reason.WRONG_CONFIRMATION),
        (PEER.upper(), Reason.WRONG_CONFIRMATION),
        (PEER.lower(), Reason.WRONG_CONFIRMATION),
        (PEER + "=", Reason.WRONG_CONFIRMATION),
        (PEER[:-1], Reason.WRONG_CONFIRMATION),
        ("", Reason.WRONG_CONFIRMATION),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}", Reason.WRONG_CONFIRMATION),
    ],
)
def test_j26_a_bound_token_is_refused_on_any_other_connection(peer: str | None, expected: InvalidTokenReason) -> None:
    """No certificate, and another one, differ: the second may be a holder that renewed, whose client can ask anew."""
    assert expected is refusal(token(), peer=peer)


@pytest.mark.parametrize("cnf", [PEER.upper(), OTHER_PEER], ids=["upper-case", "other"])
def test_j26_a_token_for_another_certificate_is_refused(cnf: str) -> None:
    """Base64url tells case apart."""
    assert Reason.WRONG_CONFIRMATION is refusal(token(None, payload(cnf={"x5t#S256": cnf})))


def test_j26_an_unbound_token_is_refused_where_bound_ones_are_expected() -> None:
    """Whether the caller has a certificate or not."""
    assert Reason.MISSING_CLAIM is refusal(UNBOUND_TOKEN)
    assert Reason.NO_PEER_CERTIFICATE is refusal(UNBOUND_TOKEN, peer=None)


@pytest.mark.parametrize("cnf", [None, {}, PEER, {"x5t": "yYMz1CcFbOoLGCXV8L9j9Xk1QyE"}, {"x5t#S256": PEER, "jwk": {}}])
def test_j26_a_confirmation_that_is_none_is_refused_by_every_verifier(cnf: object) -> None:
    """Also by one that would accept a token with no confirmation at all."""
    for expectations in (EXPECTED, UNBOUND):
        assert Reason.INVALID_CLAIM is refusal(token(None, payload(cnf=cnf)), expectations=expectations)


@pytest.mark.parametrize("peer", [None, PEER, OTHER_PEER])
def test_a_verifier_without_binding_accepts_unbound_tokens(peer: str | None) -> None:
    """It was built for them, whoever calls."""
    assert None is accept(UNBOUND_TOKEN, expectations=UNBOUND, peer=peer).confirmation


def test_a_verifier_without_binding_still_checks_what_it_can() -> None:
    """A bound token on the wrong connection is a stolen one; only where no certificate is known it cannot be told."""
    assert accept(token(), expectations=UNBOUND, peer=PEER)
    assert accept(token(), expectations=UNBOUND, peer=None)
    assert Reason.WRONG_CONFIRMATION is refusal(token(), expectations=UNBOUND, peer=OTHER_PEER)


# --- in which order --------------------------------------------------------------------------------------------------

WRONG_CLAIMS = payload(iss="https://evil.example", aud="bank", exp=1, iat=0, nbf=0, cnf={"x5t#S256": OTHER_PEER})


def test_an_unknown_key_is_told_before_anything_is_believed() -> None:
    """The verifier asks for new keys on this reason, so no wrong claim and no wrong signature may hide it."""
    assert Reason.UNKNOWN_KEY is refusal(token(header(kid=OTHER_JWK.kid), WRONG_CLAIMS, signature=bytes(64)))
    assert Reason.MALFORMED is refusal(token(header(kid=OTHER_JWK.kid, typ="JWT"), WRONG_CLAIMS))


@pytest.mark.parametrize("body", [WRONG_CLAIMS, {}, {"exp": 1}, payload(act={}), payload(cnf=...)])
def test_the_signature_is_judged_before_any_claim(body: dict[str, object]) -> None:
    """What an unsigned claim says is nothing, not even a reason."""
    assert Reason.BAD_SIGNATURE is refusal(token(None, body, key=OTHER_KEY), peer=None)


def test_of_several_wrong_claims_the_first_in_order_is_told() -> None:
    """Form, issuer, audience, times, life, holder: each is seen once those before it are right."""
    far = {"iat": seconds(NOW) + 3600, "nbf": seconds(NOW) + 3600, "exp": seconds(NOW) + 10**6}
    other = {"cnf": {"x5t#S256": OTHER_PEER}}
    assert [
        Reason.INVALID_CLAIM,
        Reason.WRONG_ISSUER,
        Reason.WRONG_AUDIENCE,
        Reason.EXPIRED,
        Reason.NOT_YET_VALID,
        Reason.INVALID_CLAIM,
        Reason.WRONG_CONFIRMATION,
    ] == [
        refusal(token(None, WRONG_CLAIMS | {"jti": "short"})),
        refusal(token(None, WRONG_CLAIMS)),
        refusal(token(None, WRONG_CLAIMS | {"iss": ISSUER})),
        refusal(token(None, WRONG_CLAIMS | {"iss": ISSUER, "aud": AUDIENCE})),
        refusal(token(None, payload(**far, **other))),
        refusal(token(None, payload(exp=seconds(NOW) + 10**6, **other))),
        refusal(token(None, payload(**other))),
    ]


# --- what is said about it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "verifier", "message"),
    [
        (
            payload(iss="https://tokens.staging.example"),
            {},
            "the token is from issuer 'https://tokens.staging.example' where 'https://tokens.prod.example' is expected",
        ),
        (payload(aud="bank"), {}, "the token is for audience 'bank' where 'payments' is expected"),
        (payload(), {"now": NOW + LIFE}, "the token ended at 2026-11-24T12:05:00Z"),
        (
            payload(),
            {"now": NOW - timedelta(hours=1)},
            "the token begins at 2026-11-24T12:00:00Z, and its issuer's clock may be ahead",
        ),
        (
            payload(exp=seconds(NOW) + 90_000),
            {},
            "the token lives 1 day, 1:00:00, longer than the 1 day, 0:00:00 allowed",
        ),
        (payload(), {"peer": OTHER_PEER}, "the token is bound to another certificate than the caller's"),
        (
            payload(),
            {"peer": None},
            "the caller's certificate is not known, and this verifier accepts bound tokens only",
        ),
        (payload(cnf=...), {}, "the token has no cnf, and this verifier accepts bound tokens only"),
        (payload(scope=...), {}, "claims missing: scope"),
        (payload(extra=1), {}, "claim 'extra' is not in the profile"),
    ],
)
def test_the_error_names_what_is_wrong(body: dict[str, object], verifier: dict[str, object], message: str) -> None:
    """For the log of the service that refuses; its caller is told nothing of this."""
    with pytest.raises(InvalidTokenError) as caught:
        accept(token(None, body), **verifier)  # type: ignore[arg-type]
    assert message == str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        token(None, payload(iss="i" * 255)),
        token(None, payload(aud="a" * 255)),
        token(None, payload(sub="s" * 3000)),
        token(None, payload(sub="spiffe://prod.example/" + "%" * 1900)),
        token(None, payload(**{"\x7f" * 300: 1})),
        token(None, payload(**{"n" * 3000: 1})),
        token(header(alg="n" * 600)),
        token(header(typ="n" * 600)),
        token(header(kid="n" * 600)),
        token(header(**{"n" * 600: 1})),
        token(header(kid=OTHER_JWK.kid)),
        token(key=OTHER_KEY),
        token(signature=b"short"),
        token() + "=",
        token() * 20,
        token(None, b'{"a":' + b"s" * 3000 + b"}"),
        "\xe9" + token(),
    ],
)
def test_b11_the_error_never_holds_the_token_or_much_of_what_is_in_it(text: str) -> None:
    """One line of plain signs, short, with no part of the encoded token in it. So is its cause."""
    with pytest.raises(InvalidTokenError) as caught:
        accept(text)
    for error in (caught.value, caught.value.__cause__, caught.value.__context__):
        message = str(error or "")
        assert len(message) < 250
        assert message.isprintable()
        assert [] == [part for part in text.split(".") if len(part) > 20 and part[:20] in message]


def test_the_error_is_of_one_class_with_a_reason() -> None:
    """A caller reacts to the class; the reason is for its log."""
    with pytest.raises(CarnetError) as caught:
        accept("")
    assert isinstance(caught.value, InvalidTokenError)
    assert ("INVALID_TOKEN", False) == (caught.value.code, caught.value.retryable)


# --- what is expected ------------------------------------------------------------------------------------------------


def test_expectations_default_to_the_strict_side() -> None:
    """Bound tokens only, 30 seconds of leeway, a day at most."""
    assert Expectations(ISSUER, AUDIENCE, Binding.CERTIFICATE, LEEWAY, timedelta(hours=24)) == EXPECTED
    with pytest.raises(FrozenInstanceError):
        EXPECTED.binding = Binding.NONE  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer": ""},
        {"audience": ""},
        {"issuer": "a b"},
        {"audience": "a" * 256},
        {"leeway": -SECOND},
        {"max_life": timedelta()},
        {"max_life": -SECOND},
    ],
)
def test_expectations_that_nothing_or_everything_could_meet_are_refused(changes: dict[str, object]) -> None:
    """An empty expectation is a mistake in the configuration, and not a wish to accept all."""
    with pytest.raises(ConfigError):
        replace(EXPECTED, **changes)  # type: ignore[arg-type]


# --- writing ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_accepted() -> None:
    """Encode, sign, assemble, verify: the claims come back."""
    signing_input = encode_unsigned(claims(), JWK.kid)
    text = assemble(signing_input, sign(signing_input))
    assert claims() == accept(text)
    assert token() == text  # The same bytes as the tests' own writer makes.


def test_the_header_is_exactly_three_members_in_one_order() -> None:
    """So all tokens of one key begin with the same text."""
    head, body = encode_unsigned(claims(), JWK.kid).split(b".")
    assert base64url(b'{"alg":"ES256","typ":"at+jwt","kid":"%s"}' % JWK.kid.encode()) == head
    assert base64url(encode_json(payload())) == body


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer": "not a name"},
        {"audience": ""},
        {"token_id": "short"},
        {"scopes": ()},
        {"scopes": ("b", "a")},
        {"scopes": ("a b",)},
        {"scopes": ("a", "a")},
        {"confirmation": "short"},
        {"confirmation": ""},
        {"revocation_version": -1},
        {"revocation_version": True},
        {"expires_at": NOW},
        {"expires_at": NOW + LIFE + timedelta(microseconds=1)},
        {"issued_at": NOW.replace(tzinfo=None)},
        {"not_before": NOW + LIFE + SECOND},
        {"expires_at": datetime(1969, 12, 31, tzinfo=UTC)},
    ],
)
def test_claims_that_a_verifier_would_refuse_are_not_written(changes: dict[str, object]) -> None:
    """Minting checks by the rules of verifying, before the key is asked."""
    with pytest.raises(InvalidTokenError) as caught:
        encode_unsigned(replace(claims(), **changes), JWK.kid)  # type: ignore[arg-type]
    assert Reason.INVALID_CLAIM is caught.value.reason


@pytest.mark.parametrize("kid", ["", "k1", JWK.kid + "=", JWK.kid[:-1]])
def test_a_kid_that_is_no_thumbprint_is_not_written(kid: str) -> None:
    """The verifier would not read it."""
    with pytest.raises(InvalidTokenError, match="kid is not a SHA-256 thumbprint"):
        encode_unsigned(claims(), kid)


def test_j14_a_token_that_would_be_too_long_is_not_written() -> None:
    """Each part within its limit, and together one byte too many; one byte less is written and accepted."""
    long_id = "spiffe://prod.example/" + "a" * 2026
    scopes = [f"{n:02}" + "s" * 126 for n in range(64)]
    written = None
    for length in range(1, len(" ".join(scopes))):
        scope = " ".join(scopes)[:length].rstrip(" ")
        try:
            signing_input = encode_unsigned(claims(sub=long_id, client_id=long_id, scope=scope), JWK.kid)
        except InvalidTokenError as error:
            assert str(error) == f"the token would be longer than {MAX_TOKEN_BYTES} bytes"  # noqa: PT017
            break
        written = assemble(signing_input, sign(signing_input))
    assert written is not None
    assert MAX_TOKEN_BYTES - 2 < len(written) <= MAX_TOKEN_BYTES
    assert accept(written)


@pytest.mark.parametrize("length", [0, SIGNATURE_BYTES - 1, SIGNATURE_BYTES + 1, 72])
def test_a_signature_of_another_length_is_not_assembled(length: int) -> None:
    """Most of all not one in DER, which is about 72 bytes long."""
    with pytest.raises(InvalidTokenError, match="not 64 bytes"):
        assemble(encode_unsigned(claims(), JWK.kid), bytes(length))


def test_verifying_leaves_no_trace() -> None:
    """Pure: the same answer each time, and the parts that come out are the caller's own."""
    parts = parse_unverified(token())
    parts.unverified_payload["aud"] = "bank"
    first = verify_token(token(), keys=KEYS, expectations=EXPECTED, peer_thumbprint=PEER, now=NOW)
    second = verify_token(token(), keys=KEYS, expectations=EXPECTED, peer_thumbprint=PEER, now=NOW)
    assert first == second
    assert AUDIENCE == first.audience
