"""A number per example, the label of regression."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.data.column import Values
from fedtune.data.table import Table
from fedtune.errors import DataError

__all__ = ["encode_known_numbers", "encode_numbers"]


def encode_numbers(
    found: Mapping[str, Table], source: str, known: Sequence[str] = ()
) -> tuple[dict[str, Table], tuple[str, ...]]:
    """Convert the column ``number`` to floats. The tuple of class names is empty."""
    return {part: encode_known_numbers(table, known, source) for part, table in found.items()}, ()


def encode_known_numbers(table: Table, _names: Sequence[str], source: str) -> Table:
    """Convert the column ``number`` to floats; DataError for a value that is not a finite number."""
    values = [_read_number(value, source, row) for row, value in enumerate(table["number"], 1)]
    return table.with_column("number", Values(np.array(values, np.float64)))


def _read_number(value: Any, source: str, row: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{source}: row {row} has {value!r} as a number to predict; write a finite number")
    return number
