"""What the two DARE merges share: entries dropped at random, the rest made larger so that the mean stays."""

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field
from torch import Tensor

from fedtune.merging._draws import derive_merge_seed, drop_at_random, make_generator
from fedtune.merging._step import BoundCombine, MergeContext, MergeInput, Shape
from fedtune.merging._task_vectors import Density, TaskVectorCombineStep, iter_delta_chunks

__all__ = ["DareCombineStep"]


class DareCombineStep(TaskVectorCombineStep, ABC):
    """Drop and rescale."""

    density: Density = 0.5
    rescale: bool = True
    seed: int = Field(0, ge=0)

    def bind(self, shapes: Mapping[str, Shape], operands: Sequence[MergeInput], evidence: MergeContext) -> BoundCombine:
        """The step with the masks of this merge."""
        return BoundCombine(self.model_copy(update={"seed": derive_merge_seed(self.seed, evidence)}), operands)

    def thinned(self, index: int, name: str, shape: Shape, operand: MergeInput) -> Iterator[Tensor]:
        """Kept with probability density and, rescaled, divided by it."""
        kept = drop_at_random(
            iter_delta_chunks(name, shape, operand), self.density, make_generator(self.seed, index, name)
        )
        return (piece.div_(self.density) for piece in kept) if self.rescale else kept
