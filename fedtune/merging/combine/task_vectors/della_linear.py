"""DELLA without sign election: drop entries of task vectors at random, small ones more often, then add the rest.

What: scale * sum_i w_i m_i x_i / p_i, where p rises from density - epsilon to density + epsilon with the rank of |x| in
its row.
Memory: one chunk per model. Rows are ranked one chunk at a time, a one-dimensional tensor as a whole.
Use when: DARE fits, and magnitudes say something about importance.
Avoid when: densities are low. Then p of the smallest entries is near zero, and dividing by it makes single entries very
large.
Adapters: if clients send one factor and share the other, the expected value over the draws is the sum of the products.
Source: Deep, Bhardwaj, Poria (arXiv 2406.11617), without the sign election. Epsilon is half the range of p, as in
mergekit; in the paper it is the whole range. Each entry is divided by its own p as published; mergekit rescales all
entries by one ratio of L1 norms.
"""

from typing import ClassVar

from fedtune.merging.combine.task_vectors._della import DellaCombineStep

__all__ = ["DellaLinear"]


class DellaLinear(DellaCombineStep):
    """Drops entries by rank, rescales the rest and adds the deltas."""

    name: ClassVar[str] = "della-linear"
    elects_sign: ClassVar[bool] = False
