"""The log of revocations in the database."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Row, and_, insert, outerjoin, select, update

from carnet.errors import InvalidRevocationError
from carnet.revocations import GENESIS_DIGEST, Revocation, RevocationKind, check_entry
from carnet_broker.core.lost_entries import epoch_of, outrun_entries, raised
from carnet_broker.edges.store.database import UNAVAILABLE, Database, Transaction, nonsense
from carnet_broker.edges.store.entries import EPOCH_JUMP, chained, entered, follows, lacking, numbered
from carnet_broker.edges.store.rollout import note_restoration
from carnet_broker.edges.store.tables import ONLY_ROW, revocation_log, revocations
from carnet_broker.ports import Appended, LogPosition, NewRevocation, RevocationPage, StoreUnavailableError

__all__ = ["StoredRevocations"]

_NAMED_AT_MOST: Final = 500
"""Values in one statement: databases bound what it can hold."""
_POSITION = (
    revocation_log.c.epoch.label("log_epoch"),
    revocation_log.c.version.label("log_version"),
    revocation_log.c.digest.label("log_digest"),
)
_ENTRY = (
    revocations.c.version,
    revocations.c.kind,
    revocations.c.value,
    revocations.c.before_version,
    revocations.c.expires_at,
)


class StoredRevocations:
    """`ports.RevocationLog`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(self, entries: Sequence[NewRevocation]) -> Appended:
        """Make `entries` durable, in their order, with the next versions, but for those that would change nothing.

        Raises `InvalidRevocationError` for one that cannot be, and then enters none; `StoreUnavailableError`. After
        that one they may be there all the same, if the answer was lost: entering them again does no harm.
        """
        with self._database.write() as transaction:
            log = _position(transaction, lock=True)
            now = transaction.now()
            if not entries:
                return Appended(entries=(), position=log, at=now)
            # Under the lock of the log: so of two brokers that revoke the same token one writes it.
            pairs, standing = entered(entries, _perhaps_covering(transaction, entries), log.version)
            position = _enter(transaction, log, pairs, now) if pairs else log
        return Appended(entries=tuple(entry for entry, _ in pairs), position=position, at=now, standing=standing)

    def read(self, after: LogPosition | None) -> RevocationPage:
        """Return what came after `after`, or all that is in force (see the port).

        A snapshot may hold entries that have ended: they are here until they are cleaned up.
        """
        delta = None if after is None else self._delta(after)
        if delta is not None:
            return delta
        with self._database.read() as transaction:
            now = transaction.now()
            log = _position(transaction)
            return RevocationPage(position=log, snapshot=True, entries=tuple(_entries(transaction)), read_at=now)

    def _delta(self, after: LogPosition) -> RevocationPage | None:
        """Return what came after `after`, by one statement; None where the log does not go on from there."""
        newer = and_(revocations.c.version > after.version, revocation_log.c.epoch == after.epoch)
        with self._database.ask() as transaction:
            query = (
                select(transaction.time.label("now"), *_POSITION, *_ENTRY)
                .select_from(outerjoin(revocation_log, revocations, newer))
                .where(revocation_log.c.id == ONLY_ROW)
                .order_by(revocations.c.version)
            )
            rows = transaction.connection.execute(query).all()
            log = _position_in(rows[0] if rows else None)
            now = transaction.time_in(rows[0].now)
        entries = _parsed(row for row in rows if row.version is not None)
        if after == log or (after.epoch == log.epoch and after.version < log.version and follows(after, entries, log)):
            return RevocationPage(position=log, snapshot=False, entries=tuple(entries), read_at=now)
        return None

    def begin_epoch(self, *, seen: LogPosition, carry: Sequence[Revocation], now: datetime) -> LogPosition:
        """Begin a new epoch where the store is not a later state of what was `seen`; else do nothing (see the port).

        That is more than a lower version: a store that was restored and written to since may have overtaken `seen`. And
        it is a lower version in any epoch: a store that was emptied has a later epoch, and versions that begin anew.
        """
        with self._database.write() as transaction:
            log = _position(transaction, lock=True)
            if log.epoch > seen.epoch and log.version >= seen.version:
                return log
            held = _entries(transaction)
            later = [entry for entry in held if entry.version > seen.version]
            if follows(seen, later, log) is not False:
                return log
            start = LogPosition(
                epoch=max(epoch_of(now), log.epoch + 1, seen.epoch + 1),
                version=max(log.version, seen.version) + EPOCH_JUMP,
                digest=GENESIS_DIGEST,
            )
            carried = [
                NewRevocation(
                    kind=entry.kind,
                    value=entry.value,
                    expires_at=entry.expires_at,
                    before_version=entry.before_version,
                    reason=f"carried over from epoch {seen.epoch}, version {entry.version}",
                )
                for entry in lacking(carry, held, now)
            ] + raised(outrun_entries(held, carry, seen=start.version, now=now))
            entries = [(numbered(new, start.version + place), new) for place, new in enumerate(carried, 1)]
            note_restoration(transaction, claimed=True)
            return _enter(transaction, start, entries, transaction.now())


