"""What a certificate is called, also where its signature is spelled otherwise."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from carnet.certificate_names import certificate_names, is_certificate_name, parse_certificate_name
from carnet.claims import certificate_thumbprint
from carnet.errors import InvalidRevocationError
from carnet.testing.ca import CertificateAuthority

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
ORDERS = "spiffe://prod.example/ns/shop/sa/orders"

# Of the curve, as the standards print them: not those of the code.
ORDERS_OF = {
    "secp256r1": 115792089210356248762697446949407573529996955224135760342422259061068512044369,
    "secp384r1": 39402006196394479212279040100143613805079739270465446667946905279627659399113263569398956308152294913554433653942643,  # noqa: E501
    "secp521r1": 6864797660130609714981900799081393217269435300143305409394463459185543183397655394245057746333217197532963996371363321113864768612440380340372808892707005449,  # noqa: E501
}


def signed_by(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> x509.Certificate:
    """Return a certificate that `key` has signed."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "any")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(ec.generate_private_key(ec.SECP256R1()).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(hours=1))
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )


def spelled(certificate: x509.Certificate, signature: bytes) -> x509.Certificate:
    """Return `certificate` with another signature, put together by the lengths that DER has."""
    der = certificate.public_bytes(Encoding.DER)
    header = 4 if der[1] == 0x82 else 3
    signed = certificate.tbs_certificate_bytes
    tail = der[header + len(signed) :]
    algorithm = tail[: 2 + tail[1]]
    return x509.load_der_x509_certificate(value(0x30, signed + algorithm + value(0x03, b"\x00" + signature)))


def value(tag: int, content: bytes) -> bytes:
    """Return a DER value."""
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    return (
        bytes([tag, 0x81, length]) + content if length < 0x100 else bytes([tag, 0x82, *divmod(length, 256)]) + content
    )


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_t16_both_spellings_of_an_ecdsa_signature_have_the_same_names(curve: ec.EllipticCurve):
    """T16: who knows a certificate knows the other; a revocation of one by its thumbprint is one of both."""
    key = ec.generate_private_key(curve)
    certificate = signed_by(key)
    r, s = decode_dss_signature(certificate.signature)
    other = spelled(certificate, encode_dss_signature(r, ORDERS_OF[curve.name] - s))

    key.public_key().verify(other.signature, other.tbs_certificate_bytes, ec.ECDSA(hashes.SHA256()))
    assert certificate_thumbprint(certificate) != certificate_thumbprint(other)
    assert certificate_names(certificate) == certificate_names(other)
    assert {f"sha256:{certificate_thumbprint(one)}" for one in (certificate, other)} < certificate_names(certificate)
    assert len(certificate_names(certificate)) == 4


@pytest.mark.parametrize(
    "key",
    [rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()],
    ids=["RSA", "Ed25519"],
)
def test_a_signature_of_one_spelling_gives_three_names(key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey):
    """The thumbprint, the key and the serial number."""
    certificate = signed_by(key)

    names = certificate_names(certificate)

    assert {"sha256", "spki-sha256", "serial"} == {name.partition(":")[0] for name in names}
    assert f"sha256:{certificate_thumbprint(certificate)}" in names
    assert len(names) == 3


@pytest.mark.parametrize(
    "signature",
    [b"no signature", encode_dss_signature(1, 2**530), encode_dss_signature(0, 5), encode_dss_signature(5, 0)],
    ids=["rubbish", "beyond every curve", "r is 0", "s is 0"],
)
def test_a_signature_that_no_key_can_have_made_is_no_crash(signature: bytes):
    """The certificate has its own names all the same."""
    certificate = spelled(signed_by(ec.generate_private_key(ec.SECP256R1())), signature)

    assert len(certificate_names(certificate)) == 3


def test_two_certificates_have_no_name_in_common():
    """The twin: others have other names."""
    authority = CertificateAuthority.create("prod.example")
    one, other = authority.issue(ORDERS).leaf, authority.issue(ORDERS).leaf

    assert not certificate_names(one) & certificate_names(other)


def test_each_name_is_one_and_what_is_like_it_is_none():
    """A name comes back as it is."""
    for name in certificate_names(CertificateAuthority.create("prod.example").issue(ORDERS).leaf):
        assert name == parse_certificate_name(name)
        for wrong in (name[:-1], name + "A", name.upper(), name.partition(":")[2], "md5:" + name.partition(":")[2]):
            assert not is_certificate_name(wrong)
            with pytest.raises(InvalidRevocationError, match="names no certificate"):
                parse_certificate_name(wrong)
