"""The shared store: SQLite for the brokers of one host, PostgreSQL for more."""

from __future__ import annotations

from carnet_broker.edges.store.database import DatabaseFailureError
from carnet_broker.edges.store.shared_store import SharedStore, check_store_url, open_store

__all__ = ["DatabaseFailureError", "SharedStore", "check_store_url", "open_store"]
