"""Revocations: what they name, how long they last, and which tokens they refuse. Pure: no clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

__all__ = ["Position", "Revocation", "RevocationKind"]


class RevocationKind(StrEnum):
    """What a revocation names."""

    TOKEN = "token"  # noqa: S105 - no secret
    """One token, by its jti."""
    SUBJECT = "subject"
    """The tokens of one SPIFFE ID whose `rv` is below `before_version`: no clock has a say in it."""
    CERTIFICATE = "certificate"
    """The tokens that are bound to one certificate."""
    ROOT = "root"
    """A token and all that were derived from it, by the jti of the first."""
    BLOCK = "block"
    """All tokens of one SPIFFE ID, until lifted."""
    LIFT = "lift"
    """Ends a block; the tokens whose `rv` is below `before_version` stay refused."""


@dataclass(frozen=True, slots=True)
class Revocation:
    """One entry of the log of revocations."""

    version: int
    """Grows by one with each entry of an epoch."""
    kind: RevocationKind
    value: str
    """A jti, a SPIFFE ID, or a certificate: ``sha256:``, ``spki-sha256:`` or ``serial:``, see `certificate_names`."""
    before_version: int
    """For SUBJECT, BLOCK and LIFT; 0 for the others."""
    expires_at: datetime | None
    """From here on nothing is left to refuse, aware UTC; None for a BLOCK."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a verifier or a broker has got. Within an epoch no part of it goes back."""

    epoch: int
    """Names one life of the shared store; a restored one begins a new, higher one."""
    generation: int
    """The version of the keyring."""
    revocation_version: int
    revocation_digest: bytes
    """The running hash over all revocations of the epoch up to that version: `next_digest`."""
