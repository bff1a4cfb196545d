"""The form of the database: made and brought up to date at the start of a broker, under a lock.

A rolling upgrade runs version N beside N-1 on the tables of N. So each version says which is the oldest software that
may use its tables: a migration that only adds leaves `COMPATIBLE_FROM` as it is.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Table, insert, inspect, select, update

from carnet.errors import ConfigError
from carnet.revocations import GENESIS_DIGEST
from carnet_broker.core.lost_entries import epoch_of
from carnet_broker.edges.store.tables import ONLY_ROW, revocation_log, rollout, schema_state, signal

__all__ = ["COMPATIBLE_FROM", "SCHEMA_VERSION", "migrate"]

SCHEMA_VERSION: Final = 2
"""Of the tables that this software makes: the number of its last migration."""
COMPATIBLE_FROM: Final = 1
"""The oldest `SCHEMA_VERSION` whose software may use these tables."""

_MIGRATIONS: Final = Path(__file__).with_name("migrations")


def migrate(connection: Connection, now: datetime) -> None:
    """Make the tables, or bring them up to date. The caller has begun the transaction, and holds the lock in it.

    Raises `ConfigError` where the database is of newer software that this one may not run beside.
    """
    known = inspect(connection).has_table(schema_state.name)
    row = connection.execute(select(schema_state.c.version, schema_state.c.compatible_from)).first() if known else None
    if row is not None and row.version > SCHEMA_VERSION:
        if row.compatible_from > SCHEMA_VERSION:
            msg = (
                f"the shared store has tables of version {row.version}, which this software (version {SCHEMA_VERSION})"
                f" cannot use: start the newer software again, or restore the backup from before its first start"
            )
            raise ConfigError(msg)
        return
    if row is None or row.version < SCHEMA_VERSION:
        _upgrade(connection)
        _write(connection, schema_state, version=SCHEMA_VERSION, compatible_from=COMPATIBLE_FROM)
    _ensure(connection, revocation_log, epoch=epoch_of(now), version=0, digest=GENESIS_DIGEST)
    _ensure(connection, rollout, generation=0, kid="")
    _ensure(connection, signal, count=0)


def _upgrade(connection: Connection) -> None:
    # Here: it takes a third of the time of a start, and most starts find nothing to do.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _write(connection: Connection, table: Table, **values: object) -> None:
    if connection.execute(update(table).where(table.c.id == ONLY_ROW).values(**values)).rowcount == 0:
        connection.execute(insert(table).values(id=ONLY_ROW, **values))


def _ensure(connection: Connection, table: Table, **values: object) -> None:
    if connection.execute(select(table.c.id)).first() is None:
        connection.execute(insert(table).values(id=ONLY_ROW, **values))
