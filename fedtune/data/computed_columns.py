"""Applies the ``map`` and the ``filter`` of a recipe to a table of a source."""

import ast
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fedtune.data.arrow import Arrow
from fedtune.data.column import Column, Values
from fedtune.data.expression_types import WrongTypeError, get_kind, normalise_chunks
from fedtune.data.expression_values import compute_expression
from fedtune.data.mapped_pages import MappedPages
from fedtune.data.table import Classes, Kind, Table
from fedtune.errors import DataError
from fedtune.files import replace_file_atomically
from fedtune.paths import get_cache_folder
from fedtune.recipe.expressions import column_name, list_columns, parse_expression, quote_expression
from fedtune.recipe.validation_errors import suggest_nearest

__all__ = ["filter_rows", "map_columns"]

_TOGETHER = 256
"""Rows that are computed together."""


class _Expression(NamedTuple):
    """An expression, and what messages say before it: the source and the key."""

    text: str
    where: str

    def make_error(self, problem: str, code: str = "") -> DataError:
        return DataError(f"{self.where} {quote_expression(self.text)}: {problem}", code=code)


def map_columns(table: Table, made: Mapping[str, str], source: str, key: str) -> Table:
    """Return the table with the columns of ``map``. All expressions read the columns of the source.

    Columns of files that stay on the disk are written to the cache and read from there.
    """
    columns, kinds = dict(table.columns), dict(table.kinds)
    for name, text in made.items():
        columns[name], kind = _make_column(table, _Expression(text, f"{source}: {key}.{name}"))
        kinds.pop(name, None)
        if kind is not None:
            kinds[name] = kind
    return Table(columns, kinds, table.rows, _digest_origin(table.origin, repr(made)))


def filter_rows(table: Table, text: str, source: str, key: str) -> Table:
    """Return the rows for which the filter is true; DataError if it removes all of them."""
    expression = _Expression(text, f"{source}: {key}")
    if not list_columns(text):
        raise expression.make_error("it names no column, so it keeps all rows or none; name one")
    kept = [np.zeros(0, np.int64)]
    for start, values in _compute(table, expression):
        if (kind := get_kind(values)) not in ("true or false", "nothing"):
            raise expression.make_error(f"it is {kind}, not true or false; compare it with a value")
        kept.append(start + np.flatnonzero(values.cast(pa.bool_()).fill_null(False).to_numpy(zero_copy_only=False)))
    rows = np.concatenate(kept)
    if len(table) and not len(rows):
        raise expression.make_error(f"it removes all {len(table)} rows; loosen it")
    return table.select(rows)


def _digest_origin(origin: str | None, *done: str) -> str | None:
    """The origin of rows that were computed from those of another origin."""
    return None if origin is None else hashlib.sha256(repr((origin, *done)).encode()).hexdigest()


def _make_column(table: Table, expression: _Expression) -> tuple[Column, Kind | None]:
    """Compute a column of all rows that the table's columns have. A column's bare name copies it with its kind."""
    whole = replace(table, rows=None)
    if (name := column_name(parse_expression(expression.text))) is not None:
        _require_columns(whole, expression)
        return whole.columns[name], whole.kinds.get(name)
    found = (values for _, values in _compute(whole, expression))
    if table.origin is None:
        return Arrow(pa.chunked_array(list(found))), None
    digest = _digest_origin(table.origin, expression.text)
    return Arrow(_keep_on_disk(found, get_cache_folder() / "columns" / f"{digest}.arrow")), None


def _keep_on_disk(chunks: Iterator[pa.Array], file: Path) -> pa.ChunkedArray:
    """Write a column a few rows at a time, unless it was written before, and map it into memory."""
    if not file.exists():
        with replace_file_atomically(file) as beside:
            first = next(chunks)
            schema = pa.schema([("column", first.type)])
            with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for chunk in chain([first], chunks):
                    writer.write_batch(pa.record_batch([chunk], schema=schema))
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()["column"]


def _compute(table: Table, expression: _Expression) -> Iterator[tuple[int, pa.Array]]:
    """Yield the first row and the values of a few rows at a time."""
    _require_columns(table, expression)
    parsed = parse_expression(expression.text)
    columns = {name: _as_chunks(table, name, expression) for name in list_columns(expression.text)}
    pages = MappedPages()
    for start in range(0, max(1, len(table)), _TOGETHER):
        part = {name: _take_slice(column, start) for name, column in columns.items()}
        yield start, _compute_part(parsed, part, min(_TOGETHER, len(table) - start), expression)
        pages.drop_read()


def _compute_part(parsed: ast.expr, part: Mapping[str, pa.Array], count: int, expression: _Expression) -> pa.Array:
    try:
        return compute_expression(parsed, part, count)
    except WrongTypeError as error:
        raise expression.make_error(str(error), "data-unfit") from error
    except (pa.ArrowException, OverflowError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise expression.make_error(
            f"it cannot be computed ({reason}); fill or fix the values", "data-unfit"
        ) from error


def _take_slice(column: pa.ChunkedArray, start: int) -> pa.Array:
    found = column.slice(start, _TOGETHER).combine_chunks()
    return pa.concat_arrays(found.chunks) if isinstance(found, pa.ChunkedArray) else found


def _require_columns(table: Table, expression: _Expression) -> None:
    for name in list_columns(expression.text):
        if name not in table.column_names:
            hint = suggest_nearest(name, table.column_names)
            raise expression.make_error(f"there is no column {name!r}; {hint}", "data-columns")


def _as_chunks(table: Table, name: str, expression: _Expression) -> pa.ChunkedArray:
    """Return a column as Arrow's. Class numbers become their names."""
    column, kind = table.column(name), table.kinds.get(name)
    try:
        found = column.select_chunks() if isinstance(column, Arrow) else _convert_values(column)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        problem = f"column {name!r} holds values of several types or images; use another column"
        raise expression.make_error(problem, "data-unfit") from error
    if isinstance(kind, Classes):
        names = pa.array(kind.names, pa.string())
        found = pa.chunked_array([_name_classes(chunk, names) for chunk in found.chunks], pa.string())
    return normalise_chunks(found)


def _convert_values(column: Column) -> pa.ChunkedArray:
    values = column.array if isinstance(column, Values) and column.array.dtype.kind in "iufb" else column.values()
    return pa.chunked_array([pa.array(values)])


def _name_classes(numbers: pa.Array, names: pa.Array) -> pa.Array:
    """Return the names of class numbers. A negative number stands for no class."""
    wanted = numbers.cast(pa.int64()).to_numpy(zero_copy_only=False)
    return names.take(pa.array([int(one) if one >= 0 else None for one in wanted], pa.int64()))
