"""The step without a backward pass: the slope of the loss along a random direction, and SGD along that direction.

With z ~ N(0, I) of a step, MeZO estimates the gradient (arXiv 2305.17333, definition 1 and Algorithm 1) as

    slope = (L(w + eps z) - L(w - eps z)) / (2 eps),   g = slope z,   w <- w - lr g.

z is drawn again from its seed each time, and w is moved in place: to w + eps z, to w - eps z, and back. Each move
rounds: in single precision, an entry is afterwards within 3 * 2**-24 * (|w| + eps |z|) of where it was. Where there
are master weights, the values are written from them, and have the same bits afterwards.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedtune.accelerator import fork_random_state
from fedtune.errors import ModelError
from fedtune.techniques._technique import Technique
from fedtune.techniques.zeroth_order._directions import TrainedTensor, move_weights, shift_weights

__all__ = ["DirectionSource", "ProjectedGradientStep", "find_gradient_conflict"]


def find_gradient_conflict(technique: Technique, other: Technique) -> str | None:
    """Why a technique without a backward pass cannot be combined with another, as the end of a sentence."""
    if other.estimates_gradients:
        return "both take the steps of a round"
    return None if other.fits_zeroth_order else f"{technique.name} runs no backward pass, which {other.name} changes"


class DirectionSource(Protocol):
    """Chooses the direction of each step of a round, and hears how far the weights moved along it."""

    def get_seed(self, step: int) -> int:
        """Return the seed of the direction of step 0, 1, ..."""
        ...

    def record_change(self, step: int, change: Tensor) -> None:
        """Take note that the weights moved by ``change``, a scalar, times the direction of a step."""
        ...


class ProjectedGradientStep:
    """The steps of one round: ``estimate_slope`` in the place of the backward pass, ``step`` in that of the optimiser.

    Between the two passes of a step only the weights differ: dropout draws the same masks.
    """

    def __init__(self, trained: Sequence[TrainedTensor], epsilon: float, directions: DirectionSource) -> None:
        self._trained, self._epsilon, self._directions = trained, epsilon, directions
        self._number = 0
        self._slope: Tensor | None = None

    @torch.no_grad()
    def estimate_slope(self, compute_loss: Callable[[], Tensor]) -> Tensor:
        """Compute the slope of the loss along the direction of this step; return the mean of the two losses.

        The weights are back afterwards, also if a pass fails. It may then be called again, with the same direction.
        """
        seed, epsilon, offset = self._directions.get_seed(self._number), self._epsilon, 0.0
        try:
            shift_weights(self._trained, seed, 0.0, epsilon)
            offset = epsilon
            with fork_random_state(self._trained[0].value.device):
                above = compute_loss()
            shift_weights(self._trained, seed, epsilon, -epsilon)
            offset = -epsilon
            below = compute_loss()
        finally:
            shift_weights(self._trained, seed, offset, 0.0)
        if torch.finfo(above.dtype).bits < 32:
            used = str(above.dtype).removeprefix("torch.")
            raise ModelError(
                f"the loss is computed in {used}, in which the two losses of a step differ by rounding alone; set "
                "model.dtype: float32"
            )
        self._slope = (above - below) / (2 * epsilon)
        return (above + below) / 2

    def step(self, lr: float) -> None:
        """Move the weights against the slope of the last estimate."""
        assert self._slope is not None, "a step comes after an estimate"
        change = -lr * self._slope
        move_weights(self._trained, self._directions.get_seed(self._number), change)
        self._directions.record_change(self._number, change)
        self._number, self._slope = self._number + 1, None
