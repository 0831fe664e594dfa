"""DARE, then a sum: drop most entries of each task vector at random, and divide the rest by the density.

What: scale * sum_i w_i m_i x_i / density, where each entry of m_i is 1 with probability ``density``.
Memory: one chunk per model.
Use when: task vectors are small, redundant and interfere. Dropped entries reduce interference, and the expected value
stays the same.
Avoid when: deltas are large (long training or much noise). Dividing by a small density then ruins the model.
Adapters: if clients send one factor and share the other, the expected value over the draws is the sum of the products.
Source: Yu et al. (arXiv 2311.03099). Divides by the density as published; mergekit rescales by the ratio of L1 norms,
which equals this on average.
"""

from typing import ClassVar

from fedtune.merging.combine.task_vectors._dare import DareCombineStep

__all__ = ["DareLinear"]


class DareLinear(DareCombineStep):
    """Drops entries at random, rescales the rest and adds the deltas."""

    name: ClassVar[str] = "dare-linear"
    elects_sign: ClassVar[bool] = False
