"""Fisher merge: weight each entry by how strongly the model's loss depends on it.

What: sum_i w_i F_i x_i / sum_i w_i F_i for each entry, where F is the diagonal Fisher information on the model's own
data.
Memory: one chunk of the delta and of the statistics.
Use when: models were trained on different data, and a few hundred examples of each are available to measure F.
Avoid when: F is measured on too few examples, or F of one model is much larger everywhere, so that this model
dominates. Tensors and entries without any F use the weighted mean.
Source: Matena, Raffel (arXiv 2111.09832), their closed form for a diagonal F. F is the empirical Fisher information,
from the true labels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.merging._step import BoundCombine, CombineStep, MergeContext, MergeInput, Shape
from fedtune.merging.combine._inner_products import flatten_rows
from fedtune.merging.combine._statistics_file import check_statistics, require_statistics
from fedtune.merging.combine._weights import normalise_weights, stack_weights
from fedtune.merging.combine.task_vectors._task_vector_step import sum_deltas
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["Fisher", "square_gradient"]


class Fisher(CombineStep):
    """The mean, weighted by Fisher information."""

    name: ClassVar[str] = "fisher"

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> BoundCombine:
        """The step itself, after checking that every model has statistics."""
        check_statistics(self.name, shapes, merge_inputs)
        return BoundCombine(self, merge_inputs)

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The weighted mean of each piece."""
        share = normalise_weights(stack_weights(merge_inputs))[:, 0].tolist()
        for start, stop in iter_row_chunks(shape):
            parts = [flatten_rows(merge_input.read_rows(name, start, stop)) for merge_input in merge_inputs]
            total = sum_deltas(parts, share, normalise=False)
            if name in require_statistics(merge_inputs[0]):
                information = [_read_information(name, shape, start, stop, merge_input) for merge_input in merge_inputs]
                weights = [w * one for w, one in zip(share, information, strict=True)]
                total = _compute_weighted_mean(parts, weights, total.double())
            yield total.float().reshape(stop - start, *shape[1:])


def square_gradient(gradient: Tensor) -> Tensor:
    """The squared gradient of one example, which is its part of the empirical Fisher information, fp32."""
    return gradient.float().square()


def _read_information(name: str, shape: Shape, start: int, stop: int, merge_input: MergeInput) -> Tensor:
    found = require_statistics(merge_input)(name, start, stop)
    if found.shape[1:] != shape[1:] or len(flatten_rows(found)) != stop - start:
        raise ModelError(f"merge: fisher needs statistics of shape {list(shape)} for {name}; measure these models")
    return flatten_rows(found).double()


def _compute_weighted_mean(parts: Sequence[Tensor], weights: Sequence[Tensor], otherwise: Tensor) -> Tensor:
    """sum w x / sum w, entry by entry; ``otherwise`` where the weights sum to zero."""
    total, over = torch.zeros_like(otherwise), torch.zeros_like(otherwise)
    for part, weight in zip(parts, weights, strict=True):
        total.addcmul_(part.double(), weight)
        over += weight
    return torch.where(over == 0, otherwise, total / over)
