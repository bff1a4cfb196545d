"""The claims of a Carnet token: one closed set, every one required (RFC 9068 section 2.2, RFC 8705 section 3.1).

`claims_of_payload` and `Claims.to_payload` are each other's reverse, and the verifier and the broker's minting share
them: what one side writes is what the other side reads. A claim that is not in the profile is refused, because a
verifier that skips what it does not know (RFC 7519 section 4 allows it) cannot be given a new restriction safely.

All texts are printable ASCII without space, quote and backslash, so that a name compares equal to itself only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from carnet.encoding import base64url
from carnet.errors import InvalidIdentityError, InvalidTokenError, InvalidTokenReason
from carnet.jwk import is_thumbprint
from carnet.spiffe import SpiffeID

__all__ = [
    "MAX_NAME_LENGTH",
    "MAX_SCOPES",
    "MAX_SCOPE_LENGTH",
    "Claims",
    "certificate_thumbprint",
    "claims_of_payload",
    "is_name",
    "is_scope_token",
    "is_token_id",
    "parse_certificate",
    "parse_scopes",
]

MAX_NAME_LENGTH: Final = 255
"""Characters of an issuer or an audience."""

MAX_SCOPE_LENGTH: Final = 128
"""Characters of one scope-token."""

MAX_SCOPES: Final = 64
"""Scope-tokens in one token."""

_REQUIRED: Final = ("iss", "sub", "aud", "client_id", "exp", "iat", "nbf", "jti", "scope", "rv")
_WITHOUT_CONFIRMATION: Final = frozenset(_REQUIRED)
_WITH_CONFIRMATION: Final = _WITHOUT_CONFIRMATION | {"cnf"}
_CONFIRMATION_METHOD: Final = "x5t#S256"
# RFC 6749 section 3.3: scope-token = 1*( %x21 / %x23-5B / %x5D-7E ).
_NAME: Final = re.compile(rf"[\x21\x23-\x5b\x5d-\x7e]{{1,{MAX_NAME_LENGTH}}}")
_SCOPE_TOKEN: Final = re.compile(rf"[\x21\x23-\x5b\x5d-\x7e]{{1,{MAX_SCOPE_LENGTH}}}")
_TOKEN_ID: Final = re.compile(r"[A-Za-z0-9_-]{16,64}")
_LAST_SECOND: Final = 253_402_300_799  # 9999-12-31T23:59:59Z, the last that a datetime can hold.
_LAST_REVOCATION_VERSION: Final = 2**53 - 1  # The last whole number that every JSON reader keeps exact (RFC 8259).


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verified token says. Times are aware UTC, whole seconds."""

    issuer: str
    """``iss``: one URL per environment."""
    subject: SpiffeID
    """``sub``: the workload that the token speaks for."""
    audience: str
    """``aud``: the one service that the token is for."""
    client_id: SpiffeID
    """``client_id``: the workload that asked for the token."""
    expires_at: datetime
    """``exp``: at this second the token is over."""
    issued_at: datetime
    """``iat``."""
    not_before: datetime
    """``nbf``."""
    token_id: str
    """``jti``: 16 to 64 letters, digits, ``-`` and ``_``. The name of the token in logs and revocations."""
    scopes: tuple[str, ...]
    """``scope``: what the token allows, sorted, at least one."""
    confirmation: str | None
    """``cnf``/``x5t#S256``: thumbprint of the certificate that the token is bound to, None for an unbound token."""
    revocation_version: int
    """``rv``: the revocation version that the issuer had applied."""

    def to_payload(self) -> dict[str, Any]:
        """Return the claims as the members of a JWT payload, always in the same order."""
        payload: dict[str, Any] = {
            "iss": self.issuer,
            "sub": str(self.subject),
            "aud": self.audience,
            "client_id": str(self.client_id),
            "exp": int(self.expires_at.timestamp()),
            "iat": int(self.issued_at.timestamp()),
            "nbf": int(self.not_before.timestamp()),
            "jti": self.token_id,
            "scope": " ".join(self.scopes),
            "rv": self.revocation_version,
        }
        if self.confirmation is not None:
            payload["cnf"] = {_CONFIRMATION_METHOD: self.confirmation}
        return payload


