"""The local training of one client in one round, from the shared state to the delta of the trained tensors."""

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.accelerator import find_device, fork_random_state, move_tensors
from fedtune.errors import DataError, FedtuneWarning
from fedtune.memory import (
    AcceleratorMemory,
    peak_rss,
    read_accelerator_peak,
    release_freed,
    reset_accelerator_peak,
    reset_peak_rss,
)
from fedtune.techniques import (
    StepInfo,
    compute_extra_payload,
    list_trainable_tensors,
    make_step_estimator,
)
from fedtune.training.algorithm_training import begin_algorithm, end_algorithm
from fedtune.training.backward_updates import refuse_smaller_batch, update_in_backward
from fedtune.training.batches import batches, total_steps
from fedtune.training.client_round import ClientRound
from fedtune.training.cpu_threads import use_cpu_threads
from fedtune.training.drift_measurement import DriftMeasurement, measure_drift
from fedtune.training.evaluation import score_held_out
from fedtune.training.master_weights import make_stepper, masters_of
from fedtune.training.model_state import get_model_state, named_tensors
from fedtune.training.optimiser_step import apply_optimiser_step
from fedtune.training.optimisers import compute_lr_factor
from fedtune.training.personal_training import take_personal_step, use_personal_model
from fedtune.training.received_state import receive_state
from fedtune.training.start import Start
from fedtune.training.stream_training import (
    begin_methods,
    collect_stored_tensors,
    collect_uploads,
    compute_lr_progress,
    mask_seen_classes,
    mask_trained_classes,
)
from fedtune.training.task_holdouts import score_task_holdouts
from fedtune.training.train_mode import set_train_mode
from fedtune.training.training_rows import make_training_rows
from fedtune.training.training_step import StepResult, run_step
from fedtune.training.uploaded_statistics import compute_uploaded_statistics
from fedtune.wire.client_update import DriftScore, HoldoutMetrics
from fedtune.wire.task_figures import TaskFigures

IntArray = NDArray[np.int64]

__all__ = ["LocalTrainingResult", "train_local_model"]


