"""Examples as named columns, and which rows of them are meant: all that a process holds of its data.

Reading a file or a sample needs no more than numpy. ``datasets``, with pandas and pyarrow behind it, costs a process
half a second and 100 MB; it is imported for sources that only it reads.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedtune.data.column import Column, Rows, Values, concatenate_columns

__all__ = ["ClassLists", "Classes", "Greys", "Kind", "Pictures", "Table", "concatenate"]


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures: ``bytes`` and ``path``, one of which may be missing."""


@dataclass(frozen=True)
class Greys:
    """Grey pictures of one shape, as an array [n, height, width]."""


@dataclass(frozen=True)
class Classes:
    """Numbers of classes with these names."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class ClassLists:
    """Lists of numbers of classes with these names."""

    names: tuple[str, ...]


Kind = Pictures | Greys | Classes | ClassLists
"""What a column holds that are no plain values."""


@dataclass(frozen=True)
class Table:
    """Columns of equal length; ``rows`` picks some of their rows, in an order of its own, and copies nothing.

    ``origin`` is the digest of the files that the columns lie in, where they are read from the disk when needed.
    """

    columns: Mapping[str, Column]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    rows: Rows | None = None
    origin: str | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.rows is None else len(self.rows)

    def __getitem__(self, name: str) -> list[Any]:
        """The values of a column as Python has them."""
        return self.column(name).values()

    @property
    def column_names(self) -> list[str]:
        """In order."""
        return list(self.columns)

    def column(self, name: str) -> Column:
        """A column of the chosen rows."""
        whole = self.columns[name]
        return whole if self.rows is None else whole.take(self.rows)

    @property
    def domains(self) -> list[str] | None:
        """The domain of each row, where the data has any."""
        return list(self["domain"]) if "domain" in self.columns else None

    def unique(self, name: str) -> list[Any]:
        """The different values of a column."""
        return self.column(name).unique()

    def pictures(self) -> Iterator[Mapping[str, Any]]:
        """Encoded pictures one by one, so that no more than one is copied at a time."""
        whole = self.columns["image"]
        for row in range(len(whole)) if self.rows is None else self.rows.tolist():
            yield whole[row]

    def greys(self) -> NDArray[Any]:
        """[n, height, width]: the pixels of grey pictures."""
        column = self.column("image")
        assert isinstance(column, Values)
        return column.array

    def select(self, rows: ArrayLike) -> "Table":
        """Some rows, counted among those chosen so far."""
        chosen = np.asarray(rows, np.int64)
        return replace(self, rows=chosen if self.rows is None else self.rows[chosen])

    def select_columns(self, names: Iterable[str]) -> "Table":
        """Some columns."""
        kept = list(names)
        kinds = {name: kind for name, kind in self.kinds.items() if name in kept}
        return replace(self, columns={name: self.columns[name] for name in kept}, kinds=kinds)

    def with_column(self, name: str, column: Column, kind: Kind | None = None) -> "Table":
        """A column for the chosen rows, in place of one of that name if there is one; plain values have no kind."""
        kinds = {other: known for other, known in self.kinds.items() if other != name}
        kinds |= {} if kind is None else {name: kind}
        others = {other: self.column(other) for other in self.columns if other != name}
        order = dict.fromkeys([*self.columns, name])
        return Table({other: column if other == name else others[other] for other in order}, kinds)


def concatenate(tables: Sequence[Table]) -> Table:
    """The rows of tables with the same columns, one table after another."""
    columns = {name: concatenate_columns([one.column(name) for one in tables]) for name in tables[0].columns}
    return Table(columns, tables[0].kinds)
