"""Weighted mean: each contribution counts by its number of examples, or all count the same.

What: delta = sum_i w_i delta_i with w_i = n_i / sum n, summed in double precision in client order.
Memory: one piece of one tensor per step, whatever the number of contributions.
Use when: clients start from one state and stay near it. It is exact for LoRA when one factor is common to all.
Avoid when: clients run long, start apart, or some may be faulty: one bad contribution moves the mean without bound.
Source: McMahan et al. (arXiv 1602.05629), Algorithm 1.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedtune.merging._step import Combine

__all__ = ["Mean"]


class Mean(Combine):
    """The mean of the deltas."""

    name: ClassVar[str] = "mean"
    weight: Literal["examples", "equal"] = "examples"

    def weights(self, examples: Sequence[int]) -> list[float]:
        """Shares of the examples, or equal shares."""
        counts = examples if self.weight == "examples" else [1] * len(examples)
        return [count / sum(counts) for count in counts]

    def combine(self, weights: Sequence[float], deltas: Iterable[Tensor]) -> Tensor:
        """The weighted sum, in the deltas' precision."""
        pairs = zip(weights, deltas, strict=True)
        weight, first = next(pairs)
        total = first.double() * weight
        for weight, delta in pairs:
            total.add_(delta.double(), alpha=weight)
        return total.to(torch.float32)
