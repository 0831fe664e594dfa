"""The best approximation of a low-rank matrix by one of smaller rank, from a core as small as its rank.

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
    """An approximation, and the Frobenius norms of what it misses and of what was to be approximated."""

    factors: LowRankFactors
    dropped_norm: float
    total_norm: float

    @property
    def relative_error(self) -> float:
        """Relative; zero for a matrix of zeros."""
        return compute_relative_error(self.dropped_norm, self.total_norm)


def compute_core(factors: LowRankFactors) -> FactorCore:
    """The product between orthonormal bases of its columns and rows."""
    q1, r1 = torch.linalg.qr(factors.b.double() * factors.scale)
    q2, r2 = torch.linalg.qr(factors.a.double().T)
    return FactorCore(q1, r1 @ r2.T, q2.T)


def truncate_product(
    factors: LowRankFactors, rank: int | None = None, energy: float | None = None, scale: float = 1.0
) -> TruncatedProduct:
    """The best approximation of at most ``rank``, or that keeps a share ``energy`` of the squared norm; fp64.

    With neither the product is kept as a whole. The factors share the singular values evenly; ``scale`` is theirs.
    """
    q1, core, q2 = compute_core(factors)
    made = truncate_matrix(core, rank, energy, scale)
    return made._replace(factors=LowRankFactors(q1 @ made.factors.b, made.factors.a @ q2, scale))


def truncate_matrix(
    matrix: Tensor, rank: int | None = None, energy: float | None = None, scale: float = 1.0
) -> TruncatedProduct:
    """``truncate_product`` of a matrix that is there as a whole."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    count = count_kept_singular_values(s, rank, energy)
    root = (s[:count] / abs(scale)).sqrt()
    b, a = u[:, :count] * root, root[:, None] * vh[:count]
    missed, whole = (float(torch.linalg.vector_norm(part)) for part in (s[count:], s))
    return TruncatedProduct(LowRankFactors(b if scale > 0 else -b, a, scale), missed, whole)


def count_kept_singular_values(s: Tensor, rank: int | None, energy: float | None) -> int:
    """How many singular values stay: the smallest number with the energy, no more than ``rank``."""
    most = len(s) if rank is None else min(rank, len(s))
    if energy is None:
        return most
    square = s.double().square()
    reached = square.cumsum(0) >= energy * square.sum() * (1 - 1e-12)
    enough = int((~reached).sum()) + 1 if bool(square.any()) else 0
    return min(enough, most)
