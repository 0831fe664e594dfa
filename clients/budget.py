"""Whether a round fits the memory a device allows, told before it trains."""

import math

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from fedtune.memory import StorageMeter
from fedtune.techniques import begin_round, begin_step, trained
from fedtune.training import Workshop, processor_threads, read_state, step_loss, train_mode

__all__ = ["need", "shortage"]

_PER_TRAINED = {"sgd": 4.0, "adamw": 6.0}
_PER_TRAINED_8BIT = 4.5
"""Values held for each trained one: gradient, before, after and delta, and the optimiser's moments."""


def shortage(shop: Workshop, rows: NDArray[np.int64], number: int, budget: int) -> str:
    """Why round ``number`` would not fit ``budget`` bytes of resident memory, or nothing."""
    needed = need(shop, rows, number)
    if needed <= budget:
        return ""
    return f"a step needs about {_megabytes(needed)} of memory, and this device allows {_megabytes(budget)}"


def need(shop: Workshop, rows: NDArray[np.int64], number: int) -> int:
    """Resident bytes a round will reach: what is held now, what training adds, what a batch keeps.

    A batch is extrapolated from what one and two of the longest examples keep, so that looking needs little itself.
    """
    model, settings = shop.model, shop.recipe.train
    begin_round(shop.techniques, model, number)
    tensors = read_state(model, trained(model)).values()
    per_trained = _PER_TRAINED.get(settings.optimiser, _PER_TRAINED_8BIT)
    added = sum(tensor.numel() * 4 for tensor in tensors) * per_trained
    one, two = (_kept(shop, _longest(shop, rows, count), number) for count in (1, 2))
    batch = min(settings.batch, len(rows))
    return math.ceil(psutil.Process().memory_info().rss + added + one + (two - one) * (batch - 1))


def _longest(shop: Workshop, rows: NDArray[np.int64], count: int) -> list[int]:
    """The longest example, ``count`` times."""
    lengths = shop.train.lengths
    first = int(rows[0]) if lengths is None else int(rows[int(lengths[torch.from_numpy(rows)].argmax())])
    return [first] * count


def _kept(shop: Workshop, chosen: list[int], number: int) -> int:
    """Bytes a step over some examples holds at its peak, beside gradients."""
    batch = shop.train.batch(chosen)
    train_mode(shop.model)
    with processor_threads(shop.recipe.train.threads), torch.random.fork_rng(devices=[]):
        begin_step(shop.techniques, shop.model, batch, number / shop.recipe.federation.rounds)
        with StorageMeter(excluded=[*shop.model.parameters(), *shop.model.buffers()]) as meter:
            step_loss(shop.model, batch).backward()
    shop.model.zero_grad()
    return meter.peak


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
