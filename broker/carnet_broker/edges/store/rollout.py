"""The gate between a published key and the signing one, in the database. The rules are those of `core.rollout`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Row, select, tuple_, update

from carnet_broker.core.rollout import (
    Permit,
    ReplicaLease,
    RolloutState,
    VerifierSession,
    has_forgotten,
    laggards,
    live_sessions,
    recount_ends,
    recounts_for_a_claim,
)
from carnet_broker.edges.store.database import UNAVAILABLE, Database, Transaction, nonsense
from carnet_broker.edges.store.rows import replica_of, session_of
from carnet_broker.edges.store.tables import ONLY_ROW, replicas, rollout, verifier_sessions
from carnet_broker.ports import StoreUnavailableError, WaitingFor

__all__ = ["StoredRollout", "note_restoration", "required_generation"]


class StoredRollout:
    """`ports.Rollout`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def raise_to(self, generation: int, kid: str) -> None:
        """Say that `kid` is about to be published as `generation`; it never goes down.

        Of two that raise to the same generation the last one is named: the keyring document decides which is published.
        """
        with self._database.write() as transaction:
            row = _locked(transaction)
            if generation > row.generation or (generation == row.generation and row.permit_generation != generation):
                _raise(transaction, generation, kid, newer=generation > row.generation)

    def permit(
        self, generation: int, kid: str, *, overdue: bool, seen: Sequence[ReplicaLease] = ()
    ) -> Permit | WaitingFor:
        """Give the permit, or name those that it waits for (see the port).

        A generation that nobody has raised to is raised to here, under the same lock: so no verifier without it joins
        after the count.
        """
        with self._database.write() as transaction:
            row = _locked(transaction)
            given = _permit(row)
            if given is not None and (given.generation, given.kid) == (generation, kid):
                return replace(given, repeated=True)
            if given is not None and given.generation == generation:
                return WaitingFor(laggards=())  # One generation publishes one key.
            if generation > row.generation:
                _raise(transaction, generation, kid, newer=True)
            leases, sessions = _everybody(transaction)
            now = transaction.now()
            recounts = row.restored_at is not None and now < recount_ends(row.restored_at, sessions, leases.values())
            if recounts or has_forgotten(leases, seen):
                return WaitingFor(laggards=())
            late = laggards(live_sessions(sessions, leases, now), generation)
            if late and not overdue:
                return WaitingFor(laggards=tuple(late))
            if late:
                names = [(session.spiffe_id, session.instance_id) for session in late]
                key = tuple_(verifier_sessions.c.spiffe_id, verifier_sessions.c.instance_id)
                transaction.connection.execute(update(verifier_sessions).where(key.in_(names)).values(lagging=True))
            permit = Permit(generation=generation, kid=kid, given_at=now, overdue=bool(late))
            transaction.connection.execute(
                update(rollout)
                .where(rollout.c.id == ONLY_ROW)
                .values(
                    permit_generation=generation,
                    permit_kid=kid,
                    permit_given_at=permit.given_at,
                    permit_overdue=permit.overdue,
                )
            )
            transaction.changed = True
            return permit

    def state(self) -> RolloutState:
        """Return the rollout row, and its permit."""
        with self._database.read() as transaction:
            row = _row(transaction)
            given = _permit(row)
            named = given is not None and (given.generation, given.kid) == (row.generation, row.kid)
            return RolloutState(
                generation=row.generation, kid=row.kid, raised_at=row.raised_at, permit=given if named else None
            )


def required_generation(transaction: Transaction) -> int:
    """Return the generation that a verifier must have loaded to join, and keep it from being raised until the end."""
    # Not alone (FOR SHARE): joins do not hold up each other, only a permit or a raise.
    query = select(rollout.c.generation).with_for_update(read=True)
    generation = transaction.connection.execute(query).scalar()
    if generation is None:
        raise StoreUnavailableError(UNAVAILABLE) from nonsense("no rollout, which")
    return int(generation)


def note_restoration(transaction: Transaction, *, claimed: bool = False) -> None:
    """Note that the store was found restored now: the verifiers are to be counted again.

    `claimed`: perhaps a verifier alone says so (see `recounts_for_a_claim`).
    """
    connection, now = transaction.connection, transaction.now()
    if claimed and not recounts_for_a_claim(connection.execute(select(rollout.c.restored_at)).scalar(), now):
        return
    connection.execute(update(rollout).where(rollout.c.id == ONLY_ROW).values(restored_at=now))
    transaction.changed = True


def _everybody(transaction: Transaction) -> tuple[dict[str, ReplicaLease], list[VerifierSession]]:
    connection = transaction.connection
    leases = {row.replica_id: replica_of(row) for row in connection.execute(select(replicas))}
    return leases, [session_of(row) for row in connection.execute(select(verifier_sessions))]


def _raise(transaction: Transaction, generation: int, kid: str, *, newer: bool) -> None:
    values: dict[str, Any] = {"generation": generation, "kid": kid}
    if newer:
        values["raised_at"] = transaction.now()
    transaction.connection.execute(update(rollout).where(rollout.c.id == ONLY_ROW).values(**values))
    transaction.changed = True


def _locked(transaction: Transaction) -> Row[*tuple[Any, ...]]:
    return _row(transaction, lock=True)


def _row(transaction: Transaction, *, lock: bool = False) -> Row[*tuple[Any, ...]]:
    query = select(rollout)
    row = transaction.connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        raise StoreUnavailableError(UNAVAILABLE) from nonsense("no rollout, which")
    return row


def _permit(row: Row[*tuple[Any, ...]]) -> Permit | None:
    if row.permit_generation is None:
        return None
    return Permit(
        generation=row.permit_generation,
        kid=row.permit_kid,
        given_at=row.permit_given_at,
        overdue=row.permit_overdue,
    )
