"""PostgreSQL behind the shared store: for brokers on more than one host."""

from __future__ import annotations

import math
import os
import select
import selectors
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import psycopg
import sqlalchemy
from psycopg.conninfo import make_conninfo
from sqlalchemy import URL, ColumnElement, Connection, Table, func, text
from sqlalchemy import select as select_of
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import QueuePool

from carnet.errors import ConfigError

__all__ = ["PostgresBackend", "libpq_parameters"]

_CHANNEL: Final = "carnet_store"
_MIGRATION_LOCK: Final = 0x6361726E6574
"""Any number, the same for all brokers: "carnet"."""
_LEAST_CONNECT_TIMEOUT: Final = 2  # psycopg, as libpq, waits at least that long.
_DEFAULTS: Final = {
    "application_name": "carnet-broker",
    "target_session_attrs": "read-write",
    # The connection that listens sends nothing: that its host is gone shows by these, in half a minute.
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
_CHECKED: Final = (
    ("synchronous_commit", "a revocation could be lost that was confirmed"),
    ("fsync", "a power failure could destroy the store"),
    ("full_page_writes", "a power failure could destroy the store"),
)

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_PASSWORD: Final = "store.url holds a password: put it into a file, and name that as store.password_file"  # noqa: S105 - says that there is one
_SECRETS: Final = frozenset({"sslpassword", "oauth_client_secret"})
"""What else is secret of the parameters of libpq, and has no file of its own here."""

_Result = TypeVar("_Result")


class _Bound(threading.local):
    """Until when this thread may wait for the database; `time.monotonic`."""

    deadline = math.inf


_bound = _Bound()


class PostgresBackend:
    """A PostgreSQL server. Each call is bounded here as well as there: a server that is frozen bounds nothing."""

    reading: Mapping[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    writing: Mapping[str, Any] = {"isolation_level": "READ COMMITTED"}
    asking: Mapping[str, Any] = {"isolation_level": "AUTOCOMMIT", "postgresql_readonly": True}
    time: ColumnElement[Any] = func.clock_timestamp()

    def __init__(self, url: URL, *, password: str | Path | None, timeout: timedelta) -> None:
        """`password` may be a file, which is read for each connection. Raises `ConfigError`."""
        self._timeout = timeout
        self._password = _password_of(password)
        self._parameters = libpq_parameters(url)
        self.engine = sqlalchemy.create_engine(
            "postgresql+psycopg://",
            creator=self._connect,
            poolclass=QueuePool,
            pool_size=3,
            max_overflow=2,
            pool_timeout=timeout.total_seconds(),
            pool_use_lifo=True,
            hide_parameters=True,
        )
        sqlalchemy.event.listen(self.engine, "checkout", _check_out)

    @contextmanager
    def bounded(self, limit: timedelta) -> Iterator[None]:
        """End the connection of whoever waits for longer than `limit` inside of the block."""
        _bound.deadline = time.monotonic() + limit.total_seconds()
        try:
            yield
        finally:
            _bound.deadline = math.inf

    def clock(self, connection: Connection) -> datetime:
        """Return the server's time."""
        return self.time_in(connection.execute(select_of(self.time)).scalar_one())

    def time_in(self, value: datetime) -> datetime:
        """Return `value`, which is in the time zone of the session, in UTC."""
        return value.astimezone(UTC)

    def signal(self, connection: Connection) -> None:
        """NOTIFY, with no data: what there is to know is in the tables."""
        connection.execute(text(f"NOTIFY {_CHANNEL}"))

    def insert(self, table: Table) -> Any:  # noqa: ANN401 - see Backend
        """Return an INSERT of PostgreSQL."""
        return postgresql.insert(table)

    def lock_for_migration(self, connection: Connection) -> None:
        """Take an advisory lock, and let this transaction take its time."""
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))

    def listener(self) -> _Listening:
        """Return a listener with a connection of its own."""
        with self.bounded(self._timeout):
            connection = self._connect()
            try:
                connection.autocommit = True
                connection.execute(f"LISTEN {_CHANNEL}")
            except BaseException:
                connection.close()
                raise
        return _Listening(connection)

    def _connect(self) -> psycopg.Connection[Any]:
        limit = min(self._timeout.total_seconds(), _bound.deadline - time.monotonic())
        if limit <= 0:
            msg = "there was no time left to connect"
            raise psycopg.OperationalError(msg)
        connection = _BoundedConnection.connect(
            **self._parameters,
            password=self._password(),
            connect_timeout=max(_LEAST_CONNECT_TIMEOUT, math.floor(limit)),
        )
        try:
            self._set_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _set_up(self, connection: psycopg.Connection[Any]) -> None:
        """Check what may not be off, and set for the session what must not change under it."""
        query = ", ".join(f"current_setting('{name}')" for name, _ in _CHECKED)
        settings: Sequence[str] = connection.execute(f"SELECT {query}").fetchone() or ()
        for (name, why), value in zip(_CHECKED, settings, strict=True):
            if value == "off":
                msg = f"store.url: the PostgreSQL server has {name} = off: {why}; set it to on for the broker's role"
                raise ConfigError(msg)
        milliseconds = str(math.ceil(self._timeout.total_seconds() * 1000))
        # The last one ends a transaction whose broker was stopped in the middle: it holds up all others.
        connection.execute(
            "SELECT set_config('synchronous_commit', %s, false), set_config('statement_timeout', %s, false),"
            " set_config('lock_timeout', %s, false), set_config('idle_in_transaction_session_timeout', %s, false)",
            (settings[0], milliseconds, milliseconds, milliseconds),
        )
        connection.commit()


