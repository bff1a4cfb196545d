"""Minting: the end of a token at every boundary, its exact bytes, and that no verifier would refuse what is signed."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from carnet.claims import MAX_SCOPE_LENGTH, MAX_SCOPES
from carnet.errors import InvalidTokenError, InvalidTokenReason
from carnet.jwk import KeySet, PublicJWK
from carnet.verify import Binding, Expectations, verify_token
from carnet_broker.core.minting import CertificateEndingError, Draft, MintingRules, check_signature, draft_token
from carnet_broker.core.policy import Granted
from carnet_broker.core.workload import Workload
from carnet_broker.edges.vault.kv_store import KvSigner
from support.keyrings import ISSUER, SECOND, T0
from support.policies import ORDERS

PRIVATE_KEY = ec.derive_private_key(1_000_003, ec.SECP256R1())
KEY = PublicJWK.of(PRIVATE_KEY.public_key())
OTHER_KEY = ec.derive_private_key(1_000_004, ec.SECP256R1())
THUMBPRINT = "A" * 43
TOKEN_ID = "0123456789abcdef"
RULES = MintingRules(
    issuer=ISSUER,
    default_life=timedelta(minutes=5),
    longest_life=timedelta(hours=1),
    shortest_life=timedelta(seconds=30),
)
FAR = T0 + timedelta(days=7)
GRANT = Granted(
    scopes=("charge", "refund"),
    max_ttl=timedelta(minutes=10),
    binding=Binding.CERTIFICATE,
    grants=(),
    acting_max_ttl=None,
)


def workload(not_after: datetime = FAR, leaf: x509.Certificate | None = None) -> Workload:
    """The caller, with a certificate that ends then. Minting looks at no other part of the leaf."""
    return Workload(spiffe_id=ORDERS, thumbprint=THUMBPRINT, leaf=leaf, not_after=not_after)


def draft(**changes: object) -> Draft:
    """The draft of an ordinary token, with some arguments changed."""
    arguments = {
        "workload": workload(),
        "audience": "payments",
        "grant": GRANT,
        "ttl": None,
        "key": KEY,
        "sign_until": FAR,
        "token_id": TOKEN_ID,
        "revocation_version": 0,
        "now": T0,
        "rules": RULES,
    }
    return draft_token(**(arguments | changes))


def life(made: Draft) -> timedelta:
    """How long the token lives."""
    return made.claims.expires_at - made.claims.issued_at


def test_a_draft_says_what_the_grant_says():
    """Every claim, and where each comes from."""
    claims = draft(revocation_version=7).claims
    assert {
        "iss": ISSUER,
        "sub": str(ORDERS),
        "aud": "payments",
        "client_id": str(ORDERS),
        "exp": int((T0 + timedelta(minutes=5)).timestamp()),
        "iat": int(T0.timestamp()),
        "nbf": int(T0.timestamp()),
        "jti": TOKEN_ID,
        "scope": "charge refund",
        "rv": 7,
        "cnf": {"x5t#S256": THUMBPRINT},
    } == claims.to_payload()


def test_the_header_is_exactly_ours():
    """alg, typ and kid, and nothing else."""
    token = draft().signed(bytes(64))
    assert {"alg": "ES256", "typ": "at+jwt", "kid": KEY.kid} == jwt.get_unverified_header(token)
    assert KEY.kid == draft().kid


def test_an_audience_without_binding_gets_a_token_without_confirmation():
    """And nothing that looks like one."""
    unbound = draft(grant=replace(GRANT, binding=Binding.NONE)).claims
    assert unbound.confirmation is None
    assert "cnf" not in unbound.to_payload()


def test_times_are_whole_seconds_rounded_down():
    """So a token never begins in the future, and never lives longer than it may."""
    made = draft(now=T0 + timedelta(microseconds=999_999))
    assert (T0, T0, T0 + timedelta(minutes=5)) == (
        made.claims.issued_at,
        made.claims.not_before,
        made.claims.expires_at,
    )


# -- the end of a token (B03) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ttl", "expected", "shortened"),
    [
        (None, timedelta(minutes=5), False),
        (timedelta(seconds=30), timedelta(seconds=30), False),
        (timedelta(minutes=10) - SECOND, timedelta(minutes=10) - SECOND, False),
        (timedelta(minutes=10), timedelta(minutes=10), False),
        (timedelta(minutes=10) + SECOND, timedelta(minutes=10), True),
        (timedelta(days=3650), timedelta(minutes=10), True),
        (timedelta(seconds=45, milliseconds=500), timedelta(seconds=45), True),
    ],
)
def test_b03_a_longer_life_than_the_grant_allows_is_shortened_and_said_to_be(ttl, expected, shortened):
    """The limit itself is given whole; a second more is not."""
    made = draft(ttl=ttl)
    assert (expected, shortened) == (life(made), made.shortened)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_b03_no_token_lives_longer_than_the_longest_life_of_the_issuer(offset):
    """Whatever the policy says: verifiers are promised that, and the keyring counts on it."""
    wanted = RULES.longest_life + offset * SECOND
    made = draft(grant=replace(GRANT, max_ttl=timedelta(days=30)), ttl=wanted)
    assert (min(wanted, RULES.longest_life), offset > 0) == (life(made), made.shortened)


def test_the_default_life_is_cut_by_the_grant_without_being_called_shortened():
    """Who did not ask for a life was not given less than it asked for."""
    made = draft(grant=replace(GRANT, max_ttl=timedelta(minutes=1)))
    assert (timedelta(minutes=1), False) == (life(made), made.shortened)


@pytest.mark.parametrize(("offset", "shortened"), [(-1, True), (0, False), (1, False)])
def test_b03_no_token_outlives_the_certificate_that_it_is_bound_to(offset, shortened):
    """The two may end in the same second: at it, both are over."""
    ends = T0 + timedelta(minutes=5) + offset * SECOND
    made = draft(workload=workload(ends), ttl=timedelta(minutes=5))
    assert (min(ends, T0 + timedelta(minutes=5)), shortened) == (made.claims.expires_at, made.shortened)


def test_b03_an_unbound_token_does_not_outlive_the_certificate_either():
    """It was that certificate that vouched for the caller."""
    ends = T0 + timedelta(minutes=1)
    made = draft(workload=workload(ends), grant=replace(GRANT, binding=Binding.NONE))
    assert ends == made.claims.expires_at


@pytest.mark.parametrize("offset", [-1, 0])
def test_k09_no_token_outlives_its_key(offset):
    """The end of a token is at most `sign_until` and the longest life: so long its key is published."""
    sign_until = T0 - RULES.longest_life + timedelta(minutes=5) + offset * SECOND
    assert timedelta(minutes=5) + offset * SECOND == life(draft(sign_until=sign_until, ttl=timedelta(minutes=5)))


@pytest.mark.parametrize(("seconds", "issued"), [(29, False), (30, True), (31, True)])
def test_a_certificate_that_ends_too_soon_is_refused_with_the_reason(seconds, issued):
    """Such a token would end on its way; the caller is to renew its certificate, so it is told that."""
    ending = workload(T0 + seconds * SECOND)
    if issued:
        assert seconds * SECOND == life(draft(workload=ending))
    else:
        with pytest.raises(CertificateEndingError, match=f"{ORDERS} ends at 2026-11-24T12:00:29"):
            draft(workload=ending)


@pytest.mark.parametrize("wanted", [0, 1, 29])
def test_b03_a_life_that_is_too_short_is_refused(wanted):
    """By another error than that of a certificate: it is the request that is wrong."""
    with pytest.raises(ValueError, match="may not live shorter than"):
        draft(ttl=wanted * SECOND)
    with pytest.raises(ValueError, match="may not live shorter than"):
        draft(ttl=timedelta(seconds=29, milliseconds=999))


def test_of_a_short_life_and_a_short_certificate_the_one_is_named_that_has_to_change():
    """Where the certificate would do, to the second, it is the request; where it would not, the certificate."""
    with pytest.raises(ValueError, match="may not live shorter than"):
        draft(ttl=29 * SECOND, workload=workload(T0 + 30 * SECOND))
    with pytest.raises(CertificateEndingError):
        draft(ttl=29 * SECOND, workload=workload(T0 + 29 * SECOND))


def test_a_grant_that_allows_too_little_is_refused():
    """A policy whose limit is below the shortest life gives no token at all."""
    with pytest.raises(ValueError, match="may not live shorter than"):
        draft(grant=replace(GRANT, max_ttl=29 * SECOND))


def test_a_token_is_never_made_over_a_certificate_that_has_ended():
    """Not even by a second."""
    for ended in (T0, T0 - SECOND, T0 - timedelta(days=1)):
        with pytest.raises(CertificateEndingError):
            draft(workload=workload(ended))


# -- read back before signing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"audience": "pay ments"}, InvalidTokenReason.INVALID_CLAIM),
        ({"audience": ""}, InvalidTokenReason.INVALID_CLAIM),
        ({"token_id": "short"}, InvalidTokenReason.INVALID_CLAIM),
        ({"revocation_version": -1}, InvalidTokenReason.INVALID_CLAIM),
        ({"grant": replace(GRANT, scopes=())}, InvalidTokenReason.INVALID_CLAIM),
        ({"grant": replace(GRANT, scopes=("refund", "charge"))}, InvalidTokenReason.INVALID_CLAIM),
        ({"grant": replace(GRANT, scopes=("a b",))}, InvalidTokenReason.INVALID_CLAIM),
        ({"rules": replace(RULES, issuer="no name")}, InvalidTokenReason.INVALID_CLAIM),
        ({"workload": replace(workload(), thumbprint="not a thumbprint")}, InvalidTokenReason.INVALID_CLAIM),
        (
            {"grant": replace(GRANT, scopes=tuple(f"{n:03}{'s' * (MAX_SCOPE_LENGTH - 3)}" for n in range(MAX_SCOPES)))},
            InvalidTokenReason.MALFORMED,
        ),
    ],
)
def test_what_a_verifier_would_refuse_is_never_signed(changes, reason):
    """The draft is read back by the verifier's own rules; there is nothing to sign."""
    with pytest.raises(InvalidTokenError) as caught:
        draft(**changes)
    assert reason is caught.value.reason


