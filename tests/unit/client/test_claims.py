from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from carnet.claims import (
    MAX_NAME_LENGTH,
    MAX_SCOPE_LENGTH,
    MAX_SCOPES,
    Claims,
    certificate_thumbprint,
    claims_of_payload,
    is_name,
    is_scope_token,
    is_token_id,
    parse_scopes,
)
from carnet.errors import InvalidIdentityError, InvalidTokenError, InvalidTokenReason
from carnet.spiffe import SpiffeID
from support.tokens import NOW, ORDERS, PEER, payload, seconds

# RFC 8705 appendix A: a certificate, and the x5t#S256 that is PEER.
RFC_8705_CERTIFICATE = b"""\
-----BEGIN CERTIFICATE-----
MIIBBjCBrAIBAjAKBggqhkjOPQQDAjAPMQ0wCwYDVQQDDARtdGxzMB4XDTE4MTAx
ODEyMzcwOVoXDTIyMDUwMjEyMzcwOVowDzENMAsGA1UEAwwEbXRsczBZMBMGByqG
SM49AgEGCCqGSM49AwEHA0IABNcnyxwqV6hY8QnhxxzFQ03C7HKW9OylMbnQZjjJ
/Au08/coZwxS7LfA4vOLS9WuneIXhbGGWvsDSb0tH6IxLm8wCgYIKoZIzj0EAwID
SQAwRgIhAP0RC1E+vwJD/D1AGHGzuri+hlV/PpQEKTWUVeORWz83AiEA5x2eXZOV
bUlJSGQgjwD5vaUaKlLR50Q2DmFfQj1L+SY=
-----END CERTIFICATE-----
"""

MISSING, INVALID = InvalidTokenReason.MISSING_CLAIM, InvalidTokenReason.INVALID_CLAIM


def refusal(**changes: object) -> tuple[InvalidTokenReason, str]:
    """Read a payload that should not pass, and return why it did not."""
    with pytest.raises(InvalidTokenError) as caught:
        claims_of_payload(payload(**changes))
    return caught.value.reason, str(caught.value)


def test_every_claim_lands_in_its_place() -> None:
    """The right payload, member by member."""
    expected = Claims(
        issuer="https://tokens.prod.example",
        subject=SpiffeID.parse(ORDERS),
        audience="payments",
        client_id=SpiffeID.parse("spiffe://prod.example/cron/nightly"),
        expires_at=NOW + timedelta(minutes=5),
        issued_at=NOW,
        not_before=NOW - timedelta(seconds=1),
        token_id="0d9f8b1c52f14a6b8f0e6f1f9d1c2b3a",
        scopes=("charge", "refund"),
        confirmation=PEER,
        revocation_version=17,
    )
    changes = {"client_id": "spiffe://prod.example/cron/nightly", "nbf": seconds(NOW) - 1, "rv": 17}
    assert expected == claims_of_payload(payload(**changes))


@pytest.mark.parametrize("cnf", [{"x5t#S256": PEER}, ...], ids=["bound", "unbound"])
def test_claims_come_back_from_their_payload(cnf: object) -> None:
    """`to_payload` is the reverse of `claims_of_payload`, with the members in one order."""
    right = payload(cnf=cnf)
    written = claims_of_payload(right).to_payload()
    assert right == written
    assert list(right) == list(written)


@pytest.mark.parametrize("name", ["iss", "sub", "aud", "client_id", "exp", "iat", "nbf", "jti", "scope", "rv"])
def test_every_claim_is_required(name: str) -> None:
    """A claim that is not there is named, and is not the same as one that is wrong."""
    assert (MISSING, f"claims missing: {name}") == refusal(**{name: ...})
    assert INVALID is refusal(**{name: None})[0]


def test_all_missing_claims_are_named_at_once() -> None:
    """Nobody wants to find them one by one."""
    assert (MISSING, "claims missing: iss, jti, rv") == refusal(iss=..., jti=..., rv=..., more=1)


@pytest.mark.parametrize("name", ["act", "anc", "may_act", "roles", "azp", "Exp", "x" * 300, ""])
def test_j24_j28_a_claim_outside_the_profile_is_refused(name: str) -> None:
    """A claim that a verifier does not know may be a restriction: delegation is refused until it is understood."""
    reason, message = refusal(**{name: {"sub": ORDERS}})
    assert INVALID is reason
    assert f"claim {name[:20]!r} is not in the profile" == message


@pytest.mark.parametrize("name", ["exp", "iat", "nbf", "rv"])
@pytest.mark.parametrize("value", ["123", 1.5, True, False, -1, 2**63, 10**30, [], {}, [1], "", float("nan")])
def test_j18_a_time_that_is_no_whole_number_is_refused(name: str, value: object) -> None:
    """Whole numbers only; a bool is an int to Python and not to JSON."""
    reason, message = refusal(**{name: value})
    assert INVALID is reason
    assert f"claim {name} is not a whole number" in message


