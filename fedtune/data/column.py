"""The interface of a column of examples, and its NumPy implementation."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Column", "Rows", "Values", "as_picture", "concatenate_columns", "objects"]

Rows = NDArray[np.int64]
_TOGETHER = 1000
"""Values that are made at a time."""


class Column(ABC):
    """Values of one type, one per example. A missing value is None."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int) -> Any:
        """Return one value as a Python object."""

    @abstractmethod
    def take(self, rows: Rows) -> "Column":
        """Select rows in the given order."""

    @abstractmethod
    def values(self) -> list[Any]:
        """Return all values as Python objects."""

    def iter_values(self) -> Iterator[Any]:
        """All values as Python has them, a few at a time."""
        for start in range(0, len(self), _TOGETHER):
            yield from self.take(np.arange(start, min(start + _TOGETHER, len(self)))).values()

    def structures(self) -> list[Any]:
        """All values, with what is stored as JSON read."""
        return self.values()

    @abstractmethod
    def texts(self) -> "Column":
        """Return the values as strings; TypeError for nested values."""

    @abstractmethod
    def pictures(self) -> "Column":
        """Return image records with ``bytes`` and ``path``, made from paths, encoded bytes or both; else TypeError."""

    @property
    @abstractmethod
    def nested(self) -> str:
        """The type name of nested values such as lists or mappings; an empty string for scalar values."""

    def find_missing_row(self) -> int | None:
        """Return the index of the first row without a value, or None."""
        return next((row for row, value in enumerate(self.values()) if value is None), None)

    def join(self, others: Sequence["Column"]) -> "Column | None":
        """Put this column and others end to end without copying values, or return None if that cannot be done."""
        return None

    def unique(self) -> list[Any]:
        """Return the distinct values in order of appearance."""
        return list(dict.fromkeys(self.values()))


@final
class Values(Column):
    """An array [n] of numbers or objects, or of grey images [n, height, width]."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, row: int) -> Any:
        value = self.array[row]
        return value.tolist() if isinstance(value, np.generic | np.ndarray) else value

    def take(self, rows: Rows) -> "Values":
        """Select rows."""
        return Values(self.array[rows])

    def values(self) -> list[Any]:
        """Return all values as a list."""
        found: list[Any] = self.array.tolist()
        return found

    def find_missing_row(self) -> int | None:
        """Return the first row that is None. Arrays of numbers have no missing values."""
        return super().find_missing_row() if self.array.dtype == object else None

    def texts(self) -> "Values":
        """Convert each value with ``str``; TypeError for nested values."""
        if self.nested:
            raise TypeError(f"{self.nested} is not text")
        return Values(objects(value if isinstance(value, str) else str(value) for value in self.values()))

    def pictures(self) -> "Values":
        """Convert each value with ``as_picture``."""
        return Values(objects(as_picture(value) for value in self.values()))

    @property
    def nested(self) -> str:
        """The type name of nested values, taken from the first value that is not None."""
        if self.array.ndim > 1:
            return "array"
        first = next((value for value in self.array if value is not None), None)
        return type(first).__name__ if isinstance(first, Mapping | list | tuple) else ""


def objects(values: Iterable[Any]) -> NDArray[Any]:
    """Return an object array [n] of the values."""
    kept = list(values)
    array = np.empty(len(kept), object)
    for place, value in enumerate(kept):
        array[place] = value
    return array


def as_picture(value: Any) -> dict[str, Any]:
    """Return an image record from a path, encoded bytes or both; TypeError for anything else."""
    if isinstance(value, str | PurePath):
        return {"bytes": None, "path": str(value)}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, Mapping) and value.keys() & {"bytes", "path"}:
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    raise TypeError(f"{type(value).__name__} is not an image")


def concatenate_columns(columns: Sequence[Column]) -> Column:
    """Concatenate columns of the same type."""
    if len(columns) == 1:
        return columns[0]
    if (joined := columns[0].join(columns[1:])) is not None:
        return joined
    arrays = [column.array for column in columns if isinstance(column, Values)]
    if len(arrays) == len(columns) and len({array.dtype for array in arrays}) == 1:
        return Values(np.concatenate(arrays))
    return Values(objects(value for column in columns for value in column.values()))
