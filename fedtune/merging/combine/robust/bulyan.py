"""Bulyan: select models by Krum, then average the values near the median of each entry.

What: Krum selects theta = n - 2 f models one by one, each among those that are left. Of each entry, the theta - 2 f
values nearest to the median of the selected models are averaged. Of two equally near values, the smaller one counts.
Defaults: f 1.
Memory: two passes, one chunk of each model. Distances are computed from inner products, n^2 / 2 of them.
Use when: up to f of n >= 4 f + 3 models may be hostile and hide a large change in a few entries, which distances of
whole models do not show.
Avoid when: there are few clients: one hostile client needs seven. It also removes what only a few clients learned.
Adapters: if clients send one factor of a product, hostile clients cannot move the entries of this factor far. The
product is limited too, but it is not Bulyan of the products.
Source: El Mhamdi, Guerraoui, Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium" (arXiv
1802.07927), with Krum as the inner rule. The last selections have fewer than f + 3 models left, for which the paper
gives no score: ours counts at least the nearest neighbour. The median of an even number is the mean of the two middle
values.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.merging._step import BoundCombine, MergeContext, MergeInput, Shape
from fedtune.merging.combine._inner_products import flatten_rows
from fedtune.merging.combine.robust._krum_scores import select_one_by_one
from fedtune.merging.combine.robust._robust_step import DistanceStep, compute_finite_gram, compute_square_distances
from fedtune.merging.combine.robust.median import compute_median
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["Bulyan", "average_near_median"]

_ENTRIES = 1 << 15
"""Entries of all models that are sorted at a time, in double precision."""


class Bulyan(DistanceStep):
    """The mean of the values near the median of selected models."""

    name: ClassVar[str] = "bulyan"

    @property
    def required_models(self) -> int:
        """4 f + 3."""
        return 4 * self.f + 3

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> BoundCombine:
        """The step itself with the selected models."""
        self.require_models(len(merge_inputs))
        squares = compute_square_distances(compute_finite_gram(self.name, shapes, merge_inputs))
        chosen = select_one_by_one(squares, self.f, len(merge_inputs) - 2 * self.f)
        return BoundCombine(self, [merge_inputs[place]._replace(weight=1 / len(chosen)) for place in chosen])

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The mean of the values near the median in each chunk."""
        for start, stop in iter_row_chunks(shape):
            stack = torch.stack([flatten_rows(one.read_rows(name, start, stop)) for one in merge_inputs])
            kept = len(merge_inputs) - 2 * self.f
            parts = [average_near_median(part.double(), kept) for part in stack.flatten(1).split(_ENTRIES, 1)]
            yield torch.cat(parts).float().reshape(stop - start, *shape[1:])


def average_near_median(stack: Tensor, count: int) -> Tensor:
    """The mean of the ``count`` values nearest to the median of each entry of [models, ...]."""
    ordered = stack.sort(dim=0).values
    distances = (ordered - compute_median(ordered)).abs()
    nearest = distances.argsort(dim=0, stable=True)[:count]  # of equal distances, the smaller value comes first
    return ordered.gather(0, nearest).mean(0)
