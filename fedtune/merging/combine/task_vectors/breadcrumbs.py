"""Model breadcrumbs: remove the outliers and the noise of each task vector, then add the rest.

What: in each tensor, drop the floor(gamma * n) largest |x| and keep the next floor(density * n), at least one. With
``rescale``, the kept entries are stretched until sum |x| is as before. The result is the scaled weighted sum.
Memory: one chunk per model and 4 MB. Each delta is read three to five times, with ``rescale`` twice more. If a tensor
of all models fits 16 MB, its deltas are read once.
Use when: you add many task vectors with one setting that was found on a few.
Avoid when: a few large entries matter most, as after sparse or low-rank training; they are dropped first.
Adapters: this step is refused when clients send one LoRA factor (alternating LoRA, or A frozen). It selects entries of
the factor by size, but one product can be written with different factors, so equal updates would give different
results.
Source: Davari, Belilovsky (arXiv 2312.06795). The defaults are milder than the paper's. If density and gamma do not fit
together, fewer of the largest entries are dropped. Without a density, `fedtune merge` drops nothing.
"""

from typing import ClassVar

from fedtune.merging.combine.task_vectors._breadcrumbs import BreadcrumbsCombineStep

__all__ = ["PlainBreadcrumbs"]


class PlainBreadcrumbs(BreadcrumbsCombineStep):
    """Removes the largest and the smallest entries, and adds the deltas."""

    name: ClassVar[str] = "breadcrumbs"
    elects_sign: ClassVar[bool] = False
