"""low-rank: matrices as the product of two thin factors.

What: a matrix M [m, n] is sent as P [m, r] with orthonormal columns and Q = M^T P [n, r], and read as P Q^T. P spans
what ``iterations`` steps of subspace iteration find from random columns. Tensors of more dimensions are matrices with
the first one as rows.
Sends: r (m + n) values in place of m n. Vectors, and matrices that this makes no smaller, go to the next codec whole.
Defaults: rank 4, iterations 2.
Use when: whole matrices are trained; the factors can go on to int8.
Avoid when: clients train low-rank adapters, whose factors are thin already; take top-k.
Trap: a sum of products of clients has a higher rank than each. Without ``wire.error_feedback: ef21``, directions beyond
the rank never arrive.
Source: PowerSGD, Vogels et al. (arXiv 1905.13727), Algorithm 1. Here each client factors its own update, because
merges read single updates; the iteration starts from the seed and not from the last Q, so that devices keep nothing.
"""

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.wire.codecs._codec import Codec, CodecKind, Coded, Layout, Shape

__all__ = ["LowRank"]


class LowRank(Codec):
    """Sends two thin factors of each matrix."""

    name: ClassVar[str] = "low-rank"
    kind: ClassVar[CodecKind] = "factors"
    rank: int = Field(4, ge=1, le=4096, description="columns of each factor")
    iterations: int = Field(2, ge=1, le=10, description="steps of subspace iteration")

    def get_layout(self, shape: Shape) -> Layout:
        """No bytes; two factors, or the tensor itself."""
        rows, columns = _cut_shape(shape)
        if not self.changes(shape):
            return Layout(0, (shape,))
        return Layout(0, ((rows, self.rank), (columns, self.rank)))

    def encode(self, tensor: Tensor, seed: int) -> Coded:
        """The orthonormal factor first."""
        shape = tuple(tensor.shape)
        if not self.changes(shape):
            return Coded(b"", (tensor.detach(),))
        matrix = tensor.detach().reshape(_cut_shape(shape))
        random = torch.Generator().manual_seed(seed)
        right = torch.randn(matrix.shape[1], self.rank, generator=random, dtype=torch.float64).to(matrix.dtype)
        for _ in range(self.iterations):
            left = torch.linalg.qr(matrix @ right).Q
            right = matrix.mT @ left
        return Coded(b"", (left, right))

    def decode(self, content: bytes, tensors: Sequence[Tensor], shape: Shape, seed: int) -> Tensor:
        """Return the product, column by column: a matrix product would round differently on other processors."""
        if not self.changes(shape):
            return tensors[0].reshape(shape)
        left, right = tensors
        total = torch.zeros(_cut_shape(shape), dtype=left.dtype)
        for column in range(self.rank):
            total += left[:, column, None] * right[:, column]
        return total.reshape(shape)

    def changes(self, shape: Shape) -> bool:
        """Return whether two factors are smaller than the tensor."""
        rows, columns = _cut_shape(shape)
        return len(shape) > 1 and self.rank * (rows + columns) < rows * columns


def _cut_shape(shape: Shape) -> tuple[int, int]:
    """Return rows and columns of a tensor as a matrix."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)
