"""NuSLERP: SLERP of two deltas with t from their weights, per tensor, row or column.

What: SLERP at t = w_2 / (w_1 + w_2). With ``granularity: row`` or ``column``, each row or column has its own angle and
its own t.
Memory: two passes, one chunk of each model, and one coefficient per row or column.
Use when: you want to blend two fine-tunes of one base by weight. Use rows if output units changed by different amounts.
Avoid when: there are more than two models. One-dimensional tensors are one group for every ``granularity``.
Source: mergekit's documentation of `nuslerp`; the arc is Shoemake's (SIGGRAPH 1985). mergekit's nuslerp_row_wise gives
each column an angle, which is ``granularity: column`` here.
"""

from collections.abc import Callable
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune.merging.combine._inner_products import Granularity
from fedtune.merging.combine._weights import normalise_weights
from fedtune.merging.combine.linear_combinations._gram_step import GramCombineStep
from fedtune.merging.combine.linear_combinations._sphere import compute_slerp_coefficients

__all__ = ["NuSlerp"]

_NEAR = 1 - 1e-14


class NuSlerp(GramCombineStep):
    """The point of the arc at the share of the second weight."""

    name: ClassVar[str] = "nuslerp"
    min_models: ClassVar[int] = 2
    max_models: ClassVar[int | None] = 2
    granularity: Granularity = Field("tensor", description="what gets its own angle")

    @property
    def coefficient_scope(self) -> Granularity:
        """As ``granularity`` says."""
        return self.granularity

    def compute_coefficients(self, weights: Tensor, gram: Callable[[], Tensor]) -> Tensor:
        """The coefficients of SLERP at the second model's share."""
        return compute_slerp_coefficients(gram(), normalise_weights(weights)[1], _NEAR)
