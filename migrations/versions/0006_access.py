"""What operators may do; audit lines that count repeats and know where they came from."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("operators", sa.Column("role", sa.String(16)))
    op.add_column("audit", sa.Column("source", sa.String(128)))
    op.add_column("audit", sa.Column("times", sa.Integer))
    op.add_column("audit", sa.Column("last", sa.DateTime(timezone=True)))
    op.create_index("ix_audit_source", "audit", ["source"])


def downgrade() -> None:
    op.drop_index("ix_audit_source", "audit")
    for column in ("last", "times", "source"):
        op.drop_column("audit", column)
    op.drop_column("operators", "role")
