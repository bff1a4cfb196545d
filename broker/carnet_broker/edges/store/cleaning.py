"""Cleaning up what has ended, so that a clock that jumps takes nothing that is in force.

A clock that jumped ahead makes all look ended. No clock is trusted for itself. A process follows the store's clock and
the one of its own host beside its monotonic clock, and takes the time by which they agreed worst since it started: a
jump ahead changes nothing then, however long it lasts, and a clock that is put right counts from there on. It cleans
nothing in its first hour, so that a process that was started during a jump sees it end. And what has ended stays for
ten minutes more. A clock that is wrong for longer than that hour, before and after a restart, and with PostgreSQL two
clocks on two machines, are needed to lose an entry. A clock that is behind only delays the cleaning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import ColumnElement, Table, delete, exists, or_, select

from carnet.revocations import RevocationKind
from carnet_broker.edges.store.database import Database, Transaction
from carnet_broker.edges.store.rows import replica_of
from carnet_broker.edges.store.tables import replicas, revocation_log, revocations, verifier_sessions

__all__ = ["KEPT", "SETTLED", "Cleaning", "SlowClock"]

SETTLED: Final = timedelta(hours=1)
"""How long a process follows the clocks before it deletes by them."""
KEPT: Final = timedelta(minutes=10)
"""How long what has ended stays."""


class SlowClock:
    """A clock that is not ahead, made of several that may jump and one that only runs. Pure."""

    def __init__(self, settled: timedelta = SETTLED) -> None:
        self._settled = settled
        self._began: timedelta | None = None
        self._start: datetime | None = None

    def time(self, *clocks: datetime, elapsed: timedelta) -> datetime | None:
        """Return the time by what the clocks say now and said before; None while they were not followed long enough.

        `elapsed` is monotonic, from any start.
        """
        # Where each clock says that `elapsed` began: the earliest is right, or behind.
        start = min(clock - elapsed for clock in clocks)
        self._start = start if self._start is None else min(self._start, start)
        if self._began is None:
            self._began = elapsed
        return self._start + elapsed if elapsed - self._began >= self._settled else None


class Cleaning:
    """Deletes what has ended, in all tables."""

    def __init__(
        self,
        database: Database,
        *,
        now: Callable[[], datetime],
        elapsed: Callable[[], timedelta],
        settled: timedelta = SETTLED,
    ) -> None:
        """`now` is the host's clock, `elapsed` a monotonic one."""
        self._database = database
        self._now = now
        self._elapsed = elapsed
        self._lock = threading.Lock()
        self._clock = SlowClock(settled)

    def clean(self) -> int:
        """Delete what has ended for long enough; say how many rows."""
        with self._database.write() as transaction:
            # One at a time: two that delete the same rows could wait for each other.
            transaction.connection.execute(select(revocation_log.c.id).with_for_update())
            with self._lock:
                now = self._clock.time(transaction.now(), self._now(), elapsed=self._elapsed())
            if now is None:
                return 0
            return _revocations(transaction, now - KEPT) + _brokers(transaction, now - KEPT)


def _revocations(transaction: Transaction, before: datetime) -> int:
    over = revocations.c.expires_at.is_not(None) & (revocations.c.expires_at < before)
    lift = revocations.alias("lift")
    # A block goes with its lift at the latest: without that one it would be in force again.
    lifted = (revocations.c.kind == RevocationKind.BLOCK.value) & exists().where(
        lift.c.kind == RevocationKind.LIFT.value,
        lift.c.value == revocations.c.value,
        lift.c.version > revocations.c.version,
        lift.c.expires_at < before,
    )
    return _delete(transaction, revocations, or_(over, lifted))


def _brokers(transaction: Transaction, before: datetime) -> int:
    """Delete the sessions of brokers that are gone, after their max_staleness, and then those brokers."""
    connection = transaction.connection
    deleted = 0
    for replica in [replica_of(row) for row in connection.execute(select(replicas))]:
        if replica.ends_at >= before:
            continue
        of_it = verifier_sessions.c.replica_id == replica.replica_id
        deleted += _delete(
            transaction, verifier_sessions, of_it & (verifier_sessions.c.max_staleness < before - replica.ends_at)
        )
        if connection.execute(select(verifier_sessions.c.replica_id).where(of_it)).first() is None:
            deleted += _delete(transaction, replicas, replicas.c.replica_id == replica.replica_id)
    return deleted


def _delete(transaction: Transaction, table: Table, which: ColumnElement[bool]) -> int:
    return transaction.connection.execute(delete(table).where(which)).rowcount
