"""A column of examples: what the rest of this room asks of it, and the plain one, kept by numpy."""

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
    """Values of one kind, one per example; None where there is none."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int) -> Any:
        """One value as Python has it."""

    @abstractmethod
    def take(self, rows: Rows) -> "Column":
        """Some rows, in their order."""

    @abstractmethod
    def values(self) -> list[Any]:
        """All values as Python has them."""

    def iter_values(self) -> Iterator[Any]:
        """All values as Python has them, a few at a time."""
        for start in range(0, len(self), _TOGETHER):
            yield from self.take(np.arange(start, min(start + _TOGETHER, len(self)))).values()

    @abstractmethod
    def texts(self) -> "Column":
        """The same as text; TypeError for values that are made of several."""

    @abstractmethod
    def pictures(self) -> "Column":
        """Paths, encoded bytes or both as pictures: ``bytes`` and ``path``; TypeError for anything else."""

    @property
    @abstractmethod
    def nested(self) -> str:
        """What its values are where each is made of several; else nothing."""

    def find_missing_row(self) -> int | None:
        """The first row without a value."""
        return next((row for row, value in enumerate(self.values()) if value is None), None)

    def unique(self) -> list[Any]:
        """The different values, as they come."""
        return list(dict.fromkeys(self.values()))


@final
class Values(Column):
    """An array [n] of numbers or of any values, or grey pictures [n, height, width]."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, row: int) -> Any:
        value = self.array[row]
        return value.tolist() if isinstance(value, np.generic | np.ndarray) else value

    def take(self, rows: Rows) -> "Values":
        """Some rows."""
        return Values(self.array[rows])

    def values(self) -> list[Any]:
        """All of them."""
        found: list[Any] = self.array.tolist()
        return found

    def find_missing_row(self) -> int | None:
        """Numbers are never missing."""
        return super().find_missing_row() if self.array.dtype == object else None

    def texts(self) -> "Values":
        """As Python writes them."""
        if self.nested:
            raise TypeError(f"{self.nested} is no text")
        return Values(objects(value if isinstance(value, str) else str(value) for value in self.values()))

    def pictures(self) -> "Values":
        """Each value for itself."""
        return Values(objects(as_picture(value) for value in self.values()))

    @property
    def nested(self) -> str:
        """By the first value that is there."""
        if self.array.ndim > 1:
            return "array"
        first = next((value for value in self.array if value is not None), None)
        return type(first).__name__ if isinstance(first, Mapping | list | tuple) else ""


def objects(values: Iterable[Any]) -> NDArray[Any]:
    """An array of whatever the values are."""
    kept = list(values)
    array = np.empty(len(kept), object)
    for place, value in enumerate(kept):
        array[place] = value
    return array


def as_picture(value: Any) -> dict[str, Any]:
    """A path, encoded bytes or both as a picture; TypeError for anything else."""
    if isinstance(value, str | PurePath):
        return {"bytes": None, "path": str(value)}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, Mapping) and value.keys() & {"bytes", "path"}:
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    raise TypeError(f"{type(value).__name__} is no picture")


def concatenate_columns(columns: Sequence[Column]) -> Column:
    """Columns of the same kind, one after another."""
    if len(columns) == 1:
        return columns[0]
    arrays = [column.array for column in columns if isinstance(column, Values)]
    if len(arrays) == len(columns) and len({array.dtype for array in arrays}) == 1:
        return Values(np.concatenate(arrays))
    return Values(objects(value for column in columns for value in column.values()))