def test_j18_times_end_where_a_calendar_does() -> None:
    """The year 9999 is the last that can be said, and 2**53 - 1 the last revocation version."""
    last = 253_402_300_799
    assert datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC) == claims_of_payload(payload(exp=last)).expires_at
    assert INVALID is refusal(exp=last + 1)[0]
    assert 2**53 - 1 == claims_of_payload(payload(rv=2**53 - 1)).revocation_version
    assert INVALID is refusal(rv=2**53)[0]


@pytest.mark.parametrize(("name", "message"), [("exp", "exp is not after iat"), ("nbf", "nbf is after exp")])
def test_j19_times_in_the_wrong_order_are_refused(name: str, message: str) -> None:
    """A token that is over before it begins was never meant; at the boundary it is refused for exp, not for nbf."""
    now = seconds(NOW)
    changes = {"exp": {"exp": now}, "nbf": {"nbf": now + 301}}[name]
    assert (INVALID, f"claim {message}") == refusal(**changes)
    assert claims_of_payload(payload(**{"exp": {"exp": now + 1}, "nbf": {"nbf": now + 300}}[name]))


@pytest.mark.parametrize("name", ["iss", "aud"])
@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "a b",
        'a"b',
        "a\\b",
        "a\x00",
        "a\n",
        "\N{CYRILLIC SMALL LETTER A}",
        "a" * 256,
        1,
        True,
        [],
        {},
        ["payments"],
        ["payments", "bank"],
        [["payments"]],
        [1, "payments"],
        {"payments": 1},
    ],
)
def test_j20_j21_a_name_that_is_not_one_plain_text_is_refused(name: str, value: object) -> None:
    """Lists too, even of one: there is one audience and one issuer."""
    assert INVALID is refusal(**{name: value})[0]


@pytest.mark.parametrize("name", ["sub", "client_id"])
@pytest.mark.parametrize(
    "value",
    [
        "",
        "orders",
        "https://prod.example/a",
        "spiffe://prod.example",
        "spiffe://prod.example/",
        "SPIFFE://prod.example/a",
        "spiffe://prod.example/a/../admin",
        "spiffe://prod.example/%61",
        "spiffe://prod.example/a/",
        7,
        [],
        [ORDERS],
        {},
        "spiffe://prod.example:1/a",
        "spiffe://u@prod.example/a",
        "spiffe://prod.example/a?q",
        "spiffe://Prod.example/a",
        pytest.param("spiffe://prod.example/" + "a" * 2048, id="too-long"),
    ],
)
def test_j22_a_workload_that_is_no_spiffe_id_is_refused(name: str, value: object) -> None:
    """The subject and the client are workloads, by the same rules as in a certificate."""
    reason, message = refusal(**{name: value})
    assert INVALID is reason
    assert message.startswith(f"claim {name} is not a ")
    assert len(message) < 250


@pytest.mark.parametrize(
    "cnf",
    [
        None,
        PEER,
        [],
        {},
        [{"x5t#S256": PEER}],
        {"x5t#S256": PEER, "jwk": {}},
        {"x5t#S256": PEER, "jkt": PEER},
        {"x5t": "yYMz1CcFbOoLGCXV8L9j9Xk1QyE"},
        {"jkt": PEER},
        {"X5T#S256": PEER},
        {"x5t#S256": None},
        {"x5t#S256": [PEER]},
        {"x5t#S256": ""},
        {"x5t#S256": PEER + "="},
        {"x5t#S256": PEER[:-1]},
        {"x5t#S256": PEER[:-1] + "1"},
        {"x5t#S256": hashlib.sha256(b"").hexdigest()},
    ],
)
def test_j26_a_confirmation_of_another_form_is_refused(cnf: object) -> None:
    """One method, ``x5t#S256``, in its one spelling."""
    reason, message = refusal(cnf=cnf)
    assert INVALID is reason
    assert message.startswith("claim cnf is not ")


@pytest.mark.parametrize(
    "jti",
    ["", "a" * 15, "a" * 65, pytest.param("a" * 10_240, id="10-kib"), "a" * 16 + "\n", "a" * 16 + ".", 1, None, []],
)
def test_j27_a_token_id_of_another_form_is_refused(jti: object) -> None:
    """Revocation and the ledger are keyed on it, so it is short and plain."""
    assert (INVALID, "claim jti is not 16 to 64 letters, digits, '-' and '_'") == refusal(jti=jti)
    assert not is_token_id(jti)


