"""The names that a revocation may call a certificate by. Pure.

A certificate's thumbprint covers its signature, and an ECDSA signature has two spellings: with (r, s), (r, n - s) is
good as well, and everybody can work it out. So whoever holds a certificate holds two, with different thumbprints and
nothing else to tell them apart. A certificate is therefore called by the thumbprints of both spellings: a revocation
of one revokes the other. By public key and by serial number the two are one anyway.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import SignatureAlgorithmOID

from carnet.encoding import base64url
from carnet.errors import InvalidRevocationError
from carnet.jwk import is_thumbprint

__all__ = ["certificate_names", "is_certificate_name", "parse_certificate_name"]

_SERIAL: Final = re.compile(r"(0|[1-9a-f][0-9a-f]{0,63})")

_ECDSA: Final = frozenset(
    {
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ECDSA_WITH_SHA512,
    }
)

# SEC 2 sections 2.4.2, 2.5.1 and 2.6.1: n of P-256, P-384 and P-521, the smallest first.
_ORDERS: Final = (
    0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973,
    (0x1FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFA << 256)
    + 0x51868783BF2F966B7FCC0148F709A5D03BB5C9B8899C47AEBB6FB71E91386409,
)

_SEQUENCE: Final = 0x30
_BIT_STRING: Final = 0x03
_LONG_FORM: Final = 0x80


def certificate_names(certificate: x509.Certificate) -> frozenset[str]:
    """Return the names that a revocation may call `certificate` by.

    ``sha256:`` and its thumbprint (``x5t#S256``), in both spellings where it is signed with ECDSA; ``spki-sha256:`` and
    the SHA-256 of its public key, all in base64url; ``serial:`` with its number in lower-case hex, ``:`` and the
    SHA-256 of its issuer's name.
    """
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return frozenset(
        {
            f"spki-sha256:{_sha256(key)}",
            f"serial:{certificate.serial_number:x}:{_sha256(certificate.issuer.public_bytes())}",
            *(f"sha256:{_sha256(spelling)}" for spelling in _spellings(certificate)),
        }
    )


def parse_certificate_name(text: str) -> str:
    """Return `text` if it is one of the forms of `certificate_names`. Raises `InvalidRevocationError`."""
    if not is_certificate_name(text):
        msg = (
            f"{text[:80]!r} names no certificate: give sha256:THUMBPRINT, spki-sha256:HASH or serial:HEX:ISSUER-HASH,"
            " with SHA-256 in base64url"
        )
        raise InvalidRevocationError(msg)
    return text


def is_certificate_name(text: str) -> bool:
    """Say whether `text` is one of the forms of `certificate_names`."""
    form, _, rest = text.partition(":")
    match form:
        case "sha256" | "spki-sha256":
            return is_thumbprint(rest)
        case "serial":
            number, _, issuer = rest.partition(":")
            return _SERIAL.fullmatch(number) is not None and is_thumbprint(issuer)
        case _:
            return False


def _spellings(certificate: x509.Certificate) -> tuple[bytes, ...]:
    """Return the DER form of `certificate`, and the one with the other spelling of its signature where there is one."""
    der = certificate.public_bytes(Encoding.DER)
    if certificate.signature_algorithm_oid not in _ECDSA:
        return (der,)
    try:
        r, s = decode_dss_signature(certificate.signature)
    except ValueError:  # Whatever it is, no CA signed it so.
        return (der,)
    # The certificate does not say on which curve it was signed. No number of a greater curve is small by chance.
    order = next((order for order in _ORDERS if 0 < r < order and 0 < s < order), None)
    if order is None:
        return (der,)
    # RFC 5280 section 4.1: a certificate is tbsCertificate, signatureAlgorithm, signatureValue.
    signed = certificate.tbs_certificate_bytes
    end_of_signed = der.index(signed) + len(signed)
    algorithm = der[end_of_signed : len(der) - len(_bit_string(certificate.signature))]
    return (der, _der(_SEQUENCE, signed + algorithm + _bit_string(encode_dss_signature(r, order - s))))


def _bit_string(octets: bytes) -> bytes:
    return _der(_BIT_STRING, b"\x00" + octets)


def _der(tag: int, content: bytes) -> bytes:
    """Return one DER value: tag, length, content (X.690 section 8.1.3)."""
    length = len(content)
    if length < _LONG_FORM:
        return bytes((tag, length)) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, _LONG_FORM | len(octets))) + octets + content


def _sha256(raw: bytes) -> str:
    return base64url(hashlib.sha256(raw).digest()).decode("ascii")
