"""Stores whose tables are made already: a broker that is started by the hundred need not make them each time.

That a broker makes its tables at its start is shown by `test_store_migrations`, `test_previous_version` and the demo.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from carnet_broker.edges.store import open_store
from support.postgres import Postgres

__all__ = ["prepared_database", "put_prepared_file"]


def put_prepared_file(path: Path) -> None:
    """Put a new SQLite store at `path`, unless there is something."""
    if not path.exists():
        path.touch(mode=0o600)
        path.write_bytes(_prepared_file())


@lru_cache(maxsize=1)
def _prepared_file() -> bytes:
    directory = Path(tempfile.mkdtemp(prefix="carnet-store-"))
    try:
        path = directory / "store.db"
        open_store(f"sqlite:///{path}").close()
        assert not path.with_name("store.db-wal").exists(), "the last connection takes the journal in"
        return path.read_bytes()
    finally:
        shutil.rmtree(directory)


def prepared_database(postgres: Postgres) -> str:
    """Make a new database with its tables in `postgres`; return its name."""
    return postgres.create_database(_template(postgres))


@lru_cache(maxsize=8)
def _template(postgres: Postgres) -> str:
    name = postgres.create_database()
    open_store(postgres.url(name)).close()
    return name
