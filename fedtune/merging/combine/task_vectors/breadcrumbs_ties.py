"""Model breadcrumbs with TIES' sign election: trim both ends of each task vector, then add entries whose signs agree.

What: as breadcrumbs, but only entries with the sign of their weighted sum are added (averaged by weight with
``normalise``), times scale.
Memory: one chunk per model and 4 MB. Each delta is read three to five times, with ``rescale`` twice more. If a tensor
of all models fits 16 MB, its deltas are read once.
Use when: breadcrumbs fits, and signs conflict.
Avoid when: a few large entries matter most, as after sparse or low-rank training; they are dropped first.
Adapters: this step is refused when clients send one LoRA factor (alternating LoRA, or A frozen). It selects entries of
the factor by sign or size, but one product can be written with different factors, so equal updates would give different
results.
Source: Davari, Belilovsky (arXiv 2312.06795), with Yadav et al. (arXiv 2306.01708), algorithm 1.
"""

from typing import ClassVar

from fedtune.merging.combine.task_vectors._breadcrumbs import BreadcrumbsCombineStep

__all__ = ["BreadcrumbsTies"]


class BreadcrumbsTies(BreadcrumbsCombineStep):
    """Removes the largest and the smallest entries, elects signs and adds the deltas."""

    name: ClassVar[str] = "breadcrumbs-ties"
    elects_sign: ClassVar[bool] = True
