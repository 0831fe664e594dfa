"""Optimisers by name and the learning rate over a run.

AdamW and SGD are torch's own formulas, called without torch's Optimizer class: its first step imports the compiler,
which costs a device a second and 70 MB.
"""

import math
import pkgutil
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedtune.recipe import Optimiser, Train

__all__ = ["Stepper", "make_optimiser", "rate"]


class Stepper(Protocol):
    """Moves parameters along their gradients; those without a gradient stay."""

    def step(self, lr: float) -> None:
        """One step at the given learning rate."""


def make_optimiser(settings: Train, parameters: Sequence[Parameter]) -> Stepper:
    """A fresh optimiser over the trained parameters."""
    if settings.optimiser == "adamw":
        return _AdamW(parameters, settings.weight_decay)
    if settings.optimiser == "sgd":
        return _Sgd(parameters, settings)
    kind = pkgutil.resolve_name(_BITSANDBYTES[settings.optimiser])
    return _Wrapped(kind(parameters, lr=settings.lr, weight_decay=settings.weight_decay))


_BITSANDBYTES: dict[Optimiser, str] = {
    "adamw8bit": "bitsandbytes.optim:AdamW8bit",
    "paged_adamw8bit": "bitsandbytes.optim:PagedAdamW8bit",
    "lion8bit": "bitsandbytes.optim:Lion8bit",
}
"""Where each is imported from, when it is asked for."""


class _Sgd:
    """torch.optim.SGD without dampening."""

    def __init__(self, parameters: Sequence[Parameter], settings: Train) -> None:
        self._parameters, self._settings = parameters, settings
        self._buffers: dict[Parameter, Tensor | None] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step at the given learning rate."""
        moved = [parameter for parameter in self._parameters if parameter.grad is not None]
        buffers = [self._buffers.get(parameter) for parameter in moved]
        sgd(
            list(moved),
            _gradients(moved),
            buffers,
            weight_decay=self._settings.weight_decay,
            momentum=self._settings.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=self._settings.nesterov,
            maximize=False,
        )
        self._buffers |= dict(zip(moved, buffers, strict=True))  # sgd puts the momenta of a first step into the list


class _AdamW:
    """torch.optim.AdamW with its default betas and epsilon."""

    def __init__(self, parameters: Sequence[Parameter], weight_decay: float) -> None:
        self._parameters, self._weight_decay = parameters, weight_decay
        self._state: dict[Parameter, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step at the given learning rate."""
        moved = [parameter for parameter in self._parameters if parameter.grad is not None]
        self._state |= {parameter: _moments(parameter) for parameter in moved if parameter not in self._state}
        states = [self._state[parameter] for parameter in moved]
        means, squares, steps = ([state[part] for state in states] for part in range(3))
        adamw(
            list(moved),
            _gradients(moved),
            means,
            squares,
            [],
            steps,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=self._weight_decay,
            eps=1e-8,
            maximize=False,
        )


class _Wrapped:
    """An optimiser of bitsandbytes."""

    def __init__(self, optimiser: Any) -> None:
        self.optimiser = optimiser

    def step(self, lr: float) -> None:
        """One step at the given learning rate."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _moments(parameter: Parameter) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(parameter), torch.zeros_like(parameter), torch.tensor(0.0)


def rate(settings: Train, progress: float) -> float:
    """The factor on ``lr`` after a share ``progress`` (0..1) of all steps of the run: warm-up, then the schedule."""
    if progress < settings.warmup:
        return progress / settings.warmup
    after = (progress - settings.warmup) / (1 - settings.warmup)
    return {"constant": 1.0, "linear": 1 - after, "cosine": (1 + math.cos(math.pi * after)) / 2}[settings.schedule]
