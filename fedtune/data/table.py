"""Examples as named arrow columns, and which rows of them are meant: all that a process holds of its data.

Reading a file or a sample needs no more than this; ``datasets``, with pandas behind it, is for what only it can read.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

__all__ = ["Classes", "Greys", "Kind", "Pictures", "Table", "as_pictures", "concatenate", "of_greys"]


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures: a struct of ``bytes`` and ``path``, one of which may be missing."""


@dataclass(frozen=True)
class Greys:
    """Grey pictures of one shape [height, width]: their pixels in a list of fixed size."""

    shape: tuple[int, int]


@dataclass(frozen=True)
class Classes:
    """Numbers of classes with these names."""

    names: tuple[str, ...]


Kind = Pictures | Greys | Classes
"""What a column holds that are no plain values."""


@dataclass(frozen=True)
class Table:
    """Columns of equal length; ``rows`` picks some of their rows, in an order of its own, and copies nothing."""

    columns: pa.Table
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return int(self.columns.num_rows) if self.rows is None else len(self.rows)

    def __getitem__(self, name: str) -> list[Any]:
        """The values of a column as Python has them."""
        values: list[Any] = self.column(name).to_pylist()
        return values

    @property
    def column_names(self) -> list[str]:
        """In order."""
        return list(self.columns.column_names)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column as arrow has it, of the chosen rows."""
        whole = self.columns[name]
        return whole if self.rows is None else whole.take(pa.array(self.rows))

    def unique(self, name: str) -> list[Any]:
        """The different values of a column."""
        values: list[Any] = pc.unique(self.column(name)).to_pylist()
        return values

    def pictures(self, name: str = "image") -> Iterator[Mapping[str, Any]]:
        """Encoded pictures one by one, so that no more than one is copied at a time."""
        whole = self.columns[name]
        for row in range(len(whole)) if self.rows is None else self.rows:
            yield whole[int(row)].as_py()

    def greys(self, name: str = "image") -> NDArray[Any]:
        """[n, height, width]: the pixels of a column of grey pictures."""
        kind = self.kinds[name]
        assert isinstance(kind, Greys)
        flat: NDArray[Any] = self.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(self), *kind.shape)

    def select(self, rows: ArrayLike) -> "Table":
        """Some rows, counted among those chosen so far."""
        chosen = np.asarray(rows, np.int64)
        return Table(self.columns, self.kinds, chosen if self.rows is None else self.rows[chosen])

    def only(self, names: Iterable[str]) -> "Table":
        """Some columns."""
        kept = list(names)
        return Table(
            self.columns.select(kept), {name: kind for name, kind in self.kinds.items() if name in kept}, self.rows
        )

    def settled(self) -> pa.Table:
        """The chosen rows as a table of their own."""
        return self.columns if self.rows is None else self.columns.take(pa.array(self.rows))

    def with_column(self, name: str, column: pa.Array | pa.ChunkedArray) -> "Table":
        """A column of plain values for the chosen rows, in place of one of that name if there is one."""
        settled = self.settled()
        kinds = {other: kind for other, kind in self.kinds.items() if other != name}
        if name in settled.column_names:
            return Table(settled.set_column(settled.column_names.index(name), name, column), kinds)
        return Table(settled.append_column(name, column), kinds)


def concatenate(tables: Sequence[Table]) -> Table:
    """The rows of tables with the same columns, one table after another."""
    first = tables[0]
    names = first.column_names
    return Table(
        pa.concat_tables([one.settled().select(names) for one in tables], promote_options="default"), first.kinds
    )


def of_greys(images: NDArray[Any]) -> pa.FixedSizeListArray:
    """[n, height, width] as a column of grey pictures."""
    size = int(np.prod(images.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(images).reshape(-1)), size)


def as_pictures(chunk: pa.Array) -> pa.StructArray:
    """Paths, encoded bytes, or both in a struct, as a column of pictures; ArrowTypeError for anything else."""
    kind, count = chunk.type, len(chunk)
    nothing = {"bytes": pa.nulls(count, pa.binary()), "path": pa.nulls(count, pa.string())}
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        found = {**nothing, "path": chunk}
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        found = {**nothing, "bytes": chunk}
    elif pa.types.is_struct(kind) and {one.name for one in kind} & set(nothing):
        found = nothing | {one.name: chunk.field(one.name) for one in kind if one.name in nothing}
    else:
        raise pa.ArrowTypeError(f"{kind} is no picture")
    return pa.StructArray.from_arrays(list(found.values()), list(found))
