"""Which checkpoints of a run are on disk, according to the store."""

from collections.abc import Sequence

from sqlalchemy import Engine, select, update

from fedtune.tracking import rows, tables
from fedtune.tracking.database import reader, writer

__all__ = ["CheckpointRows"]


class CheckpointRows:
    """The table of checkpoints."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def read_scores(self, run_id: str) -> dict[int, dict[tuple[str, str], float]]:
        """Return the rounds whose checkpoint was not pruned, each with its held-out metrics by split and name."""
        with reader(self._engine) as connection:
            return rows.read_checkpoint_scores(connection, run_id)

    def mark_pruned(self, run_id: str, numbers: Sequence[int]) -> list[str]:
        """Record that the checkpoints of these rounds are deleted, and return their paths."""
        if not numbers:
            return []
        table = tables.checkpoints
        these = table.c.run_id == run_id, table.c.round.in_(numbers)
        with writer(self._engine) as connection:
            connection.execute(update(table).where(*these), {"pruned": True})
            return list(connection.execute(select(table.c.path).where(*these)).scalars())
