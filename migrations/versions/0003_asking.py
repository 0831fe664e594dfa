"""What runs select devices by, tags of devices and of the tokens they enrol with; how late a contribution came."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("devices", "tokens"):
        op.add_column(table, sa.Column("tags", sa.Text))
    op.add_column("contributions", sa.Column("staleness", sa.Integer))


def downgrade() -> None:
    op.drop_column("contributions", "staleness")
    for table in ("devices", "tokens"):
        op.drop_column(table, "tags")
