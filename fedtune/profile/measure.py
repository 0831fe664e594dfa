"""Measuring one case in this process; only the first case a process measures has a true peak of resident memory."""

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedtune.contribution import pack, unpack
from fedtune.memory import StorageMeter, peak_rss, reset_peak_rss
from fedtune.profile.batch import random_batch
from fedtune.profile.case import Case
from fedtune.profile.gradients import gradient_error
from fedtune.profile.row import Figures
from fedtune.recipe import Recipe, Train
from fedtune.seeds import derive
from fedtune.sparse import compact, masks, to_wire
from fedtune.techniques import Moment, Technique, begin_round, begin_step, trained
from fedtune.training import build_model, processor_threads, read_state, step_loss, train_mode, update
from fedtune.training.masters import make_stepper, masters_of
from fedtune.training.start import Start

__all__ = ["measure"]

_TIMED = 3
"""Steps whose median is told, after one that warms up."""

Tensors = Mapping[str, Tensor]


def measure(case: Case) -> Figures:
    """Train a few steps, meter one, and compare gradients if the case asks for it; FedtuneError where it misfits."""
    recipe = Recipe.model_validate_json(case.recipe)
    with processor_threads(recipe.train.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(recipe.seed, "profile"))
        figures, state, batch, rounds = _cost(case, recipe)
        if not case.check:
            return figures
        return replace(figures, gradient_error=gradient_error(recipe, case.labels, state, batch, rounds))


def _cost(case: Case, recipe: Recipe) -> tuple[Figures, Tensors, Tensors, list[int]]:
    """The figures; then the state the steps led to, their batch, and the rounds that differ."""
    model, chosen, shared = build_model(recipe, case.labels)
    batch = random_batch(model, recipe, len(case.labels)) if case.batch is None else unpack(case.batch)
    rounds = _rounds(model, chosen)
    gc.collect()
    reset_peak_rss()
    loaded = peak_rss()
    seconds = [_seconds(model, chosen, batch, recipe.train, number) for number in rounds]
    rss = peak_rss()
    held = [_held(model, chosen, batch, number) for number in rounds]
    sent = [_sent(model, chosen, number) for number in rounds]
    state = read_state(model, shared)
    figures = Figures(
        technique=case.technique,
        kept_bytes=max(kept for kept, _ in held),
        peak_bytes=max(peak for _, peak in held),
        rss_bytes=rss,
        loaded_bytes=loaded,
        seconds=max(seconds),
        trainable=max(count for count, _ in sent),
        wire_bytes=max(up for _, up in sent),
        down_bytes=len(pack(to_wire(state))),
    )
    return figures, state, batch, rounds


def _rounds(model: nn.Module, techniques: Sequence[Technique]) -> list[int]:
    """Round 1, and round 2 if something else is trained in it."""
    trained_in = []
    for number in (1, 2):
        begin_round(techniques, model, number)
        trained_in.append(trained(model))
    return [1] if trained_in[0] == trained_in[1] else [1, 2]


def _seconds(model: nn.Module, techniques: Sequence[Technique], batch: Tensors, settings: Train, number: int) -> float:
    """Median seconds of a whole step in a round, as a device takes it."""
    begin_round(techniques, model, number)
    train_mode(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = make_stepper(settings, model, masters_of(model, Start(model, ())))
    seconds = []
    for _ in range(1 + _TIMED):
        started = time.perf_counter()
        begin_step(techniques, model, batch, 0.0)
        step_loss(model, batch).backward()
        update(model, techniques, optimiser, parameters, settings, Moment(number, 0, 1, settings.lr, settings.lr))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _held(model: nn.Module, techniques: Sequence[Technique], batch: Tensors, number: int) -> tuple[int, int]:
    """Bytes kept when the forward pass ends, and the most held in the forward and backward pass."""
    begin_round(techniques, model, number)
    train_mode(model)
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        begin_step(techniques, model, batch, 0.0)
        loss = step_loss(model, batch)
        kept = meter.bytes
        loss.backward()
    model.zero_grad()
    return kept, meter.peak


def _sent(model: nn.Module, techniques: Sequence[Technique], number: int) -> tuple[int, int]:
    """Parameters trained in a round, and bytes of the payload that goes up after it."""
    begin_round(techniques, model, number)
    names = trained(model)
    held = [name for technique in techniques for name in technique.held(model)]
    found = masks(read_state(model, [*names, *held]))
    deltas = compact(read_state(model, names), found)
    return sum(delta.numel() for delta in deltas.values()), len(pack(deltas))
