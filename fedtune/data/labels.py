"""Class names and numbers: the same for every part of the data."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fedtune.data.table import Classes, Kind, Table
from fedtune.errors import DataError

__all__ = ["encode_labels", "label_by_name"]

MOST_REAL_VALUES = 20


def encode_labels(found: Mapping[str, Table], source: str) -> tuple[dict[str, Table], tuple[str, ...]]:
    """Labels as class numbers, and the class names in that order; DataError when they are no classes."""
    kind = found["train"].kinds.get("label")
    if isinstance(kind, Classes):
        values, names = list(range(len(kind.names))), kind.names
    else:
        values = _values(found, source)
        names = tuple(str(value) for value in values)
        _check_single(names, source)
    if len(names) < 2:
        raise DataError(f"{source} has only the class {names[0]!r}; classification needs two or more")
    return {part: _number(table, values, f"{source}, {part} part") for part, table in found.items()}, names


def _values(found: Mapping[str, Table], source: str) -> list[Any]:
    """All label values in order; whole real numbers are class numbers."""
    columns = [table.column("label") for table in found.values()]
    kind = columns[0].type
    _check_type(kind, source)
    values = sorted({value for column in columns for value in pc.unique(column).to_pylist()})
    if not pa.types.is_floating(kind):
        return values
    if all(value.is_integer() for value in values):
        return [int(value) for value in values]
    if len(values) > MOST_REAL_VALUES:
        raise DataError(f"{source} has {len(values)} different real numbers as labels; cut them into classes first")
    return values


def _check_type(kind: Any, source: str) -> None:
    if pa.types.is_nested(kind):
        raise DataError(f"{source} has labels of type {kind}; one class name or number per example is needed")


def _check_single(names: Sequence[str], source: str) -> None:
    """Refuse labels that are lists of classes: made of other labels, or the same list in another order."""
    known, lists = set(names), set()
    for name in names:
        parts = [part.strip() for part in re.split(r"[,;|]", name)]
        kind = tuple(sorted(parts))
        if len(parts) > 1 and (all(part in known for part in parts) or kind in lists):
            raise DataError(
                f"{source}: labels such as {name!r} name several classes at once, but an example has one here; keep "
                "one per row, or rename the class if it is one"
            )
        lists.add(kind)


def _number(table: Table, values: list[Any], where: str) -> Table:
    column = table.column("label")
    known = pa.array(values).cast(column.type)
    numbers = pc.index_in(column, value_set=known)
    if numbers.null_count:
        unknown = pc.unique(column.filter(numbers.is_null())).to_pylist()[0]
        raise DataError(
            f"{where}: the label {unknown!r} is none of the {len(values)} classes; are these examples labelled?"
        )
    return table.with_column("label", numbers.cast(pa.int64()))


def label_by_name(table: Table, labels: Sequence[str], source: str) -> Table:
    """Labels as numbers of the class names ``labels``; DataError names one that is none of them."""
    column, kind = table.column("label"), table.kinds.get("label")
    _check_type(column.type, source)
    values = pc.unique(column).to_pylist()
    names = [_name(value, kind, labels) for value in values]
    unknown = [name for name in names if name not in labels]
    if unknown:
        raise DataError(f"{source}: the model does not know the label {unknown[0]!r}; it knows {', '.join(labels)}")
    numbers = pa.array([labels.index(name) for name in names], pa.int64())
    placed = numbers.take(pc.index_in(column, value_set=pa.array(values, column.type)).combine_chunks())
    return table.with_column("label", placed)


def _name(value: Any, kind: Kind | None, labels: Sequence[str]) -> str:
    """A label as a class name; a whole real number may stand for a class number."""
    if isinstance(kind, Classes) and value >= 0:
        return kind.names[int(value)]
    whole = isinstance(value, float) and value.is_integer() and str(value) not in labels
    return str(int(value) if whole else value)
