"""Krum: take the one model that is nearest to its neighbours.

What: the score of a model is the sum of its squared distances to the n - f - 2 nearest others. The model with the
smallest score is the result; of equal ones, that of the first client. Distances are those of whole models.
Defaults: f 1.
Memory: two passes, one chunk of each model. Distances are computed from inner products, n^2 / 2 of them.
Use when: up to f of n >= 2 f + 3 models may be hostile in any way, and one honest model is a good result.
Avoid when: the data of clients differ. One client's model is taken whole, and the others' work is lost: use multi-krum,
which is the same with an average, or geometric-median. Models that differ in a few large tensors are judged by these.
Adapters: if clients send one factor of a product, distances are those of the factors. The result still is one client's
product.
Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent" (NIPS 2017), section
on Krum. Theirs are gradients; ours are deltas of a round.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from fedtune.merging._step import BoundCombine, MergeContext, MergeInput, Shape
from fedtune.merging.combine.linear_combinations.linear import Linear
from fedtune.merging.combine.robust._krum_scores import rank_by_krum
from fedtune.merging.combine.robust._robust_step import DistanceStep, compute_finite_gram, compute_square_distances

__all__ = ["Krum"]


class Krum(DistanceStep):
    """The model with the nearest neighbours."""

    name: ClassVar[str] = "krum"
    weighs_whole_updates: ClassVar[bool] = True

    @property
    def required_models(self) -> int:
        """2 f + 3."""
        return 2 * self.f + 3

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> BoundCombine:
        """The chosen model alone."""
        self.require_models(len(merge_inputs))
        squares = compute_square_distances(compute_finite_gram(self.name, shapes, merge_inputs))
        best = merge_inputs[rank_by_krum(squares, self.f)[0]]
        return BoundCombine(Linear(normalise=False), [best._replace(weight=1.0)])

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The chosen model's delta, once ``bind`` has left it alone."""
        return Linear(normalise=False).combine(name, shape, merge_inputs)
