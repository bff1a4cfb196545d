"""What the streams of verifiers go by, and who hears of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

__all__ = ["StreamEvents", "WatchRules"]


class StreamEvents(Protocol):
    """Who wants to hear of streams: metrics."""

    def streams(self, count: int) -> None:
        """Tell how many streams there are."""

    def pushed(self, kind: str, seconds: float | None) -> None:
        """Tell of one response that was sent: ``key_set``, ``revocations`` or ``heartbeat``.

        `seconds`: how long after the change, where it was pushed because of one.
        """

    def left(self, reason: str) -> None:
        """Tell of a verifier that left: ``goodbye``, ``silent``, or ``blocked``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchRules:
    """The settings of streams."""

    replica_id: str
    heartbeat: timedelta
    max_age: timedelta
    """Of a key set, for verifiers that poll."""
    sessions_per_identity: int
    """Verifiers of one SPIFFE ID whose stream has ended, and that are counted still."""
