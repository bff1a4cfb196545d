"""Certificates as plain values: everything that the rules look at, read once, or not at all.

The parser is lazy: a certificate that loads can still fail when an extension, a name or its key is looked at. Here all
of it is looked at in one place, so that no rule has to expect a failure.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import SignatureAlgorithmOID

from carnet.errors import CarnetError

__all__ = ["ParsedCertificate", "UnreadableCertificateError", "read_certificates", "signature_is_accepted"]

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)

_LAST_SERIAL: Final = 2**159 - 1  # RFC 5280 section 4.1.2.2: positive, and at most 20 octets with its sign bit.
_RSA_BITS: Final = range(2048, 8192 + 1)  # Beyond that, one handshake costs as much as thousands.
_RSA_EXPONENT: Final = 65537

_PROCESSED: Final = frozenset(
    kind.oid for kind in (x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage, x509.SubjectAlternativeName)
)
"""The extensions that may be critical, because they are looked at. Name constraints come to it for a CA."""

_SIGNATURES: Final = frozenset(
    {
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ECDSA_WITH_SHA512,
        SignatureAlgorithmOID.RSA_WITH_SHA256,
        SignatureAlgorithmOID.RSA_WITH_SHA384,
        SignatureAlgorithmOID.RSA_WITH_SHA512,
        SignatureAlgorithmOID.RSASSA_PSS,
        SignatureAlgorithmOID.ED25519,
    }
)
_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


class UnreadableCertificateError(CarnetError):
    """The bytes are no certificate, or one whose form RFC 5280 does not allow."""

    code = "UNREADABLE_CERTIFICATE"


@dataclass(frozen=True, slots=True, eq=False)
class ParsedCertificate:
    """One certificate. Made by `read_certificates` only."""

    certificate: x509.Certificate
    fingerprint: bytes
    """SHA-256 of its DER form."""
    subject: x509.Name
    issuer: x509.Name
    serial_number: int
    not_before: datetime
    not_after: datetime
    key_is_accepted: bool
    """P-256, P-384, Ed25519, or RSA of 2048 to 8192 bits with e = 65537, in its one DER form."""
    signature_is_accepted: bool
    """Signed over SHA-256, SHA-384 or SHA-512, or with Ed25519. Says nothing about by whom."""
    is_ca: bool
    path_length: int | None
    key_usage: x509.KeyUsage | None
    key_usage_is_critical: bool
    purposes: frozenset[x509.ObjectIdentifier] | None
    """The extended key usages, None where the extension is absent."""
    names: tuple[x509.GeneralName, ...]
    """The subject alternative names."""
    name_constraints: x509.NameConstraints | None
    unprocessed: str | None
    """The OID of a critical extension that we do not process, None where there is none."""

    @property
    def title(self) -> str:
        """The subject, or the serial number where it is empty; for texts."""
        return self.subject.rfc4514_string() or f"serial {self.serial_number:x}"

    @property
    def may_sign_certificates(self) -> bool:
        """Whether it is a CA (RFC 5280 section 6.1.4 (k), (n)). Without a key usage, the basic constraints decide."""
        return self.is_ca and (self.key_usage is None or self.key_usage.key_cert_sign)

    @property
    def is_self_issued(self) -> bool:
        """Whether subject and issuer are the same name (RFC 5280 section 6.1)."""
        return self.subject == self.issuer


def read_certificates(pem: bytes) -> tuple[ParsedCertificate, ...]:
    """Return the certificates in `pem`, in their order, at least one. Raises `UnreadableCertificateError`.

    All that is in `pem` must be certificates, and whole: a file that was read while it was written is refused.
    """
    try:
        parsed = tuple(map(_parsed, x509.load_pem_x509_certificates(pem)))
    except Exception as error:
        # What the parser raises for hostile DER is no closed list: ValueError, UnsupportedAlgorithm, InvalidVersion,
        # DuplicateExtension, UnsupportedGeneralNameType, warnings that were made errors. All mean the same.
        msg = f"it cannot be parsed ({type(error).__name__})"
        raise UnreadableCertificateError(msg) from error
    if len(parsed) != pem.count(b"-----BEGIN "):  # The loader skips a block that has no end.
        msg = "something in it is not a whole certificate"
        raise UnreadableCertificateError(msg)
    for certificate in parsed:
        if not 0 < certificate.serial_number <= _LAST_SERIAL:
            msg = "its serial number is zero, negative or longer than 20 octets"
            raise UnreadableCertificateError(msg)
        if certificate.certificate.version is not x509.Version.v3:
            msg = "it is of X.509 version 1, which has no extensions"
            raise UnreadableCertificateError(msg)
        if not _ends_with_whole_octets(certificate.certificate):
            msg = "its signature is no whole number of octets"
            raise UnreadableCertificateError(msg)
    return parsed


def signature_is_accepted(signed: x509.Certificate | x509.CertificateRevocationList) -> bool:
    """Say whether a certificate or a revocation list may be signed so. By whom it is signed is another question."""
    oid = signed.signature_algorithm_oid
    if oid not in _SIGNATURES:
        return False
    return oid == SignatureAlgorithmOID.ED25519 or isinstance(signed.signature_hash_algorithm, _HASHES)


def _ends_with_whole_octets(certificate: x509.Certificate) -> bool:
    """Say whether no bits of the signature's BIT STRING are unused, as every signature algorithm here wants it.

    Nothing signs this count. Where the last bit is 0, a 1 in its place changes the thumbprint and nothing else, so that
    who holds a certificate would have another one, which no revocation names (X.690 section 8.6.2.2, RFC 5280 4.1.1.3).
    """
    return certificate.public_bytes(Encoding.DER)[-len(certificate.signature) - 1] == 0


def _parsed(certificate: x509.Certificate) -> ParsedCertificate:
    extensions = certificate.extensions
    basic = _value(extensions, x509.BasicConstraints)
    usage = _value(extensions, x509.KeyUsage)
    purposes = _value(extensions, x509.ExtendedKeyUsage)
    is_ca = basic is not None and basic.ca
    processed = {*_PROCESSED, x509.NameConstraints.oid} if is_ca else _PROCESSED
    critical = {extension.oid for extension in extensions if extension.critical}
    return ParsedCertificate(
        certificate=certificate,
        fingerprint=certificate.fingerprint(hashes.SHA256()),
        subject=certificate.subject,
        issuer=certificate.issuer,
        serial_number=certificate.serial_number,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        key_is_accepted=_key_is_accepted(certificate),
        signature_is_accepted=signature_is_accepted(certificate),
        is_ca=is_ca,
        path_length=basic.path_length if basic is not None else None,
        key_usage=usage,
        key_usage_is_critical=x509.KeyUsage.oid in critical,
        purposes=frozenset(purposes) if purposes is not None else None,
        names=tuple(_value(extensions, x509.SubjectAlternativeName) or ()),
        name_constraints=_value(extensions, x509.NameConstraints),
        unprocessed=min((oid.dotted_string for oid in critical - processed), default=None),
    )


def _value(extensions: x509.Extensions, kind: type[_Extension]) -> _Extension | None:
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _key_is_accepted(certificate: x509.Certificate) -> bool:
    try:
        key = certificate.public_key()
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return False
    match key:
        case EllipticCurvePublicKey():
            good = isinstance(key.curve, SECP256R1 | SECP384R1)
        case RSAPublicKey():
            good = key.key_size in _RSA_BITS and key.public_numbers().e == _RSA_EXPONENT
        case _:
            good = isinstance(key, Ed25519PublicKey)
    # RFC 5480 section 2.1.1: a curve is named, never spelled out. What does not come back the same was spelled out.
    return (
        good and key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) in certificate.tbs_certificate_bytes
    )
