"""Verifying a token. Pure: token, published keys, expectations and time in; the claims out, or an error.

The order is the security of it:

1. `parse_unverified`: lengths first, then three canonical base64url parts, then a header of exactly ``alg``, ``typ``
   and ``kid``, then one strict JSON object. Nothing in here is believed yet, and nothing but the `kid` is used.
2. The key, by a look-up of the `kid` in the key set that the caller gives. The algorithm is ours, ES256, never the
   header's choice (RFC 8725 section 3.1): every key of a `KeySet` is a P-256 key for ES256 and for nothing else.
3. The signature, over the bytes as they came.
4. The claims: form, issuer, audience, times, life, and the certificate that the token is bound to.

A signature has a second form (r, n - s) that is as good as the first, so two texts can be the same token. Nothing may
be keyed on the text of a token: its name is ``jti``.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from carnet.claims import Claims, claims_of_payload, is_name
from carnet.encoding import base64url, decode_base64url, decode_json_object, encode_json
from carnet.errors import ConfigError, InvalidTokenError, InvalidTokenReason
from carnet.jwk import KeySet, PublicJWK, is_thumbprint

__all__ = [
    "MAX_HEADER_BYTES",
    "MAX_TOKEN_BYTES",
    "SIGNATURE_BYTES",
    "Binding",
    "Expectations",
    "UnverifiedToken",
    "assemble",
    "check_claims",
    "encode_unsigned",
    "parse_unverified",
    "raw_signature",
    "verify_parsed",
    "verify_signature",
    "verify_token",
]

MAX_TOKEN_BYTES: Final = 8192
"""Length of a whole token. gRPC's metadata limit is 16 KiB for all headers of a call."""

MAX_HEADER_BYTES: Final = 1024
"""Length of the header before it is encoded."""

SIGNATURE_BYTES: Final = 64
"""An ES256 signature: r and s, 32 bytes each (RFC 7518 section 3.4)."""

_ALGORITHM: Final = "ES256"
_TYPE: Final = "at+jwt"  # RFC 9068 section 2.1, in this one spelling.
_HEADER_MEMBERS: Final = frozenset({"alg", "typ", "kid"})
_DOTS: Final = 2  # RFC 7515 section 3.1. A JWE has four; the JSON forms of JWS have none.
_MAX_CONTAINERS: Final = 16
_ENCODED_SIGNATURE_BYTES: Final = 86
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # n of P-256 (SEC 2 section 2.4.2)
_ES256: Final = ec.ECDSA(SHA256())


class Binding(StrEnum):
    """Whether a verifier wants tokens to be bound to the caller's certificate (RFC 8705 section 3)."""

    CERTIFICATE = "certificate"
    """Always bound, always checked. A call without a client certificate is refused."""
    NONE = "none"
    """Unbound tokens are accepted.

    A bound token is still checked where the caller's certificate is known; where it is not (TLS ends at a proxy that
    passes no certificate on), it is accepted like an unbound one.
    """


@dataclass(frozen=True, slots=True)
class Expectations:
    """What a verifier expects of every token. Raises `ConfigError` for what could never be met, or met by all."""

    issuer: str
    """The one issuer that is trusted, compared whole."""
    audience: str
    """The verifier's own name, compared whole."""
    binding: Binding = Binding.CERTIFICATE
    leeway: timedelta = timedelta(seconds=30)
    """How far ahead the issuer's clock may be (``nbf`` and ``iat``). ``exp`` has no leeway."""
    max_life: timedelta = timedelta(hours=24)
    """The longest life, from ``iat`` to ``exp``, that is accepted."""

    def __post_init__(self) -> None:
        for name, text in (("issuer", self.issuer), ("audience", self.audience)):
            if not is_name(text):
                msg = f"the expected {name} {text[:50]!r} is not 1 to 255 printable ASCII signs without space and quote"
                raise ConfigError(msg)
        if self.leeway < timedelta() or self.max_life <= timedelta():
            msg = f"leeway ({self.leeway}) may not be negative, and max_life ({self.max_life}) must be positive"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class UnverifiedToken:
    """A token of the right form that nobody has vouched for. Its repr shows nothing that could be replayed."""

    kid: str
    unverified_payload: dict[str, Any]
    signing_input: bytes = field(repr=False)
    signature: bytes = field(repr=False)


