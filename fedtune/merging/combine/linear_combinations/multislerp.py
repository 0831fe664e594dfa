"""Multi-SLERP: one step towards a barycentre on the sphere, with the mean length.

What: from the normalised weighted mean m of the directions, exp_m(sum_i w_i log_m(x_i/|x_i|)) times sum_i w_i |x_i|.
Memory: two passes, one chunk of each model.
Use when: you want to blend more than two models as SLERP blends two, and one step of the Karcher mean is enough.
Avoid when: models are far apart. The step then ends before the mean that karcher reaches.
Source: Goddard, mergekit's documentation of `multislerp`; the step is that of Buss and Fillmore (ACM ToG 20, 2001).
mergekit projects on the tangent plane instead of taking the logarithm, so its step is always zero.
"""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from fedtune.merging.combine._weights import normalise_weights
from fedtune.merging.combine.linear_combinations._gram_step import GramCombineStep
from fedtune.merging.combine.linear_combinations._sphere import compute_karcher_coefficients

__all__ = ["MultiSlerp"]


class MultiSlerp(GramCombineStep):
    """One step towards the barycentre."""

    name: ClassVar[str] = "multislerp"

    def compute_coefficients(self, weights: Tensor, gram: Callable[[], Tensor]) -> Tensor:
        """The coefficients after one step towards the barycentre."""
        return compute_karcher_coefficients(gram(), normalise_weights(weights), 1, 0.0)
