"""From a source's own columns to the canonical ones: ``text`` or ``image``, ``label``, ``group``, ``domain``."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fedtune.data.table import Classes, Greys, Kind, Pictures, Table, as_pictures
from fedtune.errors import DataError
from fedtune.explain import nearest
from fedtune.recipe import Natural, Recipe

__all__ = ["canonical", "split_column"]

Named = dict[str, tuple[str, str]]


def canonical(recipe: Recipe, table: Table) -> Table:
    """The columns the recipe names, renamed; DataError when one is missing or has a null."""
    columns: dict[str, Any] = {}
    kinds: dict[str, Kind] = {}
    for name, (key, column) in _named(recipe, table.column_names).items():
        stored = _column(recipe.data.source, table, key, column)
        try:
            columns[name], kind = _convert(name, stored, table.kinds.get(column))
        except pa.ArrowException as error:
            wanted = "pictures" if name == "image" else "text"
            problem = f"column {column!r} holds no {wanted}; name another in {key}"
            raise DataError(f"{recipe.data.source}: {problem}") from error
        if kind is not None:
            kinds[name] = kind
    return Table(pa.table(columns), kinds)


def split_column(recipe: Recipe, by: str) -> str:
    """The canonical name of the source's column ``by``."""
    columns = recipe.data.columns
    return {columns.label: "label", columns.domain: "domain", columns.group: "group"}.get(by, by)


def _named(recipe: Recipe, present: list[str]) -> Named:
    """Canonical name -> (the recipe's key, the source's column)."""
    columns, split = recipe.data.columns, recipe.data.split
    named: Named = {}
    if recipe.task == "image-classification":
        named["image"] = ("data.columns.image", columns.image)
    else:
        named["text"] = ("data.columns.text", columns.text)
    if recipe.task != "causal-language-modelling":
        named["label"] = ("data.columns.label", columns.label)
    group = columns.group or ("group" if recipe.data.source.startswith("sample:") and "group" in present else None)
    if group:
        named["group"] = ("data.columns.group", group)
    if columns.domain:
        named["domain"] = ("data.columns.domain", columns.domain)
    if isinstance(split, Natural):
        named.setdefault(split_column(recipe, split.by), ("data.split.by", split.by))
    return named


def _column(source: str, table: Table, key: str, column: str) -> Any:
    if column not in table.column_names:
        hint = nearest(column, table.column_names)
        raise DataError(f"{source} has no column {column!r}, which {key} names; {hint}")
    stored = table.column(column)
    if stored.null_count:
        row = pc.index(stored.is_null(), pa.scalar(True)).as_py() + 1
        raise DataError(f"{source}: row {row} has no value in column {column!r}; fill it or drop the row")
    return stored


def _convert(name: str, column: pa.ChunkedArray, kind: Kind | None) -> tuple[Any, Kind | None]:
    """The arrow column and what it holds, as canonical columns have them; labels are left for later."""
    if name == "label" or (name == "image" and isinstance(kind, Greys | Pictures)):
        return column, kind
    if name == "image":
        return pa.chunked_array([as_pictures(chunk) for chunk in column.chunks]), Pictures()
    if isinstance(kind, Classes):
        return pa.chunked_array([pa.array(kind.names).take(chunk) for chunk in column.chunks], pa.string()), None
    return column.cast(pa.string()), None
