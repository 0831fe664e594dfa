"""The local loop a device runs in one round: from the shared state to a delta of what it trained."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.contribution import OwnScore
from fedtune.data import Encoded
from fedtune.memory import StorageMeter, peak_rss, release_freed, reset_peak_rss
from fedtune.recipe import Recipe, Train
from fedtune.seeds import derive
from fedtune.techniques import (
    LiveNorm,
    Moment,
    Technique,
    answer,
    before_update,
    begin_round,
    begin_step,
    collecting,
    trained,
)
from fedtune.techniques import own as own_names
from fedtune.training.evaluate import score_held_out
from fedtune.training.held_out import held_out
from fedtune.training.masters import masters_of, stepper
from fedtune.training.micro import cut, shares
from fedtune.training.optimiser import Stepper, rate
from fedtune.training.start import Start
from fedtune.training.state import load_state, read_state, tensors_of
from fedtune.training.told_activity import tell_activity

IntArray = NDArray[np.int64]

__all__ = ["Outcome", "batches", "processor_threads", "step_loss", "total_steps", "train", "train_mode", "update"]

_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Outcome:
    """What one client's round gave: ``delta`` (trained minus received, fp32), what else is asked for, what it cost.

    ``own`` stays on the device; ``own_score`` is that of the model as received, on what the client holds out, and
    ``trained_score`` that of the model it trained.
    """

    delta: dict[str, Tensor]
    extras: dict[str, Tensor]
    own: dict[str, Tensor]
    own_score: OwnScore
    trained_score: OwnScore
    examples: int
    loss: float
    seconds: float
    saved_bytes: int
    peak_rss: int


def train(
    model: nn.Module,
    techniques: Sequence[Technique],
    state: Mapping[str, Tensor],
    data: Encoded,
    indices: IntArray,
    recipe: Recipe,
    number: int,
    client: int,
    own: Mapping[str, Tensor] = _NOTHING,
    micro: int | None = None,
) -> Outcome:
    """Train ``model`` from ``state`` on the client's examples in round ``number`` (1, 2, ...).

    ``micro`` is the most examples that go through the model at a time, the batch staying what it is. ``own`` holds all
    tensors the device keeps for itself. Every random number comes from (seed, round, client), so the outcome does not
    depend on what ran before.
    """
    assert own.keys() == set(own_names(model)), "those of another client would be left in the model"
    started = time.perf_counter()
    reset_peak_rss()
    indices, held = held_out(indices, recipe.evaluation.own, derive(recipe.seed, client, "own"))
    load_state(model, state)
    load_state(model, own)
    begin_round(techniques, model, number)
    names = trained(model)
    start = Start(model, names, own, state)
    masters = masters_of(model, start)
    with processor_threads(recipe.train.threads), torch.random.fork_rng(devices=[]):
        own_score = score_held_out(model, data, held, recipe, techniques)
        seed = derive(recipe.seed, number, client, "activity")
        told = tell_activity(model, techniques, data, indices, recipe, names, seed)
        torch.manual_seed(derive(recipe.seed, number, client, "dropout"))
        release_freed()
        loss, saved_bytes, examples = _run(model, techniques, data, indices, recipe, number, client, micro, masters)
        release_freed()
        kept = {
            name: masters[name].detach() if name in masters else one for name, one in read_state(model, own).items()
        }
        delta = start.deltas({**tensors_of(model), **masters}, names)
        backward = partial(_backward, model, techniques, data, indices, recipe, number)
        extras = {**told, **answer(techniques, model, number, backward)}
        trained_score = score_held_out(model, data, held, recipe, techniques)  # last, so that nothing follows from it
    seconds = time.perf_counter() - started
    scores = own_score, trained_score
    return Outcome(delta, extras, kept, *scores, examples, loss, seconds, saved_bytes, peak_rss())


def _backward(
    model: nn.Module, techniques: Sequence[Technique], data: Encoded, indices: IntArray, recipe: Recipe, number: int
) -> None:
    """Gradients of the loss on the client's first examples."""
    batch = data.batch(indices[: recipe.train.batch].tolist())
    model.eval()
    begin_step(techniques, model, batch, number / recipe.federation.rounds)
    step_loss(model, batch).backward()


