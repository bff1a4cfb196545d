"""Why a caller is not who it says it is: one error, with a reason that only our own log is told."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from carnet.errors import CarnetError

__all__ = ["IdentityReason", "UnauthenticatedError"]

_MAX_DETAIL: Final = 300


class IdentityReason(StrEnum):
    """What is wrong with a peer's certificate, or with the connection it came by."""

    TLS_VERSION = "TLS_VERSION"
    """The connection is not TLS 1.3."""
    NO_CERTIFICATE = "NO_CERTIFICATE"
    MALFORMED = "MALFORMED"
    """The certificate cannot be parsed, or has a form that RFC 5280 does not allow."""
    CHAIN_TOO_LONG = "CHAIN_TOO_LONG"
    NOT_YET_VALID = "NOT_YET_VALID"
    EXPIRED = "EXPIRED"
    LIFE_TOO_LONG = "LIFE_TOO_LONG"
    NOT_A_LEAF = "NOT_A_LEAF"
    """The certificate is a CA, or may sign certificates or revocation lists (X509-SVID section 5.2)."""
    KEY_USAGE = "KEY_USAGE"
    EXTENDED_KEY_USAGE = "EXTENDED_KEY_USAGE"
    KEY_POLICY = "KEY_POLICY"
    """The key is of a kind or size that is not accepted."""
    SIGNATURE_POLICY = "SIGNATURE_POLICY"
    """The certificate is signed with an algorithm that is not accepted."""
    CRITICAL_EXTENSION = "CRITICAL_EXTENSION"
    """A critical extension is not one that we process (RFC 5280 section 4.2)."""
    SPIFFE_ID = "SPIFFE_ID"
    """There is not exactly one URI SAN, or it is no SPIFFE ID; or a name stands for many."""
    WRONG_TRUST_DOMAIN = "WRONG_TRUST_DOMAIN"
    UNTRUSTED = "UNTRUSTED"
    """No path leads from the certificate to a CA of the current bundle."""
    REVOKED = "REVOKED"
    CRL_MISSING = "CRL_MISSING"
    """Revocation lists are configured, and none is the one of the issuer."""
    CRL_OUT_OF_DATE = "CRL_OUT_OF_DATE"
    """The issuer's revocation list is past its nextUpdate: fetch the next one."""


class UnauthenticatedError(CarnetError):
    """The caller is not authenticated. The text is constant, for the caller; `reason` and `detail` are for the log.

    `detail` may quote the peer's certificate: it is cut, and must be escaped like all that a peer sends.
    """

    code = "UNAUTHENTICATED"

    def __init__(self, reason: IdentityReason, detail: str) -> None:
        super().__init__("the caller is not authenticated: its certificate is not accepted")
        self.reason = reason
        self.detail = detail[:_MAX_DETAIL]
