"""Data sources of other packages: entry points in the group ``fedtune.data_sources``, by the kind before the colon.

An entry point names a function that takes what follows the colon and returns the columns of each split, e.g.
``{"train": {"text": [...], "label": [...]}}``. A column is a list or an array; grey pictures are an array [n, h, w].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.data.column import Column, Values, objects
from fedtune.data.table import Greys, Table
from fedtune.errors import DataError, FedtuneError, SourceError
from fedtune.recipe.plug_ins import PlugIn, find_plug_in, find_plug_ins

__all__ = ["DATA_SOURCES", "find_source_plug_in", "list_source_plug_ins", "read_plug_in_source"]

DATA_SOURCES = "fedtune.data_sources"
_WHERE = "data.source"
_PICTURE_DIMENSIONS = 3


def list_source_plug_ins() -> list[str]:
    """Kinds of sources that other packages publish."""
    return sorted(find_plug_ins(DATA_SOURCES))


def find_source_plug_in(kind: str, built_in: str | None) -> PlugIn | None:
    """The plug-in that reads a kind of source; RecipeError if it is published twice."""
    return find_plug_in(DATA_SOURCES, kind, _WHERE, built_in)


def read_plug_in_source(plug_in: PlugIn, name: str) -> dict[str, Table]:
    """The splits that a plug-in reads; SourceError names the package if it fails or gives something else."""
    where = f"{_WHERE}: {plug_in.name} of the package {plug_in.package}"
    read = plug_in.load(_WHERE)
    try:
        found = read(name)
    except FedtuneError:
        raise
    except Exception as error:
        raise SourceError(f"{where} failed ({' '.join(f'{type(error).__name__}: {error}'.split())})") from error
    if not isinstance(found, Mapping) or not all(
        isinstance(columns, Mapping) and columns for columns in found.values()
    ):
        raise SourceError(f"{where} must return the columns of each split, e.g. {{'train': {{'text': [...]}}}}")
    return {str(split): _make_table(columns, f"{where}: {split}") for split, columns in found.items()}


def _make_table(columns: Mapping[str, Sequence[Any]], where: str) -> Table:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where} has columns of different lengths: {lengths}")
    kinds = {name: Greys() for name, values in columns.items() if np.ndim(values) == _PICTURE_DIMENSIONS}
    return Table({name: _make_column(values) for name, values in columns.items()}, kinds)


def _make_column(values: Sequence[Any]) -> Column:
    """Arrays of numbers as they are, anything else as Python's objects."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iufb":
        return Values(values)
    return Values(objects(list(values)))
