"""The signature of the mirror. What software of version 1 writes does not fit it, and is not believed by version 2."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns."""
    op.add_column("keyring_mirror", sa.Column("signed_by", sa.Text))
    op.add_column("keyring_mirror", sa.Column("signature", sa.LargeBinary))
