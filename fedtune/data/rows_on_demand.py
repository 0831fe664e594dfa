"""A column whose values are made from the cells of other columns when they are read."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, final

import numpy as np

from fedtune.data.column import Column, Rows

__all__ = ["RowsOnDemand"]


@final
class RowsOnDemand(Column):
    """Values that ``make`` returns for the cells of a row, by column, and the row's place for messages.

    Nothing of it is kept, so that a table on the disk takes no memory. ``cells`` has at least one column.
    """

    def __init__(
        self, cells: Mapping[str, Column], make: Callable[[Mapping[str, Any], str], Any], source: str, rows: Rows
    ) -> None:
        self._cells, self._make, self._source, self._rows = cells, make, source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Any:
        return self.take(np.array([row])).values()[0]

    def take(self, rows: Rows) -> "RowsOnDemand":
        """Select rows."""
        return RowsOnDemand(self._cells, self._make, self._source, self._rows[rows])

    def values(self) -> list[Any]:
        """Make all values."""
        cells = zip(*(column.take(self._rows).structures() for column in self._cells.values()), strict=True)
        return [
            self._make(dict(zip(self._cells, row, strict=True)), f"{self._source}: row {number + 1}")
            for number, row in zip(self._rows.tolist(), cells, strict=True)
        ]

    def texts(self) -> NoReturn:
        """Raise TypeError."""
        raise TypeError(f"{self.nested} is not text")

    def pictures(self) -> NoReturn:
        """Raise TypeError."""
        raise TypeError(f"{self.nested} is not an image")

    @property
    def nested(self) -> str:
        """Return what messages call the values."""
        return "list"
