"""A client's own model, which is trained beside the shared one and never sent."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "Optimiser",
    "PersonalModel",
    "clip_gradients",
    "copy_in_single_precision",
    "refuse_optimiser",
    "swap_values",
]


class Optimiser(Protocol):
    """Updates parameters with their gradients. Parameters without a gradient do not change."""

    def step(self, lr: float) -> None:
        """Take one step with the given learning rate."""


class PersonalModel:
    """A client's own model during a round."""

    @contextmanager
    def use_values(self) -> Iterator[None]:
        """Let the model compute what the client's own model computes. The shared one is back after the block."""
        yield

    def take_step(self, lr: float) -> None:
        """Update the client's own model, inside ``use_values`` and after the backward pass of its loss."""


def refuse_optimiser(_: Sequence[nn.Parameter]) -> Optimiser:
    """Raise: only rounds that train give an optimiser."""
    raise RuntimeError("this round has no optimiser")


@contextmanager
def swap_values(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give tensors of a model other values in the block. Afterwards they have theirs again, to the bit."""
    before = {name: tensors[name].detach().clone() for name in values}
    _write(tensors, values)
    try:
        yield
    finally:
        _write(tensors, before)


def copy_in_single_precision(tensor: Tensor) -> Tensor:
    """Return a copy on the same device, in fp32 if the tensor is coarser."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def clip_gradients(parameters: Sequence[nn.Parameter], most: float | None) -> None:
    """Scale all gradients down together if their norm is larger than ``most``."""
    if most is not None:
        nn.utils.clip_grad_norm_(parameters, most)


@torch.no_grad()
def _write(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)