def _perhaps_covering(transaction: Transaction, news: Sequence[NewRevocation]) -> list[Revocation]:
    """Return the entries that name what `news` name, and last as long as the first of them to end.

    By the index of ends: what is revoked again was mostly revoked a while ago, so few entries last longer.
    """
    ends = [new.expires_at for new in news if new.expires_at is not None]
    if not ends:
        return []
    values = {new.value for new in news}
    query = select(*_ENTRY).where(revocations.c.expires_at >= min(ends))
    if len(values) <= _NAMED_AT_MOST:
        query = query.where(revocations.c.value.in_(values))
    return _parsed(transaction.connection.execute(query.order_by(revocations.c.version)))


def _enter(
    transaction: Transaction, log: LogPosition, entries: list[tuple[Revocation, NewRevocation]], now: datetime
) -> LogPosition:
    """Write `entries` after `log`, and the position that they lead to."""
    position = LogPosition(
        epoch=log.epoch,
        version=log.version + len(entries),
        digest=chained(log.digest, (entry for entry, _ in entries)),
    )
    if entries:  # A new epoch may have none.
        transaction.connection.execute(
            insert(revocations),
            [
                {
                    "version": entry.version,
                    "kind": entry.kind.value,
                    "value": entry.value,
                    "before_version": entry.before_version,
                    "expires_at": entry.expires_at,
                    "created_at": now,
                    "asked_by": new.by,
                    "reason": new.reason,
                }
                for entry, new in entries
            ],
        )
    transaction.connection.execute(
        update(revocation_log)
        .where(revocation_log.c.id == ONLY_ROW)
        .values(epoch=position.epoch, version=position.version, digest=position.digest)
    )
    transaction.changed = True
    return position


def _position(transaction: Transaction, *, lock: bool = False) -> LogPosition:
    query = select(*_POSITION)
    return _position_in(transaction.connection.execute(query.with_for_update() if lock else query).first())


def _position_in(row: Row[*tuple[Any, ...]] | None) -> LogPosition:
    if row is None:
        raise StoreUnavailableError(UNAVAILABLE) from nonsense("no position in the log of revocations, which")
    return LogPosition(epoch=row.log_epoch, version=row.log_version, digest=bytes(row.log_digest))


def _entries(transaction: Transaction) -> list[Revocation]:
    return _parsed(transaction.connection.execute(select(*_ENTRY).order_by(revocations.c.version)))


def _parsed(rows: Iterable[Row[*tuple[Any, ...]]]) -> list[Revocation]:
    try:
        return [_entry(row) for row in rows]
    except (ValueError, TypeError, OverflowError, InvalidRevocationError):
        # A revocation that is not understood must not be left out: the reader keeps what it has, and says so.
        raise StoreUnavailableError(UNAVAILABLE) from nonsense("a revocation")


def _entry(row: Row[*tuple[Any, ...]]) -> Revocation:
    entry = Revocation(
        version=row.version,
        kind=RevocationKind(row.kind),
        value=row.value,
        before_version=row.before_version,
        expires_at=row.expires_at,
    )
    check_entry(entry)
    return entry
