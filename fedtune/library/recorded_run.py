"""A run of the store as an object."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedtune.recipe.recorded_recipe import parse_recorded_recipe
from fedtune.recipe.schema import Recipe
from fedtune.tracking import RoundRecord, RunRecord, Store
from fedtune.tracking.stream_ledger import compute_stream_figures, make_matrix
from fedtune.tracking.task_matrix import TaskMatrix

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Run", "make_table"]

TableName = Literal[
    "runs", "rounds", "client_records", "metrics", "client_scores", "checkpoints", "samples", "task_scores", "tasks"
]


@dataclass(frozen=True)
class Run:
    """A run that a store holds. Each property is read from the store when it is asked for."""

    id: str
    store: str

    @property
    def record(self) -> RunRecord:
        """The run's row in the store."""
        with Store.open(self.store) as opened:
            return opened.run(self.id)

    @property
    def status(self) -> str:
        """``running``, ``completed``, ``failed`` or ``interrupted``."""
        return self.record.status

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run recorded."""
        return parse_recorded_recipe(self.record.recipe, self.record.id)

    @property
    def rounds(self) -> list[RoundRecord]:
        """All rounds in order; number 0 is the state before training."""
        with Store.open(self.store) as opened:
            return opened.rounds(self.id)

    @property
    def metrics(self) -> Any:
        """Every metric as an Arrow table with a row per round, split, domain and name. See ``to_pandas`` of Arrow."""
        return self.to_arrow("metrics")

    @property
    def samples(self) -> Any:
        """What the model generated for ``evaluation.prompts``: an Arrow table with a row per round and prompt."""
        return self.to_arrow("samples")

    @property
    def matrix(self) -> TaskMatrix | None:
        """The accuracy on each task before training and after each visit of the stream; None without a stream."""
        return make_matrix(self.record, self.rounds)

    @property
    def stream_figures(self) -> dict[str, float | None]:
        """Accuracy, forgetting, learning and the other figures of the stream by name; empty without a stream."""
        rounds = self.rounds
        matrix = make_matrix(self.record, rounds)
        return {} if matrix is None else compute_stream_figures(matrix, rounds)

    def to_arrow(self, table: TableName = "rounds") -> Any:
        """One of the tables of ``fedtune runs export`` for this run, as an Arrow table."""
        return make_table([(self.record, self.rounds)], table)

    def load_model(self, round_number: int | None = None) -> "nn.Module":
        """The model after a round, by default the last one, in plain layers and in evaluation mode."""
        from fedtune.library.exported_run import load_run_model

        return load_run_model(self.id, round_number, self.store)

    def export(
        self,
        folder: str | PathLike[str],
        *,
        form: Literal["adapter", "model"] | None = None,
        round_number: int | None = None,
    ) -> Path:
        """Write the result as ``fedtune export`` does, by default as an adapter if PEFT can load it."""
        from fedtune.library.exported_run import export_run

        export_run(self.id, Path(folder), round_number, form, self.store)
        return Path(folder)


def make_table(recorded: list[tuple[RunRecord, list[RoundRecord]]], name: str) -> Any:
    """One of the tables of an export; ValueError names all of them."""
    from fedtune.tracking.table_export import make_arrow_tables

    tables = make_arrow_tables(recorded)
    if name not in tables:
        raise ValueError(f"there is no table {name!r}; choose one of {', '.join(tables)}")
    return tables[name]
