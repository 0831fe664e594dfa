"""Sums over the features of examples. They add up over clients and tasks, and analytic heads are fitted to them.

Features are rounded to multiples of ``FEATURE_STEP``. All products are then multiples of ``FEATURE_STEP`` squared, and
double precision adds them without an error as long as no sum reaches 2^25. So the sums have the same bits in any order
and for any split over clients and tasks. Larger sums are rounded as usual.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.errors import DataError

__all__ = [
    "FEATURE_STEP",
    "FeatureSums",
    "add_sums",
    "count_once",
    "list_uncounted",
    "make_empty_sums",
    "pack_triangle",
    "select_shared_rows",
    "sum_features",
    "unpack_triangle",
]

FEATURE_STEP = 2.0**-14


class FeatureSums(NamedTuple):
    """Examples per class [C], their features' sums [C, d], and the upper triangle of sum x x^T, row by row.

    All are double on the server; a client sends them in the precision of the recipe.
    """

    counts: Tensor
    totals: Tensor
    gram: Tensor

    @property
    def num_features(self) -> int:
        """The width of the features."""
        return self.totals.shape[1]


def make_empty_sums(num_classes: int, num_features: int) -> FeatureSums:
    """Return the sums of no examples."""
    counts = torch.zeros(num_classes, dtype=torch.float64)
    gram = torch.zeros(num_features * (num_features + 1) // 2, dtype=torch.float64)
    return FeatureSums(counts, counts.new_zeros(num_classes, num_features), gram)


def sum_features(batches: Iterable[tuple[Tensor, Tensor]], num_classes: int, num_features: int) -> FeatureSums:
    """Return the sums over batches of features [n, d] and labels [n]; DataError if a feature is not finite."""
    empty = make_empty_sums(num_classes, num_features)
    counts, totals, gram = empty.counts, empty.totals, empty.counts.new_zeros(num_features, num_features)
    for features, labels in batches:
        rows, classes = _round_to_step(features), labels.cpu().long()
        counts.index_add_(0, classes, counts.new_ones(len(classes)))
        totals.index_add_(0, classes, rows)
        gram.addmm_(rows.T, rows)
    return FeatureSums(counts, totals, pack_triangle(gram))


def _round_to_step(features: Tensor) -> Tensor:
    rows = features.detach().cpu().double()
    if not rows.isfinite().all():
        raise DataError(
            "the model's features of an example are not finite numbers, so they cannot be summed; train with a lower "
            "learning rate or check the data"
        )
    return torch.round(rows / FEATURE_STEP) * FEATURE_STEP


def add_sums(parts: Sequence[FeatureSums]) -> FeatureSums:
    """Return the sum of one or more, added in the given order in double precision."""
    total = FeatureSums(*(tensor.double().clone() for tensor in parts[0]))
    for part in parts[1:]:
        for tensor, added in zip(total, part, strict=True):
            tensor.add_(added.double())
    return total


def count_once(
    total: FeatureSums, counted: Tensor, task: int, uploads: Mapping[int, FeatureSums]
) -> tuple[FeatureSums, Tensor]:
    """Add the sums of a task's clients that were not counted yet, in client order, and note that they are counted.

    ``counted`` [tasks, clients] is 1 where a client's examples of a task are part of ``total``. A repeated round, a
    resumed run, a recurring task and a client that sends twice thus change nothing.
    """
    new = [client for client in list_uncounted(counted, task) if client in uploads]
    noted = counted.clone()
    noted[task, new] = 1
    return add_sums([total, *(uploads[client] for client in new)]), noted


def list_uncounted(counted: Tensor, task: int) -> list[int]:
    """Return the clients whose examples of a task were not added yet."""
    return [client for client, bit in enumerate(counted[task].tolist()) if not bit]


def select_shared_rows(labels: Tensor, fewest: int) -> Tensor:
    """Return the rows of the classes with at least ``fewest`` examples; the sums of fewer would show single ones."""
    return torch.nonzero(torch.bincount(labels)[labels] >= fewest)[:, 0] if len(labels) else labels.long()


def pack_triangle(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix [d, d], row by row [d (d + 1) / 2]."""
    return matrix[_mask_triangle(len(matrix))]


def unpack_triangle(packed: Tensor, num_features: int) -> Tensor:
    """Return the symmetric matrix [d, d] of a packed upper triangle."""
    matrix = packed.new_zeros(num_features, num_features)
    matrix[_mask_triangle(num_features)] = packed
    return matrix + matrix.triu(1).T


def _mask_triangle(num_features: int) -> Tensor:
    """Return which entries are packed: a byte per entry, where indices would take sixteen."""
    return torch.ones(num_features, num_features, dtype=torch.bool).triu()
