"""Client records have the memory that the plan of their settings predicts."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("predicted_anonymous", "predicted_total"):
        op.add_column("client_records", sa.Column(name, sa.BigInteger))


def downgrade() -> None:
    for name in ("predicted_total", "predicted_anonymous"):
        op.drop_column("client_records", name)
