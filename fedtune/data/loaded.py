"""Sources read by the ``datasets`` library: the Hub, files of its builders, and folders of ``save_to_disk``."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Array2D,
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    List,
    are_progress_bars_disabled,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils import disable_progress_bars, enable_progress_bars, logging
from huggingface_hub.utils import logging as hub_logging

from fedtune.data.arrow import Arrow
from fedtune.data.column import Column, Values
from fedtune.data.prepared_splits import open_prepared_splits
from fedtune.data.table import Classes, ClassLists, Greys, Kind, Pictures, Table
from fedtune.errors import DataError, SourceError
from fedtune.paths import get_cache_folder

__all__ = ["as_table", "from_disk", "from_files", "from_hub"]


def from_hub(name: str) -> dict[str, Table]:
    """Load the splits of a data set on the Hub, named ``ID`` or ``ID:CONFIGURATION``."""
    identity, _, configuration = name.partition(":")
    try:
        with _quiet():
            return _tables(open_prepared_splits(load_dataset_builder(identity, configuration or None)))
    except DatasetNotFoundError as error:
        raise SourceError(f"the hub has no data set {identity!r}, or it is gated; check the id or log in") from error
    except (DatasetGenerationError, OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"cannot load hub:{name}: {_first_line(error)}; check the id and the network") from error


def from_files(path: Path, builder: str, **where: object) -> dict[str, Table]:
    """Load files with a builder of ``datasets``. Messages name ``path``."""
    try:
        with _quiet():
            cache = str(get_cache_folder() / "datasets")
            return _tables(open_prepared_splits(load_dataset_builder(builder, cache_dir=cache, **where)))
    except StopIteration as error:  # datasets, of an empty file of JSON lines
        raise DataError(f"{path} holds no example; bring data") from error
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise DataError(_unreadable(path, builder, _first_line(error.__cause__ or error))) from error


def from_disk(path: Path) -> dict[str, Table]:
    """Load what ``save_to_disk`` of ``datasets`` wrote: one data set, or one per split."""
    try:
        with _quiet():
            found = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is no data set that save_to_disk wrote: {_first_line(error)}; check it") from error
    return _tables(found) if isinstance(found, DatasetDict) else {"train": as_table(found)}


def as_table(dataset: Dataset) -> Table:
    """Return the columns of a data set and their kinds. Memory-mapped columns stay on disk."""
    stored: pa.Table = dataset.data.table if dataset._indices is None else dataset.with_format("arrow")[:]
    columns = {name: _plain(stored[name], dataset.features[name]) for name in stored.column_names}
    kinds = {name: _kind(feature) for name, feature in dataset.features.items()}
    return Table(columns, {name: kind for name, kind in kinds.items() if kind is not None})


def _kind(feature: Any) -> Kind | None:
    if isinstance(feature, Image):
        return Pictures()
    if isinstance(feature, Array2D):
        return Greys()
    if isinstance(feature, List) and isinstance(feature.feature, ClassLabel):
        return ClassLists(tuple(feature.feature.names))
    return Classes(tuple(feature.names)) if isinstance(feature, ClassLabel) else None


def _plain(column: pa.ChunkedArray, feature: Any) -> Column:
    """Return a column without the extension types that ``datasets`` adds to Arrow."""
    if not isinstance(feature, Array2D):
        return Arrow(column)
    flat = column.combine_chunks().storage.flatten().flatten().to_numpy()
    return Values(flat.reshape(len(column), *feature.shape).copy())


def _tables(loaded: Mapping[Any, Dataset]) -> dict[str, Table]:
    return {str(part): as_table(dataset) for part, dataset in loaded.items()}


def _unreadable(path: Path, builder: str, reason: str) -> str:
    if "corresponds to no data" in reason or "No columns to parse" in reason:
        return f"{path} holds no example; bring data"
    return f"{path} cannot be read as {builder}: {reason}; fix the file"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n")[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and retry messages. Errors are still raised."""
    disabled, verbosity, hub_verbosity = (
        are_progress_bars_disabled(),
        logging.get_verbosity(),
        hub_logging.get_verbosity(),
    )
    disable_progress_bars()
    logging.set_verbosity(CRITICAL)
    hub_logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if not disabled:
            enable_progress_bars()
