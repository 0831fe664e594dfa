"""Splits off the examples that a client never trains on, for evaluation on its own data."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["count_held_out", "split_holdout"]

Rows = NDArray[np.int64]


def count_held_out(examples: int, share: float) -> int:
    """Return the number of held-out examples of a client: a share, rounded down."""
    return int(share * examples)


def split_holdout(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Return rows to train on and held-out rows: ``share`` (at most 0.5) of them, rounded down, drawn with ``seed``.

    With fewer than 1 / share rows, none is held out. At least one is always left to train on.
    """
    count = count_held_out(len(rows), share)
    if not count:
        return rows, rows[:0]
    order = np.random.default_rng(seed).permutation(rows)
    return np.sort(order[:-count]), np.sort(order[-count:])
