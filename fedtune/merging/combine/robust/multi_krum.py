"""Multi-Krum: average the models that are nearest to their neighbours.

What: the score of a model is the sum of its squared distances to the n - f - 2 nearest others. The result is the mean
of the m models with the smallest scores; of equal ones, those of the first clients. Distances are those of whole
models.
Defaults: f 1, m n - f - 2.
Memory: two passes, one chunk of each model. Distances are computed from inner products, n^2 / 2 of them.
Use when: up to f of n >= 2 f + 3 models may be hostile, and clients differ little. It loses less than krum.
Avoid when: the data of clients differ much, because honest clients with rare data have the worst scores. Hostile models
that agree with each other, and stay close to the honest ones, can be among the m: see a-little-is-enough.
Adapters: if clients send one factor of a product, distances are those of the factors.
Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent" (NIPS 2017), where m
is left open between 1 (krum) and n (the mean). Ours: m is at most n - f, so that it cannot exceed the honest models.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune.merging._step import BoundCombine, MergeContext, MergeInput, Shape
from fedtune.merging.combine.linear_combinations.linear import Linear
from fedtune.merging.combine.robust._krum_scores import rank_by_krum
from fedtune.merging.combine.robust._robust_step import DistanceStep, compute_finite_gram, compute_square_distances

__all__ = ["MultiKrum"]


class MultiKrum(DistanceStep):
    """The mean of the models with the nearest neighbours."""

    name: ClassVar[str] = "multi-krum"
    weighs_whole_updates: ClassVar[bool] = True
    m: int | None = Field(None, ge=1, description="number of models that are averaged; default: n - f - 2")

    @property
    def required_models(self) -> int:
        """2 f + 3, and m honest models beside f hostile ones."""
        return max(2 * self.f + 3, self.f + (self.m or 1))

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> BoundCombine:
        """The mean of the chosen models."""
        count = len(merge_inputs)
        self.require_models(count)
        squares = compute_square_distances(compute_finite_gram(self.name, shapes, merge_inputs))
        chosen = sorted(rank_by_krum(squares, self.f)[: self.m or count - self.f - 2])
        averaged = [merge_inputs[place]._replace(weight=1 / len(chosen)) for place in chosen]
        return BoundCombine(Linear(normalise=False), averaged)

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The mean of the models that ``bind`` has chosen."""
        return Linear(normalise=False).combine(name, shape, merge_inputs)
