"""Metrics and scores say on which type of device they were computed. Older rows do not say."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

_TABLES = ("metrics", "client_scores", "task_scores")


def upgrade() -> None:
    for table in _TABLES:
        op.add_column(table, sa.Column("device_type", sa.String(16)))


def downgrade() -> None:
    for table in reversed(_TABLES):
        op.drop_column(table, "device_type")