def is_name(text: object) -> bool:
    """Say whether `text` can be an issuer or an audience: 1 to 255 signs that a scope-token may also have."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def is_scope_token(text: object) -> bool:
    """Say whether `text` is one scope-token (RFC 6749 section 3.3) of at most 128 characters."""
    return isinstance(text, str) and _SCOPE_TOKEN.fullmatch(text) is not None


def is_token_id(text: object) -> bool:
    """Say whether `text` can be a ``jti``: 16 to 64 letters, digits, ``-`` and ``_``."""
    return isinstance(text, str) and _TOKEN_ID.fullmatch(text) is not None


def parse_scopes(text: str) -> tuple[str, ...]:
    """Return the scope-tokens of `text`, divided by one space each, sorted. Raises `InvalidTokenError`.

    The order in `text` says nothing (RFC 6749 section 3.3). None, more than 64, or one twice is refused.
    """
    scopes = text.split(" ", MAX_SCOPES)
    if len(scopes) > MAX_SCOPES:
        _refuse("scope", f"has more than {MAX_SCOPES} scope-tokens")
    if not all(map(is_scope_token, scopes)):
        _refuse("scope", "is not a list of scope-tokens divided by one space each")
    if len(set(scopes)) != len(scopes):
        _refuse("scope", "names a scope-token twice")
    return tuple(sorted(scopes))


def claims_of_payload(payload: Mapping[str, Any]) -> Claims:
    """Return the claims that `payload` holds. Raises `InvalidTokenError`: MISSING_CLAIM or INVALID_CLAIM.

    This checks form alone. Whether the token is meant for this verifier, now and from this peer, is decided in
    `carnet.verify`.
    """
    if payload.keys() not in (_WITH_CONFIRMATION, _WITHOUT_CONFIRMATION):
        _refuse_names(payload)
    if not is_name(payload["iss"]):
        _refuse("iss", "is not a name")
    if not is_name(payload["aud"]):
        _refuse("aud", "is not one name")  # A list, even of one, is refused: one audience, compared whole.
    if not is_token_id(payload["jti"]):
        _refuse("jti", "is not 16 to 64 letters, digits, '-' and '_'")
    if not isinstance(payload["scope"], str):
        _refuse("scope", "is not a text")
    expires_at, issued_at, not_before = (_whole(payload, name, _LAST_SECOND) for name in ("exp", "iat", "nbf"))
    if expires_at <= issued_at:
        _refuse("exp", "is not after iat")
    if not_before > expires_at:
        _refuse("nbf", "is after exp")
    return Claims(
        issuer=payload["iss"],
        subject=_spiffe_id(payload, "sub"),
        audience=payload["aud"],
        client_id=_spiffe_id(payload, "client_id"),
        expires_at=datetime.fromtimestamp(expires_at, UTC),
        issued_at=datetime.fromtimestamp(issued_at, UTC),
        not_before=datetime.fromtimestamp(not_before, UTC),
        token_id=payload["jti"],
        scopes=parse_scopes(payload["scope"]),
        confirmation=_confirmation(payload["cnf"]) if "cnf" in payload else None,
        revocation_version=_whole(payload, "rv", _LAST_REVOCATION_VERSION),
    )


def certificate_thumbprint(certificate: bytes | x509.Certificate) -> str:
    """Return the SHA-256 thumbprint of a certificate as in ``x5t#S256`` (RFC 8705 section 3.1).

    `certificate` is DER or PEM (the first one counts, which in a chain is the leaf). Raises `InvalidIdentityError`
    where the bytes are no certificate.
    """
    der = parse_certificate(certificate).public_bytes(Encoding.DER)
    return base64url(hashlib.sha256(der).digest()).decode("ascii")


def parse_certificate(certificate: bytes | x509.Certificate) -> x509.Certificate:
    """Return the certificate that `certificate` is: parsed, DER, or PEM, of which the first counts.

    Raises `InvalidIdentityError` where the bytes are no certificate.
    """
    if isinstance(certificate, x509.Certificate):
        return certificate
    try:
        pem = b"-----BEGIN" in certificate[:4096]
        return (x509.load_pem_x509_certificate if pem else x509.load_der_x509_certificate)(certificate)
    except ValueError:
        msg = "the bytes are no X.509 certificate in DER or PEM"
        raise InvalidIdentityError(msg) from None


def _spiffe_id(payload: Mapping[str, Any], name: str) -> SpiffeID:
    if not isinstance(payload[name], str):
        _refuse(name, "is not a text")
    try:
        return _parse_spiffe_id(payload[name])
    except InvalidIdentityError as error:
        _refuse(name, f"is not a SPIFFE ID: {error}")


# A service sees few callers, each many times. What raises is not kept.
_parse_spiffe_id = lru_cache(maxsize=1024)(SpiffeID.parse)


def _whole(payload: Mapping[str, Any], name: str, last: int) -> int:
    number = payload[name]
    if type(number) is not int or not 0 <= number <= last:  # type(): True is an int to isinstance.
        _refuse(name, f"is not a whole number from 0 to {last}")
    return number


def _confirmation(cnf: object) -> str:
    # RFC 7800 section 3.1 allows more methods side by side; which of them then counts is the confusion to avoid.
    if not isinstance(cnf, dict) or cnf.keys() != {_CONFIRMATION_METHOD}:
        _refuse("cnf", f"is not exactly one {_CONFIRMATION_METHOD}")
    value = cnf[_CONFIRMATION_METHOD]
    if not is_thumbprint(value):
        _refuse("cnf", "is not a SHA-256 thumbprint in canonical base64url")
    return str(value)


def _refuse_names(payload: Mapping[str, Any]) -> NoReturn:
    missing = [name for name in _REQUIRED if name not in payload]
    if missing:
        msg = f"claims missing: {', '.join(missing)}"
        raise InvalidTokenError(InvalidTokenReason.MISSING_CLAIM, msg)
    unknown = sorted(str(name)[:20] for name in payload.keys() - _WITH_CONFIRMATION)
    _refuse(repr(unknown[0]), "is not in the profile")


def _refuse(name: str, what: str) -> NoReturn:
    msg = f"claim {name} {what}"
    raise InvalidTokenError(InvalidTokenReason.INVALID_CLAIM, msg)
