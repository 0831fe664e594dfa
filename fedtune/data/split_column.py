"""Splits a table by a column that names the split of each row."""

import numpy as np

from fedtune.data.listing import part_named
from fedtune.data.table import Table
from fedtune.errors import DataError
from fedtune.recipe.data_settings import DataSettings
from fedtune.recipe.validation_errors import suggest_nearest

__all__ = ["by_column"]

_USUAL = "split"


def by_column(table: Table, data: DataSettings) -> dict[str, Table]:
    """Split by ``columns.split``, or by a column called split. Without either, all rows are ``train``.

    The default column is ignored if none of its values names a split. Raises DataError when a configured column is
    missing, or when a value names no split.
    """
    chosen = data.columns.split
    if chosen is False or (chosen is None and _USUAL not in table.column_names):
        return {"train": table}
    column = chosen or _USUAL
    if column not in table.column_names:
        hint = suggest_nearest(column, table.column_names)
        raise DataError(f"{data.title} has no column {column!r}, which data.columns.split names; {hint}")
    words = table[column][:]
    part_of = {word: part_named(word) if isinstance(word, str) else None for word in set(words)}
    named = [word for word, part in part_of.items() if part is not None]
    if not named and chosen is None:
        return {"train": table}
    if len(named) < len(part_of):
        row = next(row for row, word in enumerate(words, 1) if part_of[word] is None)
        raise DataError(
            f"{data.title}: row {row} says neither train, validation nor test in column {column!r}, as others do; "
            "fix the row, or set data.columns.split: false to take all rows together"
        )
    found = np.array([part_of[word] for word in words])
    return {part: table.select(np.flatnonzero(found == part)) for part in ("train", *sorted({*found} - {"train"}))}
