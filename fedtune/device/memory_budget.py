"""A device estimates before training whether a round fits its memory budget."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.accelerator import fork_random_state, move_tensors
from fedtune.algorithms import count_copies
from fedtune.data import EncodedDataset
from fedtune.device.held_memory import read_held_bytes
from fedtune.errors import MemoryBudgetError
from fedtune.memory import StorageMeter, read_allocated_bytes
from fedtune.recipe.schema import Train
from fedtune.techniques import begin_round, begin_step, list_local_tensors, list_trainable_tensors
from fedtune.training import RunContext, compute_step_loss, get_tensor_shapes, set_train_mode, use_cpu_threads
from fedtune.training.micro_batches import can_split_batch
from fedtune.training.training_rows import TrainingRows, make_training_rows

__all__ = ["MemoryEstimate", "choose_micro_batch_size", "estimate_memory"]

_MOMENTS = {"sgd": 0.0, "adamw": 2.0}
_MOMENTS_8BIT = 0.5
"""Values of optimiser state per trained value."""
_AFTERWARDS = 2.0
"""Values per trained value after training: the delta, and its copy in the payload."""
_ALLOCATOR = 0.5
"""Values per trained value that the allocator does not return, as measured on models with many layers."""


class MemoryEstimate(NamedTuple):
    """The memory of a round in bytes: a fixed amount, and an amount per example of a micro-batch.

    It is what the process needs of its resident memory, and on an accelerator also what torch holds there: many small
    boards use the same memory for both.
    """

    fixed_bytes: float
    bytes_per_example: float

    def estimate_total_bytes(self, examples: int) -> int:
        """Return the bytes for micro-batches of so many examples."""
        return math.ceil(self.fixed_bytes + self.bytes_per_example * examples)


def choose_micro_batch_size(
    context: RunContext, rows: NDArray[np.int64], round_number: int, budget: int, halvings: int = 0
) -> int | None:
    """Return the largest micro-batch size whose step fits ``budget`` bytes; None if the whole batch fits.

    The batch is halved until it fits, and at least ``halvings`` times. A model whose norms use batch statistics is
    never split. Raise MemoryBudgetError if the smallest size does not fit.
    """
    batch = min(context.recipe.train.batch_size, len(_training_rows(context, rows).rows))
    needed = estimate_memory(context, rows, round_number)
    may_cut = can_split_batch(context.task, context.model)
    sizes = [batch >> count for count in range(batch.bit_length())] if may_cut else [batch]
    for size in sizes[min(halvings, len(sizes) - 1) :]:
        if needed.estimate_total_bytes(size) <= budget:
            return None if size == batch else size
    whole = "even one example at a time" if may_cut else "as its batch norms need whole batches"
    raise MemoryBudgetError(
        f"a step needs about {_megabytes(needed.estimate_total_bytes(sizes[-1]))} MB of memory, {whole}, "
        f"and this device allows {_megabytes(budget)} MB",
        code="memory-step",
        counts={"needed_mb": _megabytes(needed.estimate_total_bytes(sizes[-1])), "allowed_mb": _megabytes(budget)},
    )


def estimate_memory(context: RunContext, rows: NDArray[np.int64], round_number: int) -> MemoryEstimate:
    """Estimate memory from the memory in use now, the memory that training adds, and the memory per example.

    A model that trains other tensors in the next round is estimated in both, since the estimate holds for the run. The
    memory per example is extrapolated from steps on one and two copies of the longest example, or of the longest packed
    row, which need little memory.
    """
    numbers = [round_number, round_number + 1]
    if len({frozenset(_list_trained(context, number)) for number in reversed(numbers)}) == 1:
        numbers = [round_number]
    found = [_estimate_round(context, rows, number) for number in numbers]
    begin_round(context.techniques, context.model, round_number)
    return MemoryEstimate(max(one.fixed_bytes for one in found), max(one.bytes_per_example for one in found))


def _list_trained(context: RunContext, round_number: int) -> list[str]:
    begin_round(context.techniques, context.model, round_number)
    return list_trainable_tensors(context.model)


def _estimate_round(context: RunContext, rows: NDArray[np.int64], round_number: int) -> MemoryEstimate:
    model, settings = context.model, context.recipe.train
    begin_round(context.techniques, model, round_number)
    count = sum(
        math.prod(shape)
        for name, shape in get_tensor_shapes(model).items()
        if name in {*list_trainable_tensors(model), *list_local_tensors(model)}
    )
    per_trained = _per_trained(settings) + count_copies(context.recipe)
    added = 4 * (count * per_trained + _mastered(model))
    data = _training_rows(context, rows)
    one, two = (_kept(context, data.examples, _longest(data, count), round_number) for count in (1, 2))
    held = read_held_bytes() + read_allocated_bytes(context.device)
    return MemoryEstimate(held + added + 2 * one - two, two - one)


def _per_trained(settings: Train) -> float:
    """Return values of four bytes per trained value, besides itself: in training, its gradient and its moments."""
    moments = _MOMENTS.get(settings.optimiser, _MOMENTS_8BIT) + (settings.momentum > 0)
    return max(1 + moments, _AFTERWARDS) + _ALLOCATOR


def _mastered(model: nn.Module) -> int:
    """Return the number of trained values that have an fp32 master copy."""
    trained_ones = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return sum(one.numel() for one in trained_ones if one.dtype in (torch.bfloat16, torch.float16))


def _training_rows(context: RunContext, rows: NDArray[np.int64]) -> TrainingRows:
    """Return the rows that batches consist of. The lengths of packed rows do not depend on the seed."""
    return make_training_rows(context.train, rows, context.recipe.train, lambda _: 0)


def _longest(data: TrainingRows, count: int) -> list[int]:
    """Return the row of the longest example, ``count`` times."""
    lengths, rows = data.examples.lengths, data.rows
    first = int(rows[0]) if lengths is None else int(rows[int(lengths[torch.from_numpy(rows)].argmax())])
    return [first] * count


def _kept(context: RunContext, examples: EncodedDataset, chosen: list[int], round_number: int) -> int:
    """Return the peak bytes of a step on the chosen rows, without gradients."""
    batch = move_tensors(examples.make_batch(chosen), context.device)
    set_train_mode(context.model)
    with use_cpu_threads(context.recipe.train.threads), fork_random_state(context.device):
        begin_step(context.techniques, context.model, batch, round_number / context.recipe.federation.rounds)
        with StorageMeter(excluded=[*context.model.parameters(), *context.model.buffers()]) as meter:
            _run_step(context, batch)
    context.model.zero_grad()
    return meter.peak_bytes


def _run_step(context: RunContext, batch: Mapping[str, Tensor]) -> None:
    """Run the forward and the backward pass; techniques that estimate gradients have forward passes alone."""
    if any(technique.estimates_gradients for technique in context.techniques):
        with torch.no_grad():
            compute_step_loss(context.task, context.model, batch)
    else:
        compute_step_loss(context.task, context.model, batch).backward()


def _megabytes(count: int) -> int:
    return round(count / 1e6)
