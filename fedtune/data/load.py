"""Loads the examples of a recipe with canonical columns in three splits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.data.examples import SourceCounts, read_examples
from fedtune.data.label_encoders import LABEL_ENCODERS, find_label_column, iter_class_numbers
from fedtune.data.splits import number_groups, split_dataset
from fedtune.data.table import Table, concatenate
from fedtune.errors import DataError
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed

__all__ = ["DataSplits", "limit_examples", "load_all_examples", "load_data", "load_trainable_examples"]

RESERVED_DOMAINS = frozenset({"all", "mean"})
"""Names of summaries over domains, which no domain may have."""
LONGEST_DOMAIN = 255
"""The longest name of a domain, in characters, that every database stores."""


@dataclass(frozen=True)
class DataSplits:
    """The three splits, their class names, and notes about the data.

    Tables have the columns ``text`` or ``image``, ``label`` (int, classification only) and, where configured, ``group``
    and ``domain``. A natural partition by another column keeps that column under its own name. ``label_names`` is empty
    for tasks without classes. ``notes`` are sentences about guessed encodings, skipped examples and absent classes.
    ``sources`` counts the examples of several sources, and of one with a filter or a map.
    """

    train: Table
    validation: Table
    test: Table
    label_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    sources: tuple[SourceCounts, ...] = ()


def load_data(recipe: Recipe, columns: Sequence[str], known: Sequence[str] = ()) -> DataSplits:
    """Read, check and split the data.

    ``columns`` are the columns of the task. ``known`` are the class names of the model's head; their order is kept if
    the data has the same names. Raises DataError when the examples do not fit the task, SourceError when the source
    cannot be read.
    """
    source = recipe.data.title
    read = read_examples(recipe, columns)
    found = read.parts
    labels: tuple[str, ...] = ()
    if (name := find_label_column(columns)) is not None:
        found, labels = LABEL_ENCODERS[name].encode_new(found, source, known)
    divided = split_dataset(recipe.data, found)
    for part, table in divided.items():
        _check(source, part, table)
    train = limit_examples(recipe, divided["train"])
    all_notes = (*read.notes, *(_absent(source, divided, name, labels) if name else ()))
    return DataSplits(train, divided["validation"], divided["test"], labels, all_notes, read.sources)


def load_all_examples(recipe: Recipe, columns: Sequence[str], labels: Sequence[str], part: str = "all") -> Table:
    """Return the examples of all splits or of one, with labels encoded by the class names ``labels``, if any."""
    found = _labelled(recipe, columns, labels)
    whole = concatenate(list(found.values())) if part == "all" else split_dataset(recipe.data, found)[part]
    _check(recipe.data.title, part, whole)
    return whole


def load_trainable_examples(recipe: Recipe, columns: Sequence[str], labels: Sequence[str]) -> Table:
    """Return the examples that may be used for training. The source's own validation and test splits are left out."""
    return _labelled(recipe, columns, labels)["train"]


def _labelled(recipe: Recipe, columns: Sequence[str], labels: Sequence[str]) -> dict[str, Table]:
    found = read_examples(recipe, columns).parts
    if (name := find_label_column(columns)) is None:
        return found
    encode = LABEL_ENCODERS[name].encode_known
    return {part: encode(table, labels, recipe.data.title) for part, table in found.items()}


def _check(source: str, part: str, table: Table) -> None:
    if not len(table):
        raise DataError(f"{source}: the {part} split is empty; change data.splits or bring more data")
    if "domain" in table.column_names:
        _check_domains(source, table.unique("domain"))


def _check_domains(source: str, domains: Sequence[str]) -> None:
    """Raise DataError for domain names that scores cannot be stored under."""
    if taken := RESERVED_DOMAINS.intersection(domains):
        raise DataError(f"{source}: a domain is called {min(taken)!r}, as summaries are; rename it")
    if len(longest := max(domains, key=len)) > LONGEST_DOMAIN:
        raise DataError(
            f"{source}: the name of domain {longest[:40]!r}... has {len(longest)} characters, and {LONGEST_DOMAIN} are "
            "kept; shorten it, or name another column"
        )


def _absent(source: str, divided: Mapping[str, Table], column: str, labels: tuple[str, ...]) -> Iterator[str]:
    """Yield a note for each split in which a class has no example."""
    for part in ("train", "test") if labels else ():
        counts = np.bincount(list(iter_class_numbers(divided[part], column)), minlength=len(labels))
        absent = [label for label, count in zip(labels, counts, strict=True) if not count]
        if absent:
            several = f" and of {len(absent) - 1} more classes" if len(absent) > 1 else ""
            means = "nothing is learned of it" if part == "train" else "its score tells nothing of it"
            yield f"{source}: the {part} split has no example of class {absent[0]!r}{several}; {means}"


def limit_examples(recipe: Recipe, train: Table) -> Table:
    """Select whole groups in random order, derived from the seed, up to ``data.max_train_examples``."""
    limit = recipe.data.max_train_examples
    if limit is None:
        return train
    group = number_groups(train)
    sizes = np.bincount(group)
    order = np.random.default_rng(derive_seed(recipe.seed, "limit")).permutation(len(sizes))
    kept = order[: np.searchsorted(np.cumsum(sizes[order]), limit, side="right")]
    if not len(kept):
        raise DataError(
            f"data.max_train_examples is {limit}, but a group of {recipe.data.title} has {sizes[order[0]]} examples"
        )
    return train.select(np.flatnonzero(np.isin(group, kept)))
