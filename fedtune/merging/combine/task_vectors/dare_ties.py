"""DARE, then TIES' sign election: drop entries of each task vector at random, then add those with the elected sign.

What: as dare-linear, but only entries with the sign of sum_i w_i m_i x_i / density are added (averaged by weight with
``normalise``), times scale.
Memory: one chunk per model.
Use when: the signs of many task vectors conflict, and the largest entries that TIES keeps are too few for a task.
Avoid when: there are two models, or the density is so low that most entries come from one model. Then there is nothing
to elect.
Adapters: this step is refused when clients send one LoRA factor (alternating LoRA, or A frozen). It selects entries of
the factor by sign, but one product can be written with different factors, so equal updates would give different
results.
Source: Yu et al. (arXiv 2311.03099), with Yadav et al. (arXiv 2306.01708), algorithm 1. Divides by the density as
published; mergekit rescales by the ratio of L1 norms.
"""

from typing import ClassVar

from fedtune.merging.combine.task_vectors._dare import DareCombineStep

__all__ = ["DareTies"]


class DareTies(DareCombineStep):
    """Drops entries at random, rescales the rest, elects signs and adds the deltas."""

    name: ClassVar[str] = "dare-ties"
    elects_sign: ClassVar[bool] = True
    selects_entries: ClassVar[bool] = True
