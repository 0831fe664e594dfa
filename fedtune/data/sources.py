"""Where examples come from: every source ends as ``datasets`` tables named train, validation and test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, are_progress_bars_disabled, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils import disable_progress_bars, enable_progress_bars, logging
from huggingface_hub.utils import logging as hub_logging

from fedtune.data import images, sentiment
from fedtune.errors import DataError, SourceError
from fedtune.explain import nearest
from fedtune.home import cache

__all__ = ["read"]

PARTS = ("train", "validation", "test")


def read(source: str) -> dict[str, Dataset]:
    """The parts a source has of its own, ``train`` at least, with its own columns.

    A hub id may be followed by a configuration: ``hub:ID:CONFIGURATION``; a sample by a domain: ``sample:NAME:DOMAIN``.
    """
    kind, _, name = source.partition(":")
    if kind not in _KINDS or not name:
        kinds = "hub:ID, csv:FILE, jsonl:FILE, parquet:FILE, folder:PATH or sample:NAME"
        raise SourceError(f"data.source is {source!r}; write {kinds}")
    found = _KINDS[kind](name)
    parts = {part: found[part] for part in PARTS if part in found}
    if "train" not in parts:
        raise DataError(f"{source} has no part named train, only {', '.join(map(str, found))}; choose another source")
    if not len(parts["train"]):
        raise DataError(f"{source} holds no example; bring data")
    return parts


def _hub(name: str) -> dict[str, Dataset]:
    identity, _, configuration = name.partition(":")
    try:
        with _quiet():
            return _dict(load_dataset(identity, configuration or None))
    except DatasetNotFoundError as error:
        raise SourceError(f"the hub has no data set {identity!r}, or it is gated; check the id or log in") from error
    except (DatasetGenerationError, OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"cannot load hub:{name}: {_first_line(error)}; check the id and the network") from error


def _local(builder: str) -> Callable[[str], dict[str, Dataset]]:
    def read_path(name: str) -> dict[str, Dataset]:
        path = Path(name).expanduser()
        if not path.exists():
            raise DataError(f"there is no {path}; check data.source")
        where = {"data_dir": str(path)} if path.is_dir() else {"data_files": str(path)}
        try:
            with _quiet():
                return _dict(load_dataset(builder, cache_dir=str(cache() / "datasets"), **where))
        except (DatasetGenerationError, OSError, ValueError) as error:
            raise DataError(_unreadable(path, builder, _first_line(error.__cause__ or error))) from error

    return read_path


def _unreadable(path: Path, builder: str, reason: str) -> str:
    if "corresponds to no data" in reason or "No columns to parse" in reason:
        return f"{path} holds no example; bring data"
    return f"{path} cannot be read as {builder}: {reason}; mend the file"


def _sample(name: str) -> dict[str, Dataset]:
    sample, _, domain = name.partition(":")
    if sample not in _SAMPLES:
        raise SourceError(f"there is no sample data {sample!r}; {nearest(sample, list(_SAMPLES))}")
    found = _SAMPLES[sample]()
    return {part: _of_domain(sample, dataset, domain) for part, dataset in found.items()} if domain else found


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
_KINDS: dict[str, Callable[[str], dict[str, Dataset]]] = {
    "csv": _local("csv"),
    "folder": _local("imagefolder"),
    "hub": _hub,
    "jsonl": _local("json"),
    "parquet": _local("parquet"),
    "sample": _sample,
}
