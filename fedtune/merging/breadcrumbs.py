"""Model breadcrumbs: task vectors without their outliers and without their noise, added up.

What: per tensor, drop the floor(gamma * n) largest |x|, keep the next floor(density * n), at least one, with
  ``rescale`` stretched until sum |x| is what it was; then the scaled weighted sum.
Memory: one piece per model and 4 MB; each delta is read three to five times, with ``rescale`` twice more, those of a
  tensor that fits 16 MB once.
Use when: many task vectors are to be added with one setting found on a few.
Avoid when: what matters is in few large entries, as after sparse or low-rank training: those are dropped first.
Adapters: refused where clients send one factor of a product (lora alternating or with A frozen): entries of a factor
  win or lose as the product is cut into factors, so that equal products merge into different ones.
Source: Davari, Belilovsky (arXiv 2312.06795); the defaults are milder than the paper's. Where density and gamma do not
  fit together, fewer of the largest are dropped. Where `fedtune merge` is told no density it drops nothing.
"""

from typing import ClassVar

from fedtune.merging._breadcrumbs import BreadcrumbsCombineStep

__all__ = ["PlainBreadcrumbs"]


class PlainBreadcrumbs(BreadcrumbsCombineStep):
    """Cut both ends, add."""

    name: ClassVar[str] = "breadcrumbs"
    elects_sign: ClassVar[bool] = False
