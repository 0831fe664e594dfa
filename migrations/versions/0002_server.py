"""What a server keeps: who sits where in a run, devices, enrolment tokens, operators, and what was refused or done."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "seats",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("client", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("node", sa.String(20), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "client", name="pk_seats"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_seats_runs", ondelete="CASCADE"),
    )
    op.create_table(
        "devices",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("node", sa.String(20), nullable=False),
        sa.Column("public_key", sa.Text, nullable=False),
        sa.Column("enrolled", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen", sa.DateTime(timezone=True)),
        sa.Column("profile", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_devices"),
    )
    op.create_table(
        "tokens",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires", sa.DateTime(timezone=True), nullable=False),
        sa.Column("spent", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("sha256", name="pk_tokens"),
    )
    op.create_table(
        "operators",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_operators"),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("who", sa.String(128), nullable=False),
        sa.Column("what", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )


def downgrade() -> None:
    for table in ("audit", "operators", "tokens", "devices", "seats"):
        op.drop_table(table)
