"""DARE, then TIES' election: task vectors thinned at random, added where they have the elected sign.

What: as dare-linear, but only entries with the sign of sum_i w_i m_i x_i / density are added up (averaged by weight
  with ``normalise``), times scale.
Memory: one piece per model.
Use when: many task vectors interfere in sign, and those of TIES' largest entries are too few to hold a task.
Avoid when: there are two models, or density is so low that most entries come from one: there is nothing to elect.
Adapters: refused where clients send one factor of a product (lora alternating or with A frozen): entries of a factor
  win or lose as the product is cut into factors, so that equal products merge into different ones.
Source: Yu et al. (arXiv 2311.03099), with Yadav et al. (arXiv 2306.01708), algorithm 1.
  Divides by density as published; mergekit rescales by the ratio of L1 norms.
"""

from typing import ClassVar

from fedtune.merging._dare import DareCombineStep

__all__ = ["DareTies"]


class DareTies(DareCombineStep):
    """Drop, rescale, elect, add."""

    name: ClassVar[str] = "dare-ties"
    elects_sign: ClassVar[bool] = True
    selects_entries: ClassVar[bool] = True
