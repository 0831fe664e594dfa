"""What each client of a round scored on its own held-out examples; whether a checkpoint was pruned."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "client_scores",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("client", sa.Integer, nullable=False),
        sa.Column("moment", sa.String(8), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("value", sa.Double),
        sa.Column("predictions", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "round", "client", "moment", "name", name="pk_client_scores"),
        sa.ForeignKeyConstraint(
            ["run_id", "round"],
            ["rounds.run_id", "rounds.number"],
            name="fk_client_scores_rounds",
            ondelete="CASCADE",
        ),
    )
    op.add_column("checkpoints", sa.Column("pruned", sa.Boolean))


def downgrade() -> None:
    op.drop_column("checkpoints", "pruned")
    op.drop_table("client_scores")
