"""Find the largest entries of a tensor by magnitude, chunk by chunk, with little extra memory.

Sizes are compared as whole numbers, which order floating-point numbers without sign, NaN above all.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["INTEGER_DTYPES", "mask_largest_per_row"]

INTEGER_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types of whole numbers by their bytes."""

_PIECE = 1 << 18
"""Entries that are looked at together."""

_DIGIT = 16
"""Bits by which a long row is counted at a time."""


def mask_largest_per_row(rows: Tensor, keep: int) -> Tensor:
    """A mask [n, width] of the ``keep`` largest entries of each row; of equal ones those with the lowest index."""
    width = rows.shape[1]
    if width > _PIECE:
        return torch.stack([_of_long_row(row, keep) for row in rows])
    return torch.cat([_of_short_rows(few, keep) for few in rows.split(_PIECE // width)])


def _of_short_rows(rows: Tensor, keep: int) -> Tensor:
    sizes = _sizes(rows)
    bound = sizes.kthvalue(rows.shape[1] - keep + 1, dim=1, keepdim=True).values
    above, equal = sizes > bound, sizes == bound
    missing = keep - above.sum(1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))


def _of_long_row(row: Tensor, keep: int) -> Tensor:
    bound, missing = _bound(row, keep)
    mask = torch.empty_like(row, dtype=torch.bool)
    for part, sizes in zip(mask.split(_PIECE), _pieces(row), strict=True):
        equal = sizes == bound
        equal &= equal.cumsum(0, dtype=torch.int32) <= missing
        missing -= int(equal.sum())
        torch.logical_or(sizes > bound, equal, out=part)
    return mask


def _bound(row: Tensor, keep: int) -> tuple[int, int]:
    """The size of which, or above, there are ``keep``, and how many of just that size are among them."""
    bound, missing = 0, keep
    for shift in range(8 * row.element_size() - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64, device=row.device)
        for sizes in _pieces(row):
            leading = sizes.long() >> shift
            counts += (leading[leading >> _DIGIT == bound] - (bound << _DIGIT)).bincount(minlength=1 << _DIGIT)
        at_least = counts.flip(0).cumsum(0)
        digit = len(counts) - 1 - int((at_least < missing).sum())
        missing -= int(at_least[-digit - 1] - counts[digit])
        bound = (bound << _DIGIT) + digit
    return bound, missing


def _pieces(row: Tensor) -> Iterator[Tensor]:
    return (_sizes(piece) for piece in row.split(_PIECE))


def _sizes(values: Tensor) -> Tensor:
    return values.abs().view(INTEGER_DTYPES[values.element_size()])
