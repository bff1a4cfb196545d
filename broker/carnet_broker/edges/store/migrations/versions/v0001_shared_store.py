"""The shared store: revocations, verifiers, rollout, replicas, and the mirror of the keyring."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "schema_state",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("compatible_from", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "revocation_log",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "revocations",
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("value", sa.Text, nullable=False),
        sa.Column("before_version", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("asked_by", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.create_index("revocations_by_end", "revocations", ["expires_at"])
    op.create_table(
        "verifier_sessions",
        sa.Column("spiffe_id", sa.Text, primary_key=True),
        sa.Column("instance_id", sa.Text, primary_key=True),
        sa.Column("stream", sa.Text, nullable=False),
        sa.Column("audience", sa.Text, nullable=False),
        sa.Column("replica_id", sa.Text, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("generation_at", sa.BigInteger, nullable=False),
        sa.Column("revocation_version", sa.BigInteger, nullable=False),
        sa.Column("revocation_at", sa.BigInteger, nullable=False),
        sa.Column("max_staleness", sa.BigInteger, nullable=False),
        sa.Column("polls", sa.Boolean, nullable=False),
        sa.Column("lagging", sa.Boolean, nullable=False),
    )
    op.create_index("verifier_sessions_by_replica", "verifier_sessions", ["replica_id"])
    op.create_table(
        "rollout",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("kid", sa.Text, nullable=False),
        sa.Column("raised_at", sa.BigInteger),
        sa.Column("permit_generation", sa.BigInteger),
        sa.Column("permit_kid", sa.Text),
        sa.Column("permit_given_at", sa.BigInteger),
        sa.Column("permit_overdue", sa.Boolean),
        sa.Column("restored_at", sa.BigInteger),
    )
    op.create_table(
        "replicas",
        sa.Column("replica_id", sa.Text, primary_key=True),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("generation_at", sa.BigInteger, nullable=False),
        sa.Column("revocation_version", sa.BigInteger, nullable=False),
        sa.Column("renewed_at", sa.BigInteger, nullable=False),
        sa.Column("lease", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "keyring_mirror",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("saved_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "signal",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("count", sa.BigInteger, nullable=False),
    )
