"""Where examples come from: every source ends as ``datasets`` tables named train, validation and test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Value,
    are_progress_bars_disabled,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.table import InMemoryTable
from datasets.utils import disable_progress_bars, enable_progress_bars, logging
from huggingface_hub.utils import logging as hub_logging

from fedtune.data import images, sentiment
from fedtune.data.columns import table_of
from fedtune.data.image_folder import described, image_folder
from fedtune.data.listing import PARTS, files_in, parts_of
from fedtune.data.split_column import by_column
from fedtune.data.text_files import text_files, with_places
from fedtune.errors import DataError, SourceError
from fedtune.examples import Data
from fedtune.explain import nearest
from fedtune.home import cache

__all__ = ["Found", "read"]


@dataclass(frozen=True)
class Found:
    """What a source holds: its parts, and sentences on what was taken for granted."""

    parts: dict[str, Dataset]
    notes: tuple[str, ...] = ()


def read(data: Data) -> Found:
    """The parts a source has of its own, ``train`` at least, with its own columns.

    A hub id may be followed by a configuration: ``hub:ID:CONFIGURATION``; a sample by a domain: ``sample:NAME:DOMAIN``.
    Where there is but one part, a column may say which part a row is of.
    """
    kind, _, name = data.source.partition(":")
    if kind not in _KINDS or not name:
        kinds = "hub:ID, csv:FILE, jsonl:FILE, parquet:FILE, text:FILE, folder:PATH, disk:FOLDER or sample:NAME"
        raise SourceError(f"data.source is {data.source!r}; write {kinds}")
    found = _KINDS[kind](name, data)
    if found.parts.keys() == {"train"}:
        found = Found(by_column(found.parts["train"], data), found.notes)
    parts = {part: found.parts[part] for part in PARTS if part in found.parts}
    if "train" not in parts:
        told = ", ".join(map(str, found.parts))
        raise DataError(f"{data.source} has no part named train, only {told}; choose another source")
    if not len(parts["train"]):
        raise DataError(f"{data.source} holds no example; bring data")
    return Found(parts, found.notes)


def _hub(name: str, _data: Data) -> Found:
    identity, _, configuration = name.partition(":")
    try:
        with _quiet():
            return Found(_dict(load_dataset(identity, configuration or None)))
    except DatasetNotFoundError as error:
        raise SourceError(f"the hub has no data set {identity!r}, or it is gated; check the id or log in") from error
    except (DatasetGenerationError, OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"cannot load hub:{name}: {_first_line(error)}; check the id and the network") from error


def _there(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise DataError(f"there is no {path}; check data.source")
    return path


def _delimited(kind: str) -> Callable[[str, Data], Found]:
    def read_text(name: str, data: Data) -> Found:
        return Found(*text_files(kind, _there(name), data))

    return read_text


def _local(builder: str, *endings: str) -> Callable[[str, Data], Found]:
    """Files that ``datasets`` reads; those of a folder by the parts they are named after."""

    def read_path(name: str, data: Data) -> Found:
        path = _there(name)
        files = files_in(path, endings)
        if not files:
            raise DataError(f"{path} holds no file that ends in {' or '.join(endings)}; bring data")
        parts = parts_of(files, path, named=data.columns.split is not False)
        found = _loaded(path, builder, data_files={part: list(map(str, of)) for part, of in parts.items()})
        return Found({part: _placed(dataset, data, path) for part, dataset in found.parts.items()})

    return read_path


def _placed(dataset: Dataset, data: Data, path: Path) -> Dataset:
    column, folder = data.columns.image, path if path.is_dir() else path.parent
    if dataset.features.get(column) != Value("string"):
        return dataset
    return Dataset(InMemoryTable(with_places(table_of(dataset), column, folder)))


def _loaded(path: Path, builder: str, **where: object) -> Found:
    try:
        with _quiet():
            return Found(_dict(load_dataset(builder, cache_dir=str(cache() / "datasets"), **where)))
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise DataError(_unreadable(path, builder, _first_line(error.__cause__ or error))) from error


def _folder(name: str, data: Data) -> Found:
    path = _there(name)
    if not path.is_dir():
        raise DataError(f"{path} is no folder; name the folder that holds a folder of pictures for each class")
    if described(path):
        return _loaded(path, "imagefolder", data_dir=str(path))
    return Found(image_folder(path, parts=data.columns.split is not False))


def _disk(name: str, _data: Data) -> Found:
    """What ``save_to_disk`` of ``datasets`` wrote: one data set, or several by part."""
    path = _there(name)
    try:
        with _quiet():
            found = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is no data set that save_to_disk wrote: {_first_line(error)}; check it") from error
    return Found(_dict(found) if isinstance(found, DatasetDict) else {"train": found})


def _unreadable(path: Path, builder: str, reason: str) -> str:
    if "corresponds to no data" in reason or "No columns to parse" in reason:
        return f"{path} holds no example; bring data"
    return f"{path} cannot be read as {builder}: {reason}; mend the file"


def _sample(name: str, _data: Data) -> Found:
    sample, _, domain = name.partition(":")
    if sample not in _SAMPLES:
        raise SourceError(f"there is no sample data {sample!r}; {nearest(sample, list(_SAMPLES))}")
    found = _SAMPLES[sample]()
    return Found({part: _of_domain(sample, dataset, domain) for part, dataset in found.items()} if domain else found)


def _of_domain(sample: str, dataset: Dataset, domain: str) -> Dataset:
    known = dataset.unique("domain") if "domain" in dataset.column_names else []
    if domain not in known:
        told = nearest(domain, known) if known else "leave it out"
        raise SourceError(f"sample:{sample} has no domain {domain!r}; {told}")
    return dataset.select(np.flatnonzero(np.asarray(dataset["domain"][:]) == domain))


def _dict(loaded: DatasetDict) -> dict[str, Dataset]:
    return {str(part): dataset for part, dataset in loaded.items()}


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n")[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and retry notes; errors still come through."""
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


_SAMPLES: dict[str, Callable[[], dict[str, Dataset]]] = {
    "digits": images.digits,
    "fashion-mnist": images.fashion_mnist,
    "films": sentiment.films,
    "mnist-5k": images.mnist_5k,
    "sentiment": sentiment.sentiment,
}
_KINDS: dict[str, Callable[[str, Data], Found]] = {
    "csv": _delimited("csv"),
    "disk": _disk,
    "folder": _folder,
    "hub": _hub,
    "jsonl": _local("json", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".ndjson"),
    "parquet": _local("parquet", ".parquet"),
    "sample": _sample,
    "text": _delimited("text"),
}
