"""What the global model generated for the prompts of a recipe in a round."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "samples",
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("ended", sa.Boolean),
        sa.PrimaryKeyConstraint("run_id", "round", "number", name="pk_samples"),
        sa.ForeignKeyConstraint(
            ["run_id", "round"],
            ["rounds.run_id", "rounds.number"],
            name="fk_samples_rounds",
            ondelete="CASCADE",
        ),
    )


def downgrade() -> None:
    op.drop_table("samples")
