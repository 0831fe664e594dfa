"""Weighted mean: weight each client update by its number of examples, or all equally.

What: delta = sum_i w_i delta_i with w_i = n_i / sum n, summed in double precision in client order. Clients with packed
texts count their targets instead, unless ``train.weigh_by`` is ``examples``.
Memory: one chunk of one tensor per step, for any number of client updates.
Use when: clients start from one state and stay close to it. It is exact for LoRA when all clients share one factor.
Avoid when: clients train long, have different starts, or may be faulty. One bad update can move the mean without limit.
Source: McMahan et al. (arXiv 1602.05629), Algorithm 1.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedtune.merging._step import CombineStep, MergeInput, Shape
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["Mean"]


class Mean(CombineStep):
    """The mean of the deltas."""

    name: ClassVar[str] = "mean"
    averages: ClassVar[bool] = True
    weighting: Literal["examples", "equal"] = "examples"

    def compute_client_weights(self, num_examples: Sequence[int]) -> list[float]:
        """Weights by the number of examples, or equal weights."""
        counts = num_examples if self.weighting == "examples" else [1] * len(num_examples)
        return [count / sum(counts) for count in counts]

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The weighted sum of each chunk."""
        for start, stop in iter_row_chunks(shape):
            total = merge_inputs[0].read_rows(name, start, stop).double() * merge_inputs[0].weight
            for merge_input in merge_inputs[1:]:
                total.add_(merge_input.read_rows(name, start, stop).double(), alpha=merge_input.weight)
            yield total.to(torch.float32)
