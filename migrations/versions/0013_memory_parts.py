"""Client records tell anonymous memory and that of files apart."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("anonymous_memory", "file_memory"):
        op.add_column("client_records", sa.Column(name, sa.BigInteger))


def downgrade() -> None:
    for name in ("file_memory", "anonymous_memory"):
        op.drop_column("client_records", name)
