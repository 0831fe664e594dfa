"""Comparisons of the models of a merge by their deltas, or by the inner products of the deltas."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fedtune.merging.combine.linear_combinations._sphere import compute_cosines

__all__ = ["compute_cosine_matrix", "compute_norm_preserving_scale", "count_opposing_signs"]


def compute_cosine_matrix(gram: Tensor) -> list[list[float]]:
    """Return cosines between deltas from their inner products [K, K], in fp64. Cosines with a zero delta are zero."""
    table: list[list[float]] = compute_cosines(gram[:, :, None])[:, :, 0].tolist()
    return table


def count_opposing_signs(parts: Sequence[Tensor]) -> int:
    """Return the number of entries at which two deltas [n] have opposite signs."""
    up, down = np.zeros(parts[0].shape, dtype=np.bool_), np.zeros(parts[0].shape, dtype=np.bool_)
    for part in parts:
        values = part.numpy()
        up |= values > 0
        down |= values < 0
    return int(np.count_nonzero(up & down))


def compute_norm_preserving_scale(gram: Tensor, weights: Tensor) -> float | None:
    """Return mean_i |x_i| / |sum_i w_i x_i| from inner products [K, K]; None if the sum is zero.

    A rule of thumb, not from a paper: with this scale the weighted sum has the average norm of a delta.
    """
    length = float(weights @ gram @ weights)
    return float(gram.diagonal().sqrt().mean()) / math.sqrt(length) if length > 0 else None
