"""The visits of a stream of tasks, and the scores of each task by client and device class; bytes stored on devices."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tasks",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("visit", sa.Integer, nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("first_round", sa.Integer, nullable=False),
        sa.Column("last_round", sa.Integer),
        sa.Column("opened_by", sa.String(16), nullable=False),
        sa.Column("labels", sa.Text),
        sa.Column("test_examples", sa.BigInteger),
        sa.PrimaryKeyConstraint("run_id", "visit", name="pk_tasks"),
        sa.ForeignKeyConstraint(
            ["run_id", "first_round"],
            ["rounds.run_id", "rounds.number"],
            name="fk_tasks_rounds",
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "task_scores",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("scope", sa.String(64), nullable=False),
        sa.Column("moment", sa.String(8), nullable=False),
        sa.Column("task", sa.String(255), nullable=False),
        sa.Column("num_predictions", sa.BigInteger, nullable=False),
        sa.Column("accuracy", sa.Double),
        sa.Column("loss", sa.Double),
        sa.PrimaryKeyConstraint("run_id", "round", "scope", "moment", "task", name="pk_task_scores"),
        sa.ForeignKeyConstraint(
            ["run_id", "round"],
            ["rounds.run_id", "rounds.number"],
            name="fk_task_scores_rounds",
            ondelete="CASCADE",
        ),
    )
    op.add_column("client_records", sa.Column("stored_bytes", sa.BigInteger))


def downgrade() -> None:
    op.drop_column("client_records", "stored_bytes")
    op.drop_table("task_scores")
    op.drop_table("tasks")
