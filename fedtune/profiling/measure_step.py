"""Measure one case in this process. Only the first case of a process has a true peak of resident memory."""

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, fork_random_state, move_tensors, require_device, synchronise
from fedtune.memory import (
    MemoryWatch,
    StorageMeter,
    peak_rss,
    read_accelerator_peak,
    read_resident_memory,
    release_freed,
    reset_accelerator_peak,
)
from fedtune.profiling.gradient_check import gradient_error
from fedtune.profiling.profile_cases import ProfileCase
from fedtune.profiling.profile_results import StepProfile
from fedtune.profiling.step_inputs import make_random_batch
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.tasks import get_task
from fedtune.techniques import (
    StepInfo,
    Technique,
    begin_round,
    begin_step,
    build_techniques,
    list_trainable_tensors,
    make_step_estimator,
)
from fedtune.training import (
    apply_optimiser_step,
    compute_step_loss,
    get_model_state,
    prepare_model,
    set_train_mode,
    use_cpu_threads,
)
from fedtune.training.backward_updates import update_in_backward
from fedtune.training.master_weights import make_stepper, masters_of
from fedtune.training.start import Start
from fedtune.training.step_gradients import compute_gradients
from fedtune.wire.client_update import decode_tensors, pack
from fedtune.wire.masked_weights import encode_masked_state, find_masks, select_active_values

__all__ = ["list_distinct_rounds", "measure_step_memory", "profile_step"]

_TIMED = 3
"""The number of timed steps, whose median is reported, after one warm-up step."""

Tensors = Mapping[str, Tensor]


def profile_step(case: ProfileCase) -> StepProfile:
    """Train a few steps, measure one, and compare gradients if the case asks for it."""
    recipe = Recipe.model_validate_json(case.recipe)
    device = require_device(recipe.train.device)
    with use_cpu_threads(recipe.train.threads), fork_random_state(device):
        torch.manual_seed(derive_seed(recipe.seed, "profile"))
        figures, state, batch, rounds = _measure_case(case, recipe)
        units = build_techniques(recipe.train.techniques)
        if not case.check_gradients or any(one.estimates_gradients for one in units):
            return figures
        return replace(figures, gradient_error=gradient_error(recipe, case.labels, state, batch, rounds))


def _measure_case(case: ProfileCase, recipe: Recipe) -> tuple[StepProfile, Tensors, Tensors, list[int]]:
    """Return the figures, the state after the steps, their batch, and the rounds that differ."""
    model, chosen, shared = prepare_model(recipe, case.labels)
    batch = make_random_batch(model, recipe, len(case.labels)) if case.batch is None else decode_tensors(case.batch)
    device = find_device(model)
    batch = move_tensors(batch, device)
    rounds = list_distinct_rounds(model, chosen)
    gc.collect()
    release_freed()
    reset_accelerator_peak(device)
    with MemoryWatch() as memory:
        loaded, parts = peak_rss(), read_resident_memory()
        seconds = [_measure_seconds(model, chosen, batch, recipe, round_number) for round_number in rounds]
    rss, accelerator = peak_rss(), read_accelerator_peak(device)
    held = [measure_step_memory(model, chosen, batch, recipe, round_number) for round_number in rounds]
    sent = [_measure_payload(model, chosen, round_number) for round_number in rounds]
    state = get_model_state(model, shared)
    figures = StepProfile(
        technique=case.technique,
        kept_bytes=max(kept for kept, _ in held),
        peak_bytes=max(peak for _, peak in held),
        rss_bytes=rss,
        loaded_bytes=loaded,
        seconds=max(seconds),
        trainable=max(count for count, _ in sent),
        wire_bytes=max(up for _, up in sent),
        down_bytes=len(pack(encode_masked_state(state))),
        device_type=device.type,
        accelerator_bytes=None if accelerator is None else accelerator.allocated,
        accelerator_reserved_bytes=None if accelerator is None else accelerator.reserved,
        anonymous_bytes=memory.anonymous,
        file_bytes=memory.file_backed,
        loaded_anonymous_bytes=None if parts is None else parts.anonymous,
    )
    return figures, state, batch, rounds


def list_distinct_rounds(model: nn.Module, techniques: Sequence[Technique]) -> list[int]:
    """Return round 1, and round 2 if other tensors are trained in it."""
    trained_in = []
    for round_number in (1, 2):
        begin_round(techniques, model, round_number)
        trained_in.append(list_trainable_tensors(model))
    return [1] if trained_in[0] == trained_in[1] else [1, 2]


def _measure_seconds(
    model: nn.Module, techniques: Sequence[Technique], batch: Tensors, recipe: Recipe, round_number: int
) -> float:
    """Return the median seconds of a whole training step in a round."""
    settings, task = recipe.train, get_task(recipe.task)
    begin_round(techniques, model, round_number)
    set_train_mode(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = masters_of(model, Start(model, ()))
    estimator = make_step_estimator(techniques, model, masters, recipe.seed)
    optimiser = estimator or make_stepper(settings, model, masters)
    seconds, device = [], find_device(model)
    for _ in range(1 + _TIMED):
        started = time.perf_counter()
        begin_step(techniques, model, batch, 0.0)
        with update_in_backward(optimiser, parameters, settings.lr, active=settings.optimiser == "lomo"):
            compute_gradients(partial(compute_step_loss, task, model, batch), estimator)
        apply_optimiser_step(
            model, techniques, optimiser, parameters, settings, StepInfo(round_number, 0, 1, settings.lr, settings.lr)
        )
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measure_step_memory(
    model: nn.Module, techniques: Sequence[Technique], batch: Tensors, recipe: Recipe, round_number: int
) -> tuple[int, int]:
    """Return the bytes kept for backward when the forward pass ends, and the peak of both passes."""
    begin_round(techniques, model, round_number)
    set_train_mode(model)
    estimates, kept = any(one.estimates_gradients for one in techniques), list[int]()
    masters = masters_of(model, Start(model, ())) if estimates else {}
    estimator = make_step_estimator(techniques, model, masters, recipe.seed)

    def compute_loss() -> Tensor:
        loss = compute_step_loss(get_task(recipe.task), model, batch)
        kept.append(meter.current_bytes)
        return loss

    with StorageMeter(excluded=[*model.parameters(), *model.buffers(), *masters.values()]) as meter:
        begin_step(techniques, model, batch, 0.0)
        compute_gradients(compute_loss, estimator)
    model.zero_grad()
    return max(kept), meter.peak_bytes


def _measure_payload(model: nn.Module, techniques: Sequence[Technique], round_number: int) -> tuple[int, int]:
    """Return the number of parameters trained in a round, and the bytes sent after it."""
    begin_round(techniques, model, round_number)
    names = list_trainable_tensors(model)
    held = [name for technique in techniques for name in technique.list_server_held_tensors(model)]
    found = find_masks(get_model_state(model, [*names, *held]))
    deltas = select_active_values(get_model_state(model, names), found)
    return sum(delta.numel() for delta in deltas.values()), len(pack(deltas))
