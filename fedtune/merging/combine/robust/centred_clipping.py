"""Centred clipping: average the models after pulling them into a ball around what the last merge gave.

What: v <- v + (1/n) sum_i (x_i - v) min(1, radius / |x_i - v|), ``iterations`` times, from the centre v that the last
merge gave, zero in the first round. Distances are those of whole models. The centre is part of the run's state: it is
saved beside the checkpoint, and clients do not receive it.
Defaults: radius the median of |x_i - v| at the start, iterations 1.
Memory: two passes, one chunk of each model, and one delta of the server. Distances are computed from inner products,
n^2 / 2 of them.
Use when: fewer than half of the models may be hostile, honest updates of two rounds are alike, and no honest client
should be left out.
Avoid when: few clients take part in each round and differ much, so that the last merge says little of the next one. In
the first round, a hostile model counts as much as an honest one of the same length. A file of one merge has no last
one: ``fedtune merge`` begins at zero.
Adapters: if clients send one factor of a product in turns, each factor has the centre of its own last round.
Source: Karimireddy, He, Jaggi, "Learning from History for Byzantine Robust Optimization" (arXiv 2012.10333), centred
clipping. Theirs has a fixed radius, and clients send gradients with momentum; ours are deltas of a round, whose length
changes as training goes on, hence the median.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.merging._step import BoundCombine, MergeContext, MergeInput, Reference, Shape
from fedtune.merging.combine.linear_combinations.linear import Linear
from fedtune.merging.combine.robust._reference import make_reference_input
from fedtune.merging.combine.robust._robust_step import RobustStep, compute_finite_gram

__all__ = ["CentredClipping", "compute_clipped_coefficients"]


class CentredClipping(RobustStep):
    """The mean of clipped differences from a centre."""

    name: ClassVar[str] = "centred-clipping"
    weighs_whole_updates: ClassVar[bool] = True
    reference: ClassVar[Reference | None] = "last merge"
    radius: float | None = Field(None, gt=0, description="largest distance from the centre; default: their median")
    iterations: int = Field(1, ge=1, le=1000, description="how often the centre moves in one merge")

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> BoundCombine:
        """A sum of the models and the centre, with the coefficients of the clipped mean."""
        around = [*merge_inputs, make_reference_input(context.reference, shapes)]
        gram = compute_finite_gram(self.name, shapes, around)
        c = compute_clipped_coefficients(gram, self.radius, self.iterations).tolist()
        weighted = [one._replace(weight=weight) for one, weight in zip(around, c, strict=True)]
        return BoundCombine(Linear(normalise=False), weighted if context.reference else weighted[:-1])

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The sum with the coefficients that ``bind`` has computed."""
        return Linear(normalise=False).combine(name, shape, merge_inputs)


def compute_clipped_coefficients(gram: Tensor, radius: float | None, iterations: int) -> Tensor:
    """The coefficients [n + 1] of the models and, last, the centre, from their inner products [n + 1, n + 1]."""
    count = len(gram) - 1
    models = torch.eye(count + 1, dtype=gram.dtype)[:count]
    c = torch.zeros(count + 1, dtype=gram.dtype)
    c[-1] = 1
    for _ in range(iterations):
        apart = models - c
        distances = torch.einsum("ij,jk,ik->i", apart, gram, apart).clamp_min(0).sqrt()
        radius = float(distances.quantile(0.5)) if radius is None else radius
        share = torch.where(distances <= radius, 1.0, radius / distances)
        c = c + share @ apart / count
    return c
