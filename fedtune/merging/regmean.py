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
from fedtune.merging._gram import flatten_rows
from fedtune.merging._measured import check_statistics, require_statistics
from fedtune.merging._span import normalise_weights, stack_weights
from fedtune.merging._step import BoundCombine, CombineStep, MergeContext, MergeInput, Shape
from fedtune.merging._task_vectors import plain_sum
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["RegMean", "accumulate_gram"]


class RegMean(CombineStep):
    """Regression to the models' own outputs."""

    name: ClassVar[str] = "regmean"
    off_diagonal_scale: float = Field(
        0.9, ge=0, le=1, description="factor of the off-diagonal entries of the Gram matrices"
    )
    ridge: float = Field(1e-9, gt=0)

    def bind(self, shapes: Mapping[str, Shape], operands: Sequence[MergeInput], evidence: MergeContext) -> BoundCombine:
        """Itself, with statistics there for every model."""
        check_statistics(self.name, shapes, operands)
        return BoundCombine(self, operands)

    def combine(self, name: str, shape: Shape, operands: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The regression where the layer's inputs were measured, else the mean."""
        share = normalise_weights(stack_weights(operands))[:, 0].tolist()
        measured = name in require_statistics(operands[0])
        mixing = self._mixing(name, shape, share, operands) if measured else None
        for start, stop in iter_row_chunks(shape):
            parts = [flatten_rows(operand.read_rows(name, start, stop)) for operand in operands]
            total = plain_sum(parts, share, normalise=False) if mixing is None else _apply_mixing(parts, mixing)
            yield total.float().reshape(stop - start, *shape[1:])

    def _mixing(self, name: str, shape: Shape, share: Sequence[float], operands: Sequence[MergeInput]) -> list[Tensor]:
        """M_i = w_i G_i (sum_j w_j G_j)^-1, one [in, in] per model; they sum to the identity."""
        grams = [w * self._gram(name, shape, operand) for w, operand in zip(share, operands, strict=True)]
        total = torch.stack(grams).sum(0)
        ridge = self.ridge * total.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        for w, found in zip(share, grams, strict=True):
            found.diagonal().add_(w * ridge)
        total.diagonal().add_(ridge)
        return [torch.linalg.solve(total, found, left=False) for found in grams]

    def _gram(self, name: str, shape: Shape, operand: MergeInput) -> Tensor:
        width = shape[-1]
        found = require_statistics(operand)(name, 0, width).double()
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
