"""Optimisers by name and the learning rate over a run.

AdamW and SGD are torch's own formulas, called without torch's Optimizer class: its first step imports the compiler,
which costs a device a second and 70 MB.
"""

import math
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedtune.recipe.schema import Optimiser, Train

__all__ = ["BitsandbytesOptimiser", "LocalOptimiser", "compute_lr_factor", "make_optimiser"]


_PIECE = 1 << 20
"""Numbers of a parameter that AdamW steps at a time."""


class LocalOptimiser(Protocol):
    """Moves parameters along their gradients; those without a gradient stay."""

    def step(self, lr: float) -> None:
        """One step at the given learning rate."""


def make_optimiser(settings: Train, parameters: Sequence[Parameter]) -> LocalOptimiser:
    """A fresh optimiser over the trained parameters."""
    if settings.optimiser == "adamw":
        return _AdamW(parameters, settings.weight_decay)
    if settings.optimiser == "sgd":
        return _Sgd(parameters, settings)
    kind = pkgutil.resolve_name(_BITSANDBYTES[settings.optimiser])
    return BitsandbytesOptimiser(kind(parameters, lr=settings.lr, weight_decay=settings.weight_decay))


_BITSANDBYTES: dict[Optimiser, str] = {
    "adamw_8bit": "bitsandbytes.optim:AdamW8bit",
    "paged_adamw_8bit": "bitsandbytes.optim:PagedAdamW8bit",
    "lion_8bit": "bitsandbytes.optim:Lion8bit",
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
    """torch.optim.AdamW with its default betas and epsilon.

    Large parameters are stepped some rows at a time: torch's formula makes two tensors of the size of what it steps,
    which for an embedding is as much as a fifth of the model each. Each number comes out as it would otherwise.
    """

    def __init__(self, parameters: Sequence[Parameter], weight_decay: float) -> None:
        self._parameters, self._weight_decay = parameters, weight_decay
        self._state: dict[Parameter, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step at the given learning rate."""
        moved = [parameter for parameter in self._parameters if parameter.grad is not None]
        self._state |= {parameter: _moments(parameter) for parameter in moved if parameter not in self._state}
        pieces = [piece for parameter in moved for piece in _pieces(parameter, *self._state[parameter])]
        adamw(
            [piece.weight for piece in pieces],
            [piece.gradient for piece in pieces],
            [piece.mean for piece in pieces],
            [piece.square for piece in pieces],
            [],
            [piece.steps for piece in pieces],
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=self._weight_decay,
            eps=1e-8,
            maximize=False,
        )
        for parameter in moved:
            self._state[parameter][2].add_(1)


class BitsandbytesOptimiser:
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


class _Piece(NamedTuple):
    """Some rows of a parameter, as views, and how many steps it has made."""

    weight: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor


def _pieces(parameter: Parameter, mean: Tensor, square: Tensor, count: Tensor) -> Iterator[_Piece]:
    """All of a parameter with a gradient; a small one, or one without dimensions, in a single piece."""
    assert parameter.grad is not None
    rows = len(parameter) if parameter.dim() else 0
    if parameter.numel() > _PIECE:
        rows = max(1, _PIECE // parameter[0].numel())
    tensors = (parameter.detach(), parameter.grad, mean, square)
    split = (tensor.split(rows) if rows else (tensor,) for tensor in tensors)
    for weights, gradients, means, squares in zip(*split, strict=True):
        yield _Piece(weights, gradients, means, squares, count.clone())


def _moments(parameter: Parameter) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(parameter), torch.zeros_like(parameter), torch.tensor(0.0)


def compute_lr_factor(settings: Train, progress: float) -> float:
    """The factor on ``lr`` after a share ``progress`` (0..1) of all steps of the run: warm-up, then the schedule."""
    if progress < settings.warmup_ratio:
        return progress / settings.warmup_ratio
    after = (progress - settings.warmup_ratio) / (1 - settings.warmup_ratio)
    return {"constant": 1.0, "linear": 1 - after, "cosine": (1 + math.cos(math.pi * after)) / 2}[settings.lr_schedule]
