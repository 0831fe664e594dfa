"""Why a device is quarantined, where it is."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("devices", sa.Column("quarantined", sa.Text))


def downgrade() -> None:
    op.drop_column("devices", "quarantined")
