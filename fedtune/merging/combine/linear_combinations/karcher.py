"""Karcher mean: the point on the sphere nearest to all directions, with the mean length.

What: u <- exp_u(sum_i w_i log_u(x_i/|x_i|)), repeated. The result is u times sum_i w_i |x_i|, with w divided by its
sum.
Memory: two passes, one chunk of each model. It iterates on coefficients, not on weights.
Use when: you want to blend more than two models as SLERP blends two. Without a base it works on the models themselves.
Avoid when: directions are opposite, because there is no nearest point. If their mean is zero, the step uses linear.
Source: Karcher (Comm. Pure Appl. Math. 30, 1977); iteration as in Afsari, Tron, Vidal (arXiv 1201.0925), unit steps. If
a base is only named as such, `fedtune merge` treats it as one of the models, as mergekit does, unless the merge
relaxes.
"""

from collections.abc import Callable
from typing import ClassVar

from pydantic import AliasChoices, Field
from torch import Tensor

from fedtune.merging.combine._weights import normalise_weights
from fedtune.merging.combine.linear_combinations._gram_step import GramCombineStep
from fedtune.merging.combine.linear_combinations._sphere import compute_karcher_coefficients

__all__ = ["Karcher"]


class Karcher(GramCombineStep):
    """The Karcher mean of the directions."""

    name: ClassVar[str] = "karcher"
    max_iterations: int = Field(10, ge=1, validation_alias=AliasChoices("max_iterations", "max_iter"))
    tolerance: float = Field(
        1e-5,
        ge=0,
        validation_alias=AliasChoices("tolerance", "tol"),
        description="stop when a step is smaller, in radians",
    )

    def compute_coefficients(self, weights: Tensor, gram: Callable[[], Tensor]) -> Tensor:
        """The coefficients of the mean direction."""
        return compute_karcher_coefficients(gram(), normalise_weights(weights), self.max_iterations, self.tolerance)
