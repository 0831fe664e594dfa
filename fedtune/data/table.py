"""A table of examples: named columns and a selection of rows.

Reading a local file or a sample needs only NumPy. ``datasets``, with pandas and pyarrow, takes half a second and 100 MB
to import. It is imported only for sources that need it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedtune.data.column import Column, Rows, Values, concatenate_columns

__all__ = ["ClassLists", "Classes", "Greys", "Kind", "Pictures", "Table", "concatenate"]


@dataclass(frozen=True)
class Pictures:
    """Encoded images: records of ``bytes`` and ``path``, one of which may be missing."""


@dataclass(frozen=True)
class Greys:
    """Grey images of one shape: an array [n, height, width]."""


@dataclass(frozen=True)
class Classes:
    """Class numbers, with the class names in order."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class ClassLists:
    """Lists of class numbers, with the class names in order."""

    names: tuple[str, ...]


Kind = Pictures | Greys | Classes | ClassLists
"""The kind of a column that holds more than plain values."""


@dataclass(frozen=True)
class Table:
    """Columns of equal length. ``rows`` selects and orders rows without copying them.

    ``origin`` is the digest of the files that the columns are read from, if they stay on the disk.
    """

    columns: Mapping[str, Column]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    rows: Rows | None = None
    origin: str | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.rows is None else len(self.rows)

    def __getitem__(self, name: str) -> list[Any]:
        """Return the values of a column as Python objects."""
        return self.column(name).values()

    @property
    def column_names(self) -> list[str]:
        """The names of the columns, in order."""
        return list(self.columns)

    def column(self, name: str) -> Column:
        """Return a column, limited to the selected rows."""
        whole = self.columns[name]
        return whole if self.rows is None else whole.take(self.rows)

    @property
    def domains(self) -> list[str] | None:
        """The domain of each row, or None if there is no such column."""
        return list(self["domain"]) if "domain" in self.columns else None

    def unique(self, name: str) -> list[Any]:
        """Return the distinct values of a column."""
        return self.column(name).unique()

    def digest_rows(self) -> str | None:
        """Return the origin of the selected rows alone: that of the whole table if all are selected."""
        if self.origin is None or self.rows is None:
            return self.origin
        return hashlib.sha256(self.origin.encode() + self.rows.tobytes()).hexdigest()

    def pictures(self) -> Iterator[Mapping[str, Any]]:
        """Yield the encoded images one at a time, so that only one is copied into memory."""
        whole = self.columns["image"]
        for row in range(len(whole)) if self.rows is None else self.rows.tolist():
            yield whole[row]

    def greys(self) -> NDArray[Any]:
        """Return the pixels [n, height, width] of grey images."""
        column = self.column("image")
        assert isinstance(column, Values)
        return column.array

    def select(self, rows: ArrayLike) -> "Table":
        """Select rows by their position among the rows selected so far."""
        chosen = np.asarray(rows, np.int64)
        return replace(self, rows=chosen if self.rows is None else self.rows[chosen])

    def select_columns(self, names: Iterable[str]) -> "Table":
        """Select columns."""
        kept = list(names)
        kinds = {name: kind for name, kind in self.kinds.items() if name in kept}
        return replace(self, columns={name: self.columns[name] for name in kept}, kinds=kinds)

    def with_constant(self, name: str, value: str) -> "Table":
        """Add or replace a column that has the same value in each row, which is stored once."""
        whole = len(next(iter(self.columns.values())))
        kinds = {other: known for other, known in self.kinds.items() if other != name}
        column = Values(np.broadcast_to(np.array(value, object), whole))
        return replace(self, columns={**self.columns, name: column}, kinds=kinds)

    def with_column(self, name: str, column: Column, kind: Kind | None = None) -> "Table":
        """Add or replace a column for the selected rows. Plain values have no kind."""
        kinds = {other: known for other, known in self.kinds.items() if other != name}
        kinds |= {} if kind is None else {name: kind}
        others = {other: self.column(other) for other in self.columns if other != name}
        order = dict.fromkeys([*self.columns, name])
        return Table({other: column if other == name else others[other] for other in order}, kinds)


def concatenate(tables: Sequence[Table]) -> Table:
    """Concatenate the rows of tables that have the same columns."""
    columns = {name: concatenate_columns([one.column(name) for one in tables]) for name in tables[0].columns}
    return Table(columns, tables[0].kinds)
