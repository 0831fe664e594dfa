"""A column backed by the Arrow chunks of ``datasets``, which may be memory-mapped from disk."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedtune.data.column import Column, Rows
from fedtune.data.mapped_pages import MappedPages

__all__ = ["Arrow"]

_TOGETHER = 1000
"""Values that are read at a time."""


@final
class Arrow(Column):
    """Arrow chunks and an optional selection of their rows. Values are copied only when they are read."""

    def __init__(self, chunks: pa.ChunkedArray, rows: Rows | None = None) -> None:
        self._chunks, self._rows = chunks, rows

    def __len__(self) -> int:
        return len(self._chunks) if self._rows is None else len(self._rows)

    def __getitem__(self, row: int) -> Any:
        return self._chunks[row if self._rows is None else int(self._rows[row])].as_py()

    def take(self, rows: Rows) -> "Arrow":
        """Select rows."""
        return Arrow(self._chunks, rows if self._rows is None else self._rows[rows])

    def select_chunks(self) -> pa.ChunkedArray:
        """Return the selected rows as chunks."""
        if self._rows is None:
            return self._chunks
        if self._chunks.num_chunks < 2 or np.any(np.diff(self._rows) < 0):
            return self._chunks.take(pa.array(self._rows))
        return _take_ascending(self._chunks, self._rows)

    def join(self, others: Sequence[Column]) -> "Column | None":
        """Put columns of the same Arrow type end to end without copying their values."""
        columns = [self, *(one for one in others if isinstance(one, Arrow))]
        if len(columns) <= len(others) or len({one._chunks.type for one in columns}) > 1:
            return None
        chunks = pa.chunked_array([chunk for one in columns for chunk in one._chunks.chunks], self._chunks.type)
        if all(one._rows is None for one in columns):
            return Arrow(chunks)
        starts = np.cumsum([0, *(len(one._chunks) for one in columns[:-1])])
        rows = [np.arange(len(one)) if one._rows is None else one._rows for one in columns]
        return Arrow(chunks, np.concatenate([start + own for start, own in zip(starts, rows, strict=True)]))

    def values(self) -> list[Any]:
        """Return all values as a list."""
        found: list[Any] = self.select_chunks().to_pylist()
        return found

    def iter_values(self) -> Iterator[Any]:
        """Yield all values a few at a time; pages of a mapped file are dropped behind them."""
        pages = MappedPages()
        for start in range(0, len(self), _TOGETHER):
            yield from self.take(np.arange(start, min(start + _TOGETHER, len(self)))).values()
            pages.drop_read()

    def structures(self) -> list[Any]:
        """``datasets`` stores as JSON what has another type in other rows."""
        return [_read_json(value, self._chunks.type) for value in self.values()]

    def find_missing_row(self) -> int | None:
        """Return the first row that is null, without converting the other values to Python objects."""
        settled = self.select_chunks()
        return pc.index(settled.is_null(), pa.scalar(True)).as_py() if settled.null_count else None

    def texts(self) -> "Arrow":
        """Cast the values to strings as Arrow does; TypeError for nested or uncastable types."""
        if self.nested:
            raise TypeError(f"{self.nested} is not text")
        try:
            return Arrow(self.select_chunks().cast(pa.string()))
        except pa.ArrowException as error:
            raise TypeError(str(error)) from error

    def pictures(self) -> "Arrow":
        """Convert the values to image records, reusing the buffers of the column; TypeError for other types."""
        return Arrow(pa.chunked_array([_pictures(chunk) for chunk in self._chunks.chunks], _PICTURE), self._rows)

    @property
    def nested(self) -> str:
        """Return Arrow's name of a nested type, or an empty string."""
        return str(self._chunks.type) if pa.types.is_nested(self._chunks.type) else ""


def _take_ascending(chunks: pa.ChunkedArray, rows: Rows) -> pa.ChunkedArray:
    """Some rows, chunk by chunk; arrow's own ``take`` would first copy all chunks into one."""
    starts = np.cumsum([0, *(len(chunk) for chunk in chunks.chunks)])
    cuts = np.searchsorted(rows, starts)
    touched = [place for place, (low, high) in enumerate(pairwise(cuts.tolist())) if low < high]
    taken = [chunks.chunk(at).take(pa.array(rows[cuts[at] : cuts[at + 1]] - starts[at])) for at in touched]
    return pa.chunked_array(taken, chunks.type)


def _read_json(value: Any, kind: pa.DataType) -> Any:
    """A value of a type that may be JSON, or hold it."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _read_json(value[field.name], field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_read_json(one, kind.value_type) for one in value]
    return value


_PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def _pictures(chunk: pa.Array) -> pa.StructArray:
    kind, count = chunk.type, len(chunk)
    nothing = {"bytes": pa.nulls(count, pa.binary()), "path": pa.nulls(count, pa.string())}
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        found = {**nothing, "path": chunk.cast(pa.string())}
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        found = {**nothing, "bytes": chunk.cast(pa.binary())}
    elif pa.types.is_struct(kind) and {one.name for one in kind} & set(nothing):
        found = nothing | {one.name: chunk.field(one.name) for one in kind if one.name in nothing}
    else:
        raise TypeError(f"{kind} is not an image")
    return pa.StructArray.from_arrays(list(found.values()), list(found))
