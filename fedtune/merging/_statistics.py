"""Batch-norm statistics of several clients: the variance of all their examples holds the spread of their means too."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["compute_variance_of_means"]


def compute_variance_of_means(weights: Sequence[float], means: Sequence[Tensor]) -> Tensor:
    """sum_i w_i (m_i - m)^2 with m = sum_i w_i m_i: what pooling adds to the mean of the variances [c], fp32.

    The law of total variance; ``means`` may be deltas to a common one, which the differences do not see.
    """
    stacked = torch.stack(list(means)).double()
    weight = torch.tensor(weights, dtype=torch.float64)[:, None]
    return (weight * (stacked - (weight * stacked).sum(0)) ** 2).sum(0).float()
