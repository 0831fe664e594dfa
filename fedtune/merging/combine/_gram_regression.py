"""The base class of steps that fit a linear layer to the outputs of several, given their inputs' Gram matrices."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.merging._step import BoundCombine, CombineStep, MergeContext, MergeInput, Shape
from fedtune.merging.combine._inner_products import flatten_rows
from fedtune.merging.combine._statistics_file import check_statistics, require_statistics
from fedtune.merging.combine._weights import normalise_weights, stack_weights
from fedtune.merging.combine.task_vectors._task_vector_step import sum_deltas
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["GramRegressionStep"]


class GramRegressionStep(CombineStep, ABC):
    """sum_i W_i M_i for layers with measured inputs, with mixing matrices M_i [in, in]; otherwise the mean."""

    @abstractmethod
    def compute_mixing(self, grams: Sequence[Tensor], share: Sequence[float]) -> list[Tensor]:
        """M_i of each model from its weighted Gram matrix w_i G_i and its share w_i; double."""

    def scale_gram(self, gram: Tensor) -> Tensor:
        """The Gram matrix as it is used."""
        return gram

    def bind(
        self, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
    ) -> BoundCombine:
        """The step itself, after checking that every model has statistics."""
        check_statistics(self.name, shapes, merge_inputs)
        return BoundCombine(self, merge_inputs)

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The regression for layers with measured inputs, otherwise the mean."""
        share = normalise_weights(stack_weights(merge_inputs))[:, 0].tolist()
        measured = name in require_statistics(merge_inputs[0])
        mixing = self._read_mixing(name, shape, share, merge_inputs) if measured else None
        for start, stop in iter_row_chunks(shape):
            parts = [flatten_rows(merge_input.read_rows(name, start, stop)) for merge_input in merge_inputs]
            total = sum_deltas(parts, share, normalise=False) if mixing is None else _apply_mixing(parts, mixing)
            yield total.float().reshape(stop - start, *shape[1:])

    def _read_mixing(
        self, name: str, shape: Shape, share: Sequence[float], merge_inputs: Sequence[MergeInput]
    ) -> list[Tensor]:
        grams = [
            w * self.scale_gram(self._read_gram(name, shape, merge_input))
            for w, merge_input in zip(share, merge_inputs, strict=True)
        ]
        return self.compute_mixing(grams, share)

    def _read_gram(self, name: str, shape: Shape, merge_input: MergeInput) -> Tensor:
        width = shape[-1]
        found = require_statistics(merge_input)(name, 0, width).double()
        if len(shape) != 2 or found.shape != (width, width):
            raise ModelError(
                f"merge: {self.name} needs a Gram matrix of {width} x {width} for {name}, but its statistics have "
                f"shape {list(found.shape)}; measure Gram matrices"
            )
        return found


def _apply_mixing(parts: Sequence[Tensor], mixing: Sequence[Tensor]) -> Tensor:
    """sum_i W_i M_i; double."""
    return torch.stack([part.double() @ matrix for part, matrix in zip(parts, mixing, strict=True)]).sum(0)
