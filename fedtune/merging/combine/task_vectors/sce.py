"""SCE: merge the entries in which models differ most, weighting each model by how much it changed there.

What: select the fraction ``select_topk`` of entries with the largest variance over models. Calculate one coefficient
per tensor and model: the mean of its squared selected entries divided by the sum over models. Erase entries whose sign
differs from sum_i x_i, and average the rest by coefficient. The weights of the models are not used.
Memory: one chunk per model and 4 MB. Each delta is read four or five times with selection, otherwise twice. If a tensor
of all models fits 16 MB, its deltas are read once.
Use when: you merge fine-tunes of one base from different sources and do not want to choose weights.
Avoid when: the delta of one model is much larger for no good reason (a higher learning rate), because this model
dominates.
Adapters: this step is refused when clients send one LoRA factor (alternating LoRA, or A frozen). It selects entries of
the factor by sign or size, but one product can be written with different factors, so equal updates would give different
results.
Source: Wan et al., FuseChat (arXiv 2408.07990). As in mergekit, the fraction counts only entries in which models
differ. mergekit uses equal weights if the squares sum to less than 1e-6; this step never does.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.merging._step import CombineStep, MergeInput, Shape
from fedtune.merging.combine._inner_products import add_rows_in_order, compute_row_dots
from fedtune.merging.combine.task_vectors._delta_cache import cache_small_deltas
from fedtune.merging.combine.task_vectors._magnitude_selection import (
    MagnitudeThreshold,
    count_entries_to_keep,
    find_threshold,
)
from fedtune.merging.combine.task_vectors._task_vector_step import iter_delta_chunks
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["Sce"]

Stacks = Callable[[], Iterator[Tensor]]


class Sce(CombineStep):
    """Selects entries, calculates coefficients and erases minority signs."""

    name: ClassVar[str] = "sce"
    min_models: ClassVar[int] = 2
    sparsifies: ClassVar[bool] = True
    selects_entries: ClassVar[bool] = True
    select_topk: float = Field(1.0, gt=0, le=1, description="fraction of entries selected by variance")

    def compute_client_weights(self, num_examples: Sequence[int]) -> list[float]:
        """Equal weights."""
        return [1 / len(num_examples)] * len(num_examples)

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The merged delta of each chunk."""
        select = self._select_entries(partial(_iter_stacks, name, shape, cache_small_deltas(name, shape, merge_inputs)))
        coefficients = _compute_coefficients(select(), len(merge_inputs))
        chosen = select()
        for start, stop in iter_row_chunks(shape):
            total = _erase_minority_signs(next(chosen), coefficients)
            yield total.float().reshape(stop - start, *shape[1:])

    def _select_entries(self, stacks: Stacks) -> Stacks:
        """The stacks with zeros for entries of small variance."""
        if self.select_topk == 1:
            return stacks
        sizes = [(int(found.count_nonzero()), found.numel()) for found in map(_compute_variance, stacks())]
        differing, size = (sum(numbers) for numbers in zip(*sizes, strict=True)) if sizes else (0, 0)
        keep = count_entries_to_keep(self.select_topk, differing)
        return partial(_keep_selected, find_threshold(lambda: map(_compute_variance, stacks()), keep, size), stacks)


def _iter_stacks(name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
    """The deltas of all models in each chunk [K, rows, width]."""
    streams = [iter_delta_chunks(name, shape, merge_input) for merge_input in merge_inputs]
    for _ in iter_row_chunks(shape):
        yield torch.stack([next(stream) for stream in streams])


def _compute_variance(stack: Tensor) -> Tensor:
    """The variance over the models of a stack [K, rows, width], computed model by model to save memory."""
    mean = stack.sum(0, dtype=torch.float64) / len(stack)
    total = torch.zeros_like(mean)
    for part in stack:
        total += (part - mean).square_()
    return (total / len(stack)).float()


def _keep_selected(cut: MagnitudeThreshold, stacks: Stacks) -> Iterator[Tensor]:
    inside = cut.make_mask_function()

    def keep_inside(stack: Tensor) -> Tensor:
        return stack.mul_(inside(_compute_variance(stack)))

    return map(keep_inside, stacks())


def _erase_minority_signs(stack: Tensor, coefficients: Tensor) -> Tensor:
    """The mean by coefficient [K] of the entries that have the sign of their sum, a tie being positive; double."""
    positive = stack.sum(0, dtype=torch.float64) >= 0
    total, over = (torch.zeros(positive.shape, dtype=torch.float64) for _ in range(2))
    for part, coefficient in zip(stack, coefficients, strict=True):
        agree = torch.where(positive, part > 0, part < 0)
        total.addcmul_(part, agree * coefficient)
        over.add_(agree, alpha=float(coefficient))
    return total / torch.where(over > 0, over, 1.0)


def _compute_coefficients(stacks: Iterable[Tensor], count: int) -> Tensor:
    """Each model's share of the summed squares; equal shares if all are zero."""
    total = torch.zeros(count, dtype=torch.float64)
    for stack in stacks:
        total = add_rows_in_order(
            total, torch.stack([compute_row_dots(part.double(), part.double()) for part in stack], 1)
        )
    return (total / total.sum()).nan_to_num(1 / count)
