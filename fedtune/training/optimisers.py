"""Optimisers by name, and the learning rate schedule of a run.

AdamW and SGD call torch's functions without its Optimizer class, whose first step imports the compiler: a second and 70
MB on a device.
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
"""The number of elements of a parameter that AdamW updates at a time."""


class LocalOptimiser(Protocol):
    """Updates parameters with their gradients. Parameters without a gradient do not change."""

    def step(self, lr: float) -> None:
        """Take one step with the given learning rate."""


def make_optimiser(settings: Train, parameters: Sequence[Parameter]) -> LocalOptimiser:
    """Return a new optimiser over the trained parameters."""
    if settings.optimiser == "adamw":
        return _AdamW(parameters, settings.weight_decay)
    if settings.optimiser in ("sgd", "lomo"):
        return _Sgd(parameters, settings)
    kind = pkgutil.resolve_name(_BITSANDBYTES[settings.optimiser])
    return BitsandbytesOptimiser(kind(parameters, lr=settings.lr, weight_decay=settings.weight_decay))


_BITSANDBYTES: dict[Optimiser, str] = {
    "adamw_8bit": "bitsandbytes.optim:AdamW8bit",
    "paged_adamw_8bit": "bitsandbytes.optim:PagedAdamW8bit",
    "lion_8bit": "bitsandbytes.optim:Lion8bit",
}
"""The import path of each optimiser of bitsandbytes. It is imported only if it is used."""


class _Sgd:
    """torch.optim.SGD without dampening."""

    def __init__(self, parameters: Sequence[Parameter], settings: Train) -> None:
        self._parameters, self._settings = parameters, settings
        self._buffers: dict[Parameter, Tensor | None] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one step with the given learning rate."""
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
            foreach=False,
        )
        self._buffers |= dict(zip(moved, buffers, strict=True))  # sgd fills the list in the first step


class _AdamW:
    """torch.optim.AdamW with its default betas and epsilon.

    Large parameters are updated some rows at a time. torch's function allocates two tensors of the size of its
    parameter; for an embedding, each can be a fifth of the model. The results are the same. For the same reason
    ``foreach``, which accelerators use by default, is off.
    """

    def __init__(self, parameters: Sequence[Parameter], weight_decay: float) -> None:
        self._parameters, self._weight_decay = parameters, weight_decay
        self._state: dict[Parameter, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one step with the given learning rate."""
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
            foreach=False,
        )
        for parameter in moved:
            self._state[parameter][2].add_(1)


class BitsandbytesOptimiser:
    """An optimiser of bitsandbytes."""

    def __init__(self, optimiser: Any) -> None:
        self.optimiser = optimiser

    def step(self, lr: float) -> None:
        """Take one step with the given learning rate."""
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


class _Piece(NamedTuple):
    """Some rows of a parameter as views, and its number of steps."""

    weight: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor


def _pieces(parameter: Parameter, mean: Tensor, square: Tensor, count: Tensor) -> Iterator[_Piece]:
    """Yield the rows of a parameter in chunks. A small parameter or a scalar is one chunk."""
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
    """Return the factor on ``lr`` after a share ``progress`` (0..1) of the run's steps: warm-up, then the schedule."""
    if progress < settings.warmup_ratio:
        return progress / settings.warmup_ratio
    after = (progress - settings.warmup_ratio) / (1 - settings.warmup_ratio)
    return {"constant": 1.0, "linear": 1 - after, "cosine": (1 + math.cos(math.pi * after)) / 2}[settings.lr_schedule]
