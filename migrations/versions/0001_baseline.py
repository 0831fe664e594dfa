"""The first schema: runs, rounds, contributions, metrics, checkpoints. Frozen: changes go into a new revision."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("recipe", sa.Text, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("engine", sa.String(32), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished", sa.DateTime(timezone=True)),
        sa.Column("rounds_planned", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
    )
    op.create_index("ix_runs_created", "runs", ["created"])
    op.create_table(
        "rounds",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("seconds", sa.Double),
        sa.PrimaryKeyConstraint("run_id", "number", name="pk_rounds"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_rounds_runs", ondelete="CASCADE"),
    )
    op.create_table(
        "contributions",
        *_of_round("contributions", sa.Column("client", sa.Integer, nullable=False)),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("examples", sa.BigInteger, nullable=False),
        sa.Column("bytes_down", sa.BigInteger, nullable=False),
        sa.Column("bytes_up", sa.BigInteger, nullable=False),
        sa.Column("seconds", sa.Double),
        sa.Column("saved_bytes", sa.BigInteger, nullable=False),
        sa.Column("peak_rss", sa.BigInteger, nullable=False),
        sa.Column("norm", sa.Double),
        sa.Column("loss", sa.Double),
    )
    op.create_table(
        "metrics",
        *_of_round(
            "metrics",
            sa.Column("part", sa.String(16), nullable=False),
            sa.Column("domain", sa.String(255), nullable=False),
            sa.Column("name", sa.String(64), nullable=False),
        ),
        sa.Column("value", sa.Double),
    )
    op.create_table(
        "checkpoints",
        *_of_round("checkpoints"),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    for table in ("checkpoints", "metrics", "contributions", "rounds", "runs"):
        op.drop_table(table)


def _of_round(table: str, *key: sa.Column[Any]) -> list[Any]:
    """A table's key below a round, further key columns included."""
    return [
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        *key,
        sa.PrimaryKeyConstraint("run_id", "round", *(column.name for column in key), name=f"pk_{table}"),
        sa.ForeignKeyConstraint(
            ["run_id", "round"], ["rounds.run_id", "rounds.number"], name=f"fk_{table}_rounds", ondelete="CASCADE"
        ),
    ]
