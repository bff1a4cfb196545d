"""SQLite behind the shared store: one file, for the brokers of one host."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import sqlalchemy
from sqlalchemy import URL, ColumnElement, Connection, Table, event, null, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from carnet.errors import ConfigError
from carnet_broker.edges.store.sqlite_place import make_file
from carnet_broker.edges.store.tables import ONLY_ROW, signal

__all__ = ["SqliteBackend", "sqlite_path"]

_POLL: Final = 0.025
"""Seconds between two looks for changes. A look costs some microseconds."""


class SqliteBackend:
    """A SQLite file in WAL mode."""

    reading: Mapping[str, Any] = {"begin_with": "BEGIN"}
    asking: Mapping[str, Any] = reading  # There is no round trip to save.
    time: ColumnElement[Any] = null()
    # Takes the write lock at once: a transaction that reads first and writes then would have to fail when another one
    # wrote in between.
    writing: Mapping[str, Any] = {"begin_with": "BEGIN IMMEDIATE"}

    def __init__(self, url: URL, *, timeout: timedelta, now: Callable[[], datetime]) -> None:
        """`now` is the clock of the host, which is the store's. Raises `ConfigError`."""
        self._path = sqlite_path(url)
        self._timeout = timeout
        self._now = now
        make_file(self._path)
        self.engine = sqlalchemy.create_engine(
            "sqlite://",
            creator=self._connect,
            poolclass=QueuePool,
            pool_size=3,
            max_overflow=2,
            pool_timeout=timeout.total_seconds(),
            hide_parameters=True,
        )
        event.listen(self.engine, "begin", _begin)
        event.listen(self.engine, "connect", self._remember_file)
        event.listen(self.engine, "checkout", self._check_file)
        self._check_journal()

    def bounded(self, limit: timedelta) -> AbstractContextManager[None]:  # noqa: ARG002 - see Backend
        """Bound nothing: each connection waits for locks for the timeout, and a hanging disk cannot be called back."""
        return nullcontext()

    def clock(self, connection: Connection) -> datetime:  # noqa: ARG002 - see Backend
        """Return the host's time."""
        return self._now()

    def time_in(self, value: Any) -> datetime:  # noqa: ANN401, ARG002 - see Backend
        """Return the host's time."""
        return self._now()

    def signal(self, connection: Connection) -> None:
        """Count: the listeners compare."""
        connection.execute(update(signal).where(signal.c.id == ONLY_ROW).values(count=signal.c.count + 1))

    def insert(self, table: Table) -> Any:  # noqa: ANN401 - see Backend
        """Return an INSERT of SQLite."""
        return sqlite.insert(table)

    def lock_for_migration(self, connection: Connection) -> None:
        """Do nothing: the transaction has the write lock."""

    def listener(self) -> _Polling:
        """Return a listener with a connection of its own."""
        return _Polling(self._connect())

    def _connect(self) -> sqlite3.Connection:
        # mode=rw: a file that is gone is an error, and not a new, empty store.
        connection = sqlite3.connect(
            f"file:{quote(str(self._path))}?mode=rw",
            uri=True,
            timeout=self._timeout.total_seconds(),
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "mmap_size = 0"):
                connection.execute(f"PRAGMA {pragma}").fetchone()
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _check_journal(self) -> None:
        try:
            with closing(self._connect()) as connection:
                mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                return  # Locked, or its disk is full: that may pass.
            msg = f"store.url: {self._path} is no SQLite database: {error}; move it away, or restore a backup"
            raise ConfigError(msg) from error
        if mode != "wal":
            msg = f"store.url: {self._path} cannot have a write-ahead log: put it on a local file system"
            raise ConfigError(msg)

    def _remember_file(self, dbapi_connection: object, record: ConnectionPoolEntry) -> None:  # noqa: ARG002 - by event
        record.info["file"] = _identity(self._path)

    def _check_file(self, dbapi_connection: object, record: ConnectionPoolEntry, proxy: object) -> None:  # noqa: ARG002
        # Somebody put a backup in its place: what this connection writes would be in a file that nobody can open.
        if record.info["file"] != _identity(self._path):
            msg = "the file of the store was replaced"
            raise DisconnectionError(msg)


class _Polling:
    """Looks into the file now and then. `data_version` says cheaply whether anybody else wrote."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._interrupted = threading.Event()
        try:
            self._seen = self._look()
        except sqlite3.Error:  # There are no tables yet.
            connection.close()
            raise

    def wait(self, seconds: float) -> bool:
        """Return True when a writer has counted."""
        looks = max(1, round(seconds / _POLL))
        for _ in range(looks):
            if self._interrupted.wait(_POLL):
                return False
            if self._version() != self._seen[0]:
                before, self._seen = self._seen, self._look()
                if before[1] != self._seen[1]:
                    return True
        return False

    def interrupt(self) -> None:
        """End a `wait`."""
        self._interrupted.set()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def _look(self) -> tuple[int, int]:
        version = self._version()  # First: a change in between shows at the next look.
        return version, int(self._connection.execute("SELECT coalesce(max(count), 0) FROM signal").fetchone()[0])


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options()["begin_with"])


def sqlite_path(url: URL) -> Path:
    """Return the file that `url` names. Raises `ConfigError`."""
    if not url.database or url.database == ":memory:" or not url.database.startswith("/") or url.query or url.host:
        msg = "store.url: a SQLite store is sqlite:////absolute/path/of/the/file, without anything else"
        raise ConfigError(msg)
    return Path(url.database)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
