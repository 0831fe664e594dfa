"""What the two DARE merges share: entries dropped at random, the rest made larger so that the mean stays."""

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field
from torch import Tensor

from fedtune.merging._draws import draws, dropped, redrawn
from fedtune.merging._step import Evidence, Operand, Settled, Shape
from fedtune.merging._task_vectors import Density, TaskVectors, deltas

__all__ = ["Dare"]


class Dare(TaskVectors, ABC):
    """Drop and rescale."""

    density: Density = 0.5
    rescale: bool = True
    seed: int = Field(0, ge=0)

    def settle(self, shapes: Mapping[str, Shape], operands: Sequence[Operand], evidence: Evidence) -> Settled:
        """The step with the masks of this merge."""
        return Settled(self.model_copy(update={"seed": redrawn(self.seed, evidence)}), operands)

    def thinned(self, index: int, name: str, shape: Shape, operand: Operand) -> Iterator[Tensor]:
        """Kept with probability density and, rescaled, divided by it."""
        kept = dropped(deltas(name, shape, operand), self.density, draws(self.seed, index, name))
        return (piece.div_(self.density) for piece in kept) if self.rescale else kept
