"""Places for shared stores: in memory, in SQLite and in PostgreSQL, with a clock that a test moves."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import pytest

from carnet.revocations import RevocationKind
from carnet_broker.core.rollout import VerifierSession
from carnet_broker.edges.store import SharedStore, open_store
from carnet_broker.ports import Joined, NewRevocation, ReplicaReport
from support.postgres import Postgres
from support.store_fakes import FakeStore, FakeStoreData

__all__ = [
    "ALICE",
    "BOB",
    "FakePlace",
    "MovableClock",
    "PostgresPlace",
    "SqlitePlace",
    "Store",
    "StorePlace",
    "joined",
    "real_store_place",
    "report",
    "revoked",
    "store_place",
]

ALICE = "spiffe://prod.example/ns/shop/sa/alice"
BOB = "spiffe://prod.example/ns/shop/sa/bob"

Store = SharedStore | FakeStore


class MovableClock:
    """The real time, moved by what a test lets pass, or by a jump of the clock."""

    def __init__(self) -> None:
        self._passed = timedelta()
        self._jumped = timedelta()
        self.moved: Callable[[timedelta], None] = lambda _: None
        """Called with how far the clock is from the real time."""

    def now(self) -> datetime:
        """Return what the clock says."""
        return datetime.now(UTC) + self._passed + self._jumped

    def elapsed(self) -> timedelta:
        """Return a monotonic time: it knows no jumps."""
        return timedelta(seconds=time.monotonic()) + self._passed

    def let_pass(self, time_: timedelta) -> None:
        """Let time pass."""
        self._passed += time_
        self.moved(self._passed + self._jumped)

    def jump(self, by: timedelta) -> None:
        """Set the clock, ahead or back: no time passes."""
        self._jumped += by
        self.moved(self._passed + self._jumped)


class StorePlace(Protocol):
    """Where a store is. What it opens is closed with the test."""

    clock: MovableClock

    def open(self, **options: Any) -> Store:  # noqa: ANN401 - of open_store
        """Return a broker's way to the store."""

    def backup(self) -> Callable[[], None]:
        """Copy the store as it is, and return what puts the copy in its place. Nothing may be open."""

    def close(self) -> None:
        """Close what was opened."""


class FakePlace:
    """In memory."""

    def __init__(self) -> None:
        self.clock = MovableClock()
        self.data = FakeStoreData(now=self.clock.now, elapsed=self.clock.elapsed)
        self._opened = ExitStack()

    def open(self, **options: Any) -> Store:  # noqa: ANN401 - of open_store
        """Return a broker's way to the store."""
        self.data.sessions_per_identity = options.pop("sessions_per_identity", 200)
        store = self.data.open(**options)
        self._opened.callback(store.close)
        return store

    def backup(self) -> Callable[[], None]:
        """Copy the store."""
        copy = self.data.copy()
        return lambda: self.data.restore(copy)

    def close(self) -> None:
        """Close what was opened."""
        self._opened.close()


class SqlitePlace:
    """In a file."""

    def __init__(self, directory: Path) -> None:
        self.clock = MovableClock()
        self.file = directory / "store.db"
        self.url = f"sqlite:///{self.file}"
        self._opened = ExitStack()

    def open(self, **options: Any) -> SharedStore:  # noqa: ANN401 - of open_store
        """Return a broker's way to the store."""
        store = open_store(self.url, now=self.clock.now, elapsed=self.clock.elapsed, **options)
        self._opened.callback(store.close)
        return store

    def backup(self) -> Callable[[], None]:
        """Copy the file, with what is in its log."""
        copy = self.file.with_suffix(".backup")
        with closing(sqlite3.connect(self.file)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)

        def restore() -> None:
            # As operations.md says: the copy is put in its place in one step, and the logs of before are gone.
            for beside in ("-wal", "-shm"):
                Path(f"{self.file}{beside}").unlink(missing_ok=True)
            shutil.copy(copy, self.file.with_suffix(".new"))
            os.replace(self.file.with_suffix(".new"), self.file)  # noqa: PTH105 - replaces on all systems

        return restore

    def close(self) -> None:
        """Close what was opened."""
        self._opened.close()


