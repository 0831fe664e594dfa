"""Linear merge: a weighted sum of the models, as a mean unless told otherwise.

What: sum_i w_i x_i / sum_i w_i, or without the division when ``normalise`` is off.
Memory: one piece of one tensor.
Use when: models come from one base and stay near it; the plain average to beat.
Avoid when: models start apart or many pull in different directions: averaging shrinks what only one of them learned.
Source: Wortsman et al., model soups (arXiv 2203.05482), uniform soup; the weights are the user's.
"""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from fedtune.merging._span import GramCombineStep, Normalise, normalise_weights

__all__ = ["Linear"]


class Linear(GramCombineStep):
    """The weighted sum."""

    name: ClassVar[str] = "linear"
    averages: ClassVar[bool] = True
    normalise: Normalise = True

    def compute_coefficients(self, weights: Tensor, gram: Callable[[], Tensor]) -> Tensor:
        """w_i, or w_i / sum w."""
        return normalise_weights(weights) if self.normalise else weights
