"""Add deltas one after the other, each without what it would change in the main directions of the sum so far."""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["add_cleaned", "clean_delta"]


def add_cleaned(deltas: Iterable[Tensor], alpha: float) -> Tensor:
    """S_t = S_(t-1) + cleaned delta t, for matrices [rows, width]; double."""
    iterator = iter(deltas)
    total = next(iterator).double()
    for delta in iterator:
        total = total + clean_delta(total, delta.double(), alpha)
    return total


def clean_delta(total: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """The delta without its part along the singular vectors u_i, v_i of ``total``.

    With P = U^T delta V, the entries of P between the first k directions are removed, and the diagonal of P. k is the
    first place at which the singular values up to it have more than the fraction ``alpha`` of their sum, counted from
    zero. Directions of singular values that are rounding errors count as no directions.
    """
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    rank = int((s > s[:1] * max(total.shape) * torch.finfo(s.dtype).eps).sum())
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    place = min(rank, int((s.cumsum(0) <= alpha * s.sum()).sum()))
    along = u.T @ delta @ vh.T
    removed = torch.diag(along.diagonal())
    removed[:place, :place] = along[:place, :place]
    found: Tensor = delta - u @ removed @ vh
    return found
