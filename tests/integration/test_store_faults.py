"""The shared store when its database stops, hangs, is killed, replaced, or is not what it should be."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import pytest

from carnet.errors import ConfigError
from carnet.revocations import Revocation
from carnet_broker.edges.store import SharedStore, open_store
from carnet_broker.ports import StoreUnavailableError
from support.postgres import Postgres
from support.store_places import PostgresPlace, SqlitePlace, joined, revoked

TIMEOUT = timedelta(seconds=2)
MARGIN = 3.0
"""Seconds that a busy machine may take beyond the timeout."""


def fails_in_time(call: Callable[[], object], timeout: timedelta = TIMEOUT) -> StoreUnavailableError:
    """`call` must raise within the timeout; return what it raised."""
    began = time.monotonic()
    with pytest.raises(StoreUnavailableError) as caught:
        call()
    assert time.monotonic() - began < timeout.total_seconds() + MARGIN
    assert "the shared store cannot be used now" == str(caught.value)
    assert caught.value.__cause__ is not None
    return caught.value


def recovers(call: Callable[[], object], within: float = 20.0) -> None:
    """`call` must succeed again, without anything being opened anew."""
    deadline = time.monotonic() + within
    while True:
        try:
            call()
        except StoreUnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return


# PostgreSQL stops, hangs, dies


def test_stopped_server_is_an_error_in_time_and_is_used_again_when_it_is_back(own_postgres: Postgres):
    """Reading, writing and opening fail; waiting for a wake-up does not; after the start all goes on."""
    place = PostgresPlace(own_postgres)
    store = place.open(timeout=TIMEOUT)
    position = store.revocations.append([revoked(place)]).position
    own_postgres.stop()
    for _ in range(2):
        fails_in_time(lambda: store.revocations.read(None))
        fails_in_time(lambda: store.revocations.append([revoked(place)]))
    fails_in_time(lambda: place.open(timeout=TIMEOUT))
    store.wakeups.wait(timedelta(seconds=0.1))
    own_postgres.start()
    recovers(lambda: store.revocations.read(None))
    assert position == store.revocations.read(None).position
    assert position.version + 1 == store.revocations.append([revoked(place)]).position.version
    other = place.open()
    while store.wakeups.wait(timedelta(seconds=1)):
        pass
    other.rollout.raise_to(1, "k1")
    assert store.wakeups.wait(timedelta(seconds=10))
    place.close()


def test_frozen_server_is_an_error_in_time_and_is_used_again_when_it_goes_on(own_postgres: Postgres):
    """The server does not answer, and so does not bound anything: the client does, also in the check of its pool."""
    place = PostgresPlace(own_postgres)
    store = place.open(timeout=TIMEOUT)
    store.revocations.append([revoked(place)])
    with own_postgres.frozen():
        for _ in range(2):
            fails_in_time(lambda: store.revocations.append([revoked(place)]), 2 * TIMEOUT)
        fails_in_time(lambda: store.revocations.read(None), 2 * TIMEOUT)
    recovers(lambda: store.revocations.append([revoked(place)]))
    place.close()


def test_broker_may_start_while_the_server_is_down(own_postgres: Postgres):
    """Opened without preparing it, the store makes its tables when the server is there."""
    place = PostgresPlace(own_postgres)
    own_postgres.stop()
    store = place.open(timeout=TIMEOUT, prepare=False)
    fails_in_time(lambda: store.revocations.read(None))
    own_postgres.start()
    recovers(lambda: store.revocations.append([revoked(place)]))
    place.close()


def test_broker_that_hangs_in_a_transaction_does_not_hold_up_the_others(postgres: Postgres):
    """The server ends a transaction that is idle for the timeout: the lock of the log is free again."""
    place = PostgresPlace(postgres)
    hanging, other = place.open(timeout=timedelta(seconds=1)), place.open(timeout=timedelta(seconds=20))

    def hang() -> None:
        with hanging._database.write() as transaction:
            transaction.connection.exec_driver_sql("SELECT * FROM revocation_log FOR UPDATE")
            assert 1 == other.revocations.append([revoked(place)]).position.version
            transaction.connection.exec_driver_sql("SELECT 1")

    with pytest.raises(StoreUnavailableError):
        hang()
    place.close()


def test_killed_server_loses_no_acknowledged_entry(own_postgres: Postgres):
    """kill -9 of all of it while four threads write: what was confirmed is there, and versions have no gap."""
    place = PostgresPlace(own_postgres)
    store = place.open(timeout=TIMEOUT)
    start = store.revocations.read(None).position
    confirmed: list[Revocation] = []
    for _ in range(3):
        stop = threading.Event()
        threads = [threading.Thread(target=_write, args=(place, store, stop, confirmed)) for _ in range(4)]
        before = len(confirmed)
        for thread in threads:
            thread.start()
        while len(confirmed) < before + 20:
            time.sleep(0.01)
        own_postgres.kill()
        stop.set()
        for thread in threads:
            thread.join()
        own_postgres.start()
        recovers(lambda: store.revocations.read(None))
    page = store.revocations.read(start)
    assert not page.snapshot
    assert set() == set(confirmed) - set(page.entries)
    assert list(range(1, page.position.version + 1)) == [entry.version for entry in page.entries]
    place.close()


def _write(place: PostgresPlace, store: SharedStore, stop: threading.Event, confirmed: list[Revocation]) -> None:
    while not stop.is_set():
        try:
            confirmed.extend(store.revocations.append([revoked(place)] * 2).entries)
        except StoreUnavailableError:
            return


# PostgreSQL is not what it should be


def test_server_that_may_lose_what_it_confirmed_is_refused(postgres: Postgres):
    """`synchronous_commit = off` for the database of the store stops the start, in one line with the remedy."""
    place = PostgresPlace(postgres)
    with postgres.connect() as connection:
        connection.execute(f'ALTER DATABASE "{place.database}" SET synchronous_commit = off')
    with pytest.raises(ConfigError, match=r"the PostgreSQL server has synchronous_commit = off: .*; set it to on"):
        place.open()
    place.close()


def test_setting_that_is_changed_later_does_not_reach_a_session_that_is_open(postgres: Postgres):
    """What was found at the start of a session is set for the session; a new one is refused, as unavailable."""
    place = PostgresPlace(postgres)
    store = place.open()
    with postgres.connect() as connection:
        connection.execute(f'ALTER DATABASE "{place.database}" SET synchronous_commit = off')
    with store._database.read() as transaction:
        assert "on" == transaction.connection.exec_driver_sql("SHOW synchronous_commit").scalar()
    store._database.close()
    error = fails_in_time(lambda: store.revocations.read(None))
    assert "synchronous_commit = off" in str(error.__cause__)
    place.close()


def test_read_only_server_is_unavailable(postgres: Postgres):
    """A standby, or a server that was set read-only, is not written to and not taken for the store."""
    place = PostgresPlace(postgres)
    place.open().close()
    with postgres.connect() as connection:
        connection.execute(f'ALTER DATABASE "{place.database}" SET default_transaction_read_only = on')
    fails_in_time(place.open)
    place.close()


def test_password_is_read_from_its_file_for_each_connection_and_is_in_no_message(
    own_postgres: Postgres, tmp_path: Path
):
    """A wrong one is an error that does not show it, a changed file is used without a restart, none is named."""
    own_postgres.execute("CREATE ROLE broker LOGIN PASSWORD 'first-secret'")
    own_postgres.execute("GRANT ALL ON SCHEMA public TO broker")
    hba = own_postgres.directory / "pg_hba.conf"
    hba.write_text("local all postgres trust\nlocal all broker scram-sha-256\n")
    own_postgres.execute("SELECT pg_reload_conf()")
    name = own_postgres.create_database()
    with own_postgres.connect() as connection:
        connection.execute(f'ALTER DATABASE "{name}" OWNER TO broker')
    url = own_postgres.url(name).replace("postgres@", "broker@")
    file = tmp_path / "password"
    with pytest.raises(ConfigError, match=r"store\.password_file: cannot read .*password: No such file"):
        open_store(url, password=file)
    file.write_text("wrong-secret\n")
    error = fails_in_time(lambda: open_store(url, password=file))
    assert "wrong-secret" not in repr(error) + str(error) + str(error.__cause__)
    assert "password authentication failed" in str(error.__cause__)
    file.write_text("first-secret\n")
    with closing(open_store(url, password=file)) as store:
        own_postgres.execute("ALTER ROLE broker PASSWORD 'second-secret'")
        store._database.close()
        fails_in_time(lambda: store.revocations.read(None))
        file.write_text("second-secret")
        store.revocations.read(None)
    open_store(url, password="second-secret").close()


# SQLite


def test_sqlite_file_is_for_its_owner_alone(tmp_path: Path):
    """The file and what SQLite keeps beside it have mode 0600; one that was wider is narrowed."""
    place = SqlitePlace(tmp_path)
    place.file.touch(0o644)
    os.chmod(place.file, 0o644)  # noqa: PTH101 - whatever the umask is
    store = place.open()
    store.revocations.append([revoked(place)])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert {"store.db": 0o600, "store.db-wal": 0o600, "store.db-shm": 0o600} == modes
    place.close()


def test_sqlite_is_durable_and_has_no_memory_map(tmp_path: Path):
    """Every connection syncs each commit, writes ahead, and maps nothing."""
    place = SqlitePlace(tmp_path)
    store = place.open()
    with store._database.write() as transaction:
        pragmas = {
            name: transaction.connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "mmap_size")
        }
    assert {"journal_mode": "wal", "synchronous": 2, "mmap_size": 0} == pragmas
    place.close()


def test_sqlite_that_somebody_else_holds_is_an_error_in_time(tmp_path: Path):
    """Writing fails after the timeout, reading goes on, and after the other has let go so does writing."""
    place = SqlitePlace(tmp_path)
    store = place.open(timeout=timedelta(seconds=0.5))
    with closing(sqlite3.connect(place.file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        error = fails_in_time(lambda: store.revocations.append([revoked(place)]), timedelta(seconds=0.5))
        assert "OperationalError: database is locked" == str(error.__cause__)
        assert 0 == store.revocations.read(None).position.version
        other.execute("ROLLBACK")
    assert 1 == store.revocations.append([revoked(place)]).position.version
    place.close()


def test_killed_broker_loses_no_acknowledged_entry_in_sqlite(tmp_path: Path):
    """kill -9 of a process that writes: each version that it printed is there, none is skipped, and others go on."""
    place = SqlitePlace(tmp_path)
    store = place.open()
    start = store.revocations.read(None).position
    code = (
        "from support.store_places import *\nfrom pathlib import Path\n"
        f"place = SqlitePlace(Path({str(tmp_path)!r}))\nstore = place.open()\n"
        "while True: print(store.revocations.append([revoked(place)] * 3).position.version, flush=True)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        assert writer.stdout is not None
        confirmed = [int(writer.stdout.readline()) for _ in range(5)]
        writer.kill()
        confirmed += [int(line) for line in writer.communicate()[0].splitlines() if line]
        page = store.revocations.read(start)
        assert not page.snapshot
        assert max(confirmed) <= page.position.version
        assert list(range(1, page.position.version + 1)) == [entry.version for entry in page.entries]
        store.revocations.append([revoked(place)])
    place.close()


def test_sqlite_file_that_is_replaced_or_gone_is_noticed(tmp_path: Path):
    """What is written after a restore is in the restored file; without a file there is an error, and no new store."""
    place = SqlitePlace(tmp_path)
    place.open().revocations.append([revoked(place)])
    place.close()
    restore = place.backup()
    store = place.open()
    store.revocations.append([revoked(place)])
    place.file.rename(tmp_path / "away")
    fails_in_time(lambda: store.revocations.append([revoked(place)]))
    assert not place.file.exists()
    restore()
    assert 2 == store.revocations.append([revoked(place)]).position.version
    assert 2 == place.open().revocations.read(None).position.version
    place.close()


def test_any_file_name_does(tmp_path: Path):
    """The path is quoted in the URL; what is special in SQL or in a configuration file is not in a path."""
    path = tmp_path / "100% %41 #1? \u00e9 'x'.db"
    with closing(open_store(f"sqlite:///{quote(str(path))}")) as store:
        store.rollout.raise_to(1, "k1")
    assert path.exists()


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE revocations SET kind = 'unheard'", "a revocation"),
        ("UPDATE revocations SET value = 'no SPIFFE ID'", "a revocation"),
        ("UPDATE revocations SET expires_at = 'soon'", "a revocation"),
        ("UPDATE revocations SET expires_at = 9223372036854775807", "a revocation"),
        ("DELETE FROM revocation_log", "no position in the log of revocations, which"),
    ],
)
def test_revocation_that_is_not_understood_is_not_left_out(tmp_path: Path, statement: str, what: str):
    """A store that holds nonsense is unavailable: the broker keeps what it has, and its log says why."""
    place = SqlitePlace(tmp_path)
    store = place.open()
    store.revocations.append([revoked(place)])
    with closing(sqlite3.connect(place.file, isolation_level=None)) as other:
        other.execute(statement)
    error = fails_in_time(lambda: store.revocations.read(None))
    assert f"the database holds {what} that makes no sense" == str(error.__cause__)
    place.close()


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000], ids=range(3))
def test_mirror_that_is_not_understood_is_unavailable(tmp_path: Path, content: str):
    """It is not taken for an empty keyring."""
    place = SqlitePlace(tmp_path)
    store = place.open()
    store.mirror.save(1, {}, None)
    with closing(sqlite3.connect(place.file, isolation_level=None)) as other:
        other.execute("UPDATE keyring_mirror SET content = ?", (content,))
    assert "a keyring" in str(fails_in_time(store.mirror.load).__cause__)
    place.close()


def test_rollout_that_is_missing_is_unavailable(tmp_path: Path):
    """Without the row that is the gate nobody passes it."""
    place = SqlitePlace(tmp_path)
    store = place.open()
    with closing(sqlite3.connect(place.file, isolation_level=None)) as other:
        other.execute("DELETE FROM rollout")
    calls: list[Callable[[], object]] = [
        store.rollout.state,
        lambda: store.rollout.permit(1, "k1", overdue=True),
        lambda: store.sessions.write([joined()]),
    ]
    for call in calls:
        assert "no rollout" in str(fails_in_time(call).__cause__)
    place.close()


# Settings


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "give sqlite:////absolute/path or postgresql://"),
        ("mysql://x:secret@y/z", "give sqlite:////absolute/path or postgresql://"),
        ("not a url with a secret", "give sqlite:////absolute/path or postgresql://"),
        ("sqlite://", "a SQLite store is sqlite:////absolute/path"),
        ("sqlite:///:memory:", "a SQLite store is sqlite:////absolute/path"),
        ("sqlite:///relative.db", "a SQLite store is sqlite:////absolute/path"),
        ("sqlite:////x.db?mode=ro", "a SQLite store is sqlite:////absolute/path"),
        ("sqlite:////nowhere/at/all.db", "cannot use /nowhere/at/all.db: No such file or directory; give a file"),
        ("postgresql://broker:secret@db/carnet", "holds a password: put it into a file"),
        ("postgresql://broker@db/carnet?password=secret", "holds a password: put it into a file"),
        ("postgresql://broker@db/carnet?nonsense=1", 'invalid connection option "nonsense"'),
    ],
)
def test_url_that_cannot_be_is_one_line_without_the_password(url: str, says: str):
    """It names the setting and what to give instead, and never shows what may hold a password."""
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    assert says in str(caught.value)
    assert str(caught.value).startswith("store.url")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_file_that_is_no_database_is_refused(tmp_path: Path):
    """Another file is not overwritten."""
    file = tmp_path / "store.db"
    file.write_text("my diary\n" * 100)
    with pytest.raises(ConfigError, match=r"is no SQLite database: .*; move it away, or restore a backup"):
        open_store(f"sqlite:///{file}")
    assert file.read_text().startswith("my diary")


@pytest.mark.parametrize(
    ("url", "sslmode"),
    [
        ("postgresql://broker@db.prod.example/carnet", "verify-full"),
        ("postgresql://broker@/carnet?host=db1,localhost", "verify-full"),
        ("postgresql://broker@db.prod.example/carnet?sslmode=require", "require"),
        ("postgresql://broker@127.0.0.1:5432/carnet", None),
        ("postgresql://broker@[::1]/carnet", None),
        ("postgresql://broker@/carnet?host=/run/postgresql", None),
        ("postgres://broker@/carnet", None),
    ],
)
def test_server_on_another_host_is_verified_unless_the_url_says_otherwise(url: str, sslmode: str | None):
    """TLS with a checked name is the default for what is not on this machine."""
    store = open_store(url, prepare=False)
    assert sslmode == store._database.backend._parameters.get("sslmode")
    store.close()
