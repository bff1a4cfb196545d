from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from carnet.testing import CertificateAuthority
from carnet.testing.ca import certificate_pem
from carnet_broker.core.workload import IdentityReason, LeafRules, TrustBundle, UnauthenticatedError, authenticate
from certificate_recipe import Algorithm, Authority, Presented, extension, intermediate, leaf, oid, p256_key, sequence

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
ORDERS = "spiffe://prod.example/ns/shop/sa/orders"


@pytest.fixture(name="ca", scope="module")
def _ca() -> CertificateAuthority:
    return CertificateAuthority.create(now=NOW)


@pytest.fixture(name="root", scope="module")
def _root(ca: CertificateAuthority) -> Authority:
    return Authority.of(ca.root, send=False)


def failure(chain: bytes, *anchors: bytes, lists: tuple[bytes, ...] = ()) -> tuple[IdentityReason, str] | None:
    """Return why `chain` is refused by a bundle of `anchors`, None where it is not."""
    bundle = TrustBundle.parse(b"".join(anchors), lists, ["prod.example"])
    try:
        authenticate(chain, tls_version="TLSv1.3", bundle=bundle, now=NOW, rules=LeafRules())
    except UnauthenticatedError as error:
        return error.reason, error.detail
    return None


def untrusted(chain: bytes, *anchors: bytes) -> str:
    """Return the detail of an UNTRUSTED refusal."""
    failed = failure(chain, *anchors)
    assert failed is not None
    assert IdentityReason.UNTRUSTED is failed[0]
    return failed[1]


def test_a_bundle_may_change_while_its_leafs_live(ca: CertificateAuthority):
    """T23: old, both, new. What counts is the bundle of now."""
    other = CertificateAuthority.create(now=NOW)
    old, new = ca.issue(ORDERS).certificate_pem, other.issue(ORDERS).certificate_pem

    assert failure(old, ca.root_pem) is None
    assert untrusted(new, ca.root_pem)
    for chain in (old, new):
        assert failure(chain, ca.root_pem, other.root_pem) is None
        assert failure(chain, other.root_pem, ca.root_pem) is None
    assert untrusted(old, other.root_pem)
    assert failure(new, other.root_pem) is None


def test_an_intermediate_in_the_bundle_is_an_anchor_and_need_not_be_sent(ca: CertificateAuthority):
    """So an operator can trust one intermediate without its root, and its sisters."""
    sister = ca.with_new_intermediate()
    own = ca.issue(ORDERS).leaf.public_bytes(Encoding.PEM)

    assert failure(own, ca.intermediate_pem) is None
    assert untrusted(sister.issue(ORDERS).certificate_pem, ca.intermediate_pem)


def test_an_expired_anchor_is_no_anchor(ca: CertificateAuthority):
    """RFC 5280 leaves that open (section 6.1); TLS stacks refuse, and a CA that was let run out is meant to end."""
    old = CertificateAuthority.create(now=NOW - timedelta(days=31))
    chain = old.issue(ORDERS, not_before=NOW - HOUR, not_after=NOW + HOUR).certificate_pem

    assert "expired or not yet valid" in untrusted(chain, old.root_pem)
    assert "expired or not yet valid" in untrusted(chain, old.root_pem, ca.root_pem)


def test_a_path_may_have_four_intermediates_and_no_more(ca: CertificateAuthority, root: Authority):
    """Both sides of the limit."""
    by = root
    for level in range(4):
        by = intermediate(f"level {level}", by, NOW)
    assert failure(leaf(ca, NOW, by=by).chain_pem, without_path_length(ca)) is None

    assert untrusted(leaf(ca, NOW, by=intermediate("level 4", by, NOW)).chain_pem, without_path_length(ca))


