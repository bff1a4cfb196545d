"""What Vault's refusals mean, in words that are ours.

The text of an answer never enters a message as it came: a Vault that lies, or a proxy that repeats requests, could put
our token or a private key into it. Only phrases that are listed here are let through.
"""

from __future__ import annotations

from typing import Any, Final

__all__ = ["CONFLICT", "LOST_RACE", "SEALED", "describe", "has_phrase"]

CONFLICT: Final = "check-and-set parameter did not match the current version"
LOST_RACE: Final = "transaction commit failed"
"""OpenBao answers this, with 500, to one of two writers of the same thing in Transit."""
SEALED: Final = "Vault is sealed"

_PHRASES: Final = (
    CONFLICT,
    LOST_RACE,
    SEALED,
    "check-and-set parameter required for this call",
    "invalid role or secret ID",
    "invalid role ID",
    "invalid secret id",
    "permission denied",
    "namespace not authorized",
    "no handler for route",
    "route entry not found",
    "encryption key not found",
    "key not found",
    "signing key not found",
    "requested version for signing is less than the minimum encryption key version",
    "requested version for signing is higher than the latest key version",
    "refused JSON input due to high complexity",
    "request rate quota exceeded",
    "rate limit exceeded",
    "lease count quota exceeded",
    "Vault is in standby mode",
    "local node not active but active cluster node not found",
    "no space left on device",
)
_REMEDIES: Final = {
    400: "Vault does not accept the request: compare its version and mounts with what the bootstrap sets up",
    401: "log in is refused: check the AppRole",
    403: "the policy of this AppRole does not allow it: run the bootstrap again, or ask who owns Vault",
    404: "there is nothing: check address, namespace and mounts, and run the bootstrap",
    405: "this is not Vault's API: check the address",
    412: "this node has not caught up with the primary: it is tried again",
    429: "there are too many requests: it is tried again",
    472: "this node is a disaster recovery secondary: give the address of the primary",
    473: "this node is a performance standby that does not forward: give the address of the active node",
    500: "Vault failed: its own log says why",
    501: "Vault is not initialised: set it up first",
    502: "a proxy before Vault has no answer from it",
    503: "Vault is sealed or in maintenance: unseal it",
    504: "a proxy before Vault has no answer from it",
}


def has_phrase(body: dict[str, Any], phrase: str) -> bool:
    """Say whether one of Vault's errors in `body` holds `phrase`."""
    errors = body.get("errors")
    return isinstance(errors, list) and any(isinstance(text, str) and phrase in text for text in errors)


def describe(status: int, body: dict[str, Any]) -> str:
    """Return what an answer with `status` means, and what to do."""
    said = [phrase for phrase in _PHRASES if has_phrase(body, phrase)]
    words = f" ({', '.join(said)})" if said else ""
    if 300 <= status < 400:  # noqa: PLR2004
        remedy = "it sends us elsewhere, which is never followed: give the address of the active node or its balancer"
    else:
        remedy = _REMEDIES.get(status, "this is not an answer that Vault gives: check the address")
    return f"HTTP {status}{words}: {remedy}"
