"""Linear heads in closed form from feature sums. All arithmetic is in double precision."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.continual._feature_sums import FeatureSums, unpack_triangle
from fedtune.errors import RecipeError

__all__ = [
    "RIDGE_GRID",
    "UNSEEN_BIAS",
    "LinearHead",
    "choose_ridge_by_halves",
    "choose_ridge_by_validation",
    "fit_ridge",
    "fit_slda",
    "score_features",
]

RIDGE_GRID = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
UNSEEN_BIAS = -1e9
"""The bias of a class without examples, which therefore never wins. It is finite, because states are subtracted."""


class LinearHead(NamedTuple):
    """Weight [C, d] and bias [C] of a classifier, double."""

    weight: Tensor
    bias: Tensor


def fit_slda(sums: FeatureSums, shrinkage: float) -> LinearHead:
    """Return the head of linear discriminant analysis with equal priors (Hayes and Kanan, arXiv 1909.01520, eq. 1-3).

    The pooled covariance within classes is shrunk towards its mean variance: (1 - e) Sw + e tr(Sw) / d. Without
    shrinkage it must be invertible; RecipeError otherwise.
    """
    seen = sums.counts > 0
    means = sums.totals / sums.counts.clamp_min(1)[:, None]
    gram = unpack_triangle(sums.gram, sums.num_features)
    within = (gram - (sums.totals.T @ means)) / sums.counts.sum()
    within = (within + within.T) / 2
    if not shrinkage:
        _require_full_rank(within)
    floor = shrinkage * within.diagonal().mean()
    weight = _solve_with_floor((1 - shrinkage) * within, floor, means.T).T
    return _mark_unseen(LinearHead(weight, -(weight * means).sum(1) / 2), seen)


def _require_full_rank(covariance: Tensor) -> None:
    if torch.linalg.eigvalsh(covariance)[0] <= 1e-12 * covariance.diagonal().max():
        raise RecipeError(
            f"analytic: slda cannot invert the covariance of {len(covariance)} features without shrinkage, because "
            "the examples do not span them; set shrinkage above 0, for example 0.1"
        )


def _solve_with_floor(matrix: Tensor, floor: Tensor, right: Tensor) -> Tensor:
    """Return (M + floor I)^-1 ``right``. If rounding made M indefinite, its negative eigenvalues count as 0."""
    shifted = matrix.clone()
    shifted.diagonal().add_(floor)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if not failed:
        return torch.cholesky_solve(right.contiguous(), factor)
    values, vectors = torch.linalg.eigh(matrix)
    solved: Tensor = vectors @ ((vectors.T @ right) / (values.clamp_min(0) + floor)[:, None])
    return solved


def fit_ridge(sums: FeatureSums, ridge: float) -> LinearHead:
    """Return the head of least squares to one-hot targets: (G + l I)^-1 S^T with l = ridge tr(G) / d, no bias.

    Old classes have target 0 for new examples from the start, so a new class only adds a row.
    """
    gram = unpack_triangle(sums.gram, sums.num_features)
    weight = _solve_with_floor(gram, ridge * gram.diagonal().mean(), sums.totals.T).T
    return _mark_unseen(LinearHead(weight, torch.zeros_like(sums.counts)), sums.counts > 0)


def _mark_unseen(head: LinearHead, seen: Tensor) -> LinearHead:
    return LinearHead(head.weight * seen[:, None], head.bias.masked_fill(~seen, UNSEEN_BIAS))


def score_features(head: LinearHead, features: Tensor) -> Tensor:
    """Return the logits [n, C] of features [n, d], double."""
    return features.double() @ head.weight.T + head.bias


def choose_ridge_by_validation(
    sums: FeatureSums, features: Tensor, labels: Tensor, grid: Sequence[float] = RIDGE_GRID
) -> float:
    """Return the ridge with the most correct validation examples of the classes seen; the largest of equal ones."""
    seen = sums.counts[labels] > 0

    def count_errors(ridge: float) -> float:
        predictions = score_features(fit_ridge(sums, ridge), features[seen]).argmax(1)
        return float((predictions != labels[seen]).sum())

    return _choose_least(grid, count_errors)


def choose_ridge_by_halves(one: FeatureSums, other: FeatureSums, grid: Sequence[float] = RIDGE_GRID) -> float:
    """Return the ridge whose head, fitted to one half, has the least squared error on the other half, both ways.

    The squared error of a linear head is a function of the sums, so no examples are needed.
    """
    return _choose_least(
        grid, lambda ridge: _squared_error(fit_ridge(one, ridge), other) + _squared_error(fit_ridge(other, ridge), one)
    )


def _choose_least(grid: Sequence[float], compute_error: Callable[[float], float]) -> float:
    return min(sorted(grid, reverse=True), key=compute_error)


def _squared_error(head: LinearHead, sums: FeatureSums) -> float:
    """Return sum |y - W x|^2 = N - 2 <W, S> + <W G, W> over the examples of the sums."""
    gram = unpack_triangle(sums.gram, sums.num_features)
    weight = head.weight
    return float(sums.counts.sum() - 2 * (weight * sums.totals).sum() + ((weight @ gram) * weight).sum())
