from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from carnet.errors import ConfigError
from carnet.testing import CertificateAuthority
from carnet.testing.ca import Issuer, certificate_pem, key_usage, private_key_pem
from carnet_broker.core.workload import IdentityReason, LeafRules, TrustBundle, UnauthenticatedError, authenticate
from certificate_recipe import Authority, bit_string, intermediate, leaf, sequence, tlv

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
DOMAINS = ["prod.example"]
Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
ORDERS = "spiffe://prod.example/ns/shop/sa/orders"


@pytest.fixture(name="ca")
def _ca() -> CertificateAuthority:
    return CertificateAuthority.create(now=NOW)


def crl(
    by: Issuer,
    *,
    revoked: Sequence[int] = (),
    at: datetime = NOW,
    extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
    key: Key | None = None,
) -> bytes:
    """Return a revocation list of `by` in PEM, good for an hour from `at`."""
    builder = x509.CertificateRevocationListBuilder(
        issuer_name=by.certificate.subject,
        last_update=at,
        next_update=at + HOUR,
        revoked_certificates=[
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at).build() for serial in revoked
        ],
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    key = key or by.private_key
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest).public_bytes(Encoding.PEM)


def anchor(
    *, key: Key | None = None, usage: x509.KeyUsage | None = None, critical: x509.ExtensionType | None = None
) -> bytes:
    """Return a self-signed CA certificate in PEM."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an anchor")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7, NOW - HOUR, NOW + HOUR).add_extension(
        x509.BasicConstraints(ca=True, path_length=None), critical=True
    )
    if usage is not None:
        builder = builder.add_extension(usage, critical=True)
    if critical is not None:
        builder = builder.add_extension(critical, critical=True)
    return certificate_pem(builder.sign(key, hashes.SHA256()))


def judge(chain: bytes, ca: CertificateAuthority, *lists: bytes, now: datetime = NOW) -> IdentityReason | None:
    """Return why `chain` is refused with these lists, None where it is not."""
    bundle = TrustBundle.parse(ca.root_pem, lists, DOMAINS)
    try:
        authenticate(chain, tls_version="TLSv1.3", bundle=bundle, now=now, rules=LeafRules())
    except UnauthenticatedError as error:
        return error.reason
    return None


# -- parsing -----------------------------------------------------------------------------------------------------------


def test_a_bundle_holds_all_that_was_given(ca: CertificateAuthority):
    """Several anchors, several lists, one of which came in one text with another."""
    other = CertificateAuthority.create(now=NOW)
    both = ca.crl_pem() + other.crl_pem()

    bundle = TrustBundle.parse(ca.root_pem + other.root_pem, [both, crl(ca.root)], DOMAINS)

    assert [ca.root.certificate, other.root.certificate] == [anchor.certificate for anchor in bundle.anchors]
    assert 3 == len(bundle.revocation_lists)
    assert {"prod.example"} == bundle.trust_domains


def test_the_version_tells_whether_anything_changed(ca: CertificateAuthority):
    """Order and white space change nothing; an anchor, a list or a domain more does."""
    other = CertificateAuthority.create(now=NOW)
    lists = [ca.crl_pem(), other.crl_pem()]

    def version(ca_pem: bytes, lists: Sequence[bytes], domains: Sequence[str]) -> str:
        return TrustBundle.parse(ca_pem, lists, domains).version

    same = version(ca.root_pem + other.root_pem, lists, ["a", "b"])
    assert same == version(b"\n" + other.root_pem + b"\n" + ca.root_pem, lists[::-1], ["b", "a"])
    assert 4 == len(
        {
            same,
            version(ca.root_pem, lists, ["a", "b"]),
            version(ca.root_pem + other.root_pem, lists[:1], ["a", "b"]),
            version(ca.root_pem + other.root_pem, lists, ["ab"]),
        }
    )


@pytest.mark.parametrize("domains", [[], [""], ["Prod.example"], ["prod.example", "a/b"], ["prod.example\n"]])
def test_trust_domains_are_named_and_well_formed(domains: list[str], ca: CertificateAuthority):
    """None means nobody could be let in, so it is a mistake."""
    with pytest.raises(ConfigError, match="trust domain"):
        TrustBundle.parse(ca.root_pem, [], domains)


def test_what_is_no_bundle_of_certificates_is_refused_whole(ca: CertificateAuthority):
    """T23: a broken, empty, half-written or mixed file never becomes a bundle."""
    good = ca.root_pem
    for text in (
        b"",
        b"\n",
        b"garbage",
        good + good[: len(good) // 2],
        good[:-30],
        good + private_key_pem(ca.root.private_key),
        good + crl(ca.root),
        good.replace(b"CERTIFICATE", b"TRUSTED CERTIFICATE"),
    ):
        with pytest.raises(ConfigError, match="CA bundle"):
            TrustBundle.parse(text, [], DOMAINS)


def test_an_anchor_is_an_authority(ca: CertificateAuthority):
    """A workload's certificate in the bundle would be an identity that can make others."""
    for pem in (leaf(ca, NOW).chain_pem, anchor(usage=key_usage("crl_sign"))):
        with pytest.raises(ConfigError, match="may not sign certificates"):
            TrustBundle.parse(ca.root_pem + pem, [], DOMAINS)