def without_path_length(ca: CertificateAuthority) -> bytes:
    """Return the root of `ca` with no limit on its paths, so that the limit under test is ours."""
    key = ca.root.private_key
    certificate = (
        x509.CertificateBuilder(ca.root.certificate.subject, ca.root.certificate.subject, key.public_key(), 9)
        .not_valid_before(NOW - HOUR)
        .not_valid_after(NOW + HOUR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate_pem(certificate)


@pytest.mark.parametrize(("path_length", "good"), [(0, False), (1, True), (2, True), (None, True)])
def test_a_path_length_counts_the_intermediates_below(
    path_length: int | None, good: bool, ca: CertificateAuthority, root: Authority
):
    """T12, at its boundary. The leaf does not count (RFC 5280 section 4.2.1.9)."""
    first = intermediate("first", root, NOW, path_length=path_length)
    failed = failure(leaf(ca, NOW, by=intermediate("second", first, NOW)).chain_pem, without_path_length(ca))

    assert good == (failed is None)


def test_a_self_issued_intermediate_does_not_count_for_the_path_length(ca: CertificateAuthority, root: Authority):
    """RFC 5280 section 6.1.4 (l): a CA that changes its key signs itself the new one."""
    first = intermediate("changes its key", root, NOW, path_length=0)
    again = intermediate("changes its key", first, NOW)

    assert failure(leaf(ca, NOW, by=again).chain_pem, without_path_length(ca)) is None


@pytest.mark.parametrize(
    ("purposes", "good"),
    [
        ([ExtendedKeyUsageOID.CLIENT_AUTH], True),
        ([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE], True),
        ([ExtendedKeyUsageOID.SERVER_AUTH], False),
        ([ExtendedKeyUsageOID.CODE_SIGNING], False),
    ],
)
def test_an_intermediate_for_another_purpose_is_passed_over(
    purposes: list[x509.ObjectIdentifier], good: bool, ca: CertificateAuthority, root: Authority
):
    """T03 for those who sign."""
    extra = [extension("2.5.29.37", x509.ExtendedKeyUsage(purposes).public_bytes())]
    failed = failure(leaf(ca, NOW, by=intermediate("purpose", root, NOW, extra=extra)).chain_pem, ca.root_pem)

    assert good == (failed is None)


def test_an_intermediate_with_an_unknown_critical_extension_is_passed_over(ca: CertificateAuthority, root: Authority):
    """T15 for those who sign, and the twin that is not critical."""
    for critical, good in ((True, False), (False, True)):
        extra = [extension("1.3.6.1.4.1.99999.1", b"\x05\x00", critical=critical)]
        chain = leaf(ca, NOW, by=intermediate("unknown", root, NOW, extra=extra)).chain_pem
        assert good == (failure(chain, ca.root_pem) is None)


def test_an_intermediate_whose_own_signature_is_weak_is_passed_over(ca: CertificateAuthority):
    """T14: SHA-1 anywhere below the anchor. The anchor's own signature proves nothing, and is not looked at."""
    key = p256_key()

    def sha1(signer: object, data: bytes) -> bytes:
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        return signer.sign(data, ec.ECDSA(hashes.SHA1()))  # noqa: S303 - to be refused

    weak = Algorithm(sequence(oid("1.2.840.10045.4.1")), sha1)
    by = intermediate("weak", Authority(ca.root.certificate.subject, ca.root.private_key, (), weak), NOW, key=key)
    chain = leaf(ca, NOW, by=by).chain_pem

    assert "did not sign" in untrusted(chain, ca.root_pem)
    assert failure(chain, Presented.of(key, *by.chain).chain_pem) is None


@pytest.mark.parametrize("make", [ed25519.Ed25519PrivateKey.generate, lambda: rsa.generate_private_key(65537, 2048)])
def test_an_issuer_of_another_kind_of_key_than_the_signature_did_not_sign(
    make: object, ca: CertificateAuthority, root: Authority
):
    """Same name, other kind of key: no exception of the library gets out."""
    assert callable(make)
    other = intermediate("one name", root, NOW, key=make())
    real = intermediate("one name", root, NOW)
    wrong = leaf(ca, NOW, by=Authority(real.subject, real.key, other.chain)).chain_pem
    both = leaf(ca, NOW, by=Authority(real.subject, real.key, (*other.chain, *real.chain))).chain_pem

    assert "did not sign" in untrusted(wrong, ca.root_pem)
    assert failure(both, ca.root_pem) is None


def test_the_work_for_one_leaf_is_bounded(ca: CertificateAuthority):
    """T12: many authorities of one name, each of which could have signed each other."""
    anchors = b""
    for _ in range(30):
        key = p256_key()
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "one of many")])
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(NOW - HOUR)
            .not_valid_after(NOW + HOUR)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        anchors += certificate_pem(certificate)
    chain = leaf(ca, NOW, by=Authority(name, p256_key())).chain_pem

    started = time.perf_counter()
    assert "too many signatures to check" == untrusted(chain, anchors)
    assert time.perf_counter() - started < 1


def test_a_barred_path_is_told_of_rather_than_one_that_leads_nowhere(ca: CertificateAuthority):
    """The log says REVOKED, not that some other certificate was of no use; in either order of what was sent."""
    revoking = CertificateAuthority("prod.example", ca.root, ca.intermediate, now=NOW)
    issued = revoking.issue(ORDERS)
    revoking.revoke(issued)
    # The same name and key, but no path to the root: signed by somebody who took the root's name.
    impostor = Authority(ca.root.certificate.subject, p256_key())
    dead_end = intermediate("prod.example intermediate", impostor, NOW, key=ca.intermediate.private_key)
    dead_end_pem = Presented.of(p256_key(), *dead_end.chain).chain_pem
    own = issued.leaf.public_bytes(Encoding.PEM)

    for sent in ([ca.intermediate_pem, dead_end_pem], [dead_end_pem, ca.intermediate_pem]):
        failed = failure(own + b"".join(sent), ca.root_pem, lists=(revoking.crl_pem(),))
        assert failed is not None
        assert IdentityReason.REVOKED is failed[0]


def test_a_second_path_is_tried_where_the_first_is_barred(ca: CertificateAuthority, root: Authority):
    """T13: cross-signed. One intermediate's certificate forbids the name, the other of the same key does not."""
    key = p256_key()
    elsewhere = x509.NameConstraints([x509.UniformResourceIdentifier("other.example")], None).public_bytes()
    barred = intermediate("crossed", root, NOW, key=key, extra=[extension("2.5.29.30", elsewhere, critical=True)])
    free = intermediate("crossed", root, NOW, key=key)

    for chain in ((*barred.chain, *free.chain), (*free.chain, *barred.chain)):
        by = Authority(free.subject, key, chain)
        assert failure(leaf(ca, NOW, by=by).chain_pem, ca.root_pem) is None
    assert "name constraints" in untrusted(leaf(ca, NOW, by=barred).chain_pem, ca.root_pem)
