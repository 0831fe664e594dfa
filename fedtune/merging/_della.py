"""What the two DELLA merges share: entries dropped at random, larger ones of a row less often."""

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedtune.contribution import pieces
from fedtune.merging._draws import draws, ranked, redrawn
from fedtune.merging._step import Evidence, Operand, Settled, Shape
from fedtune.merging._task_vectors import Density, TaskVectors, deltas

__all__ = ["Della"]


class Della(TaskVectors, ABC):
    """Drop by rank and rescale."""

    density: Density = 0.5
    epsilon: float = Field(0.15, ge=0, lt=0.5, description="probabilities reach from density - epsilon to + epsilon")
    rescale: bool = True
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        if self.density < 1 and not (self.epsilon < self.density < 1 - self.epsilon):
            raise ValueError("density - epsilon and density + epsilon must both lie between 0 and 1; lower epsilon")
        return self

    def settle(self, shapes: Mapping[str, Shape], operands: Sequence[Operand], evidence: Evidence) -> Settled:
        """The step with the masks of this merge."""
        return Settled(self.model_copy(update={"seed": redrawn(self.seed, evidence)}), operands)

    def thinned(self, index: int, name: str, shape: Shape, operand: Operand) -> Iterator[Tensor]:
        """Kept with a probability by rank and, rescaled, divided by it; a tensor of one dimension is one row.

        A density of 1 drops nothing.
        """
        if self.density == 1:
            return deltas(name, shape, operand)
        random = draws(self.seed, index, name)
        stream = deltas(name, shape, operand)
        if len(shape) > 1:
            return ranked(stream, self.density, self.epsilon, random, rescale=self.rescale)
        row = torch.cat([torch.empty(0, 1), *stream]).reshape(1, -1)
        [found] = ranked([row], self.density, self.epsilon, random, rescale=self.rescale)
        return (found[0, start:stop, None] for start, stop in pieces(shape))
