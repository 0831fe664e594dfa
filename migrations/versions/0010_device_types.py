"""Rounds and client records say on which type of device they were measured. Older rows say nothing: the CPU."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_COLUMNS = (
    ("rounds", "device_type", sa.String(16)),
    ("client_records", "device_type", sa.String(16)),
    ("client_records", "accelerator_memory", sa.BigInteger()),
    ("client_records", "accelerator_reserved", sa.BigInteger()),
)


def upgrade() -> None:
    for table, name, kind in _COLUMNS:
        op.add_column(table, sa.Column(name, kind))


def downgrade() -> None:
    for table, name, _ in reversed(_COLUMNS):
        op.drop_column(table, name)
