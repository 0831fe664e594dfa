"""Naive sequence: each task is trained on its own examples, and nothing keeps the memory of earlier ones.

What: plain fine-tuning, one task after another. It is the lower reference of continual learning: what a method gains is
counted from here. ``memory: []`` is the same.
"""

from typing import ClassVar

from fedtune.continual._method import ContinualMethod

__all__ = ["Naive"]


class Naive(ContinualMethod):
    """Do nothing."""

    name: ClassVar[str] = "naive"