def test_an_anchor_without_key_usage_may_sign():
    """RFC 5280 section 6.1.4 (n): only a key usage that is there can forbid it."""
    assert 1 == len(TrustBundle.parse(anchor(), [], DOMAINS).anchors)


def test_an_anchor_has_a_key_that_is_accepted():
    """T14 holds for those who sign too."""
    with pytest.raises(ConfigError, match="key is not"):
        TrustBundle.parse(anchor(key=rsa.generate_private_key(65537, 1024)), [], DOMAINS)  # noqa: S505 - to be refused


def test_an_anchor_with_a_critical_extension_that_is_not_processed_is_refused():
    """Policy constraints limit what it may sign, and nobody here would keep to them."""
    constraints = x509.PolicyConstraints(require_explicit_policy=0, inhibit_policy_mapping=None)
    with pytest.raises(ConfigError, match=r"critical extension that is not supported: 2\.5\.29\.36"):
        TrustBundle.parse(anchor(critical=constraints), [], DOMAINS)


def test_what_is_no_revocation_list_is_refused(ca: CertificateAuthority):
    """An empty file is a broken one, not a list of nothing."""
    good = ca.crl_pem()
    for text in (b"", b"garbage", ca.root_pem, good[:-30], good + ca.root_pem):
        with pytest.raises(ConfigError, match="no whole CRL"):
            TrustBundle.parse(ca.root_pem, [good, text], DOMAINS)
    broken = b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"
    with pytest.raises(ConfigError, match="cannot be parsed"):
        TrustBundle.parse(ca.root_pem, [broken], DOMAINS)


def test_a_list_that_is_not_the_whole_list_of_one_authority_is_refused(ca: CertificateAuthority):
    """A delta, or one that speaks for others, would be read as saying that the rest is good."""
    with pytest.raises(ConfigError, match=r"critical extension \(2\.5\.29\.27\)"):
        TrustBundle.parse(ca.root_pem, [crl(ca.root, extensions=[(x509.DeltaCRLIndicator(3), True)])], DOMAINS)


def test_a_list_without_an_end_or_with_a_weak_signature_is_refused(ca: CertificateAuthority):
    """Made from parts, because no honest builder makes either."""
    good = x509.load_pem_x509_crl(ca.crl_pem()).public_bytes(Encoding.DER)
    ecdsa_sha256, ecdsa_sha1 = bytes.fromhex("06082a8648ce3d040302"), bytes.fromhex("06072a8648ce3d0401")

    moment = tlv(0x17, b"261124120000Z")
    name = ca.intermediate.certificate.subject.public_bytes()

    def made(algorithm: bytes, *times: bytes) -> bytes:
        listed = sequence(b"\x02\x01\x01", sequence(algorithm), name, *times)
        der = sequence(listed, sequence(algorithm), bit_string(b"x"))
        return x509.load_der_x509_crl(der).public_bytes(Encoding.PEM)

    assert ecdsa_sha256 in good
    with pytest.raises(ConfigError, match="no nextUpdate"):
        TrustBundle.parse(ca.root_pem, [made(ecdsa_sha256, moment)], DOMAINS)
    with pytest.raises(ConfigError, match="signed with an algorithm"):
        TrustBundle.parse(ca.root_pem, [made(ecdsa_sha1, moment, moment)], DOMAINS)


# -- revocation --------------------------------------------------------------------------------------------------------


def test_a_revoked_leaf_is_refused_and_its_neighbour_is_not(ca: CertificateAuthority):
    """T16, and the twin."""
    revoked, good = ca.issue(ORDERS), ca.issue(ORDERS)
    ca.revoke(revoked)

    assert IdentityReason.REVOKED is judge(revoked.certificate_pem, ca, ca.crl_pem())
    assert judge(good.certificate_pem, ca, ca.crl_pem()) is None
    assert judge(revoked.certificate_pem, ca) is None


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_a_list_counts_until_its_next_update(offset: int, ca: CertificateAuthority):
    """Whoever holds up the lists must not keep a revoked certificate alive: out of date means no."""
    judged = judge(ca.issue(ORDERS).certificate_pem, ca, ca.crl_pem(now=NOW - HOUR), now=NOW + offset * SECOND)

    assert (None if offset < 0 else IdentityReason.CRL_OUT_OF_DATE) == judged


