"""Rule T14: keys and signatures that are too weak, or of a kind that nobody asked for.

The policy is P-256, P-384, Ed25519, or RSA of 2,048 bits and more, and SHA-2 signatures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache
from typing import Final, cast

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from carnet.testing.ca import CertificateAuthority
from certificate_recipe import (
    ECDSA_SHA256,
    Algorithm,
    Authority,
    Presented,
    PrivateKey,
    bit_string,
    integer,
    intermediate,
    leaf,
    oid,
    p256_key,
    sequence,
    tlv,
)
from wrong_kind import Build, Client, Expected, WrongCertificate

__all__ = ["KEYS"]

_NULL: Final = b"\x05\x00"


@cache  # The one kind of key that takes long to make; the same key in two certificates harms nothing here.
def _rsa(bits: int, exponent: int = 65537) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(exponent, bits)


@cache
def _dsa() -> dsa.DSAPrivateKey:
    return dsa.generate_private_key(1024)  # noqa: S505 - to be refused


def _rsa_signature(dotted: str, digest: hashes.HashAlgorithm) -> Algorithm:
    def sign(key: PrivateKey, data: bytes) -> bytes:
        return cast("rsa.RSAPrivateKey", key).sign(data, padding.PKCS1v15(), digest)

    return Algorithm(sequence(oid(dotted), _NULL), sign)


def _ecdsa_sha1(key: PrivateKey, data: bytes) -> bytes:
    return cast("ec.EllipticCurvePrivateKey", key).sign(data, ec.ECDSA(hashes.SHA1()))  # noqa: S303 - to be refused


_RSA_SHA256: Final = _rsa_signature("1.2.840.113549.1.1.11", hashes.SHA256())
_RSA_SHA1: Final = _rsa_signature("1.2.840.113549.1.1.5", hashes.SHA1())  # noqa: S303 - to be refused
_RSA_MD5: Final = _rsa_signature("1.2.840.113549.1.1.4", hashes.MD5())  # noqa: S303 - to be refused
_ECDSA_SHA1: Final = Algorithm(sequence(oid("1.2.840.10045.4.1")), _ecdsa_sha1)


def _key(make: Callable[[], PrivateKey]) -> Build:
    return lambda ca, now: leaf(ca, now, key=make())


def _curve(curve: ec.EllipticCurve) -> Build:
    return _key(lambda: ec.generate_private_key(curve))


def _signed(algorithm: Algorithm, make: Callable[[], PrivateKey]) -> Build:
    """Return the builder of a leaf signed with `algorithm` by an intermediate that has the key of `make`."""

    def build(ca: CertificateAuthority, now: datetime) -> Presented:
        root = Authority.of(ca.root, send=False)
        return leaf(ca, now, by=intermediate("signs otherwise", root, now, key=make(), algorithm=algorithm))

    return build


# SEC 2 section 2.4.2.
_P: Final = 2**256 - 2**224 + 2**192 + 2**96 - 1
_B: Final = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
_N: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_GENERATOR: Final = bytes.fromhex(
    "04"
    "6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"
    "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5"
)


def _explicit_curve(ca: CertificateAuthority, now: datetime) -> Presented:
    """Return a leaf that spells its curve out (RFC 3279 section 2.3.5, CVE-2020-0601). It is P-256 all the same."""
    key = p256_key()
    curve = sequence(
        integer(1),
        sequence(oid("1.2.840.10045.1.1"), integer(_P)),
        sequence(tlv(0x04, (_P - 3).to_bytes(32, "big")), tlv(0x04, _B.to_bytes(32, "big"))),
        tlv(0x04, _GENERATOR),
        integer(_N),
        integer(1),
    )
    point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return leaf(ca, now, key=key, key_info=sequence(sequence(oid("1.2.840.10045.2.1"), curve), bit_string(point)))


_H, _U, _A = Expected.HANDSHAKE, Expected.UNAUTHENTICATED, Expected.ACCEPT
_GRPC, _OPENSSL = Client.GRPC, Client.OPENSSL

_CASES: Final[Mapping[str, tuple[Expected, str, Build, Client]]] = {
    "T14-p384": (_A, "twin: allowed", _curve(ec.SECP384R1()), _GRPC),
    "T14-rsa-2048": (_A, "twin: allowed", _key(lambda: _rsa(2048)), _GRPC),
    "T14-rsa-1024": (_U, "too short", _key(lambda: _rsa(1024)), _GRPC),
    "T14-rsa-exponent-3": (_U, "exponent under 65,537", _key(lambda: _rsa(2048, 3)), _GRPC),
    "T14-p521": (_H, "not asked for", _curve(ec.SECP521R1()), _OPENSSL),
    "T14-p192": (_H, "too short", _curve(ec.SECP192R1()), _OPENSSL),
    "T14-p224": (_H, "too short", _curve(ec.SECP224R1()), _OPENSSL),
    "T14-secp256k1": (_H, "not asked for", _curve(ec.SECP256K1()), _OPENSSL),
    "T14-dsa": (_H, "not asked for", _key(_dsa), _OPENSSL),
    "T14-ed25519": (
        _H,
        "the policy allows it, gRPC's TLS does not offer it",
        _key(ed25519.Ed25519PrivateKey.generate),
        _GRPC,
    ),
    "T14-explicit-curve": (_H, "P-256 spelled out", _explicit_curve, _OPENSSL),
    "T14-ecdsa-sha1": (_U, "SHA-1 signature by a P-256 authority", _signed(_ECDSA_SHA1, p256_key), _GRPC),
    "T14-rsa-sha1": (_U, "SHA-1 signature by an RSA authority", _signed(_RSA_SHA1, lambda: _rsa(2048)), _GRPC),
    "T14-rsa-md5": (_H, "MD5 signature by an RSA authority", _signed(_RSA_MD5, lambda: _rsa(2048)), _GRPC),
    "T14-rsa-authority": (_A, "twin: SHA-256 by an RSA authority", _signed(_RSA_SHA256, lambda: _rsa(2048)), _GRPC),
    "T14-rsa-1024-authority": (_U, "signed by a short key", _signed(_RSA_SHA256, lambda: _rsa(1024)), _GRPC),
    "T14-ecdsa-authority": (_A, "twin: SHA-256 by another P-256 authority", _signed(ECDSA_SHA256, p256_key), _GRPC),
}

KEYS: Final = tuple(WrongCertificate(name, *case) for name, case in _CASES.items())
