from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from carnet.claims import certificate_thumbprint
from carnet.testing import CertificateAuthority
from carnet_broker.core.workload import (
    IdentityCache,
    IdentityReason,
    LeafRules,
    TrustBundle,
    UnauthenticatedError,
    Workload,
    authenticate,
)
from certificate_recipe import Presented, good_name, leaf
from wrong_certificates import WRONG_CERTIFICATES, Expected, WrongCertificate

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
TLS = "TLSv1.3"

# What a gRPC server's own TLS refuses before a certificate gets here, and what is good by our rules all the same: it
# tries one path only, and asks for no Ed25519 signatures.
REFUSED_BY_TLS_ONLY = {"T13-cross-signed-first", "T13-expired-first", "T14-ed25519"}

REASONS = {
    "T01": {IdentityReason.NO_CERTIFICATE, IdentityReason.UNTRUSTED},
    "T02": {IdentityReason.EXPIRED, IdentityReason.NOT_YET_VALID, IdentityReason.LIFE_TOO_LONG},
    "T03": {IdentityReason.EXTENDED_KEY_USAGE},
    "T04": {IdentityReason.NOT_A_LEAF, IdentityReason.KEY_USAGE},
    "T05": {IdentityReason.SPIFFE_ID},
    "T06": {IdentityReason.SPIFFE_ID},
    "T07": {IdentityReason.SPIFFE_ID, IdentityReason.MALFORMED, IdentityReason.WRONG_TRUST_DOMAIN},
    "T08": {IdentityReason.SPIFFE_ID, IdentityReason.MALFORMED, IdentityReason.WRONG_TRUST_DOMAIN},
    "T09": {IdentityReason.SPIFFE_ID, IdentityReason.MALFORMED},
    "T10": {IdentityReason.SPIFFE_ID},
    "T11": {IdentityReason.UNTRUSTED},
    "T12": {IdentityReason.UNTRUSTED, IdentityReason.CHAIN_TOO_LONG},
    "T13": {IdentityReason.UNTRUSTED},
    "T14": {IdentityReason.KEY_POLICY, IdentityReason.SIGNATURE_POLICY, IdentityReason.UNTRUSTED},
    "T15": {IdentityReason.MALFORMED, IdentityReason.SPIFFE_ID, IdentityReason.CRITICAL_EXTENSION},
}


@pytest.fixture(name="ca", scope="module")
def _ca() -> CertificateAuthority:
    return CertificateAuthority.create(now=NOW)


@pytest.fixture(name="bundle", scope="module")
def _bundle(ca: CertificateAuthority) -> TrustBundle:
    return TrustBundle.parse(ca.root_pem, [], ["prod.example"])


def verify(
    chain: bytes | list[bytes], bundle: TrustBundle, now: datetime = NOW, *, tls_version: str | None = TLS
) -> Workload:
    """Authenticate with the default rules."""
    return authenticate(chain, tls_version=tls_version, bundle=bundle, now=now, rules=LeafRules())


def reason_of(
    chain: bytes | list[bytes], bundle: TrustBundle, now: datetime = NOW, *, tls_version: str | None = TLS
) -> IdentityReason:
    """Return why `chain` is refused."""
    with pytest.raises(UnauthenticatedError) as caught:
        verify(chain, bundle, now, tls_version=tls_version)
    assert "the caller is not authenticated: its certificate is not accepted" == str(caught.value)
    assert len(caught.value.detail) <= 300
    return caught.value.reason


@pytest.mark.parametrize("kind", WRONG_CERTIFICATES.values(), ids=lambda kind: kind.name)
@pytest.mark.filterwarnings("ignore:Parsed a serial number:UserWarning")
def test_each_wrong_kind_is_refused_and_each_twin_accepted(
    kind: WrongCertificate, ca: CertificateAuthority, bundle: TrustBundle
):
    """The rules here do not lean on the TLS stack: what it would refuse in the handshake is refused here too."""
    shown = kind.build(ca, NOW)
    if kind.expected is Expected.ACCEPT or kind.name in REFUSED_BY_TLS_ONLY:
        workload = verify(shown.chain_pem, bundle)
        assert "prod.example" == workload.spiffe_id.trust_domain
        assert certificate_thumbprint(shown.chain_pem) == workload.thumbprint
    else:
        assert reason_of(shown.chain_pem, bundle) in REASONS[kind.row]


def test_a_certificate_that_python_warns_about_is_refused_with_warnings_as_errors(
    ca: CertificateAuthority, bundle: TrustBundle
):
    """The parser warns where a later version will refuse; whoever makes warnings errors must see no crash."""
    assert IdentityReason.MALFORMED is reason_of(leaf(ca, NOW, serial=-5).chain_pem, bundle)


