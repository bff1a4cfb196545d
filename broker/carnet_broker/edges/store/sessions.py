"""The verifiers that rotations wait for, in the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, bindparam, delete, select, tuple_, update

from carnet_broker.core.rollout import VerifierSession
from carnet_broker.edges.store.database import Database, Transaction
from carnet_broker.edges.store.rollout import required_generation
from carnet_broker.edges.store.rows import replica_of, session_of
from carnet_broker.edges.store.tables import replicas, verifier_sessions
from carnet_broker.ports import Acknowledged, Joined, Left, SessionChange, SessionOutcome

__all__ = ["StoredSessions"]

_KEY = (verifier_sessions.c.spiffe_id, verifier_sessions.c.instance_id)
_ACKNOWLEDGED = ("generation", "generation_at", "revocation_version", "revocation_at", "lagging")


class StoredSessions:
    """`ports.VerifierSessions`."""

    def __init__(self, database: Database, *, per_identity: int) -> None:
        """`per_identity`: how many verifiers of one SPIFFE ID are admitted.

        Brokers that admit at the same moment may exceed it together, by what they admit in that one transaction.
        """
        self._database = database
        self._per_identity = per_identity

    def write(self, changes: Sequence[SessionChange]) -> Sequence[SessionOutcome]:
        """Enter the changes; one outcome for each (see the port).

        For a change of an older stream, or of a verifier that is not known, the outcome is not live.
        """
        if not changes:
            return ()
        outcomes: dict[int, SessionOutcome] = {}
        acknowledged = [change for change in changes if isinstance(change, Acknowledged)]
        with self._database.write() as transaction:
            required = required_generation(transaction)
            if len(acknowledged) == len(changes):
                return _acknowledge_all(transaction, acknowledged, required)
            # By verifier, each one's in their order: two brokers that write of the same ones lock them alike.
            for place, change in sorted(enumerate(changes), key=lambda entry: (_key(entry[1]), entry[0])):
                outcomes[place] = self._enter(transaction, change, required)
        return tuple(outcomes[place] for place in range(len(changes)))

    def all(self) -> Sequence[VerifierSession]:
        """Return every session, live or not."""
        with self._database.read() as transaction:
            rows = transaction.connection.execute(select(verifier_sessions).order_by(*_KEY))
            return tuple(session_of(row) for row in rows)

    def _enter(self, transaction: Transaction, change: SessionChange, required: int) -> SessionOutcome:
        if isinstance(change, Joined):
            return self._join(transaction, change, required)
        not_live = SessionOutcome(live=False, required_generation=max(required, 1))
        row = transaction.connection.execute(select(verifier_sessions).where(_is(change)).with_for_update()).first()
        if row is None or row.stream != change.stream:
            return not_live
        if isinstance(change, Left):
            transaction.connection.execute(delete(verifier_sessions).where(_is(change)))
            transaction.changed = True
            return not_live
        _acknowledge(transaction, change, row, required)
        return SessionOutcome(live=True)

    def _join(self, transaction: Transaction, change: Joined, required: int) -> SessionOutcome:
        session = change.session
        if session.generation < required:
            return SessionOutcome(live=False, required_generation=required)
        now = transaction.now()
        if self._others(transaction, session) >= self._per_identity:
            return SessionOutcome(live=False)
        values = {
            "stream": change.stream,
            "audience": session.audience,
            "replica_id": session.replica_id,
            "generation": session.generation,
            "generation_at": now,
            "revocation_version": session.revocation_version,
            "revocation_at": now,
            "max_staleness": session.max_staleness,
            "polls": session.polls,
            "lagging": False,
        }
        transaction.connection.execute(
            transaction.insert(verifier_sessions)
            .values(spiffe_id=session.spiffe_id, instance_id=session.instance_id, **values)
            .on_conflict_do_update(index_elements=_KEY, set_=values)
        )
        transaction.changed = True
        return SessionOutcome(live=True)

    def _others(self, transaction: Transaction, session: VerifierSession) -> int:
        """Count the other verifiers of its identity, without those that nobody serves any more."""
        connection = transaction.connection
        others = connection.execute(
            select(verifier_sessions.c.replica_id, verifier_sessions.c.max_staleness).where(
                verifier_sessions.c.spiffe_id == session.spiffe_id,
                verifier_sessions.c.instance_id != session.instance_id,
            )
        ).all()
        if len(others) < self._per_identity:
            return len(others)
        now = transaction.now()
        ends = {row.replica_id: replica_of(row).ends_at for row in connection.execute(select(replicas))}
        return sum(row.replica_id in ends and now < ends[row.replica_id] + row.max_staleness for row in others)


def _acknowledge(transaction: Transaction, change: Acknowledged, row: Row[*tuple[Any, ...]], required: int) -> None:
    values = _news(change, row._asdict(), transaction.now(), required)
    if values:
        transaction.connection.execute(update(verifier_sessions).where(_is(change)).values(**values))
        transaction.changed = transaction.changed or _is_waited_for(values)


def _acknowledge_all(
    transaction: Transaction, changes: Sequence[Acknowledged], required: int
) -> tuple[SessionOutcome, ...]:
    """Enter what many verifiers say at the same time, as they do after each revocation, in two statements."""
    keys = sorted({_key(change) for change in changes})
    query = select(verifier_sessions).where(tuple_(*_KEY).in_(keys)).order_by(*_KEY).with_for_update()
    rows = {(row.spiffe_id, row.instance_id): row._asdict() for row in transaction.connection.execute(query)}
    now = transaction.now()
    outcomes = []
    waited_for = False
    news: dict[tuple[str, str], dict[str, Any]] = {}
    for change in changes:
        row = rows.get(_key(change))
        if row is None or row["stream"] != change.stream:
            outcomes.append(SessionOutcome(live=False, required_generation=max(required, 1)))
            continue
        outcomes.append(SessionOutcome(live=True))
        values = _news(change, row, now, required)
        if values:
            row.update(values)
            news[_key(change)] = row
            waited_for = waited_for or _is_waited_for(values)
    if news:
        transaction.connection.execute(
            update(verifier_sessions)
            .where(
                verifier_sessions.c.spiffe_id == bindparam("of_spiffe_id"),
                verifier_sessions.c.instance_id == bindparam("of_instance_id"),
            )
            .values({name: bindparam(f"new_{name}") for name in _ACKNOWLEDGED}),
            [
                {
                    "of_spiffe_id": key[0],
                    "of_instance_id": key[1],
                    **{f"new_{name}": row[name] for name in _ACKNOWLEDGED},
                }
                for key, row in news.items()
            ],
        )
        transaction.changed = waited_for
    return tuple(outcomes)


def _news(change: Acknowledged, row: Mapping[str, Any], now: datetime, required: int) -> dict[str, Any]:
    """Return the columns that a verifier's answer changes."""
    at = now - max(change.ago, timedelta(0))
    values: dict[str, Any] = {}
    if change.generation > row["generation"]:
        values |= {"generation": change.generation, "generation_at": at}
    if change.revocation_version > row["revocation_version"]:
        values |= {"revocation_version": change.revocation_version, "revocation_at": at}
    if row["lagging"] and max(change.generation, row["generation"]) >= required:
        values["lagging"] = False
    return values


def _is_waited_for(values: Mapping[str, Any]) -> bool:
    """Say whether another replica is to look at once: a rotation may go on.

    All verifiers acknowledge each revocation, and nobody waits for that but those who ask how far it has spread. Were
    everybody told, each replica would read the store once for each of them, while the next revocation waits its turn.
    """
    return bool(values.keys() - {"revocation_version", "revocation_at"})


def _key(change: SessionChange) -> tuple[str, str]:
    named = change.session if isinstance(change, Joined) else change
    return named.spiffe_id, named.instance_id


def _is(change: Acknowledged | Left) -> ColumnElement[bool]:
    return and_(
        verifier_sessions.c.spiffe_id == change.spiffe_id, verifier_sessions.c.instance_id == change.instance_id
    )
