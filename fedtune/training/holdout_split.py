"""What a client never trains on, so that it can tell how good a model is for its own data."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["count_held_out", "split_holdout"]

Rows = NDArray[np.int64]


def count_held_out(examples: int, share: float) -> int:
    """How many of a client's examples it holds out: a share, rounded down."""
    return int(share * examples)


def split_holdout(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to train on and rows to score on: ``share`` (at most 0.5) of them, rounded down, drawn by ``seed``.

    Of fewer than 1 / share rows none is held out; one at least is always left to train on.
    """
    count = count_held_out(len(rows), share)
    if not count:
        return rows, rows[:0]
    order = np.random.default_rng(seed).permutation(rows)
    return np.sort(order[:-count]), np.sort(order[-count:])
