"""The batches of a client's round."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedtune.recipe.schema import Recipe

__all__ = ["batches", "total_steps"]

IntArray = NDArray[np.int64]


def batches(indices: IntArray, batch: int, steps: int, seed: int, lengths: Tensor | None = None) -> Iterator[list[int]]:
    """Yield ``steps`` batches, each epoch in a new random order. The last batch of an epoch may be smaller.

    With ``lengths`` [n], the examples of a batch have similar lengths.
    """
    random = np.random.default_rng(seed)
    left = steps
    while left:
        order = random.permutation(indices)
        if lengths is not None:
            order = _like_lengths_together(order, lengths.numpy(), batch, random)
        for start in range(0, len(order), batch)[:left]:
            yield order[start : start + batch].tolist()
            left -= 1


_WINDOW = 8
"""The number of batches whose examples are sorted together. A larger number saves padding but mixes less."""


def _like_lengths_together(order: IntArray, lengths: IntArray, batch: int, random: np.random.Generator) -> IntArray:
    """Sort within windows of several batches, then shuffle the batches of each window.

    A partial batch stays the last.
    """
    placed = []
    for start in range(0, len(order), _WINDOW * batch):
        window = order[start : start + _WINDOW * batch]
        window = window[np.argsort(lengths[window], kind="stable")]
        whole = len(window) // batch * batch
        placed += [random.permutation(window[:whole].reshape(-1, batch)).reshape(-1), window[whole:]]
    return np.concatenate(placed)


def total_steps(examples: int, recipe: Recipe) -> int:
    """Return the number of optimiser steps of one client in one round."""
    settings = recipe.train
    per_epoch = -(-examples // settings.batch_size)
    return settings.local_steps or per_epoch * (settings.local_epochs or 1)
