"""Optimisers by name and the learning rate over a run."""

import math
import pkgutil
from collections.abc import Sequence

import torch
from torch.nn import Parameter

from fedtune.recipe import Optimiser, Train

__all__ = ["make_optimiser", "rate"]

_OPTIMISERS: dict[Optimiser, str] = {
    "adamw": "torch.optim:AdamW",
    "sgd": "torch.optim:SGD",
    "adamw8bit": "bitsandbytes.optim:AdamW8bit",
    "paged_adamw8bit": "bitsandbytes.optim:PagedAdamW8bit",
    "lion8bit": "bitsandbytes.optim:Lion8bit",
}
"""Where each is imported from, when it is asked for."""


def make_optimiser(settings: Train, parameters: Sequence[Parameter]) -> torch.optim.Optimizer:
    """A fresh optimiser over the trained parameters."""
    kind: type[torch.optim.Optimizer] = pkgutil.resolve_name(_OPTIMISERS[settings.optimiser])
    return kind(parameters, lr=settings.lr, weight_decay=settings.weight_decay)  # type: ignore[call-arg]


def rate(settings: Train, progress: float) -> float:
    """The factor on ``lr`` after a share ``progress`` (0..1) of all steps of the run: warm-up, then the schedule."""
    if progress < settings.warmup:
        return progress / settings.warmup
    after = (progress - settings.warmup) / (1 - settings.warmup)
    return {"constant": 1.0, "linear": 1 - after, "cosine": (1 + math.cos(math.pi * after)) / 2}[settings.schedule]