def _check_out(connection: psycopg.Connection[Any], *_: object) -> None:
    """Have the pool connect anew where the server has said something to a connection that nobody uses.

    A server says nothing then but that it ends the connection. This takes no time; a ping would double that of a
    short transaction. A server that is gone without a word shows in the first statement, as with a ping.
    """
    if connection.closed:
        raise DisconnectionError
    said = select.poll()
    said.register(connection.fileno(), select.POLLIN)
    if said.poll(0):
        raise DisconnectionError


class _BoundedConnection(psycopg.Connection[Any]):
    """A connection that minds the bound of the thread that uses it: in a ping, a statement and a commit."""

    def wait(self, gen: Generator[Any, Any, _Result], *args: Any, **kwargs: Any) -> _Result:  # noqa: ANN401
        """Run `gen`, through which psycopg does all that it waits for; close the connection when the time is over."""
        return super().wait(self._bounded(gen), *args, **kwargs)

    def _bounded(self, gen: Generator[Any, Any, _Result]) -> Generator[Any, Any, _Result]:
        try:
            waiting_for = next(gen)
            while True:
                ready = yield waiting_for
                if time.monotonic() >= _bound.deadline:
                    self.pgconn.finish()
                    msg = "the server did not answer in time"
                    raise psycopg.OperationalError(msg)
                waiting_for = gen.send(ready)
        except StopIteration as done:
            result: _Result = done.value
            return result


class _Listening:
    """A connection that listens."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._interrupted = threading.Event()
        self._reader, self._writer = os.pipe()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._connection.fileno(), selectors.EVENT_READ)
        self._selector.register(self._reader, selectors.EVENT_READ)

    def wait(self, seconds: float) -> bool:
        """Return True when there was a NOTIFY."""
        if not self._selector.select(seconds) or self._interrupted.is_set():
            return False
        return any(True for _ in self._connection.notifies(timeout=0))

    def interrupt(self) -> None:
        """End a `wait`."""
        self._interrupted.set()
        os.write(self._writer, b".")

    def close(self) -> None:
        """Close the connection."""
        self._selector.close()
        os.close(self._reader)
        os.close(self._writer)
        self._connection.close()


def libpq_parameters(url: URL) -> dict[str, Any]:
    """Return what libpq is told, by its names. Raises `ConfigError`."""
    if url.password:
        raise ConfigError(_PASSWORD)
    named = {"user": url.username, "host": url.host, "port": url.port, "dbname": url.database}
    parameters: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    parameters |= {name: value if isinstance(value, str) else ",".join(value) for name, value in url.query.items()}
    if "password" in parameters:
        raise ConfigError(_PASSWORD)
    for name in sorted(_SECRETS & parameters.keys()):
        msg = (
            f"store.url holds a password ({name}): take it out; a password of the database user goes into a file that"
            " store.password_file names, and the key of a client certificate has none (sslkey=FILE, mode 0600)"
        )
        raise ConfigError(msg)
    if not _is_local(str(parameters.get("host", ""))):
        parameters.setdefault("sslmode", "verify-full")
    for name, value in _DEFAULTS.items():
        parameters.setdefault(name, value)
    try:
        make_conninfo(**parameters)
    except psycopg.ProgrammingError as error:
        msg = f"store.url: {str(error).strip()}"
        raise ConfigError(msg) from error
    return parameters


def _is_local(hosts: str) -> bool:
    """Say whether all `hosts` are sockets of this machine or loopback addresses, where no TLS is needed."""
    return all(host.startswith("/") or host in _LOOPBACK for host in hosts.split(",") if host)


def _password_of(password: str | Path | None) -> Callable[[], str | None]:
    if not isinstance(password, Path):
        return lambda: password
    path = password

    def read() -> str:
        try:
            return path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeError) as error:
            msg = f"store.password_file: cannot read {path}: {getattr(error, 'strerror', None) or 'it is no text'}"
            raise ConfigError(msg) from error

    return read
