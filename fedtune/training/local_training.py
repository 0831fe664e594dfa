"""The local training of one client in one round, from the shared state to the delta of the trained tensors."""

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.data import EncodedDataset
from fedtune.errors import DataError, FedtuneWarning
from fedtune.memory import StorageMeter, peak_rss, release_freed, reset_peak_rss
from fedtune.recipe.schema import Train
from fedtune.tasks import Task
from fedtune.techniques import (
    StepInfo,
    Technique,
    UnfrozenBatchNorm2d,
    before_optimiser_step,
    begin_step,
    collect_loss_terms,
    compute_extra_payload,
    list_trainable_tensors,
)
from fedtune.training.batches import batches, total_steps
from fedtune.training.client_round import ClientRound
from fedtune.training.cpu_threads import use_cpu_threads
from fedtune.training.evaluation import score_held_out
from fedtune.training.master_weights import make_stepper, masters_of
from fedtune.training.micro_batches import compute_loss_weights, split_into_micro_batches
from fedtune.training.model_state import get_model_state, named_tensors
from fedtune.training.optimisers import LocalOptimiser, compute_lr_factor
from fedtune.training.received_state import receive_state
from fedtune.training.start import Start
from fedtune.training.training_rows import make_training_rows
from fedtune.training.uploaded_statistics import compute_uploaded_statistics
from fedtune.wire.client_update import HoldoutMetrics

IntArray = NDArray[np.int64]

__all__ = [
    "LocalTrainingResult",
    "apply_optimiser_step",
    "compute_step_loss",
    "freeze_batch_norm_statistics",
    "set_train_mode",
    "train_local_model",
]


@dataclass(frozen=True)
class LocalTrainingResult:
    """The result of one client's round: ``delta`` is trained minus received, in fp32.

    ``local_tensors`` stay on the device. ``holdout_metrics`` are those of the received model on the held-out examples,
    and ``trained_score`` those of the trained model.
    """

    delta: dict[str, Tensor]
    extra_payload: dict[str, Tensor]
    local_tensors: dict[str, Tensor]
    holdout_metrics: HoldoutMetrics
    trained_score: HoldoutMetrics
    num_examples: int
    train_loss: float
    seconds: float
    activation_bytes: int
    peak_rss: int


def train_local_model(client: ClientRound, state: Mapping[str, Tensor]) -> LocalTrainingResult:
    """Train the client's model from ``state`` on its examples.

    All random numbers are derived from (seed, round, client), so the result does not depend on earlier rounds in this
    process.
    """
    started = time.perf_counter()
    reset_peak_rss()
    model, recipe = client.model, client.recipe
    rows, held_out = client.split_rows()
    receive_state(client, state)
    names = list_trainable_tensors(model)
    start = Start(model, names, client.local_tensors, state)
    masters = masters_of(model, start)
    with use_cpu_threads(recipe.train.threads), torch.random.fork_rng(devices=[]):
        received_score = score_held_out(client, held_out.tolist())
        statistics = compute_uploaded_statistics(client, rows, names)
        torch.manual_seed(client.derive_seed("dropout"))
        release_freed()
        loss, saved_bytes, examples = _run_steps(client, rows, masters)
        release_freed()
        kept = {
            name: masters[name].detach() if name in masters else one
            for name, one in get_model_state(model, client.local_tensors).items()
        }
        delta = start.deltas({**named_tensors(model), **masters}, names)
        _warn_if_nothing_moved(
            [*delta.values(), *(kept[name] - one for name, one in client.local_tensors.items())], client
        )
        backward = partial(_run_extra_backward, client, rows)
        extras = {**statistics, **compute_extra_payload(client.techniques, model, client.number, backward)}
        trained_score = score_held_out(client, held_out.tolist())  # last, so that it cannot affect anything else
    seconds = time.perf_counter() - started
    scores = received_score, trained_score
    return LocalTrainingResult(delta, extras, kept, *scores, examples, loss, seconds, saved_bytes, peak_rss())


def _warn_if_nothing_moved(moves: Sequence[Tensor], client: ClientRound) -> None:
    if not any(bool(move.any()) for move in moves):
        warnings.warn(
            f"client {client.client} moved nothing in round {client.number}: no gradient arrives, or train.lr is lost "
            "in rounding",
            FedtuneWarning,
            stacklevel=3,
        )


