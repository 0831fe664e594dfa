"""O-LoRA's term: how much the row space of a task's A overlaps with those of earlier tasks."""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["compute_overlap"]


def compute_overlap(present: Tensor, earlier: Iterable[Tensor]) -> Tensor:
    """Return sum_i sum_ab |A_i A^T|_ab, for A [rank, in]: the entrywise L1 norm, zero if all rows are orthogonal."""
    parts = [(one.detach() @ present.T).abs().sum() for one in earlier]
    return torch.stack(parts).sum() if parts else present.new_zeros(())