def _run(
    model: nn.Module,
    techniques: Sequence[Technique],
    data: Encoded,
    indices: IntArray,
    recipe: Recipe,
    number: int,
    client: int,
    micro: int | None,
    masters: Mapping[str, nn.Parameter],
) -> tuple[float, int, int]:
    """All steps of a round: mean loss, bytes kept for the first backward pass, examples seen."""
    settings = recipe.train
    steps = total_steps(len(indices), recipe)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()  # a client that failed midway may have left gradients
    optimiser = stepper(settings, model, masters)
    train_mode(model)
    losses, saved_bytes, examples = [], 0, 0
    lengths = data.lengths if settings.by_length else None
    order = batches(indices, settings.batch, steps, derive(recipe.seed, number, client, "order"), lengths)
    for step, chosen in enumerate(order):
        progress = ((number - 1) + step / steps) / recipe.federation.rounds
        parts = [data.batch(part) for part in cut(chosen, micro or len(chosen))]
        loss, kept = _step(model, techniques, parts, progress, metered=step == 0)
        saved_bytes = max(saved_bytes, kept)
        moment = Moment(number, step, steps, settings.lr, settings.lr * rate(settings, progress))
        update(model, techniques, optimiser, parameters, settings, moment)
        losses.append(loss)
        examples += len(chosen)
    return float(np.mean(losses)), saved_bytes, examples


def update(
    model: nn.Module,
    techniques: Sequence[Technique],
    optimiser: Stepper,
    parameters: Sequence[nn.Parameter],
    settings: Train,
    moment: Moment,
) -> None:
    """Follow the gradients of a step and let go of them."""
    lr = before_update(techniques, model, moment)
    if settings.clip is not None:
        nn.utils.clip_grad_norm_(parameters, settings.clip)
    optimiser.step(lr)
    model.zero_grad()


def _step(
    model: nn.Module,
    techniques: Sequence[Technique],
    parts: Sequence[Mapping[str, Tensor]],
    progress: float,
    *,
    metered: bool,
) -> tuple[float, int]:
    """Gradients of a batch's loss, part by part; the loss, and if ``metered`` the most bytes a part kept for them."""
    excluded = [*model.parameters(), *model.buffers()]
    total, kept = 0.0, 0
    for part, share in zip(parts, shares(parts), strict=True):
        begin_step(techniques, model, part, progress)
        with StorageMeter(excluded=excluded) if metered else nullcontext() as meter:
            loss = step_loss(model, part)
            kept = max(kept, meter.bytes if meter is not None else 0)
        (loss if len(parts) == 1 else loss * share).backward()
        total += share * float(loss.detach())
    return total, kept


def step_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss a step follows: the task's, and the terms that techniques add inside the model."""
    with collecting() as terms:
        loss: Tensor = model(**batch).loss
    return torch.stack([loss, *terms]).sum() if terms else loss


def train_mode(model: nn.Module) -> None:
    """Dropout on; batch-norm statistics stay those of the pretrained model, except where a technique trains them."""
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, LiveNorm):
            layer.eval()


def total_steps(examples: int, recipe: Recipe) -> int:
    """Optimiser steps of one client in one round."""
    settings = recipe.train
    per_epoch = -(-examples // settings.batch)
    return settings.steps or per_epoch * (settings.epochs or 1)


def batches(indices: IntArray, batch: int, steps: int, seed: int, lengths: Tensor | None = None) -> Iterator[list[int]]:
    """``steps`` batches, epoch after epoch, each epoch in its own order; the last batch of an epoch may be smaller.

    With ``lengths`` [n], batches hold examples of like length, drawn from a few batches' worth at a time.
    """
    random = np.random.default_rng(seed)
    left = steps
    while left:
        order = random.permutation(indices)
        if lengths is not None:
            order = _like_lengths_together(order, lengths.numpy(), batch, random)
        for start in range(0, len(order), batch)[:left]:
            yield order[start : start + batch].tolist()
            left -= 1


_WINDOW = 8
"""Batches whose examples are sorted by length together; more saves more padding but mixes less."""


def _like_lengths_together(order: IntArray, lengths: IntArray, batch: int, random: np.random.Generator) -> IntArray:
    """Sort within windows, then shuffle each window's batches; a ragged batch stays the last."""
    placed = []
    for start in range(0, len(order), _WINDOW * batch):
        window = order[start : start + _WINDOW * batch]
        window = window[np.argsort(lengths[window], kind="stable")]
        whole = len(window) // batch * batch
        placed += [random.permutation(window[:whole].reshape(-1, batch)).reshape(-1), window[whole:]]
    return np.concatenate(placed)


@contextmanager
def processor_threads(count: int) -> Iterator[None]:
    """Use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
