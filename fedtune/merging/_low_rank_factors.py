"""Sums, means and inner products of low-rank matrices, computed from their factors without forming a product.

D_i = s_i B_i A_i is what client i adds to a weight. The mean of the products is D = sum_i w_i D_i; the product of the
means of the factors is another matrix, and the difference is the factors' covariance over the clients.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "LowRankFactors",
    "average_factors",
    "compute_averaging_error",
    "compute_averaging_residual",
    "compute_inner_product",
    "compute_product_norm",
    "compute_relative_error",
    "pad_factors",
    "stack_factors",
]


class LowRankFactors(NamedTuple):
    """scale * b @ a with b [d, r] and a [r, k]; r may be zero."""

    b: Tensor
    a: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The number of columns of b, whatever their values."""
        return len(self.a)

    def compute_rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` of the product [stop - start, k], in fp64."""
        return self.b[start:stop].double() * self.scale @ self.a.double()


def stack_factors(factors: Sequence[LowRankFactors], weights: Sequence[float]) -> LowRankFactors:
    """Return sum_i w_i s_i B_i A_i exactly: B = [B_1 B_2 ..], A = the rows of all w_i s_i A_i; fp64. The ranks add up.

    Wang et al., "FLoRA" (arXiv 2409.05976). Factors of weight zero are left out.
    """
    used = [(one, weight) for one, weight in zip(factors, weights, strict=True) if weight] or [(factors[0], 0.0)]
    b = torch.cat([one.b.double() for one, _ in used], 1)
    return LowRankFactors(b, torch.cat([one.a.double() * (weight * one.scale) for one, weight in used]))


def compute_inner_product(one: LowRankFactors, other: LowRankFactors) -> float:
    """<D, D'> = s s' sum((B^T B') * (A A'^T)), in O((d + k) r r')."""
    left = one.b.double().T @ other.b.double()
    right = one.a.double() @ other.a.double().T
    return one.scale * other.scale * float((left * right).sum())


def compute_product_norm(factors: LowRankFactors) -> float:
    """Return the Frobenius norm of the product."""
    return math.sqrt(max(0.0, compute_inner_product(factors, factors)))


def pad_factors(factors: LowRankFactors, rank: int) -> LowRankFactors:
    """Return the first ``rank`` columns of b and rows of a, padded with zeros."""
    more = rank - factors.rank
    return LowRankFactors(F.pad(factors.b, (0, more)), F.pad(factors.a, (0, 0, 0, more)), factors.scale)


def average_factors(factors: Sequence[LowRankFactors], weights: Sequence[float]) -> LowRankFactors:
    """(sum_i w_i B_i)(sum_i w_i A_i), which is not the mean of the products; fp64, of the largest rank.

    Smaller ranks are padded with zeros. Scales that differ from the first one are multiplied into B.
    """
    b, a, _ = _stack_padded(factors, weights)
    weight = torch.tensor(weights, dtype=torch.float64)
    return LowRankFactors(torch.tensordot(weight, b, 1), torch.tensordot(weight, a, 1), factors[0].scale)


def compute_averaging_residual(factors: Sequence[LowRankFactors], weights: Sequence[float]) -> LowRankFactors:
    """The residual of ``average_factors``: sum_i w_i (B_i - Bbar)(A_i - Abar) = D - Bbar Abar; sum_i w_i = 1; fp64.

    As the centred A_i sum to zero, B_K may stand in for Bbar, so that K - 1 of the K blocks are left.
    """
    b, a, used = _stack_padded(factors, weights)
    weight = torch.tensor(weights, dtype=torch.float64)[:, None, None]
    left, right = b - b[used[-1]], a - a[used[-1]]
    left, right = left[used[:-1]], (weight * (right - (weight * right).sum(0)))[used[:-1]]
    flat = left.permute(1, 0, 2).reshape(b.shape[1], -1)
    return LowRankFactors(flat, right.reshape(-1, a.shape[2]), factors[0].scale)


def compute_averaging_error(factors: Sequence[LowRankFactors], weights: Sequence[float]) -> float:
    """||D - Bbar Abar|| / ||D|| by the covariance identity; zero where one factor is common, see below."""
    return compute_relative_error(
        compute_product_norm(compute_averaging_residual(factors, weights)),
        compute_product_norm(stack_factors(factors, weights)),
    )


def compute_relative_error(missed: float, whole: float) -> float:
    """The norm of an error relative to that of the exact result: infinite where the exact result is zero."""
    if not missed:
        return 0.0
    return missed / whole if whole else math.inf


def _stack_padded(factors: Sequence[LowRankFactors], weights: Sequence[float]) -> tuple[Tensor, Tensor, list[int]]:
    """All B [K, d, r] and A [K, r, k] at the first's scale and the largest rank, and whose weight is not zero."""
    rank, scale = max(one.rank for one in factors), factors[0].scale
    wide = [pad_factors(one, rank) for one in factors]
    b = torch.stack([one.b.double() * (one.scale / scale) for one in wide])
    used = [place for place, weight in enumerate(weights) if weight] or [0]
    return b, torch.stack([one.a.double() for one in wide]), used
