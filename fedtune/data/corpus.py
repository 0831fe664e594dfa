"""The examples of a recipe in canonical columns and three parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, concatenate_datasets

from fedtune.data.columns import canonical
from fedtune.data.labels import encode_labels, label_by_name
from fedtune.data.parts import divide, groups
from fedtune.data.sources import read
from fedtune.errors import DataError
from fedtune.recipe import Recipe
from fedtune.seeds import derive

__all__ = ["Corpus", "everything", "load"]

RESERVED = frozenset({"all", "mean"})
"""What scores over several domains are called."""


@dataclass(frozen=True)
class Corpus:
    """Columns: ``text`` or ``image``, ``label`` (int, classification only) and, where named, ``group`` and ``domain``.

    A natural split by a further column keeps that column under its own name. ``labels`` is empty for causal language
    modelling.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    labels: tuple[str, ...]


def load(recipe: Recipe, known: Sequence[str] = ()) -> Corpus:
    """Read, check and part the data; DataError when the examples do not fit the task, SourceError when unreadable.

    ``known`` are the class names of the model's head, whose order is kept where the data's are the same.
    """
    found = {part: canonical(recipe, dataset) for part, dataset in read(recipe.data.source).items()}
    labels: tuple[str, ...] = ()
    if recipe.task != "causal-language-modelling":
        found, labels = encode_labels(found, recipe.data.source, known)
    divided = divide(recipe.data, found)
    _check(recipe.data.source, divided, labels)
    train = divided["train"] if recipe.data.limit is None else _limited(recipe, divided["train"], recipe.data.limit)
    return Corpus(train, divided["validation"], divided["test"], labels)


def everything(recipe: Recipe, labels: Sequence[str], part: str = "all") -> Dataset:
    """Examples of the recipe's source, of all parts or of one, labelled for a model that knows ``labels``, if any."""
    source = recipe.data.source
    found = {name: canonical(recipe, dataset) for name, dataset in read(source).items()}
    if labels:
        found = {name: label_by_name(dataset, labels, source) for name, dataset in found.items()}
    return concatenate_datasets(list(found.values())) if part == "all" else divide(recipe.data, found)[part]


def _check(source: str, divided: Mapping[str, Dataset], labels: tuple[str, ...]) -> None:
    for part, dataset in divided.items():
        if not len(dataset):
            raise DataError(f"{source}: the {part} part is empty; change data.parts or bring more data")
        if "domain" in dataset.column_names and (taken := RESERVED.intersection(dataset.unique("domain"))):
            raise DataError(f"{source}: a domain is called {min(taken)!r}, as summaries are; rename it")
    if not labels:
        return
    counts = np.bincount(divided["test"]["label"][:], minlength=len(labels))
    if not counts.all():
        absent = labels[int(counts.argmin())]
        raise DataError(f"{source}: the test part has no example of class {absent!r}; raise data.parts.test or drop it")


def _limited(recipe: Recipe, train: Dataset, limit: int) -> Dataset:
    """Whole groups in an order drawn from the seed, as many as fit."""
    group = groups(train)
    sizes = np.bincount(group)
    order = np.random.default_rng(derive(recipe.seed, "limit")).permutation(len(sizes))
    kept = order[: np.searchsorted(np.cumsum(sizes[order]), limit, side="right")]
    if not len(kept):
        raise DataError(f"data.limit is {limit}, but a group of {recipe.data.source} has {sizes[order[0]]} examples")
    return train.select(np.flatnonzero(np.isin(group, kept)))
