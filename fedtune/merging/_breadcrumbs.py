"""What the two breadcrumbs merges share: neither the largest nor the smallest entries count."""

from abc import ABC
from collections.abc import Iterator
from functools import partial
from math import floor, prod
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune.merging._select import between, count_kept
from fedtune.merging._step import Operand, Shape
from fedtune.merging._task_vectors import Density, TaskVectors, deltas

__all__ = ["Breadcrumbs"]


class Breadcrumbs(TaskVectors, ABC):
    """A band of magnitudes."""

    picks: ClassVar[bool] = True
    rereads: ClassVar[bool] = True
    density: Density = 0.9
    gamma: float = Field(0.01, ge=0, lt=1, description="share of the largest entries that is dropped")

    def thinned(self, index: int, name: str, shape: Shape, operand: Operand) -> Iterator[Tensor]:
        """floor(density * n) entries below the floor(gamma * n) largest, fewer of which go where both do not fit."""
        size = prod(shape)
        keep = count_kept(self.density, size)
        top = min(floor(self.gamma * size), size - keep)
        return between(partial(deltas, name, shape, operand), top, top + keep, size)
