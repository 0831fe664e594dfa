"""Trimmed mean: for each entry, remove the largest and the smallest values and average the rest.

What: with K models, the floor(trim_fraction * K) largest values of each entry are removed, and as many of the smallest.
Memory: one chunk per model.
Use when: up to that many client updates may be broken or hostile, possibly different ones for each entry.
Avoid when: there are few models: 0.2 needs five. It also removes what only a few models learned.
Adapters: if clients send one factor of a product, broken clients cannot move the entries of this factor far. The
product is limited too, but it is not the trimmed mean of the products.
Source: Yin et al. (arXiv 1803.01498), definition 2.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count as count_from
from math import floor
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging._step import BoundCombine, CombineStep, MergeContext, MergeInput, Shape
from fedtune.merging.combine._inner_products import flatten_rows
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["TrimmedMean"]


class TrimmedMean(CombineStep):
    """The mean without the extreme values of each entry."""

    name: ClassVar[str] = "trimmed-mean"
    adds_variance_of_means: ClassVar[bool] = False
    trim_fraction: float = Field(0.2, gt=0, lt=0.5, description="fraction of the models removed at each end")

    @property
    def required_models(self) -> int:
        """The smallest number of models of which one can be removed at each end."""
        return next(count for count in count_from(floor(1 / self.trim_fraction)) if self._cut(count))

    def compute_client_weights(self, num_examples: Sequence[int]) -> list[float]:
        """Equal weights."""
        return [1 / len(num_examples)] * len(num_examples)

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> BoundCombine:
        """The step itself; RecipeError if there are too few models to remove one at each end."""
        if not self._cut(len(merge_inputs)):
            raise RecipeError(
                f"merge: trimmed-mean with trim_fraction {self.trim_fraction:g} needs at least {self.required_models} "
                f"models to remove one at each end, but {len(merge_inputs)} were given; raise trim_fraction or "
                "add models"
            )
        return BoundCombine(self, merge_inputs)

    def _cut(self, count: int) -> int:
        return floor(self.trim_fraction * count)

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The mean of the remaining values in each chunk."""
        cut = self._cut(len(merge_inputs))
        for start, stop in iter_row_chunks(shape):
            stack = torch.stack(
                [flatten_rows(merge_input.read_rows(name, start, stop)) for merge_input in merge_inputs]
            )
            middle = stack.sort(dim=0).values[cut : len(merge_inputs) - cut]
            yield middle.double().mean(0).float().reshape(stop - start, *shape[1:])
