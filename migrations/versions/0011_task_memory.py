"""Checkpoints name what the server remembers of earlier tasks, a file beside them. Runs without a stream have none."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_COLUMNS = (("memory_sha256", sa.String(64)), ("memory_bytes", sa.BigInteger()))


def upgrade() -> None:
    for name, kind in _COLUMNS:
        op.add_column("checkpoints", sa.Column(name, kind))


def downgrade() -> None:
    for name, _ in reversed(_COLUMNS):
        op.drop_column("checkpoints", name)