def test_a_workload_is_its_leaf_and_lasts_as_long_as_its_path(ca: CertificateAuthority, bundle: TrustBundle):
    """Everything that issuing needs to know, from one leaf."""
    issued = ca.issue("spiffe://prod.example/ns/shop/sa/orders")

    workload = verify(issued.certificate_pem, bundle)

    assert "spiffe://prod.example/ns/shop/sa/orders" == str(workload.spiffe_id)
    assert certificate_thumbprint(issued.leaf) == workload.thumbprint
    assert issued.leaf == workload.leaf
    assert issued.leaf.not_valid_after_utc == workload.not_after


def test_a_workload_ends_with_an_authority_that_ends_before_it(ca: CertificateAuthority, bundle: TrustBundle):
    """A leaf that outlives its intermediate is good for as long as the intermediate is."""
    ends = NOW + timedelta(days=40)
    shown = ca.issue("spiffe://prod.example/ns/shop/sa/orders", not_after=ends)

    assert ca.intermediate.certificate.not_valid_after_utc == verify(shown.certificate_pem, bundle).not_after


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_the_window_begins_with_not_before(offset: int, ca: CertificateAuthority, bundle: TrustBundle):
    """Not a second earlier (T02)."""
    chain = leaf(ca, NOW, not_before=NOW).chain_pem

    if offset < 0:
        assert IdentityReason.NOT_YET_VALID is reason_of(chain, bundle, NOW + offset * SECOND)
    else:
        verify(chain, bundle, NOW + offset * SECOND)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_the_window_ends_at_not_after(offset: int, ca: CertificateAuthority, bundle: TrustBundle):
    """At that very second it is over (T02), as with a token."""
    chain = leaf(ca, NOW, not_after=NOW).chain_pem

    if offset < 0:
        verify(chain, bundle, NOW + offset * SECOND)
    else:
        assert IdentityReason.EXPIRED is reason_of(chain, bundle, NOW + offset * SECOND)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_the_life_of_a_leaf_is_limited_to_the_second(extra: int, ca: CertificateAuthority, bundle: TrustBundle):
    """The limit itself is allowed."""
    chain = leaf(ca, NOW, not_before=NOW, not_after=NOW + timedelta(days=7) + extra * SECOND).chain_pem
    rules = LeafRules(max_life=timedelta(days=7))

    if extra <= 0:
        authenticate(chain, tls_version=TLS, bundle=bundle, now=NOW, rules=rules)
    else:
        with pytest.raises(UnauthenticatedError) as caught:
            authenticate(chain, tls_version=TLS, bundle=bundle, now=NOW, rules=rules)
        assert IdentityReason.LIFE_TOO_LONG is caught.value.reason


@pytest.mark.parametrize("tls_version", ["TLSv1.2", "TLSv1.1", "TLSv1", "tlsv1.3", "TLSv1.30", "", None])
def test_only_tls_1_3_is_accepted(tls_version: str | None, ca: CertificateAuthority, bundle: TrustBundle):
    """T20: also not where the version is unknown."""
    assert IdentityReason.TLS_VERSION is reason_of(leaf(ca, NOW).chain_pem, bundle, tls_version=tls_version)


def test_a_chain_may_come_in_one_text_or_in_several(ca: CertificateAuthority, bundle: TrustBundle):
    """GRPC gives the leaf and the others as two texts."""
    issued = ca.issue("spiffe://prod.example/ns/shop/sa/orders")
    own = issued.leaf.public_bytes(Encoding.PEM)

    for chain in (issued.certificate_pem, [own, ca.intermediate_pem], [own.rstrip(), ca.intermediate_pem]):
        assert certificate_thumbprint(own) == verify(chain, bundle).thumbprint
    assert IdentityReason.UNTRUSTED is reason_of([own], bundle)
    assert IdentityReason.NOT_A_LEAF is reason_of([ca.intermediate_pem, own], bundle)


@pytest.mark.parametrize("chain", [b"", [], [b""], [b" ", b"\n"]])
def test_no_certificate_is_no_identity(chain: bytes | list[bytes], bundle: TrustBundle):
    """T01: in whatever form nothing comes."""
    assert IdentityReason.NO_CERTIFICATE is reason_of(chain, bundle)


@pytest.mark.parametrize(
    "text",
    [
        b"garbage",
        b"\x00\xff",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\n",
    ],
)
def test_what_is_no_certificate_is_malformed(text: bytes, ca: CertificateAuthority, bundle: TrustBundle):
    """T15: alone, and after a good leaf."""
    assert IdentityReason.MALFORMED is reason_of(text, bundle)
    if b"BEGIN" in text:
        assert IdentityReason.MALFORMED is reason_of(leaf(ca, NOW).chain_pem + text, bundle)


