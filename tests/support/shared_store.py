"""The store that all replicas share, in memory, as the rotation sees it; and the verifiers whose word it keeps."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from carnet_broker.core.mirror import MirrorSignature
from carnet_broker.core.rollout import RolloutState, VerifierSession, live_sessions
from carnet_broker.ports import Acknowledged, Joined, Left, ReplicaReport, ReplicasSeen
from support.store_fakes import FakeStoreData

__all__ = ["LEASE", "MAX_STALENESS", "PAYMENTS", "SharedStore"]

LEASE: Final = timedelta(seconds=15)
MAX_STALENESS: Final = timedelta(seconds=40)
PAYMENTS: Final = "spiffe://prod.example/ns/shop/sa/payments"


class _Now(Protocol):
    def now(self) -> datetime:
        """Return the wall time."""


class SharedStore:
    """One store, and shorter words for what brokers do with it."""

    def __init__(self, clock: _Now) -> None:
        self._clock = clock
        self._data = FakeStoreData(now=clock.now)
        self._store = self._data.open()
        self.rollout = self._store.rollout
        self.mirror = self._store.mirror

    # -- what there is ---------------------------------------------------------------------------------------------

    @property
    def row(self) -> RolloutState:
        """The rollout row, with its permit; may be set to what no broker would make of it."""
        return self.rollout.state()

    @row.setter
    def row(self, row: RolloutState) -> None:
        with self._data.transaction() as tables:
            tables.rollout, tables.permit = row, row.permit

    @property
    def mirrored(self) -> int:
        """The generation of the mirror, 0 for none."""
        found = self.mirror.load()
        return 0 if found is None else found.generation

    def put_mirror(
        self, generation: int, content: dict[str, Any] | None, signature: MirrorSignature | None = None
    ) -> None:
        """Put into the mirror what no broker would; None empties it."""
        with self._data.transaction() as tables:
            now = self._clock.now()
            tables.mirror = None if content is None else (generation, json.dumps(content), signature, now)

    # -- replicas --------------------------------------------------------------------------------------------------

    def renew(self, replica_id: str, generation: int) -> ReplicasSeen:
        """Renew a lease."""
        report = ReplicaReport(
            replica_id=replica_id, version="test", generation=generation, revocation_version=0, lease=LEASE
        )
        return self._store.replicas.renew(report)

    def leave(self, replica_id: str) -> None:
        """End a lease."""
        self._store.replicas.leave(replica_id)

    # -- verifiers -------------------------------------------------------------------------------------------------

    def live(self) -> list[VerifierSession]:
        """Return the verifiers that are live now."""
        with self._data.transaction() as tables:
            return live_sessions(self._store.sessions.all(), tables.replicas, self._clock.now())

    def join(self, instance_id: str, replica_id: str, generation: int, *, polls: bool = False) -> bool:
        """Let a verifier join that has loaded `generation`; say whether it was admitted."""
        now = self._clock.now()
        session = VerifierSession(
            spiffe_id=PAYMENTS,
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
        (outcome,) = self._store.sessions.write([Joined(session, replica_id)])
        return outcome.live

    def acknowledge(self, instance_id: str, replica_id: str, generation: int) -> bool:
        """Note that a verifier has loaded `generation`; say whether it is one that is counted."""
        change = Acknowledged(PAYMENTS, instance_id, replica_id, generation, 0, timedelta(0))
        (outcome,) = self._store.sessions.write([change])
        return outcome.live

    def part(self, instance_id: str, replica_id: str) -> None:
        """Note that a verifier is gone, or was silent for too long."""
        self._store.sessions.write([Left(PAYMENTS, instance_id, replica_id)])
