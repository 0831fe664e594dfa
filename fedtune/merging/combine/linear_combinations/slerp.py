"""SLERP: blend two models along the arc between them instead of the straight line.

What: sin((1-t)O)/sin O x_1 + sin(tO)/sin O x_2 per tensor, where O is the angle between them; weights are not used.
Memory: two passes, one chunk of each model.
Use when: you want to blend two models without the loss of norm of an average. Without a base it works on the models
themselves, with a base on their deltas.
Avoid when: there are more than two models. Above |cos O| = 0.9995 it is a straight line.
Source: Shoemake (SIGGRAPH 1985).
"""

from collections.abc import Callable
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune.merging.combine.linear_combinations._gram_step import GramCombineStep
from fedtune.merging.combine.linear_combinations._sphere import compute_slerp_coefficients

__all__ = ["Slerp"]

_NEAR = 0.9995


class Slerp(GramCombineStep):
    """The point of the arc at t."""

    name: ClassVar[str] = "slerp"
    min_models: ClassVar[int] = 2
    max_models: ClassVar[int | None] = 2
    t: float = Field(0.5, ge=0, le=1, description="0 is the first model, 1 the second")

    def compute_coefficients(self, weights: Tensor, gram: Callable[[], Tensor]) -> Tensor:
        """The sines of both partial angles, divided by the sine of the whole angle."""
        return compute_slerp_coefficients(gram(), self.t, _NEAR)
