"""Task arithmetic: the weighted sum of the task vectors, times one scale.

What: scale * sum_i w_i x_i, where x_i is model i minus the base. ``normalise`` divides w by its sum.
Memory: one chunk of one tensor.
Use when: you want to add several tasks to one base, or remove one with a negative weight.
Avoid when: the sum of the weights is much more than one and the abilities of the base matter. The sum then overshoots.
Source: Ilharco et al. (arXiv 2212.04089), section 2.
"""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from fedtune.merging.combine._weights import Normalise, Scale, normalise_weights
from fedtune.merging.combine.linear_combinations._gram_step import GramCombineStep

__all__ = ["TaskArithmetic"]


class TaskArithmetic(GramCombineStep):
    """The scaled sum of the task vectors."""

    name: ClassVar[str] = "task-arithmetic"
    scale: Scale = 1.0
    normalise: Normalise = False

    def compute_coefficients(self, weights: Tensor, gram: Callable[[], Tensor]) -> Tensor:
        """The scale times w_i, or times w_i / sum w."""
        return self.scale * (normalise_weights(weights) if self.normalise else weights)
