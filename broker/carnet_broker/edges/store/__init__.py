"""The shared store: SQLite for the brokers of one host, PostgreSQL for more."""

from __future__ import annotations

from carnet_broker.edges.store.database import DatabaseFailureError
from carnet_broker.edges.store.shared_store import SharedStore, open_store

__all__ = ["DatabaseFailureError", "SharedStore", "open_store"]
