"""Which brokers are running, in the database."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import select, update

from carnet_broker.edges.store.cleaning import KEPT, Cleaning
from carnet_broker.edges.store.database import Database
from carnet_broker.edges.store.rollout import note_restoration
from carnet_broker.edges.store.rows import replica_of
from carnet_broker.edges.store.tables import replicas
from carnet_broker.ports import ReplicaReport, ReplicasSeen

__all__ = ["StoredReplicas", "was_forgotten"]


def was_forgotten(report: ReplicaReport, found: datetime | None, now: datetime) -> bool:
    """Say whether the store has forgotten a renewal: it has `found` an older one, or none that nobody cleaned up."""
    if report.renewed_at is None:
        return False
    return now - report.renewed_at < KEPT if found is None else found < report.renewed_at


class StoredReplicas:
    """`ports.ReplicaLeases`."""

    def __init__(self, database: Database, cleaning: Cleaning) -> None:
        self._database = database
        self._cleaning = cleaning

    def renew(self, report: ReplicaReport) -> ReplicasSeen:
        """Renew the lease (see the port). Others are woken only where it says something new."""
        with self._database.write() as transaction:
            connection = transaction.connection
            now = transaction.now()
            before = connection.execute(select(replicas).where(replicas.c.replica_id == report.replica_id)).first()
            known = before is not None and before.generation == report.generation
            restored = was_forgotten(report, None if before is None else before.renewed_at, now)
            if restored:
                note_restoration(transaction)
            values = {
                "version": report.version,
                "generation": report.generation,
                "generation_at": before.generation_at if before is not None and known else now,
                "revocation_version": report.revocation_version,
                "renewed_at": now,
                "lease": report.lease,
            }
            connection.execute(
                transaction.insert(replicas)
                .values(replica_id=report.replica_id, **values)
                .on_conflict_do_update(index_elements=[replicas.c.replica_id], set_=values)
            )
            # A mere renewal wakes nobody: all brokers renew when they wake.
            transaction.changed = not known or restored
            seen = connection.execute(select(replicas).order_by(replicas.c.replica_id))
            return ReplicasSeen(now=now, replicas=tuple(replica_of(row) for row in seen), restored=restored)

    def leave(self, replica_id: str) -> None:
        """End the lease now. The row stays: its sessions live on for their max_staleness."""
        with self._database.write() as transaction:
            row = transaction.connection.execute(select(replicas).where(replicas.c.replica_id == replica_id)).first()
            now = transaction.now()
            if row is not None and replica_of(row).is_live(now):
                transaction.connection.execute(
                    update(replicas)
                    .where(replicas.c.replica_id == replica_id)
                    .values(renewed_at=now, lease=timedelta(0))
                )
                transaction.changed = True

    def clean(self) -> int:
        """Delete what has ended, and say how many rows: see `cleaning`."""
        return self._cleaning.clean()
