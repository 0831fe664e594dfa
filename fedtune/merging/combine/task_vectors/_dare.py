"""The base class of the DARE steps, which drop entries at random and rescale the rest."""

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field
from torch import Tensor

from fedtune.merging._step import BoundCombine, MergeContext, MergeInput, Shape
from fedtune.merging.combine.task_vectors._random_masks import derive_merge_seed, drop_at_random, make_generator
from fedtune.merging.combine.task_vectors._task_vector_step import Density, TaskVectorCombineStep, iter_delta_chunks

__all__ = ["DareCombineStep"]


class DareCombineStep(TaskVectorCombineStep, ABC):
    """Drops entries and rescales the rest."""

    density: Density = 0.5
    rescale: bool = True
    seed: int = Field(0, ge=0)

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> BoundCombine:
        """The step with the masks of this merge."""
        return BoundCombine(self.model_copy(update={"seed": derive_merge_seed(self.seed, context)}), merge_inputs)

    def iter_sparse_chunks(self, index: int, name: str, shape: Shape, merge_input: MergeInput) -> Iterator[Tensor]:
        """Entries are kept with probability ``density`` and, with ``rescale``, divided by it."""
        kept = drop_at_random(
            iter_delta_chunks(name, shape, merge_input), self.density, make_generator(self.seed, index, name)
        )
        return (piece.div_(self.density) for piece in kept) if self.rescale else kept
