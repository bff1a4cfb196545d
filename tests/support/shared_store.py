"""The store that all replicas share, in memory, as the rotation sees it; and the verifiers whose word it keeps.

The rollout follows the rules of `carnet_broker.core.rollout`. Its clock is the one that the test moves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Protocol

from carnet_broker.core.rollout import Permit, ReplicaLease, RolloutState, VerifierSession, laggards, live_sessions
from carnet_broker.ports import MirroredKeyring, ReplicasSeen, WaitingFor

__all__ = ["LEASE", "MAX_STALENESS", "Mirror", "Rollout", "SharedStore"]

LEASE = timedelta(seconds=15)
MAX_STALENESS = timedelta(seconds=40)


class _Now(Protocol):
    def now(self) -> datetime:
        """Return the wall time."""


class Rollout:
    """The gate. `live` returns the sessions that are live now."""

    def __init__(self, clock: _Now, live: Callable[[], list[VerifierSession]], mark: Callable[[str], None]) -> None:
        self._clock = clock
        self._live = live
        self._mark = mark
        self.row = RolloutState(generation=0, kid="", raised_at=None, permit=None)
        self.permits: list[Permit] = []

    def raise_to(self, generation: int, kid: str) -> None:
        """Raise the row, unless it is as high already."""
        if generation > self.row.generation:
            self.row = RolloutState(generation=generation, kid=kid, raised_at=self._clock.now(), permit=None)

    def permit(self, generation: int, kid: str, *, overdue: bool) -> Permit | WaitingFor:
        """Give the permit, or say who has not acknowledged."""
        if (generation, kid) != (self.row.generation, self.row.kid):
            return WaitingFor(())
        if self.row.permit is None:
            missing = laggards(self._live(), generation)
            if missing and not overdue:
                return WaitingFor(tuple(missing))
            for session in missing:
                self._mark(session.instance_id)
            permit = Permit(generation=generation, kid=kid, given_at=self._clock.now(), overdue=bool(missing))
            self.row = replace(self.row, permit=permit)
            self.permits.append(permit)
        assert self.row.permit is not None
        return self.row.permit

    def state(self) -> RolloutState:
        """Return the row."""
        return self.row


class Mirror:
    """The mirror of the keyring."""

    def __init__(self, clock: _Now) -> None:
        self._clock = clock
        self.saved: list[tuple[int, str, datetime]] = []
        """Everything that was ever kept."""

    def save(self, generation: int, content: dict[str, Any]) -> None:
        """Keep `content`, unless a later generation is there."""
        if not self.saved or self.saved[-1][0] < generation:
            self.saved.append((generation, json.dumps(content), self._clock.now()))

    def load(self) -> MirroredKeyring | None:
        """Return what was kept last."""
        if not self.saved:
            return None
        generation, content, saved_at = self.saved[-1]
        return MirroredKeyring(generation, json.loads(content), saved_at, self._clock.now())


class SharedStore:
    """One store: rollout, mirror, leases and sessions."""

    def __init__(self, clock: _Now) -> None:
        self._clock = clock
        self.sessions: dict[str, VerifierSession] = {}
        """By instance id."""
        self.leases: dict[str, ReplicaLease] = {}
        self.rollout = Rollout(clock, self.live, self._mark)
        self.mirror = Mirror(clock)

    # -- replicas --------------------------------------------------------------------------------------------------

    def renew(self, replica_id: str, generation: int) -> ReplicasSeen:
        """Renew a lease."""
        now = self._clock.now()
        known = self.leases.get(replica_id)
        since = known.generation_at if known is not None and known.generation == generation else now
        self.leases[replica_id] = ReplicaLease(
            replica_id=replica_id,
            version="test",
            generation=generation,
            generation_at=since,
            revocation_version=0,
            renewed_at=now,
            lease=LEASE,
        )
        return self.seen()

    def seen(self) -> ReplicasSeen:
        """Return all replicas."""
        return ReplicasSeen(self._clock.now(), tuple(self.leases.values()))

    # -- verifiers -------------------------------------------------------------------------------------------------

    def live(self) -> list[VerifierSession]:
        """Return the verifiers that are live now."""
        return live_sessions(self.sessions.values(), self.leases, self._clock.now())

    def join(self, instance_id: str, replica_id: str, generation: int, *, polls: bool = False) -> bool:
        """Let a verifier join that has loaded `generation`; say whether it was admitted."""
        if generation < self.rollout.row.generation:
            return False
        now = self._clock.now()
        self.sessions[instance_id] = VerifierSession(
            spiffe_id="spiffe://prod.example/ns/shop/sa/payments",
            instance_id=instance_id,
            audience="payments",
            replica_id=replica_id,
            generation=generation,
            generation_at=now,
            revocation_version=0,
            revocation_at=now,
            max_staleness=MAX_STALENESS,
            polls=polls,
        )
        return True

    def acknowledge(self, instance_id: str, generation: int) -> None:
        """Note that a verifier has loaded `generation`. With the newest one it lags no longer."""
        session = self.sessions.get(instance_id)
        if session is not None and session.generation < generation:
            lagging = session.lagging and generation < self.rollout.row.generation
            self.sessions[instance_id] = replace(
                session, generation=generation, generation_at=self._clock.now(), lagging=lagging
            )

    def leave(self, instance_id: str) -> None:
        """Note that a verifier is gone, or was silent for too long."""
        self.sessions.pop(instance_id, None)

    def _mark(self, instance_id: str) -> None:
        self.sessions[instance_id] = replace(self.sessions[instance_id], lagging=True)