@pytest.mark.parametrize("binding", Binding)
def test_a_signed_draft_is_good_for_its_receiver(binding):
    """By our verifier, with all that it may expect."""
    made = draft(grant=replace(GRANT, binding=binding))
    token = made.signed(KvSigner(KEY.kid, PRIVATE_KEY).sign(made.signing_input))
    check_signature(token, made, key=KEY, now=T0, rules=RULES)
    claims = verify_token(
        token,
        keys=KeySet.of([KEY]),
        expectations=Expectations(issuer=ISSUER, audience="payments", binding=binding),
        peer_thumbprint=THUMBPRINT,
        now=T0,
    )
    assert made.claims == claims


def test_a_token_signed_by_another_key_is_found_out():
    """The sample check is the receiver's: a signer that signs with another key, or not at all, is caught."""
    made = draft()
    for signature in (KvSigner(KEY.kid, OTHER_KEY).sign(made.signing_input), bytes(64), b"\x01" * 64):
        with pytest.raises(InvalidTokenError) as caught:
            check_signature(made.signed(signature), made, key=KEY, now=T0, rules=RULES)
        assert InvalidTokenReason.BAD_SIGNATURE is caught.value.reason


def test_a_signature_of_another_length_makes_no_token():
    """63 or 65 bytes, or DER."""
    for length in (0, 63, 65, 70):
        with pytest.raises(InvalidTokenError):
            draft().signed(bytes(length))


def test_the_check_of_a_token_is_of_that_token():
    """Another key, another issuer, or a token that is over does not pass."""
    made = draft()
    token = made.signed(KvSigner(KEY.kid, PRIVATE_KEY).sign(made.signing_input))
    wrong = [
        {"key": PublicJWK.of(OTHER_KEY.public_key())},
        {"rules": replace(RULES, issuer="https://tokens.staging.example")},
        {"rules": replace(RULES, longest_life=timedelta(minutes=4))},
        {"now": T0 + timedelta(minutes=5)},
    ]
    for changes in wrong:
        with pytest.raises(InvalidTokenError):
            check_signature(token, made, **({"key": KEY, "now": T0, "rules": RULES} | changes))


def test_the_default_lives_are_those_of_the_design():
    """Five minutes, an hour at most, half a minute at least, replaced at six tenths of its life."""
    rules = MintingRules(issuer=ISSUER)
    assert (timedelta(minutes=5), timedelta(hours=1), timedelta(seconds=30), 0.6) == (
        rules.default_life,
        rules.longest_life,
        rules.shortest_life,
        rules.refresh_at,
    )
