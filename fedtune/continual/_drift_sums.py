"""Sums over the reference examples of a drift signal. They add up over clients and tasks.

The sums are n, S and diag G of the analytic heads: the examples and the feature sums of each class, and the sums of
squares over all classes. Sums of parts equal those of the whole, so no client sees the features of another.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

__all__ = ["FeatureMoments", "FeatureSums", "add_feature_sums", "compute_moments", "sum_features"]

VARIANCE_FLOOR = 0.01
"""Share of the mean variance that is added to each variance: a feature that never varied does not count infinitely."""


class FeatureSums(NamedTuple):
    """``counts`` [classes], ``sums`` [classes, width] and ``squares`` [width], in double precision."""

    counts: Tensor
    sums: Tensor
    squares: Tensor

    def to_float32(self) -> Self:
        """Return the sums as they are sent: four bytes a number."""
        return type(self)(*(one.float() for one in self))

    def count_bytes(self) -> int:
        """Return the bytes of the sums as they are sent."""
        return 4 * sum(one.numel() for one in self)


class FeatureMoments(NamedTuple):
    """``means`` [classes, width] of ``counts`` [classes] examples, and the floored ``variance`` [width].

    The variance is the one within classes, pooled over them.
    """

    means: Tensor
    counts: Tensor
    variance: Tensor


def sum_features(features: Tensor, labels: Tensor | None, num_classes: int) -> FeatureSums:
    """Return the sums of some examples. Without labels, all examples are of one class."""
    rows = features.to("cpu", torch.float64)
    classes = torch.zeros(len(rows), dtype=torch.int64) if labels is None else labels.to("cpu", torch.int64)
    width = 1 if labels is None else num_classes
    counts = torch.bincount(classes, minlength=width).double()
    sums = torch.zeros(width, rows.shape[1], dtype=torch.float64).index_add_(0, classes, rows)
    return FeatureSums(counts, sums, rows.square().sum(0))


def add_feature_sums(parts: Sequence[FeatureSums]) -> FeatureSums:
    """Return the sums of the union of parts, added in their order."""
    return FeatureSums(*(torch.stack([one.double() for one in column]).sum(0) for column in zip(*parts, strict=True)))


def compute_moments(sums: FeatureSums) -> FeatureMoments:
    """Return class means and the pooled within-class variance, sum_c sum_i (x_ij - mu_cj)^2 / (N - classes).

    Sums sent in single precision may leave a variance below zero by rounding. It counts as zero.
    """
    counts, totals, squares = (one.double() for one in sums)
    seen = counts > 0
    means = totals / counts.clamp(min=1)[:, None]
    within = (squares - (counts[:, None] * means.square()).sum(0)).clamp(min=0)
    variance = within / (counts.sum() - seen.sum()).clamp(min=1)
    return FeatureMoments(means, counts, variance + VARIANCE_FLOOR * variance.mean())
