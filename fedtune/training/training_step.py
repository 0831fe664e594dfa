"""One training step of a client: the loss and the gradients of a batch, in micro-batches where memory is short.

The examples of a batch are on the CPU and move to the model's device one micro-batch at a time. If an accelerator runs
out of memory, or this process reaches its limit, the micro-batch is halved and the step begins again from the same
random state. Its gradients are those of the whole batch, except for rounding, and dropout, which draws anew for every
micro-batch.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtune.accelerator import find_device, is_out_of_memory, move_tensors, release_memory
from fedtune.data import EncodedDataset
from fedtune.errors import FedtuneWarning, MemoryBudgetError
from fedtune.memory import StorageMeter
from fedtune.techniques import begin_step
from fedtune.training.backward_updates import refuse_smaller_batch
from fedtune.training.client_round import ClientRound
from fedtune.training.micro_batches import can_split_batch, compute_loss_weights, split_into_micro_batches
from fedtune.training.step_loss import capture_logits, compute_step_loss
from fedtune.training.stream_training import add_memory_gradients, compute_method_terms

__all__ = ["StepResult", "run_step"]


class StepResult(NamedTuple):
    """The losses of a step's micro-batches with their shares of the predictions, still on the model's device.

    ``kept_bytes`` is the largest number of bytes that a micro-batch kept for backward, if that was measured.
    ``micro_batch_size`` is None if the whole batch passed at once.
    """

    losses: list[tuple[float, Tensor]]
    kept_bytes: int
    micro_batch_size: int | None

    def compute_loss(self) -> float:
        """Return the loss of the batch. This waits for an accelerator."""
        total = 0.0
        for share, loss in self.losses:
            total += share * float(loss)
        return total


def run_step(
    client: ClientRound,
    examples: EncodedDataset,
    rows: Sequence[int],
    progress: float,
    micro_batch_size: int | None,
    *,
    metered: bool,
) -> StepResult:
    """Compute the gradients of the loss on the rows, in smaller micro-batches if memory is too small.

    Raise MemoryBudgetError if the smallest ones do not fit either.
    """
    device, size = find_device(client.model), micro_batch_size
    while True:
        restore = _save_random_state(device)
        try:
            parts = split_into_micro_batches(rows, size or len(rows))
            compute = _add_gradients if client.estimator is None else _estimate_gradients
            return StepResult(*compute(client, examples, parts, progress, device, metered=metered), size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        client.model.zero_grad()  # outside the handler, whose error holds the tensors of the step
        release_memory(device)
        restore()
        size = _halve(client, size or len(rows), device)


def _halve(client: ClientRound, size: int, device: torch.device) -> int:
    """Return half the micro-batch size, with a warning."""
    if size == 1 or not can_split_batch(client.task, client.model):
        whole = "even one example at a time" if size == 1 else "and its batch cannot be split"
        raise MemoryBudgetError(
            f"a step needs more memory than {_name_memory(device)}, {whole}; lower train.batch_size or "
            "train.max_length, or add gradient-checkpointing",
            code="memory-short",
        )
    refuse_smaller_batch(client.recipe, size // 2)
    warnings.warn(
        f"client {client.client}: {device} ran out of memory in round {client.number}; it continues in micro-batches "
        f"of {size // 2}",
        FedtuneWarning,
        stacklevel=3,
    )
    return size // 2


def _name_memory(device: torch.device) -> str:
    return "this process may take" if device.type == "cpu" else f"{device} has"


def _save_random_state(device: torch.device) -> Callable[[], None]:
    """Return a function that restores the generators of the CPU and of an accelerator."""
    backends: list[Any] = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    states = [backend.get_rng_state() for backend in backends]

    def restore() -> None:
        for backend, state in zip(backends, states, strict=True):
            backend.set_rng_state(state)

    return restore


def _add_gradients(
    client: ClientRound,
    examples: EncodedDataset,
    rows: Sequence[Sequence[int]],
    progress: float,
    device: torch.device,
    *,
    metered: bool,
) -> tuple[list[tuple[float, Tensor]], int]:
    """Add the gradients of each micro-batch, given by its rows. Return their losses, and the bytes kept for backward.

    Micro-batches without predictions, such as texts of one token, are skipped.
    """
    losses: list[tuple[float, Tensor]] = []
    kept = 0
    parts = _make_micro_batches(client, examples, rows)
    for part in parts:
        loss, held = _pass_micro_batch(client, part, progress, device, metered=metered)
        kept = max(kept, held)
        (loss if len(rows) == 1 else loss * part.share).backward()
        losses.append((part.share, loss.detach()))
    if losses:
        add_memory_gradients(client.method_rounds)
    return losses, kept


def _estimate_gradients(
    client: ClientRound,
    examples: EncodedDataset,
    rows: Sequence[Sequence[int]],
    progress: float,
    device: torch.device,
    *,
    metered: bool,
) -> tuple[list[tuple[float, Tensor]], int]:
    """Let the round's estimator pass the micro-batches as often as it needs. Return the loss, and the bytes kept."""
    assert client.estimator is not None
    parts = _make_micro_batches(client, examples, rows)
    kept = [0]

    def compute_loss() -> Tensor:
        losses = []
        for part in parts:
            loss, held = _pass_micro_batch(client, part, progress, device, metered=metered)
            losses.append(loss if len(rows) == 1 else loss * part.share)
            kept.append(held)
        return torch.stack(losses).sum()

    losses = [(1.0, client.estimator.estimate_slope(compute_loss))] if parts else []
    return losses, max(kept)


class _MicroBatch(NamedTuple):
    """The rows of a micro-batch, its tensors on the CPU, and its share of the predictions."""

    rows: Sequence[int]
    tensors: Mapping[str, Tensor]
    share: float


def _make_micro_batches(
    client: ClientRound, examples: EncodedDataset, rows: Sequence[Sequence[int]]
) -> list[_MicroBatch]:
    """Return the micro-batches with predictions."""
    parts = [examples.make_batch(part) for part in rows]
    shares = compute_loss_weights(client.task, parts)
    return [_MicroBatch(*one) for one in zip(rows, parts, shares, strict=True) if one[2]]


def _pass_micro_batch(
    client: ClientRound, part: _MicroBatch, progress: float, device: torch.device, *, metered: bool
) -> tuple[Tensor, int]:
    """Return the loss of a micro-batch with all its terms, and the bytes kept for backward if they are measured."""
    model, methods = client.model, client.method_rounds
    batch = move_tensors(part.tensors, device)
    begin_step(client.techniques, model, batch, progress)
    excluded = [*model.parameters(), *model.buffers()] if metered else []
    with StorageMeter(excluded=excluded) if metered else nullcontext() as meter:
        with capture_logits(model, wanted=bool(methods)) as logits:
            loss = compute_step_loss(client.task, model, batch)
        terms = compute_method_terms(methods, part.rows, batch, logits)
        terms += client.algorithm_round.compute_batch_terms(batch)
        loss = torch.stack([loss, *terms]).sum() if terms else loss
        kept = meter.current_bytes if meter is not None else 0
    return loss, kept
