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

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.merging.combine._gram_regression import GramRegressionStep

__all__ = ["RegMean", "accumulate_gram"]


class RegMean(GramRegressionStep):
    """Fits layers to the outputs of all models by linear regression."""

    name: ClassVar[str] = "regmean"
    off_diagonal_scale: float = Field(
        0.9, ge=0, le=1, description="factor of the off-diagonal entries of the Gram matrices"
    )
    ridge: float = Field(1e-9, gt=0)

    def scale_gram(self, gram: Tensor) -> Tensor:
        """The Gram matrix with smaller off-diagonal entries."""
        return gram * self.off_diagonal_scale + torch.diag(gram.diagonal()) * (1 - self.off_diagonal_scale)

    def compute_mixing(self, grams: Sequence[Tensor], share: Sequence[float]) -> list[Tensor]:
        """M_i = w_i G_i (sum_j w_j G_j)^-1 with a ridge; they sum to the identity."""
        total = torch.stack(list(grams)).sum(0)
        ridge = self.ridge * total.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        for w, found in zip(share, grams, strict=True):
            found.diagonal().add_(w * ridge)
        total.diagonal().add_(ridge)
        return [torch.linalg.solve(total, found, left=False) for found in grams]


def accumulate_gram(total: Tensor, inputs: Tensor) -> None:
    """Adds sum x x^T over inputs x [n, in] to ``total`` [in, in], in double."""
    rows = inputs.double()
    total.addmm_(rows.T, rows)
