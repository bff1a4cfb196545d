"""What is to be revoked, as a person writes it on a command line. Pure.

A token is never written there: every process of the machine can read a command line, and shells keep it. So a text that
looks like one is refused, with what to write in its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from cryptography import x509

from carnet.certificate_names import parse_certificate_name
from carnet.claims import certificate_thumbprint, is_token_id
from carnet.encoding import base64url
from carnet.errors import ConfigError, InvalidIdentityError, InvalidRevocationError
from carnet.jwk import is_thumbprint
from carnet.spiffe import SpiffeID

__all__ = ["NamedCertificate", "certificate_in_pem", "certificate_name", "moment", "subject_of", "token_id_of"]

_HEX_THUMBPRINT: Final = re.compile(r"(?:[0-9A-Fa-f]{2}:?){31}[0-9A-Fa-f]{2}")
_A_TOKEN: Final = re.compile(r"\s*eyJ[A-Za-z0-9_-]*\..*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class NamedCertificate:
    """A certificate by the name that revokes it, and its end where that is known."""

    name: str
    not_after: datetime | None


def token_id_of(text: str, option: str) -> str:
    """Return the jti that `text` is. Raises `ConfigError` for a token, and for what no jti can be."""
    if text == "-" or _A_TOKEN.match(text):
        msg = (
            f"{option} takes the jti of a token, never the token: others can read a command line; see the jti with:"
            " carnet inspect - < FILE"
        )
        raise ConfigError(msg)
    if not is_token_id(text):
        msg = f"{option} {text[:80]!r} is no jti; see it with: carnet inspect - < FILE, or in the audit record"
        raise ConfigError(msg)
    return text


def subject_of(text: str) -> str:
    """Return the SPIFFE ID that `text` is. Raises `ConfigError`."""
    try:
        return str(SpiffeID.parse(text))
    except InvalidIdentityError as error:
        msg = f"--subject: {error}; give a whole SPIFFE ID, for instance spiffe://prod.example/ns/shop/sa/orders"
        raise ConfigError(msg) from error


def certificate_name(text: str) -> str | None:
    """Return the name of the certificate that `text` is: its SHA-256 thumbprint in hex or base64url, or the name.

    None where it is none of them, and may be the name of a file.
    """
    if is_thumbprint(text):
        return f"sha256:{text}"
    if _HEX_THUMBPRINT.fullmatch(text):
        return f"sha256:{base64url(bytes.fromhex(text.replace(':', ''))).decode('ascii')}"
    try:
        return parse_certificate_name(text)
    except InvalidRevocationError:
        return None


def certificate_in_pem(pem: bytes) -> NamedCertificate:
    """Return the first certificate in `pem`: its thumbprint, and its end. Raises `ValueError` where there is none."""
    leaf = x509.load_pem_x509_certificates(pem)[0]
    return NamedCertificate(f"sha256:{certificate_thumbprint(leaf)}", leaf.not_valid_after_utc)


def moment(text: str, option: str) -> datetime:
    """Return the moment that `text` is (RFC 3339, with its offset from UTC). Raises `ConfigError`."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        msg = f"{option} {text[:80]!r} is no moment with its time zone; write for instance 2026-11-24T16:30:00Z"
        raise ConfigError(msg)
    return at.astimezone(UTC)