def test_a_list_whose_this_update_is_ahead_of_our_clock_counts(ca: CertificateAuthority):
    """The authority's clock may be ahead; what it says is signed, and newer."""
    revoked = ca.issue(ORDERS)
    ca.revoke(revoked)

    assert IdentityReason.REVOKED is judge(revoked.certificate_pem, ca, ca.crl_pem(now=NOW + 60 * SECOND))


def test_the_issuer_of_a_leaf_must_have_a_list_when_lists_are_configured(ca: CertificateAuthority):
    """A list of somebody else says nothing about this leaf."""
    other = CertificateAuthority.create("other.example", now=NOW)

    assert IdentityReason.CRL_MISSING is judge(ca.issue(ORDERS).certificate_pem, ca, other.crl_pem())
    assert IdentityReason.CRL_MISSING is judge(ca.issue(ORDERS).certificate_pem, ca, crl(ca.root))


def test_a_list_counts_only_when_the_issuer_signed_it(ca: CertificateAuthority):
    """A name is not a key: an authority of the same name has other serial numbers, and other intentions (T16)."""
    impostor = Issuer(ca.intermediate.certificate, ec.generate_private_key(ec.SECP256R1()))
    issued = ca.issue(ORDERS)

    assert IdentityReason.CRL_MISSING is judge(issued.certificate_pem, ca, crl(impostor))
    forged = crl(impostor, revoked=[issued.leaf.serial_number], at=NOW + SECOND)
    assert judge(issued.certificate_pem, ca, ca.crl_pem(), forged) is None


def test_a_serial_number_is_revoked_for_its_issuer_only(ca: CertificateAuthority):
    """T16: the same number by another authority is another certificate."""
    second = ca.with_new_intermediate()
    first_leaf = leaf(ca, NOW, serial=42).chain_pem
    second_leaf = leaf(second, NOW, serial=42).chain_pem
    lists = [crl(ca.intermediate, revoked=[42]), second.crl_pem()]

    assert IdentityReason.REVOKED is judge(first_leaf, ca, *lists)
    assert judge(second_leaf, ca, *lists) is None


def test_the_newest_of_several_lists_counts(ca: CertificateAuthority):
    """An old file that was left beside the new one does no harm, in either order."""
    issued = ca.issue(ORDERS)
    old, new = ca.crl_pem(now=NOW - 2 * HOUR), crl(ca.intermediate, revoked=[issued.leaf.serial_number])

    for lists in ([old, new], [new, old]):
        assert IdentityReason.REVOKED is judge(issued.certificate_pem, ca, *lists)
        assert judge(ca.issue(ORDERS).certificate_pem, ca, *lists) is None


def test_a_revoked_intermediate_is_refused_and_one_without_a_list_is_not(ca: CertificateAuthority):
    """The root's list is honoured when there is one; only the leaf's issuer must have one."""
    chain, serial = ca.issue(ORDERS).certificate_pem, ca.intermediate.certificate.serial_number

    assert judge(chain, ca, ca.crl_pem()) is None
    assert judge(chain, ca, ca.crl_pem(), crl(ca.root)) is None
    assert IdentityReason.REVOKED is judge(chain, ca, ca.crl_pem(), crl(ca.root, revoked=[serial]))
    assert IdentityReason.CRL_OUT_OF_DATE is judge(chain, ca, ca.crl_pem(), crl(ca.root, at=NOW - 2 * HOUR))


def test_an_issuer_that_may_not_sign_lists_has_none(ca: CertificateAuthority):
    """RFC 5280 section 4.2.1.3: cRLSign."""
    key = ec.generate_private_key(ec.SECP256R1())
    for usage, expected in (
        (key_usage("key_cert_sign"), IdentityReason.CRL_MISSING),
        (key_usage("key_cert_sign", "crl_sign"), None),
        (None, None),
    ):
        pem = anchor(key=key, usage=usage)
        issuer = Issuer(x509.load_pem_x509_certificate(pem), key)
        chain = leaf(ca, NOW, by=Authority(issuer.certificate.subject, key)).chain_pem
        bundle = TrustBundle.parse(pem, [crl(issuer)], DOMAINS)
        try:
            authenticate(chain, tls_version="TLSv1.3", bundle=bundle, now=NOW, rules=LeafRules())
            judged = None
        except UnauthenticatedError as error:
            judged = error.reason
        assert expected == judged


def test_a_list_may_be_signed_with_ed25519(ca: CertificateAuthority):
    """The key policy allows it for authorities too."""
    key = ed25519.Ed25519PrivateKey.generate()
    by = intermediate("modern", Authority.of(ca.root, send=False), NOW, key=key)
    certificate = x509.load_der_x509_certificate(by.chain[0])
    listed = crl(Issuer(certificate, key))  # type: ignore[arg-type]

    bundle = TrustBundle.parse(ca.root_pem, [listed], DOMAINS)

    assert bundle.revocation_lists[0].crl.is_signature_valid(key.public_key())
