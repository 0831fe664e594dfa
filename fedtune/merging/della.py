"""DELLA: task vectors thinned at random by magnitude, added where they have the elected sign.

What: x_i m_i / p_i, with p from density - epsilon to density + epsilon by rank of |x| in its row; entries with the sign
  of their weighted sum are averaged by weight (added up when ``normalise`` is off), times scale.
Memory: one piece per model; rows are ranked one piece at a time, a tensor of one dimension whole.
Use when: DARE with TIES is, but magnitudes say something about what matters.
Avoid when: densities are low: p of the smallest entries comes near zero, and dividing by it makes single entries huge.
Adapters: refused where clients send one factor of a product (lora alternating or with A frozen): entries of a factor
  win or lose as the product is cut into factors, so that equal products merge into different ones.
Source: Deep, Bhardwaj, Poria (arXiv 2406.11617). Epsilon is half the range of p, as in mergekit; the paper's
  is all of it. Each entry is divided by its own p as published; mergekit rescales all by one ratio of L1 norms.
  Where `fedtune merge` is told no density it drops nothing, as mergekit.
"""

from typing import ClassVar

from fedtune.merging._della import DellaCombineStep
from fedtune.merging._span import Normalise

__all__ = ["DellaTies"]


class DellaTies(DellaCombineStep):
    """Drop by rank, rescale, elect, add."""

    name: ClassVar[str] = "della"
    elects_sign: ClassVar[bool] = True
    selects_entries: ClassVar[bool] = True
    normalise: Normalise = True
