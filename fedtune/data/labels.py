"""Class names and numbers: the same for every part of the data."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Value

from fedtune.data.columns import assemble
from fedtune.errors import DataError

__all__ = ["encode_labels", "label_by_name"]

MOST_REAL_VALUES = 20


def encode_labels(found: Mapping[str, Dataset], source: str) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """Labels as class numbers, and the class names in that order; DataError when they are no classes."""
    feature = found["train"].features["label"]
    if isinstance(feature, ClassLabel):
        values, names = list(range(len(feature.names))), tuple(feature.names)
    else:
        values = _values(found, source)
        names = tuple(str(value) for value in values)
    if len(names) < 2:
        raise DataError(f"{source} has only the class {names[0]!r}; classification needs two or more")
    return {part: _number(dataset, values, f"{source}, {part} part") for part, dataset in found.items()}, names


def _values(found: Mapping[str, Dataset], source: str) -> list[Any]:
    """All label values in order; whole real numbers are class numbers."""
    columns = [dataset.data.table["label"] for dataset in found.values()]
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


def _number(dataset: Dataset, values: list[Any], where: str) -> Dataset:
    column = dataset.data.table["label"]
    known = pa.array(values).cast(column.type)
    numbers = pc.index_in(column, value_set=known)
    if numbers.null_count:
        unknown = pc.unique(column.filter(numbers.is_null())).to_pylist()[0]
        raise DataError(
            f"{where}: the label {unknown!r} is none of the {len(values)} classes; are these examples labelled?"
        )
    columns = {name: dataset.data.table[name] for name in dataset.column_names} | {"label": numbers.cast(pa.int64())}
    return assemble(columns, dict(dataset.features) | {"label": Value("int64")})


def label_by_name(dataset: Dataset, labels: Sequence[str], source: str) -> Dataset:
    """Labels as numbers of the class names ``labels``; DataError names one that is none of them."""
    column, feature = dataset.data.table["label"], dataset.features["label"]
    _check_type(column.type, source)
    values = pc.unique(column).to_pylist()
    names = [_name(value, feature, labels) for value in values]
    unknown = [name for name in names if name not in labels]
    if unknown:
        strange = pa.array(
            [value for value, name in zip(values, names, strict=True) if name not in labels], column.type
        )
        rows = len(column) - pc.index_in(column, value_set=strange).null_count
        raise DataError(
            f"{source}: the model does not know the label {unknown[0]!r}; it knows {', '.join(labels)}",
            code="unknown-labels",
            counts={"rows": rows},
        )
    numbers = pa.array([labels.index(name) for name in names], pa.int64())
    placed = numbers.take(pc.index_in(column, value_set=pa.array(values, column.type)).combine_chunks())
    columns = {name: dataset.data.table[name] for name in dataset.column_names} | {"label": placed}
    return assemble(columns, dict(dataset.features) | {"label": Value("int64")})


def _name(value: Any, feature: Any, labels: Sequence[str]) -> str:
    """A label as a class name; a whole real number may stand for a class number."""
    if isinstance(feature, ClassLabel) and value >= 0:
        return str(feature.names[value])
    whole = isinstance(value, float) and value.is_integer() and str(value) not in labels
    return str(int(value) if whole else value)
