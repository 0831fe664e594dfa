"""``fedtune.runs``: the runs of a store."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedtune.library.recorded_run import Run, TableName, make_table
from fedtune.tracking import Store, get_default_url

__all__ = ["Runs", "runs"]


@dataclass(frozen=True)
class Runs:
    """Runs of a store, newest first."""

    found: tuple[Run, ...]
    store: str

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.found)

    def __getitem__(self, key: int | str) -> Run:
        """The run at a place, or by its id, the beginning of its id, or ``latest``."""
        if isinstance(key, int):
            return self.found[key]
        with Store.open(self.store) as opened:
            return Run(opened.run(key).id, self.store)

    def to_arrow(self, table: TableName = "runs") -> Any:
        """One of the tables of ``fedtune runs export``, over all these runs, as an Arrow table."""
        with Store.open(self.store) as opened:
            rounds = opened.rounds_of([run.id for run in self.found])
            return make_table([(opened.run(run.id), rounds[run.id]) for run in self.found], table)

    def to_pandas(self, table: TableName = "runs") -> Any:
        """The same table as a data frame of pandas."""
        return self.to_arrow(table).to_pandas()


def runs(store: str | None = None) -> Runs:
    """The runs of a store, which is a URL of SQLAlchemy; by default the store that the commands use.

    >>> import fedtune, tempfile
    >>> found = fedtune.runs(f"sqlite:///{tempfile.mkdtemp()}/runs.db")
    >>> len(found), found.to_pandas("metrics").columns.tolist()
    (0, ['run_id', 'round', 'split', 'domain', 'name', 'value', 'device_type'])
    """
    url = store or get_default_url()
    with Store.open(url) as opened:
        return Runs(tuple(Run(record.id, url) for record in opened.runs()), url)
