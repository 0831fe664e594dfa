"""How the models of a merge differ, as figures of their deltas and of the deltas' inner products alone."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fedtune.merging._sphere import cosines

__all__ = ["cosine_table", "opposed", "scale_that_keeps_length"]


def cosine_table(gram: Tensor) -> list[list[float]]:
    """Cosines between deltas from their inner products [K, K], double; those with a zero delta are zero."""
    table: list[list[float]] = cosines(gram[:, :, None])[:, :, 0].tolist()
    return table


def opposed(parts: Sequence[Tensor]) -> int:
    """The number of entries [n] at which two models move in opposite directions."""
    up, down = np.zeros(parts[0].shape, dtype=np.bool_), np.zeros(parts[0].shape, dtype=np.bool_)
    for part in parts:
        values = part.numpy()
        up |= values > 0
        down |= values < 0
    return int(np.count_nonzero(up & down))


def scale_that_keeps_length(gram: Tensor, weights: Tensor) -> float | None:
    """mean_i |x_i| / |sum_i w_i x_i| from inner products [K, K]; None where the sum vanishes.

    A rule of thumb, not from a paper: times it the weighted sum is as long as a delta is on average.
    """
    length = float(weights @ gram @ weights)
    return float(gram.diagonal().sqrt().mean()) / math.sqrt(length) if length > 0 else None