def parse_unverified(token: str | bytes) -> UnverifiedToken:
    """Return the parts of `token` without believing them. Raises `InvalidTokenError`: MALFORMED or BAD_ALGORITHM.

    Cheap for any input: nothing that is longer than `MAX_TOKEN_BYTES` is looked at.
    """
    if len(token) > MAX_TOKEN_BYTES:  # Signs of a str are bytes here: only ASCII passes below.
        _refuse(f"the token is longer than {MAX_TOKEN_BYTES} bytes")
    if not token.isascii():
        _refuse("the token is not ASCII")
    raw = token.encode("ascii") if isinstance(token, str) else token
    if raw.count(b".") != _DOTS:
        _refuse("the token is not three parts divided by dots")
    header, payload, signature = raw.split(b".")
    if not (header and payload and signature):
        _refuse("a part of the token is empty")
    kid = _parse_header(header)
    try:
        unverified_payload = decode_json_object(_decode_part("payload", payload), max_containers=_MAX_CONTAINERS)
    except ValueError as error:
        _refuse(f"the payload {error}")
    raw_rs = _decode_part("signature", signature)
    if len(raw_rs) != SIGNATURE_BYTES:
        _refuse(f"the signature is not {SIGNATURE_BYTES} bytes long")
    return UnverifiedToken(kid, unverified_payload, raw[: -len(signature) - 1], raw_rs)


def verify_token(
    token: str | bytes,
    *,
    keys: KeySet,
    expectations: Expectations,
    peer_thumbprint: str | None,
    now: datetime,
) -> Claims:
    """Return what `token` says, having checked all of it, or raise `InvalidTokenError` with the reason.

    `keys` are the keys that the expected issuer publishes. `peer_thumbprint` is the ``x5t#S256`` of the certificate
    that the caller showed in TLS, None where there was none. `now` is aware UTC.
    """
    unverified = parse_unverified(token)
    key = keys.get(unverified.kid)
    if key is None:
        msg = f"no published key has kid {unverified.kid}"
        raise InvalidTokenError(InvalidTokenReason.UNKNOWN_KEY, msg)
    return verify_parsed(unverified, key=key, expectations=expectations, peer_thumbprint=peer_thumbprint, now=now)


def verify_parsed(
    unverified: UnverifiedToken,
    *,
    key: PublicJWK,
    expectations: Expectations,
    peer_thumbprint: str | None,
    now: datetime,
) -> Claims:
    """Do the rest of `verify_token`: all that comes after the look-up of the key, which must be that of the `kid`."""
    verify_signature(key, unverified.signing_input, unverified.signature)
    claims = claims_of_payload(unverified.unverified_payload)
    check_claims(claims, expectations=expectations, peer_thumbprint=peer_thumbprint, now=now)
    return claims


def check_claims(claims: Claims, *, expectations: Expectations, peer_thumbprint: str | None, now: datetime) -> None:
    """Raise `InvalidTokenError` unless `claims` are meant for this verifier, now, and from this peer.

    All that `verify_token` decides after the signature. The broker runs it on what it is about to sign.
    """
    _check_purpose(claims, expectations)
    _check_times(claims, expectations, now)
    _check_binding(claims, expectations.binding, peer_thumbprint)


def verify_signature(key: PublicJWK, signing_input: bytes, signature: bytes) -> None:
    """Raise `InvalidTokenError` (BAD_SIGNATURE) unless `signature` is the ES256 signature of `key`, 64 bytes."""
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    # The range is checked here too (SEC 1 section 4.1.4 step 1): libraries have forgotten it (CVE-2022-21449).
    if len(signature) == SIGNATURE_BYTES and 0 < r < _ORDER and 0 < s < _ORDER:
        try:
            key.public_key.verify(encode_dss_signature(r, s), signing_input, _ES256)
        except InvalidSignature:
            pass
        else:
            return
    msg = f"the signature is not one of key {key.kid}"
    raise InvalidTokenError(InvalidTokenReason.BAD_SIGNATURE, msg)


def encode_unsigned(claims: Claims, kid: str) -> bytes:
    """Return what is to be signed to make a token of `claims`: header and payload, encoded (RFC 7515 section 5.1).

    Raises `InvalidTokenError` for whatever a verifier would refuse in it, so such a token is never signed.
    """
    payload = claims.to_payload()
    if claims_of_payload(payload) != claims:
        msg = "the claims do not survive encoding: times must be aware UTC in whole seconds, scopes sorted"
        raise InvalidTokenError(InvalidTokenReason.INVALID_CLAIM, msg)
    if not is_thumbprint(kid):
        _refuse("the kid is not a SHA-256 thumbprint in base64url")
    header = encode_json({"alg": _ALGORITHM, "typ": _TYPE, "kid": kid})
    signing_input = base64url(header) + b"." + base64url(encode_json(payload))
    if len(signing_input) > MAX_TOKEN_BYTES - _ENCODED_SIGNATURE_BYTES - 1:
        _refuse(f"the token would be longer than {MAX_TOKEN_BYTES} bytes")
    return signing_input


