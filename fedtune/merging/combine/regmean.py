"""RegMean: the linear layers whose outputs are closest to those of every model on that model's own inputs.

What: for a linear weight W [out, in], W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1. G_i is the mean of x x^T over the
inputs of model i, with its off-diagonal entries multiplied by ``off_diagonal_scale``. All other tensors get the
weighted mean.
Memory: one chunk of the delta and one Gram matrix [in, in] per model, in double precision.
Use when: models were trained on different data, and a few thousand tokens of each are available to measure G.
Avoid when: layers are wide. The Gram matrix of a layer with 10 000 inputs takes 400 MB in a file and twice that in
memory.
Source: Jin et al. (arXiv 2212.09849), their closed form; their off-diagonal scale is 0.9 for most models. A ridge of
``ridge`` times the mean diagonal sets directions that no input has to the mean; theirs has none.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.merging._step import BoundCombine, CombineStep, MergeContext, MergeInput, Shape
from fedtune.merging.combine._inner_products import flatten_rows
from fedtune.merging.combine._statistics_file import check_statistics, require_statistics
from fedtune.merging.combine._weights import normalise_weights, stack_weights
from fedtune.merging.combine.task_vectors._task_vector_step import sum_deltas
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["RegMean", "accumulate_gram"]


class RegMean(CombineStep):
    """Fits layers to the outputs of all models by linear regression."""

    name: ClassVar[str] = "regmean"
    off_diagonal_scale: float = Field(
        0.9, ge=0, le=1, description="factor of the off-diagonal entries of the Gram matrices"
    )
    ridge: float = Field(1e-9, gt=0)

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
        mixing = self._compute_mixing(name, shape, share, merge_inputs) if measured else None
        for start, stop in iter_row_chunks(shape):
            parts = [flatten_rows(merge_input.read_rows(name, start, stop)) for merge_input in merge_inputs]
            total = sum_deltas(parts, share, normalise=False) if mixing is None else _apply_mixing(parts, mixing)
            yield total.float().reshape(stop - start, *shape[1:])

    def _compute_mixing(
        self, name: str, shape: Shape, share: Sequence[float], merge_inputs: Sequence[MergeInput]
    ) -> list[Tensor]:
        """M_i = w_i G_i (sum_j w_j G_j)^-1, one [in, in] per model; they sum to the identity."""
        grams = [
            w * self._read_gram(name, shape, merge_input) for w, merge_input in zip(share, merge_inputs, strict=True)
        ]
        total = torch.stack(grams).sum(0)
        ridge = self.ridge * total.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        for w, found in zip(share, grams, strict=True):
            found.diagonal().add_(w * ridge)
        total.diagonal().add_(ridge)
        return [torch.linalg.solve(total, found, left=False) for found in grams]

    def _read_gram(self, name: str, shape: Shape, merge_input: MergeInput) -> Tensor:
        width = shape[-1]
        found = require_statistics(merge_input)(name, 0, width).double()
        if len(shape) != 2 or found.shape != (width, width):
            raise ModelError(
                f"merge: regmean needs a Gram matrix of {width} x {width} for {name}, but its statistics have shape "
                f"{list(found.shape)}; measure Gram matrices"
            )
        return found * self.off_diagonal_scale + torch.diag(found.diagonal()) * (1 - self.off_diagonal_scale)


def accumulate_gram(total: Tensor, inputs: Tensor) -> None:
    """Adds sum x x^T over inputs x [n, in] to ``total`` [in, in], in double."""
    rows = inputs.double()
    total.addmm_(rows.T, rows)


def _apply_mixing(parts: Sequence[Tensor], mixing: Sequence[Tensor]) -> Tensor:
    """sum_i W_i M_i; double."""
    return torch.stack([part.double() @ matrix for part, matrix in zip(parts, mixing, strict=True)]).sum(0)
