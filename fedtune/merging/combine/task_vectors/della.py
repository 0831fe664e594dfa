"""DELLA: drop entries of task vectors at random by magnitude, then add those with the elected sign.

What: x_i m_i / p_i, where p rises from density - epsilon to density + epsilon with the rank of |x| in its row. Entries
with the sign of their weighted sum are averaged by weight (added when ``normalise`` is off), times scale.
Memory: one chunk per model. Rows are ranked one chunk at a time, a one-dimensional tensor as a whole.
Use when: DARE with TIES fits, and magnitudes say something about importance.
Avoid when: densities are low. Then p of the smallest entries is near zero, and dividing by it makes single entries very
large.
Adapters: this step is refused when clients send one LoRA factor (alternating LoRA, or A frozen). It selects entries of
the factor by sign or size, but one product can be written with different factors, so equal updates would give different
results.
Source: Deep, Bhardwaj, Poria (arXiv 2406.11617). Epsilon is half the range of p, as in mergekit; in the paper it is the
whole range. Each entry is divided by its own p as published; mergekit rescales all entries by one ratio of L1 norms.
Without a density, `fedtune merge` drops nothing, as mergekit.
"""

from typing import ClassVar

from fedtune.merging.combine._weights import Normalise
from fedtune.merging.combine.task_vectors._della import DellaCombineStep

__all__ = ["DellaTies"]


class DellaTies(DellaCombineStep):
    """Drops entries by rank, rescales the rest, elects signs and adds the deltas."""

    name: ClassVar[str] = "della"
    elects_sign: ClassVar[bool] = True
    selects_entries: ClassVar[bool] = True
    normalise: Normalise = True
