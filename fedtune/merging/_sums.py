"""Weighted sums of several models' rows, entry by entry.

Up to ``_FEW`` terms are added in single precision, each with one rounding where the processor has fused
multiply-adds: the sum is off by a unit or two in its last place, measured by its largest term, in a quarter of the
time. Rounding adds up with the number of terms, so more of them are added in double precision. Terms of one weight are
added first and divided once: of half-precision models nothing but the quotient is rounded.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["precision_for", "sum_terms", "sum_weighted"]

_FEW = 8


def precision_for(count: int) -> torch.dtype:
    """The precision in which so many terms are added."""
    return torch.float32 if count <= _FEW else torch.float64


def sum_weighted(parts: Iterable[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """sum_i w_i x_i of rows that are taken one at a time, in ``precision_for`` their number.

    A weight is a number, or broadcasts to the rows.
    """
    dtype, first = precision_for(len(weights)), weights[0]
    if isinstance(first, Tensor) or any(weight != first for weight in weights):
        return sum_terms(zip(parts, weights, strict=True), dtype)
    total = sum_terms(zip(parts, [1.0] * len(weights), strict=True), dtype)
    return total.div_(1 / first if first else math.inf)


def sum_terms(terms: Iterable[tuple[Tensor, float | Tensor]], dtype: torch.dtype) -> Tensor:
    """sum_i x_i c_i over pairs (x_i, c_i) of which one at a time is held; c_i is a number or broadcasts to x_i."""
    iterator = iter(terms)
    rows, share = next(iterator)
    total = rows.to(dtype) * (share.to(dtype) if isinstance(share, Tensor) else share)
    for rows, share in iterator:
        if isinstance(share, Tensor):
            total.addcmul_(rows.to(dtype), share.to(dtype))
        else:
            total.add_(rows.to(dtype), alpha=share)
    return total
