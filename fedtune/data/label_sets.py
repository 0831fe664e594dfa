"""Several classes per example: a list of class names, or a string of names separated by ``,``, ``;`` or ``|``."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.data.column import Values, objects
from fedtune.data.table import ClassLists, Table
from fedtune.data.unknown_names import require_known_names
from fedtune.errors import DataError

__all__ = ["encode_known_label_sets", "encode_label_sets"]

_SEPARATOR = re.compile(r"[,;|]")


def encode_label_sets(
    found: Mapping[str, Table], source: str, known: Sequence[str] = ()
) -> tuple[dict[str, Table], tuple[str, ...]]:
    """Encode the column ``labels`` as sorted class numbers per example. Return the splits and the class names in order.

    If the names are the same as ``known``, that order is kept. Raises DataError when no example has a class.
    """
    sets = {part: _read_sets(table, source) for part, table in found.items()}
    different = {name for rows in sets.values() for row in rows for name in row}
    names = sorted(different, key=int if all(name.isdecimal() for name in different) else None)
    if not names:
        raise DataError(f"{source} has no example with a label; name the column that has them in data.columns.label")
    order = tuple(known) if set(known) == set(names) else tuple(names)
    return {part: _with_numbers(table, sets[part], order) for part, table in found.items()}, order


def encode_known_label_sets(table: Table, labels: Sequence[str], source: str) -> Table:
    """Encode the column ``labels`` with the class names ``labels``; DataError for an unknown class name."""
    sets = _read_sets(table, source)
    require_known_names(sets, labels, source, "label")
    return _with_numbers(table, sets, labels)


def _with_numbers(table: Table, sets: Iterable[Sequence[str]], order: Sequence[str]) -> Table:
    numbers = {name: number for number, name in enumerate(order)}
    values = objects(sorted({numbers[name] for name in row}) for row in sets)
    return table.with_column("labels", Values(values), ClassLists(tuple(order)))


def _read_sets(table: Table, source: str) -> list[list[str]]:
    """Return the class names of each example. Numbers are replaced by the names that the data set declares."""
    sets = [_split(value, source) for value in table["labels"]]
    kind = table.kinds.get("labels")
    return [[kind.names[int(one)] for one in row] for row in sets] if isinstance(kind, ClassLists) else sets


def _split(value: Any, source: str) -> list[str]:
    """Return the class names of one example."""
    if isinstance(value, str):
        return [name.strip() for name in _SEPARATOR.split(value) if name.strip()]
    if not isinstance(value, list | tuple | np.ndarray):
        raise DataError(f"{source}: the label {value!r} is no list of classes; write several classes as a,b or a list")
    if any(isinstance(one, Mapping | list | tuple) or one is None for one in value):
        raise DataError(f"{source}: the labels {value!r} are no list of class names")
    return [str(one) for one in value]
