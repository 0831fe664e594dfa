"""Median: for each entry, take the middle value of all models.

What: the median of each entry; with an even number of models, the mean of the two middle values.
Defaults: none to set.
Memory: one chunk per model.
Use when: fewer than half of the models may be hostile, possibly different ones for each entry, and nothing is known of
their number.
Avoid when: the data of clients differ much: the median of each entry can be far from the mean of honest models, and
what fewer than half of the clients learned is lost. trimmed-mean loses less if the number of hostile clients is known.
Adapters: if clients send one factor of a product, hostile clients cannot move the entries of this factor far. The
product is limited too, but it is not the median of the products.
Source: Yin et al. (arXiv 1803.01498), definition 1.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.merging._step import MergeInput, Shape
from fedtune.merging.combine._inner_products import flatten_rows
from fedtune.merging.combine.robust._robust_step import RobustStep, require_finite_rows
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["Median", "compute_median"]


class Median(RobustStep):
    """The median of each entry."""

    name: ClassVar[str] = "median"

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The medians of each chunk."""
        for start, stop in iter_row_chunks(shape):
            rows = [flatten_rows(one.read_rows(name, start, stop)) for one in merge_inputs]
            require_finite_rows(self.name, name, rows)
            ordered = torch.stack(rows).sort(dim=0).values
            yield compute_median(ordered).float().reshape(stop - start, *shape[1:])


def compute_median(ordered: Tensor) -> Tensor:
    """The median, double, of values that are sorted along the first axis."""
    count = len(ordered)
    return (ordered[(count - 1) // 2].double() + ordered[count // 2].double()) / 2
