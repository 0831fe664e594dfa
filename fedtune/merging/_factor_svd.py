"""The best approximation of a low-rank matrix by one of smaller rank, computed from a small core.

With B = Q1 R1 and A^T = Q2 R2 the singular values of B A are those of the core R1 R2^T, R x R, so that the cost is
O((d + k) R^2 + R^3) in place of O(d k min(d, k)).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.merging._low_rank_factors import LowRankFactors, compute_relative_error

__all__ = [
    "FactorCore",
    "TruncatedProduct",
    "compute_core",
    "count_kept_singular_values",
    "truncate_matrix",
    "truncate_product",
]


class FactorCore(NamedTuple):
    """q1 @ core @ q2, with orthonormal columns of q1 [d, R] and rows of q2 [R, k]; fp64."""

    q1: Tensor
    core: Tensor
    q2: Tensor


class TruncatedProduct(NamedTuple):
    """An approximation, and the Frobenius norms of its error and of the exact matrix."""

    factors: LowRankFactors
    dropped_norm: float
    total_norm: float

    @property
    def relative_error(self) -> float:
        """The relative error; zero for a matrix of zeros."""
        return compute_relative_error(self.dropped_norm, self.total_norm)


def compute_core(factors: LowRankFactors) -> FactorCore:
    """Return the product in orthonormal bases of its columns and rows."""
    q1, r1 = torch.linalg.qr(factors.b.double() * factors.scale)
    q2, r2 = torch.linalg.qr(factors.a.double().T)
    return FactorCore(q1, r1 @ r2.T, q2.T)


def truncate_product(
    factors: LowRankFactors, rank: int | None = None, energy: float | None = None, scale: float = 1.0
) -> TruncatedProduct:
    """Return the best approximation of at most ``rank``, or with the fraction ``energy`` of the squared norm; fp64.

    Without both limits, nothing is truncated. Both factors contain the square roots of the singular values, and
    ``scale`` is the scale of the returned factors.
    """
    q1, core, q2 = compute_core(factors)
    made = truncate_matrix(core, rank, energy, scale)
    return made._replace(factors=LowRankFactors(q1 @ made.factors.b, made.factors.a @ q2, scale))


def truncate_matrix(
    matrix: Tensor, rank: int | None = None, energy: float | None = None, scale: float = 1.0
) -> TruncatedProduct:
    """Do the same as ``truncate_product`` for a dense matrix."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    count = count_kept_singular_values(s, rank, energy)
    root = (s[:count] / abs(scale)).sqrt()
    b, a = u[:, :count] * root, root[:, None] * vh[:count]
    missed, whole = (float(torch.linalg.vector_norm(part)) for part in (s[count:], s))
    return TruncatedProduct(LowRankFactors(b if scale > 0 else -b, a, scale), missed, whole)


def count_kept_singular_values(s: Tensor, rank: int | None, energy: float | None) -> int:
    """Return the smallest number of singular values with the energy, at most ``rank``."""
    most = len(s) if rank is None else min(rank, len(s))
    if energy is None:
        return most
    square = s.double().square()
    reached = square.cumsum(0) >= energy * square.sum() * (1 - 1e-12)
    enough = int((~reached).sum()) + 1 if bool(square.any()) else 0
    return min(enough, most)
