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
from fedtune.merging._gram import flatten_rows
from fedtune.merging._step import BoundCombine, CombineStep, MergeContext, MergeInput, Shape
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["TrimmedMean"]


class TrimmedMean(CombineStep):
    """The mean of the middle."""

    name: ClassVar[str] = "trimmed-mean"
    adds_variance_of_means: ClassVar[bool] = False
    trim_fraction: float = Field(0.2, gt=0, lt=0.5, description="fraction of the models removed at each end")

    @property
    def needed(self) -> int:
        """The fewest models of which one can be cut at each end."""
        return next(count for count in count_from(floor(1 / self.trim_fraction)) if self._cut(count))

    def weights(self, examples: Sequence[int]) -> list[float]:
        """Equal shares."""
        return [1 / len(examples)] * len(examples)

    def bind(self, shapes: Mapping[str, Shape], operands: Sequence[MergeInput], evidence: MergeContext) -> BoundCombine:
        """Itself; RecipeError when there are too few models to cut one at each end."""
        if not self._cut(len(operands)):
            raise RecipeError(
                f"merge: trimmed-mean with trim_fraction {self.trim_fraction:g} needs at least {self.needed} models to "
                f"remove one at each end, but {len(operands)} were given; raise trim_fraction or add models"
            )
        return BoundCombine(self, operands)

    def _cut(self, count: int) -> int:
        return floor(self.trim_fraction * count)

    def combine(self, name: str, shape: Shape, operands: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The mean of what is left of each piece."""
        cut = self._cut(len(operands))
        for start, stop in iter_row_chunks(shape):
            stack = torch.stack([flatten_rows(operand.read_rows(name, start, stop)) for operand in operands])
            middle = stack.sort(dim=0).values[cut : len(operands) - cut]
            yield middle.double().mean(0).float().reshape(stop - start, *shape[1:])
