"""A broker whose store tells nobody of changes: the others find them when they look. Run as `carnet_broker` is."""

from __future__ import annotations

from sqlalchemy import Connection

from carnet_broker.cli import main
from carnet_broker.edges.store.postgres import PostgresBackend


def _say_nothing(_: PostgresBackend, connection: Connection) -> None:
    del connection


if __name__ == "__main__":
    PostgresBackend.signal = _say_nothing  # type: ignore[assignment, method-assign] # its purpose
    main()
