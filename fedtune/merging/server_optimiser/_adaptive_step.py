"""The base class of adaptive server optimisers, which differ in how they follow the squares of the change."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

from pydantic import Field
from torch import Tensor

from fedtune.merging._step import ServerOptimiserStep

__all__ = ["AdaptiveServerStep"]

_MEAN, _SQUARE = "mean", "square"


class AdaptiveServerStep(ServerOptimiserStep, ABC):
    """Divides the mean of the changes by the root of their squares, entry by entry."""

    lr: float = Field(0.01, gt=0, description="server learning rate, eta")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of the changes")
    tau: float = Field(1e-3, gt=0, description="degree of adaptivity: larger values come closer to fedavgm")

    @final
    @property
    def initial_moments(self) -> Mapping[str, float]:
        """A mean of zero, and squares of tau^2."""
        return {_MEAN: 0.0, _SQUARE: self.tau**2}

    @abstractmethod
    def update_square(self, square: Tensor, delta: Tensor) -> Tensor:
        """Return the next v, given the last one and the merged change."""

    @final
    def compute_step(self, delta: Tensor, moments: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return lr m / (sqrt(v) + tau), with the next m and v."""
        mean = self.beta1 * moments[_MEAN] + (1 - self.beta1) * delta
        square = self.update_square(moments[_SQUARE], delta)
        return self.lr * mean / (square.sqrt() + self.tau), {_MEAN: mean, _SQUARE: square}