def _run_extra_backward(client: ClientRound, rows: IntArray) -> None:
    """Compute the gradients of the loss on the client's first examples."""
    recipe = client.recipe
    parts = _make_micro_batches(client, client.examples, rows[: recipe.train.batch_size].tolist())
    client.model.eval()
    _run_step(client, parts, client.number / recipe.federation.rounds, metered=False)


def _make_micro_batches(client: ClientRound, examples: EncodedDataset, chosen: list[int]) -> list[dict[str, Tensor]]:
    size = client.micro_batch_size or len(chosen)
    return [examples.make_batch(part) for part in split_into_micro_batches(chosen, size)]


def _run_steps(client: ClientRound, rows: IntArray, masters: Mapping[str, nn.Parameter]) -> tuple[float, int, int]:
    """Run all steps of a round.

    Return the mean loss, the bytes kept for backward in the first step, and the examples seen.
    """
    model, recipe, settings = client.model, client.recipe, client.recipe.train
    data = make_training_rows(client.examples, rows, settings, client.derive_seed)
    steps = total_steps(len(data.rows), recipe)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()  # a client that failed earlier may have left gradients
    optimiser = make_stepper(settings, model, masters)
    set_train_mode(model)
    losses, saved_bytes, examples = [], 0, 0
    lengths = client.examples.lengths if settings.group_by_length else None
    order = batches(data.rows, settings.batch_size, steps, client.derive_seed("order"), lengths)
    for step, chosen in enumerate(order):
        progress = ((client.number - 1) + step / steps) / recipe.federation.rounds
        parts = _make_micro_batches(client, data.at_step(step), chosen)
        loss, kept = _run_step(client, parts, progress, metered=step == 0)
        saved_bytes = max(saved_bytes, kept)
        info = StepInfo(client.number, step, steps, settings.lr, settings.lr * compute_lr_factor(settings, progress))
        if loss is not None:
            apply_optimiser_step(model, client.techniques, optimiser, parameters, settings, info)
            losses.append(loss)
        examples += data.count_examples(chosen)
    if not losses:
        raise DataError(
            "no example of the client has a second token, so there is nothing to predict; bring longer texts"
        )
    return float(np.mean(losses)), saved_bytes, examples


def apply_optimiser_step(
    model: nn.Module,
    techniques: Sequence[Technique],
    optimiser: LocalOptimiser,
    parameters: Sequence[nn.Parameter],
    settings: Train,
    info: StepInfo,
) -> None:
    """Apply the gradients of a step and release them."""
    lr = before_optimiser_step(techniques, model, info)
    if settings.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    optimiser.step(lr)
    model.zero_grad()


def _run_step(
    client: ClientRound, parts: Sequence[Mapping[str, Tensor]], progress: float, *, metered: bool
) -> tuple[float | None, int]:
    """Compute the gradients of a batch's loss, one micro-batch at a time.

    Return the loss and, if ``metered``, the largest number of bytes that a micro-batch kept for backward. Micro-batches
    without predictions, such as texts of one token, are skipped. If all are skipped, the loss is None.
    """
    model, task, techniques = client.model, client.task, client.techniques
    excluded = [*model.parameters(), *model.buffers()]
    total, kept = 0.0, 0
    predicting = [(part, share) for part, share in zip(parts, compute_loss_weights(task, parts), strict=True) if share]
    for part, share in predicting:
        begin_step(techniques, model, part, progress)
        with StorageMeter(excluded=excluded) if metered else nullcontext() as meter:
            loss = compute_step_loss(task, model, part)
            kept = max(kept, meter.current_bytes if meter is not None else 0)
        (loss if len(parts) == 1 else loss * share).backward()
        total += share * float(loss.detach())
    return total if predicting else None, kept


def compute_step_loss(task: Task, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of a step: the task's loss plus the terms that techniques add inside the model."""
    with collect_loss_terms() as terms:
        loss = task.compute_loss(model, batch)
    return torch.stack([loss, *terms]).sum() if terms else loss


def set_train_mode(model: nn.Module) -> None:
    """Set the model to training mode. Batch norms stay in evaluation mode, except those that a technique trains."""
    model.train()
    freeze_batch_norm_statistics(model)


def freeze_batch_norm_statistics(model: nn.Module) -> None:
    """Let batch norms use the statistics of the pretrained model, except where a technique trains them."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, UnfrozenBatchNorm2d):
            layer.eval()
