"""DARE, then a sum: most entries of each task vector dropped at random, the rest divided by what is kept.

What: scale * sum_i w_i m_i x_i / density, m_i drawn entry by entry with probability ``density``.
Memory: one piece per model.
Use when: task vectors are small and redundant and interfere: dropped entries leave room, and the mean stays unbiased.
Avoid when: deltas are large (long training or full of noise): dividing by a small density then breaks the model.
Adapters: where clients send one factor and the other is common, the mean over the draws is the sum of the products.
Source: Yu et al. (arXiv 2311.03099). Divides by density as published; mergekit rescales by the ratio of
  L1 norms, which is that in the mean.
"""

from typing import ClassVar

from fedtune.merging._dare import DareCombineStep

__all__ = ["DareLinear"]


class DareLinear(DareCombineStep):
    """Drop, rescale, add."""

    name: ClassVar[str] = "dare-linear"
    elects_sign: ClassVar[bool] = False
