"""Linear merge: a weighted sum of the models; by default their weighted mean.

What: sum_i w_i x_i / sum_i w_i, or without the division when ``normalise`` is off.
Memory: one chunk of one tensor.
Use when: models come from one base and stay close to it. This is the baseline for other merges.
Avoid when: models have different starts, or many point in different directions. Averaging shrinks what only one model
learned.
Source: Wortsman et al., model soups (arXiv 2203.05482), uniform soup; the user chooses the weights.
"""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from fedtune.merging.combine._weights import Normalise, normalise_weights
from fedtune.merging.combine.linear_combinations._gram_step import GramCombineStep

__all__ = ["Linear"]


class Linear(GramCombineStep):
    """The weighted sum of the deltas."""

    name: ClassVar[str] = "linear"
    averages: ClassVar[bool] = True
    normalise: Normalise = True

    def compute_coefficients(self, weights: Tensor, gram: Callable[[], Tensor]) -> Tensor:
        """w_i, or w_i / sum w."""
        return normalise_weights(weights) if self.normalise else weights