def test_a_chain_is_bounded_in_count_and_bytes(ca: CertificateAuthority, bundle: TrustBundle):
    """Ten certificates, 64 KiB: the limit itself is allowed, one more is not (T12)."""
    issued = ca.issue("spiffe://prod.example/ns/shop/sa/orders")
    own = issued.leaf.public_bytes(Encoding.PEM)
    verify([own, *[ca.intermediate_pem] * 9], bundle)
    assert IdentityReason.CHAIN_TOO_LONG is reason_of([own, *[ca.intermediate_pem] * 10], bundle)

    room = 64 * 1024 - len(issued.certificate_pem)
    verify(issued.certificate_pem + b"\n" * room, bundle)
    assert IdentityReason.CHAIN_TOO_LONG is reason_of(issued.certificate_pem + b"\n" * (room + 1), bundle)


def test_a_name_of_several_trust_domains_is_accepted_when_they_are_all_configured(ca: CertificateAuthority):
    """The trust domain is looked up whole, in the bundle."""
    chain = ca.issue("spiffe://staging.example/ns/shop/sa/orders").certificate_pem

    both = TrustBundle.parse(ca.root_pem, [], ["prod.example", "staging.example"])
    assert "staging.example" == verify(chain, both).spiffe_id.trust_domain
    one = TrustBundle.parse(ca.root_pem, [], ["prod.example"])
    assert IdentityReason.WRONG_TRUST_DOMAIN is reason_of(chain, one)