@pytest.mark.parametrize("jti", ["a" * 16, "a" * 64, "0f3c9a52-7f0e-4a57-9d0a-2f5f1c9f6a11", "AZaz09-_AZaz09-_"])
def test_j27_a_token_id_of_the_right_form_is_read(jti: str) -> None:
    """A UUID in any usual form, or random bytes in base64url."""
    assert is_token_id(jti)
    assert jti == claims_of_payload(payload(jti=jti)).token_id


@pytest.mark.parametrize("scope", [1, None, [], ["charge"], {}])
def test_a_scope_claim_that_is_no_text_is_refused(scope: object) -> None:
    """RFC 9068 section 2.2.3: a space-delimited text, no list."""
    assert (INVALID, "claim scope is not a text") == refusal(scope=scope)


@pytest.mark.parametrize(
    ("text", "scopes"),
    [("charge", ("charge",)), ("b a", ("a", "b")), ("a A a:b", ("A", "a", "a:b")), ("!~#[]", ("!~#[]",))],
)
def test_scopes_are_sorted_whatever_order_they_come_in(text: str, scopes: tuple[str, ...]) -> None:
    """RFC 6749 section 3.3: the order does not matter, but case does."""
    assert scopes == parse_scopes(text)


@pytest.mark.parametrize(
    "text", ["", " ", " a", "a ", "a  b", "a\tb", "a\nb", 'a"', "a\\", "\x7f", "\N{EM SPACE}", "a,\xe9"]
)
def test_b01_scopes_of_another_form_are_refused(text: str) -> None:
    """At least one, one space between two, no sign outside RFC 6749 section 3.3."""
    with pytest.raises(InvalidTokenError, match="not a list of scope-tokens"):
        parse_scopes(text)


def test_b01_a_scope_that_stands_twice_is_refused() -> None:
    """Our issuer names each once."""
    with pytest.raises(InvalidTokenError, match="twice"):
        parse_scopes("a b a")


def test_b01_sixty_four_scopes_are_read_and_one_more_is_not() -> None:
    """The limit holds before the rest is looked at."""
    most = [f"s{n:02}" for n in range(MAX_SCOPES)]
    assert tuple(most) == parse_scopes(" ".join(most))
    for more in ([*most, "one-more"], ["a"] * 10_000):
        with pytest.raises(InvalidTokenError, match="more than 64"):
            parse_scopes(" ".join(more))


@pytest.mark.parametrize(("check", "most"), [(is_scope_token, MAX_SCOPE_LENGTH), (is_name, MAX_NAME_LENGTH)])
def test_names_are_plain_and_bounded(check: Callable[[object], bool], most: int) -> None:
    """Every sign of RFC 6749 section 3.3, no other, from one up to the limit."""
    plain = {sign for sign in map(chr, range(0x21, 0x7F)) if sign not in '"\\'}
    assert plain == {sign for sign in map(chr, range(0x250)) if check(sign)}
    assert check("a" * most)
    assert not check("a" * (most + 1))
    assert not check("")
    assert not check("a\n")
    assert not check(None)
    assert not check(b"a")


def test_claims_that_do_not_fit_the_wire_are_visible_after_one_round() -> None:
    """Fractions of a second are cut by the wire: the two sides then differ, which minting checks."""
    claims = replace(claims_of_payload(payload()), issued_at=NOW + timedelta(milliseconds=1))
    assert claims != claims_of_payload(claims.to_payload())


def test_the_certificate_thumbprint_is_the_one_that_rfc_8705_prints() -> None:
    """PEM, DER and the parsed certificate give the same digest."""
    certificate = x509.load_pem_x509_certificate(RFC_8705_CERTIFICATE)
    der = certificate.public_bytes(Encoding.DER)
    assert [PEER] * 3 == [certificate_thumbprint(form) for form in (RFC_8705_CERTIFICATE, der, certificate)]


def test_of_a_chain_the_leaf_counts() -> None:
    """A leaf comes first in a chain, also with text before it."""
    assert PEER == certificate_thumbprint(
        b"subject: mtls\n" + RFC_8705_CERTIFICATE + b"-----BEGIN CERTIFICATE-----\nAA==\n"
    )


@pytest.mark.parametrize(
    "certificate",
    [
        b"",
        b"x",
        b"\x30\x00",
        b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n",
        RFC_8705_CERTIFICATE[:200],
    ],
)
def test_bytes_that_are_no_certificate_have_no_thumbprint(certificate: bytes) -> None:
    """The digest of garbage would be a confirmation that no certificate ever meets, or that one is made to meet."""
    with pytest.raises(InvalidIdentityError, match=r"no X\.509 certificate"):
        certificate_thumbprint(certificate)
