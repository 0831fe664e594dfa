"""Renames the columns of a source to the canonical names.

``text``, ``text_pair``, ``target``, ``prompt``, ``chosen`` and ``rejected`` are strings, ``image`` is an image,
``audio`` is a wav file, and ``words`` is a list of words. ``label`` is one class, ``labels`` are several classes,
``number`` is a real number, and ``tags`` has one class per word. ``messages`` is a conversation, read from the columns
that hold it, and ``tools`` are the tools that it may call. Rows of the same ``group`` stay together. Results are
reported per ``domain``.
"""

from collections.abc import Sequence

from fedtune.data.column import Column, Values, objects
from fedtune.data.conversation_forms import find_conversation_form, resolve_text_column
from fedtune.data.conversations import read_conversations
from fedtune.data.table import Classes, Greys, Kind, Pictures, Recordings, Table
from fedtune.errors import DataError
from fedtune.recipe.schema import Natural, Recipe
from fedtune.recipe.validation_errors import suggest_nearest

__all__ = ["get_canonical_column_name", "rename_columns"]

_KEYS = {"labels": "label", "number": "label"}
"""The recipe setting of a canonical column, where its name differs."""
_AS_THEY_ARE = frozenset({"label", "labels", "number", "words", "tags"})
"""Columns that are checked and converted later, once all splits are known."""
_FILES: dict[str, Kind] = {"audio": Recordings(), "image": Pictures()}
"""Columns of encoded files, or of paths to them."""
Named = dict[str, tuple[str, str]]


def rename_columns(recipe: Recipe, needed: Sequence[str], table: Table) -> Table:
    """Return the columns that the task needs and those that the recipe names, under their canonical names.

    Raises DataError when a column is missing or has a null.
    """
    form = find_conversation_form(recipe, needed, table.column_names)
    columns = {} if form is None else read_conversations(table, form, recipe.data.columns, recipe.data.title)
    named = _named(recipe, resolve_text_column(needed) if form is None else (), table.column_names)
    return _convert_columns(recipe, named, table, columns)


def _convert_columns(recipe: Recipe, named: "Named", table: Table, columns: dict[str, Column]) -> Table:
    """``columns`` and those that are named, as canonical ones."""
    kinds: dict[str, Kind] = {}
    for name, (key, column) in named.items():
        stored = _column(recipe.data.title, table, key, column)
        try:
            columns[name], kind = _convert(name, stored, table.kinds.get(column))
        except TypeError as error:
            wanted = {"image": "images", "audio": "recordings"}.get(name, "text")
            problem = f"column {column!r} holds no {wanted}; name another in {key}"
            raise DataError(f"{recipe.data.title}: {problem}") from error
        if kind is not None:
            kinds[name] = kind
    return Table(columns, kinds, origin=table.digest_rows())


def get_canonical_column_name(recipe: Recipe, by: str) -> str:
    """Return the canonical name of the source's column ``by``."""
    columns = recipe.data.columns
    return {columns.label: "label", columns.domain: "domain", columns.group: "group"}.get(by, by)


def _named(recipe: Recipe, needed: Sequence[str], present: list[str]) -> Named:
    """Map each canonical name to (the recipe's key, the source's column)."""
    columns, split = recipe.data.columns, recipe.data.partition
    keys = {name: _KEYS.get(name, name) for name in needed}
    named: Named = {name: (f"data.columns.{key}", getattr(columns, key)) for name, key in keys.items()}
    group = columns.group or ("group" if recipe.data.title.startswith("sample:") and "group" in present else None)
    if group:
        named["group"] = ("data.columns.group", group)
    if columns.domain:
        named["domain"] = ("data.columns.domain", columns.domain)
    if recipe.stream is not None and recipe.stream.by not in (None, "label"):
        named.setdefault(get_canonical_column_name(recipe, recipe.stream.by), ("stream.by", recipe.stream.by))
    if isinstance(split, Natural):
        named.setdefault(get_canonical_column_name(recipe, split.column), ("data.partition.column", split.column))
    return named


def _column(source: str, table: Table, key: str, column: str) -> Column:
    if column not in table.column_names:
        hint = suggest_nearest(column, table.column_names)
        raise DataError(
            f"{source} has no column {column!r}, which {key} names; {hint}", code="data-columns", counts={"columns": 1}
        )
    stored = table.column(column)
    if (row := stored.find_missing_row()) is not None:
        raise DataError(
            f"{source}: row {row + 1} has no value in column {column!r}; fill it or drop the row", code="data-values"
        )
    return stored


def _convert(name: str, column: Column, kind: Kind | None) -> tuple[Column, Kind | None]:
    """Convert a column to its canonical type and return it with its kind. Labels are converted later."""
    if name in _AS_THEY_ARE or (name == "image" and isinstance(kind, Greys | Pictures)):
        return column, kind
    if name in _FILES:
        return column.pictures(), _FILES[name]
    if isinstance(kind, Classes):
        return Values(objects(kind.names[number] for number in column.values())), None
    return column.texts(), None
