"""Run by Alembic: takes the connection and the transaction that `migrate` has begun, and holds its lock in."""

from __future__ import annotations

from alembic import context

from carnet_broker.edges.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
