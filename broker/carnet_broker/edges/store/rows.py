"""Rows of the database as what they stand for."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row

from carnet_broker.core.rollout import ReplicaLease, VerifierSession

__all__ = ["replica_of", "session_of"]


def session_of(row: Row[*tuple[Any, ...]]) -> VerifierSession:
    """Return the verifier of a row of `verifier_sessions`."""
    return VerifierSession(
        spiffe_id=row.spiffe_id,
        instance_id=row.instance_id,
        audience=row.audience,
        replica_id=row.replica_id,
        generation=row.generation,
        generation_at=row.generation_at,
        revocation_version=row.revocation_version,
        revocation_at=row.revocation_at,
        max_staleness=row.max_staleness,
        polls=row.polls,
        lagging=row.lagging,
    )


def replica_of(row: Row[*tuple[Any, ...]]) -> ReplicaLease:
    """Return the broker of a row of `replicas`."""
    return ReplicaLease(
        replica_id=row.replica_id,
        version=row.version,
        generation=row.generation,
        generation_at=row.generation_at,
        revocation_version=row.revocation_version,
        renewed_at=row.renewed_at,
        lease=row.lease,
    )