class PostgresPlace:
    """In a database of a real server. Its `clock_timestamp` is one that the test moves."""

    def __init__(self, server: Postgres) -> None:
        self.clock = MovableClock()
        self.server = server
        self.database = server.create_database()
        # Found before the one of the system: the search path names that one last.
        server.execute("CREATE TABLE moved (by interval NOT NULL)", self.database)
        server.execute("INSERT INTO moved VALUES ('0')", self.database)
        server.execute(
            "CREATE FUNCTION clock_timestamp() RETURNS timestamptz LANGUAGE sql AS"
            " 'SELECT pg_catalog.clock_timestamp() + by FROM moved'",
            self.database,
        )
        self.clock.moved = self._move
        self._opened = ExitStack()

    @property
    def url(self) -> str:
        """Of the database."""
        return f"{self.server.url(self.database)}&options=-csearch_path%3Dpublic,pg_catalog"

    def open(self, **options: Any) -> SharedStore:  # noqa: ANN401 - of open_store
        """Return a broker's way to the store."""
        store = open_store(self.url, now=self.clock.now, elapsed=self.clock.elapsed, **options)
        self._opened.callback(store.close)
        return store

    def backup(self) -> Callable[[], None]:
        """Copy the database."""
        copy = self.server.create_database(self.database)

        def restore() -> None:
            self.database = copy

        return restore

    def close(self) -> None:
        """Close what was opened."""
        self._opened.close()

    def _move(self, by: timedelta) -> None:
        with self.server.connect(self.database) as connection:
            connection.execute("UPDATE moved SET by = %s", (by,))


@pytest.fixture(params=["fake", "sqlite", "postgresql"])
def store_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StorePlace]:
    """An empty store of each kind: what every test of the contract runs on."""
    place: StorePlace = FakePlace() if request.param == "fake" else _real_place(request, tmp_path)
    yield place
    place.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def real_store_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlitePlace | PostgresPlace]:
    """An empty store in each real database."""
    place = _real_place(request, tmp_path)
    yield place
    place.close()


def _real_place(request: pytest.FixtureRequest, tmp_path: Path) -> SqlitePlace | PostgresPlace:
    if request.param == "sqlite":
        return SqlitePlace(tmp_path)
    return PostgresPlace(request.getfixturevalue("postgres"))


def revoked(
    place: StorePlace,
    value: str = ALICE,
    kind: RevocationKind = RevocationKind.SUBJECT,
    *,
    lasts: timedelta | None = timedelta(hours=1),
) -> NewRevocation:
    """Return a revocation that ends in an hour from now."""
    ends = None if lasts is None else (place.clock.now() + lasts).replace(microsecond=0)
    return NewRevocation(kind=kind, value=value, expires_at=ends, by=BOB, reason="stolen")


def joined(
    instance: str = "one",
    *,
    generation: int = 1,
    spiffe_id: str = ALICE,
    replica: str = "broker-1",
    stream: str = "stream-1",
    polls: bool = False,
    max_staleness: timedelta = timedelta(minutes=5),
) -> Joined:
    """Return that a verifier wants to be counted."""
    ignored = datetime(2000, 1, 1, tzinfo=UTC)
    session = VerifierSession(
        spiffe_id=spiffe_id,
        instance_id=instance,
        audience="payments",
        replica_id=replica,
        generation=generation,
        generation_at=ignored,
        revocation_version=7,
        revocation_at=ignored,
        max_staleness=max_staleness,
        polls=polls,
    )
    return Joined(session=session, stream=stream)


def report(
    replica: str = "broker-1", *, generation: int = 1, lease: timedelta = timedelta(seconds=15)
) -> ReplicaReport:
    """Return what a broker tells of itself."""
    return ReplicaReport(replica_id=replica, version="0.1.0", generation=generation, revocation_version=3, lease=lease)