@dataclass(frozen=True)
class LocalTrainingResult:
    """The result of one client's round: ``delta`` is trained minus received, in fp32 on the CPU.

    ``local_tensors`` stay on the device. ``holdout_metrics`` are those of the received model on the held-out examples,
    and ``trained_score`` those of the trained model; where a client has its own model, they are of that one.
    ``micro_batch_size`` is None if whole batches passed.
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
    device_type: str = "cpu"
    accelerator_peak: AcceleratorMemory | None = None
    micro_batch_size: int | None = None
    remembered: dict[str, Tensor] = field(default_factory=dict)
    """What continual methods keep on the device of this visit of a task."""
    task_figures: TaskFigures | None = None
    """Scores of the received model on the held-out examples of each task begun so far."""
    drift: DriftScore | None = None
    algorithm_memory: Mapping[str, Tensor] = field(default_factory=dict)
    """What the algorithm keeps on the device."""


class _Received(NamedTuple):
    """What a client measures on the received model, before it trains."""

    score: HoldoutMetrics
    task_figures: TaskFigures | None
    drift: DriftMeasurement
    statistics: dict[str, Tensor]


class _Changes(NamedTuple):
    """What training changed: the deltas, and the tensors that stay on the device."""

    delta: dict[str, Tensor]
    kept: dict[str, Tensor]


class _Collected(NamedTuple):
    """What the device keeps of this visit of a task, and what it sends besides the deltas."""

    remembered: dict[str, Tensor]
    extras: dict[str, Tensor]


class _RoundSteps(NamedTuple):
    """The mean loss of a round's steps, the bytes kept for backward in the first one, and the examples or targets seen.

    ``micro_batch_size`` is the smallest one of the round, None if whole batches passed.
    """

    loss: float
    activation_bytes: int
    num_examples: int
    micro_batch_size: int | None


def train_local_model(client: ClientRound, state: Mapping[str, Tensor]) -> LocalTrainingResult:
    """Train the client's model from ``state`` on its examples.

    All random numbers are derived from (seed, round, client), so the result does not depend on earlier rounds in this
    process.
    """
    started = time.perf_counter()
    model, device = client.model, find_device(client.model)
    reset_peak_rss()
    reset_accelerator_peak(device)
    rows, held_out = client.split_rows()
    receive_state(client, state)
    names = list_trainable_tensors(model)
    start = Start(model, names, client.local_tensors, state)
    masters = masters_of(model, start)
    with use_cpu_threads(client.recipe.train.threads), fork_random_state(device):
        client = begin_algorithm(begin_methods(client), state.keys())
        received = _measure_received(client, rows, held_out, names)
        steps = _train(client, rows, masters)
        changes = _read_changes(client, start, masters, names)
        corrected = end_algorithm(client, changes.delta)
        collected = _collect(client, rows, steps, received)
        with mask_seen_classes(client), use_personal_model(client):  # last, so that it cannot affect anything else
            trained_score = score_held_out(client, held_out.tolist())
    return LocalTrainingResult(
        changes.delta,
        {**collected.extras, **corrected.upload},
        changes.kept,
        received.score,
        trained_score,
        num_examples=steps.num_examples,
        train_loss=steps.loss,
        seconds=time.perf_counter() - started,
        activation_bytes=steps.activation_bytes,
        peak_rss=peak_rss(),
        device_type=device.type,
        accelerator_peak=read_accelerator_peak(device),
        micro_batch_size=steps.micro_batch_size,
        remembered=collected.remembered,
        algorithm_memory=corrected.stored,
        task_figures=received.task_figures,
        drift=received.drift.score,
    )


def _measure_received(client: ClientRound, rows: IntArray, held_out: IntArray, names: Sequence[str]) -> _Received:
    with mask_seen_classes(client), use_personal_model(client):
        score = score_held_out(client, held_out.tolist())
    task_figures = score_task_holdouts(client)
    return _Received(score, task_figures, measure_drift(client), compute_uploaded_statistics(client, rows, names))


def _train(client: ClientRound, rows: IntArray, masters: Mapping[str, nn.Parameter]) -> _RoundSteps:
    torch.manual_seed(client.derive_seed("dropout"))
    release_freed()
    seed = client.derive_seed("directions")
    client = replace(client, estimator=make_step_estimator(client.techniques, client.model, masters, seed))
    with mask_trained_classes(client), client.algorithm_round.change_model():
        steps = _run_steps(client, rows, masters) if client.trains else _skip_steps(client, rows)
    release_freed()
    return steps


def _read_changes(
    client: ClientRound, start: Start, masters: Mapping[str, nn.Parameter], names: Sequence[str]
) -> _Changes:
    """Return what training changed, and warn if it changed nothing."""
    kept = {
        name: masters[name].detach().cpu() if name in masters else one
        for name, one in get_model_state(client.model, client.local_tensors).items()
    }
    delta = start.deltas({**named_tensors(client.model), **masters}, names)
    if client.trains and not _has_one_class(client):
        _warn_if_nothing_moved(
            [*delta.values(), *(kept[name] - one for name, one in client.local_tensors.items())], client
        )
    return _Changes(delta, kept)


def _collect(client: ClientRound, rows: IntArray, steps: _RoundSteps, received: _Received) -> _Collected:
    backward = partial(_run_extra_backward, client, rows, steps.micro_batch_size)
    added = compute_extra_payload(client.techniques, client.model, client.number, backward)
    with mask_trained_classes(client):
        remembered, uploads = collect_stored_tensors(client), collect_uploads(client)
    moved = move_tensors(added, torch.device("cpu"))
    return _Collected(remembered, {**received.statistics, **moved, **uploads, **received.drift.upload})


def _has_one_class(client: ClientRound) -> bool:
    """Whether the loss compares a single class with nothing, as in the first task of a stream that has one label."""
    return client.stream is not None and client.stream.classes is not None and len(client.stream.classes) == 1


def _warn_if_nothing_moved(moves: Sequence[Tensor], client: ClientRound) -> None:
    if not any(bool(move.any()) for move in moves):
        warnings.warn(
            f"client {client.client} moved nothing in round {client.number}: no gradient arrives, or train.lr is lost "
            "in rounding",
            FedtuneWarning,
            stacklevel=4,
        )


def _run_extra_backward(client: ClientRound, rows: IntArray, micro_batch_size: int | None) -> None:
    """Compute the gradients of the loss on the client's first examples."""
    recipe = client.recipe
    chosen = rows[: recipe.train.batch_size].tolist()
    client.model.eval()
    progress = client.number / recipe.federation.rounds
    run_step(client, client.examples, chosen, progress, micro_batch_size, metered=False)