def test_no_bit_of_a_leaf_can_be_flipped(ca: CertificateAuthority, bundle: TrustBundle):
    """T15: each flip is refused, and none is a crash."""
    issued = ca.issue("spiffe://prod.example/ns/shop/sa/orders")
    der = issued.leaf.public_bytes(Encoding.DER)
    for position in range(0, 8 * len(der), 3):
        flipped = bytearray(der)
        flipped[position // 8] ^= 1 << position % 8
        chain = Presented.of(ca.root.private_key, bytes(flipped)).chain_pem + ca.intermediate_pem
        with pytest.raises(UnauthenticatedError):
            verify(chain, bundle)


def test_t15_a_signature_with_unused_bits_is_refused(ca: CertificateAuthority, bundle: TrustBundle):
    """T15: one bit that nobody signs, and a certificate has two thumbprints. Half of all signatures end in a 0."""
    while (issued := ca.issue("spiffe://prod.example/ns/shop/sa/orders")).leaf.signature[-1] & 1:
        pass
    der = bytearray(issued.leaf.public_bytes(Encoding.DER))
    verify(Presented.of(ca.root.private_key, bytes(der)).chain_pem + ca.intermediate_pem, bundle)
    der[-len(issued.leaf.signature) - 1] = 1
    with pytest.raises(UnauthenticatedError):
        verify(Presented.of(ca.root.private_key, bytes(der)).chain_pem + ca.intermediate_pem, bundle)


@settings(deadline=None)  # A busy machine is slow, and that is not what is tested here.
@given(der=st.binary(max_size=200))
def test_no_bytes_are_a_crash(der: bytes, ca: CertificateAuthority, bundle: TrustBundle):
    """T15: whatever stands where a certificate should."""
    with pytest.raises(UnauthenticatedError):
        verify(Presented.of(ca.root.private_key, der).chain_pem, bundle)


# -- the cache ---------------------------------------------------------------------------------------------------------


def ask(cache: IdentityCache, chain: bytes | tuple[bytes, ...], bundle: TrustBundle, now: datetime = NOW) -> Workload:
    """Authenticate through the cache."""
    return cache.authenticate(chain, tls_version=TLS, bundle=bundle, now=now)


def test_a_chain_is_verified_once(ca: CertificateAuthority, bundle: TrustBundle):
    """The second answer is the very object of the first, also for equal bytes that are not the same."""
    cache, chain = IdentityCache(LeafRules()), leaf(ca, NOW).chain_pem

    first = ask(cache, (chain,), bundle)

    assert first is ask(cache, chain, bundle)
    assert first is ask(cache, (bytes(bytearray(chain)),), bundle)
    assert first is ask(cache, chain, TrustBundle.parse(ca.root_pem, [], ["prod.example"]))


def test_a_remembered_chain_is_refused_outside_its_window_and_by_tls_version(
    ca: CertificateAuthority, bundle: TrustBundle
):
    """T17: each call is judged by its own time and connection."""
    cache, chain = IdentityCache(LeafRules()), leaf(ca, NOW, not_before=NOW, not_after=NOW + 10 * SECOND).chain_pem
    ask(cache, chain, bundle)

    ask(cache, chain, bundle, NOW + 9 * SECOND)
    for now, reason in (
        (NOW + 10 * SECOND, IdentityReason.EXPIRED),
        (NOW - SECOND, IdentityReason.NOT_YET_VALID),
    ):
        with pytest.raises(UnauthenticatedError) as caught:
            ask(cache, chain, bundle, now)
        assert reason is caught.value.reason
    with pytest.raises(UnauthenticatedError) as caught:
        cache.authenticate(chain, tls_version="TLSv1.2", bundle=bundle, now=NOW)
    assert IdentityReason.TLS_VERSION is caught.value.reason


def test_a_new_bundle_forgets_what_the_old_one_allowed(ca: CertificateAuthority, bundle: TrustBundle):
    """T18: a CA that was taken out of the bundle counts no more from the next call on, and may come back."""
    cache, chain = IdentityCache(LeafRules()), leaf(ca, NOW).chain_pem
    other = TrustBundle.parse(CertificateAuthority.create(now=NOW).root_pem, [], ["prod.example"])
    ask(cache, chain, bundle)

    with pytest.raises(UnauthenticatedError) as caught:
        ask(cache, chain, other)
    assert IdentityReason.UNTRUSTED is caught.value.reason
    ask(cache, chain, bundle)


def test_a_remembered_chain_is_refused_when_its_revocation_list_is_out_of_date(ca: CertificateAuthority):
    """The end of the list is part of the window."""
    crl = ca.crl_pem(now=NOW, lifetime=timedelta(seconds=60))
    bundle = TrustBundle.parse(ca.root_pem, [crl], ["prod.example"])
    cache, chain = IdentityCache(LeafRules()), leaf(ca, NOW).chain_pem
    ask(cache, chain, bundle, NOW + 59 * SECOND)

    with pytest.raises(UnauthenticatedError) as caught:
        ask(cache, chain, bundle, NOW + 60 * SECOND)
    assert IdentityReason.CRL_OUT_OF_DATE is caught.value.reason


def test_a_full_cache_keeps_those_in_use_and_forgets_the_others(ca: CertificateAuthority, bundle: TrustBundle):
    """Two generations: what is asked for again moves to the new one."""
    cache = IdentityCache(LeafRules(), capacity=2)
    chains = [leaf(ca, NOW).chain_pem for _ in range(4)]
    busy, idle = ask(cache, chains[0], bundle), ask(cache, chains[1], bundle)
    ask(cache, chains[2], bundle)

    assert busy is ask(cache, chains[0], bundle)
    ask(cache, chains[3], bundle)

    assert busy is ask(cache, chains[0], bundle)
    assert idle is not ask(cache, chains[1], bundle)
    assert len(cache._remembered.recent) + len(cache._remembered.earlier) <= 4


def test_a_refusal_is_remembered_for_a_second_and_no_longer(ca: CertificateAuthority, bundle: TrustBundle):
    """So that it costs little, and that a certificate that becomes valid is not kept waiting."""
    cache, chain = IdentityCache(LeafRules()), leaf(ca, NOW, not_before=NOW).chain_pem
    looked_at = []
    for now in (NOW - SECOND, NOW - SECOND / 2, NOW - 2 * SECOND):
        with pytest.raises(UnauthenticatedError) as caught:
            ask(cache, chain, bundle, now)
        assert IdentityReason.NOT_YET_VALID is caught.value.reason
        looked_at += [refused.at for refused in cache._remembered.refused.values()]
    assert [NOW - SECOND, NOW - SECOND, NOW - 2 * SECOND] == looked_at
    ask(cache, chain, bundle, NOW)


def test_what_is_remembered_of_refusals_is_bounded_and_holds_no_certificates(
    ca: CertificateAuthority, bundle: TrustBundle
):
    """A peer can send its chain in as many forms as it likes."""
    cache = IdentityCache(LeafRules(), capacity=2)
    for number in range(600):
        with pytest.raises(UnauthenticatedError):
            ask(cache, b"no certificate %d" % number, bundle)
    assert 0 < len(cache._remembered.refused) <= 512
    for _ in range(3):
        ask(cache, leaf(ca, NOW).chain_pem, bundle)
    remembered = cache._remembered
    assert {32} == {len(key) for kept in (remembered.recent, remembered.refused) for key in kept}


def test_the_expected_name_is_the_one_that_the_table_uses(ca: CertificateAuthority, bundle: TrustBundle):
    """So that an accepted twin is accepted for its own name, and not for another's."""
    certificate = x509.load_pem_x509_certificate(leaf(ca, NOW).chain_pem)

    assert good_name(ca) == str(verify(leaf(ca, NOW).chain_pem, bundle).spiffe_id)
    assert certificate.subject == x509.Name([])
