"""What the loop of the store is wired from: its ports, its times and turns, and who wants to hear of it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from carnet_broker.ports import (
    KeyringMirror,
    LogPosition,
    ReplicaLeases,
    RevocationLog,
    Rollout,
    VerifierSessions,
    Wakeups,
)

__all__ = ["Claim", "StoreEvents", "StorePorts", "StoreTiming", "Turns", "answer"]


@dataclass(frozen=True, slots=True)
class Claim:
    """What was seen of the store before, and by whom: a new epoch may begin on it."""

    position: LogPosition
    by: str
    """For the log: this replica, the store itself, or a verifier by SPIFFE ID and instance."""


class StoreEvents(Protocol):
    """Who wants to hear of the store: logs and metrics."""

    def store_answered(self) -> None:
        """Tell that a round went well."""

    def store_failed(self, error: Exception) -> None:
        """Tell that a round failed. What was read before stays in force."""

    def store_restored(self, claim: Claim, found: LogPosition) -> None:
        """Tell that the store, at `found`, is behind what somebody has seen of it, and that a new epoch begins."""

    def revocations_read(self, position: LogPosition, count: int) -> None:
        """Tell how far this replica is in the log, and how many entries are in force."""

    def verifiers_counted(self, live: int) -> None:
        """Tell how many verifiers are live, of all brokers."""

    def lease_renewed(self, *, live_replicas: int, clock_offset: float) -> None:
        """Tell how many brokers are live, and how far the store's clock is from ours, in seconds."""


@dataclass(frozen=True, slots=True)
class StorePorts:
    """The ports to one store."""

    log: RevocationLog
    sessions: VerifierSessions
    rollout: Rollout
    leases: ReplicaLeases
    mirror: KeyringMirror
    wakeups: Wakeups


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreTiming:
    """How often the store is looked at, and how long it may take."""

    poll_interval: timedelta
    lease: timedelta
    append_within: timedelta
    """How long whoever revokes waits."""


@dataclass(slots=True)
class Turns:
    """When a thread has its next turn, and how its last one went."""

    due_at: float = 0.0
    failing: bool = False


def answer(asked: Sequence[Future[bool]], *, well: bool) -> None:
    """Tell those who asked for a reading whether there was one."""
    for future in asked:
        if future.set_running_or_notify_cancel():
            future.set_result(well)
