"""The shared store, opened: all its ports over one database."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from carnet.errors import ConfigError
from carnet_broker.edges.store.cleaning import SETTLED, Cleaning
from carnet_broker.edges.store.database import Backend, Database
from carnet_broker.edges.store.mirror import StoredMirror
from carnet_broker.edges.store.postgres import PostgresBackend, libpq_parameters
from carnet_broker.edges.store.replicas import StoredReplicas
from carnet_broker.edges.store.revocations import StoredRevocations
from carnet_broker.edges.store.rollout import StoredRollout
from carnet_broker.edges.store.sessions import StoredSessions
from carnet_broker.edges.store.sqlite import SqliteBackend, sqlite_path
from carnet_broker.edges.store.sqlite_place import check_place
from carnet_broker.edges.store.wakeups import StoreWakeups, WakeupHub

__all__ = ["SharedStore", "check_store_url", "open_store"]


def _host_time() -> datetime:
    return datetime.now(UTC)


def _elapsed() -> timedelta:
    return timedelta(seconds=time.monotonic())


class SharedStore:
    """All ports of the shared store. Thread-safe; every call blocks."""

    def __init__(
        self,
        backend: Backend,
        *,
        timeout: timedelta,
        now: Callable[[], datetime],
        elapsed: Callable[[], timedelta],
        notify: bool,
        sessions_per_identity: int,
        settled: timedelta,
    ) -> None:
        self._hub = WakeupHub(backend.listener)
        self._database = Database(backend, timeout=timeout, notify=notify, wake=self._hub.wake)
        self.revocations = StoredRevocations(self._database)
        self.sessions = StoredSessions(self._database, per_identity=sessions_per_identity)
        self.rollout = StoredRollout(self._database)
        self.replicas = StoredReplicas(
            self._database, Cleaning(self._database, now=now, elapsed=elapsed, settled=settled)
        )
        self.mirror = StoredMirror(self._database)
        self.wakeups = self.open_wakeups()
        """For one thread. Each further one has its own: `open_wakeups`."""

    def prepare(self) -> None:
        """Make the tables, or bring them up to date. Raises `ConfigError` and `StoreUnavailableError`."""
        self._database.prepare()

    def open_wakeups(self) -> StoreWakeups:
        """Return one more `ports.Wakeups`, for another thread."""
        return self._hub.open()

    def close(self) -> None:
        """End all waits and close the connections."""
        self._hub.close()
        self._database.close()


def open_store(
    url: str,
    *,
    password: str | Path | None = None,
    timeout: timedelta = timedelta(seconds=5),
    now: Callable[[], datetime] = _host_time,
    elapsed: Callable[[], timedelta] = _elapsed,
    notify: bool = True,
    sessions_per_identity: int = 200,
    settled: timedelta = SETTLED,
    prepare: bool = True,
) -> SharedStore:
    """Open the store at `url`: ``sqlite:////absolute/path`` or ``postgresql://user@host/database``.

    `password` is the one of the database user, or a file with it, which is read again for each connection. `timeout`
    bounds each call, and connecting; PostgreSQL needs 2 s at least to connect. `now` is the host's clock: SQLite's
    only one. With `notify=False` other processes are not told of changes: they find them when they look.
    `sessions_per_identity`: how many verifiers of one SPIFFE ID are admitted. `elapsed` and `settled`: see `cleaning`.

    Raises `ConfigError` for a store that cannot be used until somebody changes something. With `prepare` it connects
    and raises `StoreUnavailableError` too; without, that is left to the first call.
    """
    parsed = _parsed(url)
    backend: Backend
    if parsed.get_backend_name() == "sqlite":
        backend = SqliteBackend(parsed, timeout=timeout, now=now)
    else:
        backend = PostgresBackend(parsed, password=password, timeout=timeout)
    store = SharedStore(
        backend,
        timeout=timeout,
        now=now,
        elapsed=elapsed,
        notify=notify,
        sessions_per_identity=sessions_per_identity,
        settled=settled,
    )
    if prepare:
        try:
            store.prepare()
        except BaseException:
            store.close()
            raise
    return store


def check_store_url(url: str) -> None:
    """Say what is wrong with the store at `url` without opening it or making anything. Raises `ConfigError`."""
    parsed = _parsed(url)
    if parsed.get_backend_name() == "sqlite":
        check_place(sqlite_path(parsed))
    else:
        libpq_parameters(parsed)


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    # The text of it may hold a password: it is not shown.
    if parsed is None or parsed.drivername not in {"sqlite", "postgresql", "postgres"}:
        msg = "store.url: give sqlite:////absolute/path or postgresql://user@host:port/database"
        raise ConfigError(msg) from None
    return parsed.set(drivername="postgresql") if parsed.drivername == "postgres" else parsed
