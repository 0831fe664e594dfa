"""Batch-norm statistics of several clients: the variance of all examples includes the spread between their means."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["compute_variance_of_means"]


def compute_variance_of_means(weights: Sequence[float], means: Sequence[Tensor]) -> Tensor:
    """sum_i w_i (m_i - m)^2 with m = sum_i w_i m_i, to be added to the mean of the variances [c], fp32.

    This is the law of total variance. ``means`` may be deltas to a common value, which cancels in the differences.
    """
    stacked = torch.stack(list(means)).double()
    weight = torch.tensor(weights, dtype=torch.float64)[:, None]
    return (weight * (stacked - (weight * stacked).sum(0)) ** 2).sum(0).float()
