"""The numbers in the table and the plot of a partition: what each client holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.data.load import DataSplits
from fedtune.data.splits import number_groups
from fedtune.data.table import Table
from fedtune.recipe.schema import Natural, Recipe

__all__ = ["ClientExamples", "PartitionSummary", "summarise_partition"]


@dataclass(frozen=True)
class ClientExamples:
    """The examples of one client; ``counts`` are per domain or label, in the order of ``PartitionSummary.values``."""

    client: int
    device: str
    examples: int
    groups: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class PartitionSummary:
    """A partition: the number of examples in each split, and the examples of each client.

    ``by`` is what is counted: domains for a natural partition of data with domains, otherwise labels if there are any.
    """

    name: str
    parts: dict[str, int]
    by: str
    values: tuple[str, ...]
    holdings: tuple[ClientExamples, ...]


def summarise_partition(recipe: Recipe, corpus: DataSplits, clients: Sequence[NDArray[np.int64]]) -> PartitionSummary:
    """Count examples, groups and domains or labels per client; ``clients`` are row numbers of the training split."""
    by, values, numbers = _values(corpus, prefers_domains=isinstance(recipe.data.partition, Natural))
    group = number_groups(corpus.train)
    holdings = tuple(
        ClientExamples(
            client=client,
            device=recipe.get_device_class(client).name,
            examples=len(rows),
            groups=len(np.unique(group[rows])),
            counts=tuple(np.bincount(numbers[rows], minlength=len(values)).tolist()),
        )
        for client, rows in enumerate(clients)
    )
    return PartitionSummary(recipe.name, _parts(corpus), by, values, holdings)


def _parts(corpus: DataSplits) -> dict[str, int]:
    return {"train": len(corpus.train), "validation": len(corpus.validation), "test": len(corpus.test)}


def _values(corpus: DataSplits, *, prefers_domains: bool) -> tuple[str, tuple[str, ...], NDArray[np.int64]]:
    """Return what is counted, its names, and the index of the name of each training row."""
    train: Table = corpus.train
    if "domain" in train.column_names and (prefers_domains or not corpus.label_names):
        names, numbers = np.unique(np.asarray(train["domain"][:]), return_inverse=True)
        return "domain", tuple(names.tolist()), numbers
    if corpus.label_names:
        return "label", corpus.label_names, np.asarray(train["label"][:])
    return "examples", ("examples",), np.zeros(len(train), np.int64)
