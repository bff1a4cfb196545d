"""Tokens to order: the right one, and every wrong one, signed with a fixed test key.

`token()` is right. What is given to it replaces its parts: a dict for the members, bytes for the raw JSON.
The signature is right for whatever is signed, unless the key or the signature is replaced as well.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from carnet.claims import Claims
from carnet.encoding import base64url, decode_base64url
from carnet.errors import InvalidTokenError, InvalidTokenReason
from carnet.jwk import KeySet, PublicJWK
from carnet.verify import Binding, Expectations, raw_signature, verify_token

ISSUER: Final = "https://tokens.prod.example"
AUDIENCE: Final = "payments"
ORDERS: Final = "spiffe://prod.example/ns/shop/sa/orders"
NOW: Final = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
LIFE: Final = timedelta(minutes=5)

KEY: Final = ec.derive_private_key(0x0CA6_1E7 << 200 | 1, ec.SECP256R1())  # Fixed, and for tests only.
OTHER_KEY: Final = ec.derive_private_key(0x0CA6_1E7 << 200 | 2, ec.SECP256R1())
JWK: Final = PublicJWK.of(KEY.public_key())
OTHER_JWK: Final = PublicJWK.of(OTHER_KEY.public_key())
KEYS: Final = KeySet.of([JWK])

PEER: Final = "A4DtL2JmUMhAsvJj5tKyn64SqzmuXbMrJa0n761y5v0"  # RFC 8705 appendix A.
OTHER_PEER: Final = "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"  # Any other digest; this one is from RFC 9449.

EXPECTED: Final = Expectations(issuer=ISSUER, audience=AUDIENCE)
UNBOUND: Final = Expectations(issuer=ISSUER, audience=AUDIENCE, binding=Binding.NONE)


def seconds(moment: datetime) -> int:
    """Return `moment` as a NumericDate (RFC 7519 section 2)."""
    return int(moment.timestamp())


def header(**changes: object) -> dict[str, Any]:
    """Return the right header with `changes`; a change to `...` leaves the member out."""
    return _changed({"alg": "ES256", "typ": "at+jwt", "kid": JWK.kid}, changes)


def payload(**changes: object) -> dict[str, Any]:
    """Return the right payload with `changes`; a change to `...` leaves the claim out."""
    now = seconds(NOW)
    right = {
        "iss": ISSUER,
        "sub": ORDERS,
        "aud": AUDIENCE,
        "client_id": ORDERS,
        "exp": now + int(LIFE.total_seconds()),
        "iat": now,
        "nbf": now,
        "jti": "0d9f8b1c52f14a6b8f0e6f1f9d1c2b3a",
        "scope": "charge refund",
        "rv": 0,
        "cnf": {"x5t#S256": PEER},
    }
    return _changed(right, changes)


def compact(members: dict[str, Any]) -> bytes:
    """Return `members` as JSON. Unlike the product's own writer it writes anything."""
    return json.dumps(members, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def sign(signing_input: bytes, key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    """Return the 64-byte ES256 signature, always the same for the same input (RFC 6979)."""
    return raw_signature(key.sign(signing_input, ec.ECDSA(SHA256(), deterministic_signing=True)))


def token(
    head: dict[str, Any] | bytes | None = None,
    body: dict[str, Any] | bytes | None = None,
    *,
    key: ec.EllipticCurvePrivateKey = KEY,
    signature: bytes | None = None,
) -> str:
    """Return a token: right but for the parts that are given."""
    parts = [header() if head is None else head, payload() if body is None else body]
    signing_input = b".".join(base64url(p if isinstance(p, bytes) else compact(p)) for p in parts)
    return (signing_input + b"." + base64url(sign(signing_input, key) if signature is None else signature)).decode()


def split(text: str) -> tuple[bytes, bytes, bytes]:
    """Return the three parts of a token, decoded."""
    head, body, signature = (decode_base64url(part) for part in text.encode().split(b"."))
    return head, body, signature


def accept(
    text: str | bytes,
    *,
    keys: KeySet = KEYS,
    expectations: Expectations = EXPECTED,
    peer: str | None = PEER,
    now: datetime = NOW,
) -> Claims:
    """Verify a token that should pass."""
    return verify_token(text, keys=keys, expectations=expectations, peer_thumbprint=peer, now=now)


def refusal(
    text: str | bytes,
    *,
    keys: KeySet = KEYS,
    expectations: Expectations = EXPECTED,
    peer: str | None = PEER,
    now: datetime = NOW,
) -> InvalidTokenReason:
    """Verify a token that should not pass, and return why it did not."""
    with pytest.raises(InvalidTokenError) as caught:
        accept(text, keys=keys, expectations=expectations, peer=peer, now=now)
    return caught.value.reason


def _changed(right: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (right | changes).items() if value is not ...}
