"""Model breadcrumbs with TIES' election: both ends of each task vector cut, entries added where signs agree.

What: as breadcrumbs, but only entries with the sign of their weighted sum are added up (averaged by weight with
  ``normalise``), times scale.
Memory: one piece per model and 4 MB; each delta is read three to five times, with ``rescale`` twice more, those of a
  tensor that fits 16 MB once.
Use when: breadcrumbs is, and signs conflict.
Avoid when: what matters is in few large entries, as after sparse or low-rank training: those are dropped first.
Adapters: refused where clients send one factor of a product (lora alternating or with A frozen): entries of a factor
  win or lose as the product is cut into factors, so that equal products merge into different ones.
Source: Davari, Belilovsky (arXiv 2312.06795), with Yadav et al. (arXiv 2306.01708), algorithm 1.
"""

from typing import ClassVar

from fedtune.merging._breadcrumbs import BreadcrumbsCombineStep

__all__ = ["BreadcrumbsTies"]


class BreadcrumbsTies(BreadcrumbsCombineStep):
    """Cut both ends, elect, add."""

    name: ClassVar[str] = "breadcrumbs-ties"
    elects_sign: ClassVar[bool] = True