def _skip_steps(client: ClientRound, rows: IntArray) -> _RoundSteps:
    """Return the result of a round without training. It has no loss, and the weight of the examples of its steps."""
    client.model.eval()
    return _RoundSteps(math.nan, 0, _count_skipped(client, rows), client.micro_batch_size)


def _count_skipped(client: ClientRound, rows: IntArray) -> int:
    settings = client.recipe.train
    if settings.weigh_by != "tokens":
        return min(len(rows), total_steps(len(rows), client.recipe) * settings.batch_size)
    data = make_training_rows(client.examples, rows, settings, client.derive_seed)
    most = total_steps(len(data.rows), client.recipe) * settings.batch_size
    return max(1, data.count_weight(data.rows[:most].tolist()))


def _run_steps(client: ClientRound, rows: IntArray, masters: Mapping[str, nn.Parameter]) -> _RoundSteps:
    """Run all steps of a round. Losses are read after the last one, so that no step waits for an accelerator."""
    model, recipe, settings = client.model, client.recipe, client.recipe.train
    data = make_training_rows(client.examples, rows, settings, client.derive_seed)
    steps = total_steps(len(data.rows), recipe)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    refuse_smaller_batch(recipe, client.micro_batch_size)
    model.zero_grad()  # a client that failed earlier may have left gradients
    optimiser = client.estimator or make_stepper(settings, model, masters)
    set_train_mode(model)
    results: list[StepResult] = []
    size, examples = client.micro_batch_size, 0
    lengths = client.examples.lengths if settings.group_by_length else None
    order = batches(data.rows, settings.batch_size, steps, client.derive_seed("order"), lengths)
    for step, chosen in enumerate(order):
        progress = ((client.number - 1) + step / steps) / recipe.federation.rounds
        lr = settings.lr * compute_lr_factor(settings, compute_lr_progress(client, step, steps))
        info = StepInfo(client.number, step, steps, settings.lr, lr)
        size = take_personal_step(client, data.at_step(step), chosen, info, size)
        client.algorithm_round.begin_step(step, steps)
        with update_in_backward(optimiser, parameters, lr, active=settings.optimiser == "lomo"):
            result = run_step(client, data.at_step(step), chosen, progress, size, metered=step == 0)
        size = result.micro_batch_size
        if result.losses:
            for one in client.method_rounds:
                one.change_gradients()
            client.algorithm_round.change_gradients()
            taken = apply_optimiser_step(model, client.techniques, optimiser, parameters, settings, info)
            client.algorithm_round.record_step(taken)
        results.append(result)
        examples += data.count_weight(chosen)
    losses = [result.compute_loss() for result in results if result.losses]
    if not losses:
        raise DataError(
            "no example of the client has a second token, so there is nothing to predict; bring longer texts"
        )
    return _RoundSteps(float(np.mean(losses)), max(result.kept_bytes for result in results), examples, size)
