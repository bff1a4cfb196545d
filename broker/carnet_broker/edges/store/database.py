"""Transactions of the shared store: one code path for SQLite and PostgreSQL, bounded in time, one error for all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from sqlalchemy import ColumnElement, Connection, Engine, Table
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from carnet.errors import ConfigError
from carnet_broker.edges.store.migrate import migrate
from carnet_broker.ports import StoreUnavailableError

__all__ = ["UNAVAILABLE", "Backend", "Database", "DatabaseFailureError", "Listener", "Transaction", "nonsense"]

UNAVAILABLE: Final = "the shared store cannot be used now"
_OTHERS_PREPARE: Final = "another thread is waiting for its tables"
_MIGRATION: Final = timedelta(minutes=2)
"""How long a start waits for another broker that migrates, and for its own migration."""


class DatabaseFailureError(Exception):
    """The cause of a `StoreUnavailableError`, for the log: what the database said, without the values of ours."""


class Listener(Protocol):
    """Where a database tells of changes. Used by one thread."""

    def wait(self, seconds: float) -> bool:
        """Return True when something was told, False after `seconds` or when interrupted. Raises when broken."""

    def interrupt(self) -> None:
        """End a `wait`, from any thread."""

    def close(self) -> None:
        """Let go of the connection."""


class Backend(Protocol):
    """What differs between the databases."""

    engine: Engine
    reading: Mapping[str, Any]
    """Execution options of a transaction that reads: all of it sees one state."""
    writing: Mapping[str, Any]
    asking: Mapping[str, Any]
    """Those of one statement that reads, which is of one state by itself."""
    time: ColumnElement[Any]
    """What `time_in` makes the store's time of."""

    def bounded(self, limit: timedelta) -> AbstractContextManager[None]:
        """Bound what this thread does with the database inside of the block."""

    def clock(self, connection: Connection) -> datetime:
        """Return the store's time."""

    def time_in(self, value: Any) -> datetime:  # noqa: ANN401 - as the driver gives it
        """Return the store's time, where `value` is what the server said for `time`."""

    def signal(self, connection: Connection) -> None:
        """Have the listeners told when the transaction is committed."""

    def insert(self, table: Table) -> Any:  # noqa: ANN401 - one class for each dialect, alike by custom only
        """Return an INSERT that knows `on_conflict_do_update`."""

    def lock_for_migration(self, connection: Connection) -> None:
        """Let no other broker migrate until the end of the transaction."""

    def listener(self) -> Listener:
        """Open a connection of its own that is told of changes."""


@dataclass(slots=True)
class Transaction:
    """One transaction. It is committed when its block ends, and rolled back when that raises."""

    connection: Connection
    _backend: Backend
    changed: bool = False
    """Set it when others should look: they are woken after the commit."""

    def now(self) -> datetime:
        """Return the store's time now."""
        return self._backend.clock(self.connection)

    @property
    def time(self) -> ColumnElement[Any]:
        """The column of the store's time, for `time_in`."""
        return self._backend.time

    def time_in(self, value: Any) -> datetime:  # noqa: ANN401 - see Backend
        """Return the store's time from the value of `time`."""
        return self._backend.time_in(value)

    def insert(self, table: Table) -> Any:  # noqa: ANN401 - see Backend
        """Return an INSERT that knows `on_conflict_do_update`."""
        return self._backend.insert(table)


class Database:
    """The way to the tables. Thread-safe."""

    def __init__(
        self, backend: Backend, *, timeout: timedelta, notify: bool = True, wake: Callable[[], None] = lambda: None
    ) -> None:
        """`wake` is called after each commit that others should look at; `notify` says whether they are told."""
        self.backend = backend
        self._timeout = timeout
        self._notify = notify
        self._wake = wake
        self._preparing = threading.Lock()
        self._prepared = False

    def prepare(self) -> None:
        """Make the tables, or bring them up to date, unless this is done.

        Raises `ConfigError` for a database that cannot be used until somebody changes something, and
        `StoreUnavailableError`.
        """
        if not self._preparing.acquire(timeout=self._timeout.total_seconds()):
            raise StoreUnavailableError(UNAVAILABLE) from DatabaseFailureError(_OTHERS_PREPARE)
        try:
            if not self._prepared:
                with self._connected(self.backend.reading, self._timeout) as transaction:
                    transaction.now()  # One that does not answer at all is not waited for as long as a migration.
                with self._connected(self.backend.writing, _MIGRATION) as transaction:
                    self.backend.lock_for_migration(transaction.connection)
                    migrate(transaction.connection, transaction.now())
                self._prepared = True
        finally:
            self._preparing.release()

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """Begin a transaction that reads: everything of it is from one moment."""
        self._prepare_late()
        with self._connected(self.backend.reading, self._timeout) as transaction:
            yield transaction

    @contextmanager
    def ask(self) -> Iterator[Transaction]:
        """Begin what reads by one statement: that takes one round trip, where a transaction takes three and more."""
        self._prepare_late()
        with self._connected(self.backend.asking, self._timeout) as transaction:
            yield transaction

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """Begin a transaction that writes. What it wrote is durable when the block is left without an error."""
        self._prepare_late()
        with self._connected(self.backend.writing, self._timeout) as transaction:
            yield transaction
            if transaction.changed and self._notify:
                self.backend.signal(transaction.connection)
        if transaction.changed:
            self._wake()

    def close(self) -> None:
        """Close the connections that nobody is using."""
        self.backend.engine.dispose()

    def _prepare_late(self) -> None:
        # A broker may start while the store is down. What is wrong with the store then shows when it comes back.
        if not self._prepared:
            try:
                self.prepare()
            except ConfigError as error:
                raise StoreUnavailableError(UNAVAILABLE) from error

    @contextmanager
    def _connected(self, options: Mapping[str, Any], limit: timedelta) -> Iterator[Transaction]:
        try:
            with self.backend.bounded(limit), self.backend.engine.connect() as connected:
                connection = connected.execution_options(**options)
                with connection.begin():
                    yield Transaction(connection, self.backend)
        except (SQLAlchemyError, OSError) as error:
            raise StoreUnavailableError(UNAVAILABLE) from _cause(error)
        except ConfigError as error:
            if self._prepared:  # For instance after a failover to a server that is not set up like the first.
                raise StoreUnavailableError(UNAVAILABLE) from error
            raise


def nonsense(what: str) -> DatabaseFailureError:
    """Return the cause for a row that holds what nobody writes."""
    return DatabaseFailureError(f"the database holds {what} that makes no sense")


def _cause(error: Exception) -> DatabaseFailureError:
    """Return what the driver said, its first line only: further ones may hold values of a row."""
    said = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    first = str(said).strip().partition("\n")[0]
    return DatabaseFailureError(f"{type(said).__name__}: {first}" if first else type(said).__name__)
