"""Carnet: short-lived, audience-scoped, certificate-bound tokens between services.

The names below are all that a service needs; each is loaded when it is first used, so that what only parses a SPIFFE ID
does not load gRPC.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from carnet.caller import current
    from carnet.claims import Claims
    from carnet.errors import (
        BrokerUnavailableError,
        CarnetError,
        ConfigError,
        InvalidIdentityError,
        InvalidKeySetError,
        InvalidRevocationError,
        InvalidTokenError,
        InvalidTokenReason,
        KeySetUnavailableError,
        RequestDeniedError,
        TokenError,
    )
    from carnet.identity import Identity
    from carnet.source import AsyncClient, Client
    from carnet.spiffe import SpiffeID
    from carnet.token import Token
    from carnet.trust import AsyncVerifier, Verifier, VerifierStatus

__all__ = [
    "AsyncClient",
    "AsyncVerifier",
    "BrokerUnavailableError",
    "CarnetError",
    "Claims",
    "Client",
    "ConfigError",
    "Identity",
    "InvalidIdentityError",
    "InvalidKeySetError",
    "InvalidRevocationError",
    "InvalidTokenError",
    "InvalidTokenReason",
    "KeySetUnavailableError",
    "RequestDeniedError",
    "SpiffeID",
    "Token",
    "TokenError",
    "Verifier",
    "VerifierStatus",
    "current",
]

_HOMES: Final = {
    "carnet.caller": ("current",),
    "carnet.claims": ("Claims",),
    "carnet.errors": (
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
    ),
    "carnet.identity": ("Identity",),
    "carnet.source": ("AsyncClient", "Client"),
    "carnet.spiffe": ("SpiffeID",),
    "carnet.token": ("Token",),
    "carnet.trust": ("AsyncVerifier", "Verifier", "VerifierStatus"),
}


def __getattr__(name: str) -> object:
    """Load a public name from its module (PEP 562)."""
    for home, names in _HOMES.items():
        if name in names:
            value: object = getattr(import_module(home), name)
            globals()[name] = value
            return value
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
