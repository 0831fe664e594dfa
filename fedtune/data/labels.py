"""Encodes class names as numbers that are the same in every split."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.data.column import Column, Values
from fedtune.data.table import Classes, Kind, Table
from fedtune.errors import DataError

__all__ = ["encode_known_labels", "encode_labels"]

MAX_FLOAT_CLASSES = 20


def encode_labels(
    found: Mapping[str, Table], source: str, known: Sequence[str] = ()
) -> tuple[dict[str, Table], tuple[str, ...]]:
    """Encode the column ``label`` as class numbers. Return the splits and the class names in order.

    If the names are the same as ``known``, ignoring case, the order of ``known`` is kept: it is the order of a trained
    head. Raises DataError when the labels are not classes.
    """
    kind = found["train"].kinds.get("label")
    if isinstance(kind, Classes):
        values, names = list(range(len(kind.names))), kind.names
    else:
        values = _values(found, source)
        names = tuple(str(value) for value in values)
        _check_single(names, source)
    if order := _order(names, known):
        values, names = [values[at] for at in order], tuple(names[at] for at in order)
    if len(names) < 2:
        raise DataError(f"{source} has only the class {names[0]!r}; classification needs two or more")
    return {part: _number(table, values, f"{source}, {part} split") for part, table in found.items()}, names


def _order(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return the index in ``names`` of each known name; an empty list unless both have the same names."""
    folded = [name.casefold().strip() for name in names]
    wanted = [name.casefold().strip() for name in known]
    same = len(set(folded)) == len(names) and sorted(folded) == sorted(wanted)
    return [folded.index(name) for name in wanted] if same else []


def _values(found: Mapping[str, Table], source: str) -> list[Any]:
    """Return all label values, sorted. Floats that are whole numbers become integers."""
    columns = [table.column("label") for table in found.values()]
    for column in columns:
        _check_type(column, source)
    values = sorted({value for column in columns for value in column.unique()})
    if not all(isinstance(value, float) for value in values):
        return values
    if all(value.is_integer() for value in values):
        return [int(value) for value in values]
    if len(values) > MAX_FLOAT_CLASSES:
        raise DataError(f"{source} has {len(values)} different real numbers as labels; cut them into classes first")
    return values


def _check_type(column: Column, source: str) -> None:
    if column.nested:
        raise DataError(f"{source} has labels of type {column.nested}; one class name or number per example is needed")


def _check_single(names: Sequence[str], source: str) -> None:
    """Raise DataError for labels that list several classes.

    Such a label consists of other labels, or permutes another list.
    """
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
    numbers = {value: number for number, value in enumerate(values)}
    found = table["label"]
    unknown = next((value for value in found if value not in numbers), None)
    if unknown is not None:
        raise DataError(
            f"{where}: the label {unknown!r} is none of the {len(values)} classes; are these examples labelled?"
        )
    return table.with_column("label", Values(np.array([numbers[value] for value in found], np.int64)))


def encode_known_labels(table: Table, labels: Sequence[str], source: str) -> Table:
    """Encode the column ``label`` with the class names ``labels``; DataError for an unknown class name."""
    column, kind = table.column("label"), table.kinds.get("label")
    _check_type(column, source)
    names = {value: _name(value, kind, labels) for value in column.unique()}
    unknown = [name for name in names.values() if name not in labels]
    if unknown:
        raise DataError(
            f"{source}: the model does not know the label {unknown[0]!r}; it knows {', '.join(labels)}",
            code="unknown-labels",
            counts={"rows": sum(names[value] not in labels for value in column.values())},
        )
    numbers = {value: labels.index(name) for value, name in names.items()}
    return table.with_column("label", Values(np.array([numbers[value] for value in column.values()], np.int64)))


def _name(value: Any, kind: Kind | None, labels: Sequence[str]) -> str:
    """Return the class name of a label. A float that is a whole number may stand for a class number."""
    if isinstance(kind, Classes) and value >= 0:
        return kind.names[int(value)]
    whole = isinstance(value, float) and value.is_integer() and str(value) not in labels
    return str(int(value) if whole else value)
