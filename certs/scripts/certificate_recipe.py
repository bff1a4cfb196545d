"""Certificates from parts, with no rule kept: what no honest builder makes, tests want to see refused.

`leaf` makes a certificate that is good in every respect but the ones that its arguments name. The good twin of each
wrong kind comes from the same code, so a refusal is about the one thing that is wrong.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from carnet.testing.ca import CertificateAuthority, Issuer, key_usage

__all__ = [
    "ECDSA_SHA256",
    "NO_NAME",
    "Algorithm",
    "Authority",
    "Presented",
    "PrivateKey",
    "bit_string",
    "certificate",
    "common_name",
    "extension",
    "good_name",
    "integer",
    "intermediate",
    "leaf",
    "oid",
    "p256_key",
    "public_key_info",
    "sequence",
    "tlv",
]

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | dsa.DSAPrivateKey | ed25519.Ed25519PrivateKey

NO_NAME: Final = x509.Name([])
_BACKDATED: Final = timedelta(minutes=1)
_LEAF_LIFE: Final = timedelta(hours=1)
_LONG_FORM: Final = 0x80
_V3: Final = 2


# DER, as much of it as a certificate needs (X.690).


def tlv(tag: int, *content: bytes) -> bytes:
    """Return one value: tag, length, content."""
    body = b"".join(content)
    if len(body) < _LONG_FORM:
        return bytes([tag, len(body)]) + body
    length = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes([tag, _LONG_FORM | len(length)]) + length + body


def sequence(*content: bytes) -> bytes:
    """Return a SEQUENCE."""
    return tlv(0x30, *content)


def integer(value: int) -> bytes:
    """Return an INTEGER, negative ones included."""
    return tlv(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def bit_string(content: bytes) -> bytes:
    """Return a BIT STRING of whole octets."""
    return tlv(0x03, b"\x00", content)


def oid(dotted: str) -> bytes:
    """Return an OBJECT IDENTIFIER."""
    first, second, *rest = map(int, dotted.split("."))
    body = b""
    for arc in (first * 40 + second, *rest):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.insert(0, (arc & 0x7F) | 0x80)
        body += bytes(groups)
    return tlv(0x06, body)


def _time(moment: datetime) -> bytes:
    return tlv(0x17, moment.strftime("%y%m%d%H%M%SZ").encode())


def extension(dotted: str, value: bytes, *, critical: bool = False) -> bytes:
    """Return one Extension (RFC 5280 section 4.1)."""
    return sequence(oid(dotted), tlv(0x01, b"\xff") if critical else b"", tlv(0x04, value))


def public_key_info(key: PrivateKey) -> bytes:
    """Return the SubjectPublicKeyInfo of the public half of `key`."""
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def common_name(text: str) -> x509.Name:
    """Return a name of one part."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def p256_key() -> ec.EllipticCurvePrivateKey:
    """Return a new key of the good kind."""
    return ec.generate_private_key(ec.SECP256R1())


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A signature algorithm: how a certificate names it, and how it signs."""

    identifier: bytes
    sign: Callable[[PrivateKey, bytes], bytes]


def _ecdsa_sha256(key: PrivateKey, data: bytes) -> bytes:
    return cast("ec.EllipticCurvePrivateKey", key).sign(data, ec.ECDSA(hashes.SHA256()))


ECDSA_SHA256: Final = Algorithm(sequence(oid("1.2.840.10045.4.3.2")), _ecdsa_sha256)


@dataclass(frozen=True, slots=True)
class Authority:
    """Something that signs, with the certificates that lead from it towards the root (its own first, no root)."""

    subject: x509.Name
    key: PrivateKey
    chain: tuple[bytes, ...] = ()
    algorithm: Algorithm = ECDSA_SHA256

    @classmethod
    def of(cls, issuer: Issuer, *, send: bool) -> Authority:
        """Return `issuer` as an authority; `send` says whether its certificate goes into chains."""
        der = issuer.certificate.public_bytes(Encoding.DER)
        return cls(issuer.certificate.subject, issuer.private_key, (der,) if send else ())


@dataclass(frozen=True, slots=True)
class Presented:
    """What a client shows: its chain and the private key, both PEM and both empty where it shows nothing."""

    chain_pem: bytes
    private_key_pem: bytes = field(repr=False)

    @classmethod
    def of(cls, key: PrivateKey, *chain: bytes) -> Presented:
        """Return `chain` (DER, leaf first) and `key` as PEM."""
        text = "".join(ssl.DER_cert_to_PEM_cert(der) for der in chain)
        return cls(text.encode(), key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def certificate(
    *,
    subject: x509.Name,
    by: Authority,
    key_info: bytes,
    extensions: Sequence[bytes],
    not_before: datetime,
    not_after: datetime,
    serial: int | None = None,
    version: int | None = _V3,
) -> bytes:
    """Return a signed certificate (RFC 5280 section 4.1) of exactly these parts. `version` is as encoded: 2 is v3."""
    to_be_signed = sequence(
        tlv(0xA0, integer(version)) if version is not None else b"",
        integer(x509.random_serial_number() if serial is None else serial),
        by.algorithm.identifier,
        by.subject.public_bytes(),
        sequence(_time(not_before), _time(not_after)),
        subject.public_bytes(),
        key_info,
        tlv(0xA3, sequence(*extensions)) if extensions else b"",
    )
    return sequence(to_be_signed, by.algorithm.identifier, bit_string(by.algorithm.sign(by.key, to_be_signed)))


def intermediate(
    name: str,
    by: Authority,
    now: datetime,
    *,
    path_length: int | None = None,
    ca: bool = True,
    key: PrivateKey | None = None,
    extra: Sequence[bytes] = (),
    not_before: datetime | None = None,
    not_after: datetime | None = None,
    algorithm: Algorithm = ECDSA_SHA256,
) -> Authority:
    """Return an authority below `by`. `algorithm` is what it will sign with."""
    key = key or p256_key()
    constraints = x509.BasicConstraints(ca=ca, path_length=path_length if ca else None)
    der = certificate(
        subject=common_name(name),
        by=by,
        key_info=public_key_info(key),
        extensions=[
            extension(ExtensionOID.BASIC_CONSTRAINTS.dotted_string, constraints.public_bytes(), critical=True),
            extension(
                ExtensionOID.KEY_USAGE.dotted_string,
                key_usage("key_cert_sign", "crl_sign").public_bytes(),
                critical=True,
            ),
            *_key_identifiers(key, by),
            *extra,
        ],
        not_before=not_before or now - _BACKDATED,
        not_after=not_after or now + timedelta(days=1),
    )
    return Authority(common_name(name), key, (der, *by.chain), algorithm)


def _key_identifiers(key: PrivateKey, by: Authority) -> list[bytes]:
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).public_bytes()
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key()).public_bytes()
    return [
        extension(ExtensionOID.SUBJECT_KEY_IDENTIFIER.dotted_string, own),
        extension(ExtensionOID.AUTHORITY_KEY_IDENTIFIER.dotted_string, issuer),
    ]


_USAGES: Final = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
_GOOD: Final[Mapping[str, bytes]] = {
    "basic": extension("2.5.29.19", x509.BasicConstraints(ca=False, path_length=None).public_bytes(), critical=True),
    "usage": extension("2.5.29.15", key_usage("digital_signature").public_bytes(), critical=True),
    "extended": extension("2.5.29.37", x509.ExtendedKeyUsage(_USAGES).public_bytes()),
}


def good_name(ca: CertificateAuthority) -> str:
    """Return the SPIFFE ID that a good leaf has."""
    return f"spiffe://{ca.trust_domain}/ns/shop/sa/orders"


def leaf(
    ca: CertificateAuthority,
    now: datetime,
    *,
    names: Sequence[bytes] | None = None,
    replace: Mapping[str, bytes] | None = None,
    extra: Sequence[bytes] = (),
    subject: x509.Name = NO_NAME,
    key: PrivateKey | None = None,
    key_info: bytes | None = None,
    by: Authority | None = None,
    not_before: datetime | None = None,
    not_after: datetime | None = None,
    serial: int | None = None,
    version: int | None = _V3,
    no_extensions: bool = False,
) -> Presented:
    """Return a leaf and its chain.

    `names` are the GeneralNames of the SAN (DER); None is the good one, empty leaves the SAN out. `replace` has other
    bytes for the extensions ``names basic usage extended``, empty to leave one out; `extra` come after all others.
    """
    key = key or p256_key()
    by = by or Authority.of(ca.intermediate, send=True)
    if names is None:
        names = [tlv(0x86, good_name(ca).encode())]
    # With an empty subject the SAN is critical (RFC 5280 section 4.2.1.6).
    named = extension("2.5.29.17", sequence(*names), critical=subject == NO_NAME) if names else b""
    parts = {"names": named, **_GOOD, **(replace or {})}
    der = certificate(
        subject=subject,
        by=by,
        key_info=key_info or public_key_info(key),
        extensions=[] if no_extensions else [*filter(None, parts.values()), *_key_identifiers(key, by), *extra],
        not_before=not_before or now - _BACKDATED,
        not_after=not_after or now + _LEAF_LIFE,
        serial=serial,
        version=version,
    )
    return Presented.of(key, der, *by.chain)
