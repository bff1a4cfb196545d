"""The tables of the shared store. The migrations make them; a test compares the two."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import BigInteger, Boolean, Column, Index, LargeBinary, MetaData, String, Table, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

__all__ = [
    "ONLY_ROW",
    "Duration",
    "Instant",
    "keyring_mirror",
    "metadata",
    "replicas",
    "revocation_log",
    "revocations",
    "rollout",
    "schema_state",
    "signal",
    "verifier_sessions",
]

ONLY_ROW: Final = 1
"""The `id` of the row of a table that has just one."""

_EPOCH_START: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class Instant(TypeDecorator[datetime]):
    """A moment, aware UTC: whole microseconds since 1970, in both databases."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        """To the database."""
        return None if value is None else (value - _EPOCH_START) // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """From the database."""
        return None if value is None else _EPOCH_START + value * _MICROSECOND


class Duration(TypeDecorator[timedelta]):
    """A length of time: whole microseconds, in both databases."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: timedelta | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        """To the database."""
        return None if value is None else value // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: Dialect) -> timedelta | None:  # noqa: ARG002
        """From the database."""
        return None if value is None else value * _MICROSECOND


metadata = MetaData()


def _only_row() -> Column[int]:
    return Column("id", BigInteger, primary_key=True, autoincrement=False)


# Which software made the tables, and the oldest one that may still use them.
schema_state = Table(
    "schema_state",
    metadata,
    _only_row(),
    Column("version", BigInteger, nullable=False),
    Column("compatible_from", BigInteger, nullable=False),
)

# Where the log of revocations is. Whoever writes an entry locks this row first, until its commit: so versions have no
# gap, and become visible in their order.
revocation_log = Table(
    "revocation_log",
    metadata,
    _only_row(),
    Column("epoch", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("digest", LargeBinary, nullable=False),
)

revocations = Table(
    "revocations",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String(16), nullable=False),
    Column("value", Text, nullable=False),
    Column("before_version", BigInteger, nullable=False),
    Column("expires_at", Instant),
    Column("created_at", Instant, nullable=False),
    Column("asked_by", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Index("revocations_by_end", "expires_at"),
)

verifier_sessions = Table(
    "verifier_sessions",
    metadata,
    Column("spiffe_id", Text, primary_key=True),
    Column("instance_id", Text, primary_key=True),
    Column("stream", Text, nullable=False),
    Column("audience", Text, nullable=False),
    Column("replica_id", Text, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("generation_at", Instant, nullable=False),
    Column("revocation_version", BigInteger, nullable=False),
    Column("revocation_at", Instant, nullable=False),
    Column("max_staleness", Duration, nullable=False),
    Column("polls", Boolean, nullable=False),
    Column("lagging", Boolean, nullable=False),
    Index("verifier_sessions_by_replica", "replica_id"),
)

# The gate between a published key and the signing one. Joins lock the row in common, a permit and a raise alone.
rollout = Table(
    "rollout",
    metadata,
    _only_row(),
    Column("generation", BigInteger, nullable=False),
    Column("kid", Text, nullable=False),
    Column("raised_at", Instant),
    Column("permit_generation", BigInteger),
    Column("permit_kid", Text),
    Column("permit_given_at", Instant),
    Column("permit_overdue", Boolean),
    # When it was found that the store was restored from a backup, and sessions are missing.
    Column("restored_at", Instant),
)

replicas = Table(
    "replicas",
    metadata,
    Column("replica_id", Text, primary_key=True),
    Column("version", Text, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("generation_at", Instant, nullable=False),
    Column("revocation_version", BigInteger, nullable=False),
    Column("renewed_at", Instant, nullable=False),
    Column("lease", Duration, nullable=False),
)

keyring_mirror = Table(
    "keyring_mirror",
    metadata,
    _only_row(),
    Column("generation", BigInteger, nullable=False),
    Column("content", Text, nullable=False),
    Column("saved_at", Instant, nullable=False),
    # Both None where nobody could sign. Of another content where a broker of version 1 wrote last.
    Column("signed_by", Text),
    Column("signature", LargeBinary),
)

# SQLite has no NOTIFY: writers count here what others should look at.
signal = Table("signal", metadata, _only_row(), Column("count", BigInteger, nullable=False))
