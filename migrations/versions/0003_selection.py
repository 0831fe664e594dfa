"""What runs select devices by: tags of devices, and of the tokens they enrol with."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("devices", "tokens"):
        op.add_column(table, sa.Column("tags", sa.Text))


def downgrade() -> None:
    for table in ("devices", "tokens"):
        op.drop_column(table, "tags")
