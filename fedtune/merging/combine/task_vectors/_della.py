"""The base class of the DELLA steps, which drop entries at random, larger ones of a row less often."""

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedtune.merging._step import BoundCombine, MergeContext, MergeInput, Shape
from fedtune.merging.combine.task_vectors._random_masks import derive_merge_seed, drop_by_rank, make_generator
from fedtune.merging.combine.task_vectors._task_vector_step import Density, TaskVectorCombineStep, iter_delta_chunks
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["DellaCombineStep"]


class DellaCombineStep(TaskVectorCombineStep, ABC):
    """Drops entries by rank and rescales the rest."""

    density: Density = 0.5
    epsilon: float = Field(0.15, ge=0, lt=0.5, description="probabilities reach from density - epsilon to + epsilon")
    rescale: bool = True
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        if self.density < 1 and not (self.epsilon < self.density < 1 - self.epsilon):
            raise ValueError("density - epsilon and density + epsilon must both lie between 0 and 1; lower epsilon")
        return self

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> BoundCombine:
        """The step with the masks of this merge."""
        return BoundCombine(self.model_copy(update={"seed": derive_merge_seed(self.seed, context)}), merge_inputs)

    def iter_sparse_chunks(self, index: int, name: str, shape: Shape, merge_input: MergeInput) -> Iterator[Tensor]:
        """Entries are kept with a probability by rank and, if rescaled, divided by it; a vector is one row.

        A density of 1 drops nothing.
        """
        if self.density == 1:
            return iter_delta_chunks(name, shape, merge_input)
        random = make_generator(self.seed, index, name)
        stream = iter_delta_chunks(name, shape, merge_input)
        if len(shape) > 1:
            return drop_by_rank(stream, self.density, self.epsilon, random, rescale=self.rescale)
        row = torch.cat([torch.empty(0, 1), *stream]).reshape(1, -1)
        [found] = drop_by_rank([row], self.density, self.epsilon, random, rescale=self.rescale)
        return (found[0, start:stop, None] for start, stop in iter_row_chunks(shape))
