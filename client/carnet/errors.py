"""The errors of Carnet: one class per way the caller must react, an enum for why.

::

    CarnetError                        code, retryable
    ├─ ConfigError                     fix your configuration, or a file that it names
    ├─ InvalidIdentityError            a certificate or a name that is not a SPIFFE identity
    ├─ InvalidKeySetError              published keys that break the rules; the last good set stays
    ├─ InvalidRevocationError          a revocation that cannot be; what was loaded before stays
    ├─ TokenError                      no token could be had
    │  ├─ BrokerUnavailableError       retryable: the broker could not be reached, or could not answer
    │  └─ RequestDeniedError           the broker said no, and why
    ├─ InvalidTokenError               this token is not good, and why
    └─ KeySetUnavailableError          retryable: cannot tell whether a token is good (not the same as "no")

A message names the thing and the remedy. It never holds a token or a key.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

__all__ = [
    "BrokerUnavailableError",
    "CarnetError",
    "ConfigError",
    "InvalidIdentityError",
    "InvalidKeySetError",
    "InvalidRevocationError",
    "InvalidTokenError",
    "InvalidTokenReason",
    "KeySetUnavailableError",
    "RequestDeniedError",
    "TokenError",
]


class CarnetError(Exception):
    """The root of all errors that Carnet raises on purpose."""

    code: ClassVar[str] = "ERROR"
    """Stable and documented; for logs, metrics and machines."""

    retryable: ClassVar[bool] = False
    """Whether the same call may succeed later with nothing changed on the caller's side."""


class ConfigError(CarnetError):
    """A setting, a file or a variable is missing or wrong. The message names it and says what to do."""

    code = "CONFIG"


class InvalidIdentityError(CarnetError):
    """A text is not a SPIFFE ID, or a certificate does not carry exactly one."""

    code = "INVALID_IDENTITY"


class InvalidKeySetError(CarnetError):
    """A key, or a set of keys, breaks the rules for published keys; the set that was loaded before stays."""

    code = "INVALID_KEY_SET"


class InvalidRevocationError(CarnetError):
    """A revocation breaks the rules, or does not follow from those that were loaded; those stay."""

    code = "INVALID_REVOCATION"


class TokenError(CarnetError):
    """No token could be had, and none that is still valid was at hand."""

    code = "TOKEN"


class BrokerUnavailableError(TokenError):
    """The broker could not be reached or could not answer now."""

    code = "BROKER_UNAVAILABLE"
    retryable = True


class RequestDeniedError(TokenError):
    """The broker refused the request; asking again will not help.

    `reason` is the broker's own (``google.rpc.ErrorInfo.reason``), for instance ``NOT_GRANTED``.
    """

    code = "REQUEST_DENIED"

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class InvalidTokenReason(StrEnum):
    """Why a token is not good. The peer that sent it is told only that it is not."""

    MALFORMED = "MALFORMED"
    BAD_ALGORITHM = "BAD_ALGORITHM"
    UNKNOWN_KEY = "UNKNOWN_KEY"
    BAD_SIGNATURE = "BAD_SIGNATURE"
    MISSING_CLAIM = "MISSING_CLAIM"
    INVALID_CLAIM = "INVALID_CLAIM"
    WRONG_ISSUER = "WRONG_ISSUER"
    WRONG_AUDIENCE = "WRONG_AUDIENCE"
    EXPIRED = "EXPIRED"
    NOT_YET_VALID = "NOT_YET_VALID"
    WRONG_CONFIRMATION = "WRONG_CONFIRMATION"
    NO_PEER_CERTIFICATE = "NO_PEER_CERTIFICATE"
    INSUFFICIENT_SCOPE = "INSUFFICIENT_SCOPE"
    REVOKED = "REVOKED"


class InvalidTokenError(CarnetError):
    """The token is not good. `reason` says why; it is for logs, not for the peer."""

    code = "INVALID_TOKEN"

    def __init__(self, reason: InvalidTokenReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class KeySetUnavailableError(CarnetError):
    """There is no key set that is fresh enough to decide with. The token may be good."""

    code = "KEY_SET_UNAVAILABLE"
    retryable = True