def assemble(signing_input: bytes, signature: bytes) -> str:
    """Return the token of `signing_input` and its 64-byte signature. Raises `InvalidTokenError` for another length."""
    if len(signature) != SIGNATURE_BYTES:
        _refuse(f"the signature is not {SIGNATURE_BYTES} bytes long")
    return (signing_input + b"." + base64url(signature)).decode("ascii")


def raw_signature(der: bytes) -> bytes:
    """Return the 64 bytes r, s of an ECDSA signature in DER, the form that `cryptography` signs in.

    Raises `ValueError` where `der` is none.
    """
    r, s = decode_dss_signature(der)
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _decode_part(what: str, part: bytes) -> bytes:
    try:
        return decode_base64url(part)
    except ValueError as error:
        _refuse(f"the {what} {error}")


@lru_cache(maxsize=64)  # All tokens of one key have one and the same header. What raises is not kept.
def _parse_header(part: bytes) -> str:
    """Return the `kid` of a header that is exactly ours (RFC 7515 section 4, RFC 8725 sections 3.1, 3.10 and 3.11)."""
    raw = _decode_part("header", part)
    if len(raw) > MAX_HEADER_BYTES:
        _refuse(f"the header is longer than {MAX_HEADER_BYTES} bytes")
    try:
        header = decode_json_object(raw, max_containers=_MAX_CONTAINERS)
    except ValueError as error:
        _refuse(f"the header {error}")
    if header.get("alg") != _ALGORITHM:
        msg = f"the header's alg is not {_ALGORITHM}"
        raise InvalidTokenError(InvalidTokenReason.BAD_ALGORITHM, msg)
    if header.keys() != _HEADER_MEMBERS:
        # Among the others are crit, b64, jwk, jku and x5u: each an offer to verify by another rule or another key.
        _refuse("the header's members are not exactly alg, typ and kid")
    if header["typ"] != _TYPE:
        _refuse(f"the header's typ is not {_TYPE}")
    kid = header["kid"]
    if not is_thumbprint(kid):
        _refuse("the header's kid is not a SHA-256 thumbprint in base64url")
    return str(kid)


def _check_purpose(claims: Claims, expectations: Expectations) -> None:
    if claims.issuer != expectations.issuer:
        msg = f"the token is from issuer {claims.issuer[:80]!r} where {expectations.issuer!r} is expected"
        raise InvalidTokenError(InvalidTokenReason.WRONG_ISSUER, msg)
    if claims.audience != expectations.audience:
        msg = f"the token is for audience {claims.audience[:80]!r} where {expectations.audience!r} is expected"
        raise InvalidTokenError(InvalidTokenReason.WRONG_AUDIENCE, msg)


def _check_times(claims: Claims, expectations: Expectations, now: datetime) -> None:
    if now >= claims.expires_at:  # RFC 7519 section 4.1.4: "on or after" is over.
        msg = f"the token ended at {claims.expires_at:%Y-%m-%dT%H:%M:%SZ}"
        raise InvalidTokenError(InvalidTokenReason.EXPIRED, msg)
    starts_at = max(claims.not_before, claims.issued_at)
    if starts_at > now + expectations.leeway:
        msg = f"the token begins at {starts_at:%Y-%m-%dT%H:%M:%SZ}, and its issuer's clock may be ahead"
        raise InvalidTokenError(InvalidTokenReason.NOT_YET_VALID, msg)
    if claims.expires_at - claims.issued_at > expectations.max_life:
        msg = f"the token lives {claims.expires_at - claims.issued_at}, longer than the {expectations.max_life} allowed"
        raise InvalidTokenError(InvalidTokenReason.INVALID_CLAIM, msg)


def _check_binding(claims: Claims, binding: Binding, peer_thumbprint: str | None) -> None:
    """Check that the token is used by the holder of the certificate that it names (RFC 8705 section 3)."""
    if binding is Binding.CERTIFICATE:
        if peer_thumbprint is None:
            msg = "the caller's certificate is not known, and this verifier accepts bound tokens only"
            raise InvalidTokenError(InvalidTokenReason.NO_PEER_CERTIFICATE, msg)
        if claims.confirmation is None:
            msg = "the token has no cnf, and this verifier accepts bound tokens only"
            raise InvalidTokenError(InvalidTokenReason.MISSING_CLAIM, msg)
    if claims.confirmation is None or peer_thumbprint is None:
        return
    if not hmac.compare_digest(claims.confirmation.encode(), peer_thumbprint.encode()):
        msg = "the token is bound to another certificate than the caller's"
        raise InvalidTokenError(InvalidTokenReason.WRONG_CONFIRMATION, msg)


def _refuse(what: str) -> NoReturn:
    raise InvalidTokenError(InvalidTokenReason.MALFORMED, what)
