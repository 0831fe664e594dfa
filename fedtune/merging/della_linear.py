"""DELLA without its election: task vectors thinned at random, larger entries of a row more often kept, then added.

What: scale * sum_i w_i m_i x_i / p_i, with p from density - epsilon to density + epsilon by rank of |x| in its row.
Memory: one piece per model; rows are ranked one piece at a time, a tensor of one dimension whole.
Use when: DARE is, but magnitudes say something about what matters.
Avoid when: densities are low: p of the smallest entries comes near zero, and dividing by it makes single entries huge.
Adapters: where clients send one factor and the other is common, the mean over the draws is the sum of the products.
Source: Deep, Bhardwaj, Poria (arXiv 2406.11617), without its election. Epsilon is half the range of p, as
  in mergekit; the paper's is all of it. Each entry is divided by its own p as published; mergekit rescales all by one
  ratio of L1 norms.
"""

from typing import ClassVar

from fedtune.merging._della import DellaCombineStep

__all__ = ["DellaLinear"]


class DellaLinear(DellaCombineStep):
    """Drop by rank, rescale, add."""

    name: ClassVar[str] = "della-linear"
    elects_sign: ClassVar[bool] = False
