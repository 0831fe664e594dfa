"""How each kind of label column is encoded as numbers, with new class names or with those of a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedtune.data.column import Values, objects
from fedtune.data.label_numbers import encode_known_numbers, encode_numbers
from fedtune.data.label_sets import encode_known_label_sets, encode_label_sets
from fedtune.data.labels import encode_known_labels, encode_labels
from fedtune.data.table import Table
from fedtune.data.word_tags import encode_known_tags, encode_tags

__all__ = ["LABEL_ENCODERS", "LabelEncoder", "add_blank_labels", "find_label_column", "iter_class_numbers"]


class LabelEncoder(NamedTuple):
    """The two functions that encode a label column.

    ``encode_new(splits, source, known)`` returns the encoded splits and the class names. It keeps the order of
    ``known`` if the names are the same. ``encode_known(table, names, source)`` encodes a table with given class names.
    """

    encode_new: Callable[[Mapping[str, Table], str, Sequence[str]], tuple[dict[str, Table], tuple[str, ...]]]
    encode_known: Callable[[Table, Sequence[str], str], Table]


LABEL_ENCODERS: Mapping[str, LabelEncoder] = {
    "label": LabelEncoder(encode_labels, encode_known_labels),
    "labels": LabelEncoder(encode_label_sets, encode_known_label_sets),
    "number": LabelEncoder(encode_numbers, encode_known_numbers),
    "tags": LabelEncoder(encode_tags, encode_known_tags),
}
"""The encoder of each canonical label column. A task uses at most one of them."""


def find_label_column(columns: Sequence[str]) -> str | None:
    """Return the label column among a task's columns, or None."""
    return next((name for name in columns if name in LABEL_ENCODERS), None)


def add_blank_labels(table: Table, column: str) -> Table:
    """Add placeholder labels to examples whose labels are not used."""
    if column == "tags":
        blank = Values(objects([0] * len(words) for words in table["words"]))
    elif column == "labels":
        blank = Values(objects([] for _ in range(len(table))))
    else:
        blank = Values(np.zeros(len(table), np.int64))
    return table.with_column(column, blank)


def iter_class_numbers(table: Table, column: str) -> Iterator[int]:
    """Yield the class numbers of an encoded label column."""
    for value in table[column]:
        if isinstance(value, list):
            yield from value
        else:
            yield value
