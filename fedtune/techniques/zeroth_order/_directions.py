"""Random directions over several tensors, drawn again from a seed whenever they are needed, so that none is kept.

A direction has independent standard normal entries. They are drawn on the CPU in single precision, tensor by tensor in
the given order and in pieces of rows, whatever the device and the precision of the tensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["TrainedTensor", "list_trained_tensors", "move_weights", "shift_weights"]

_PIECE = 1 << 18
"""The number of entries of a direction that exist at once: 1 MiB."""


class TrainedTensor(NamedTuple):
    """A tensor that is trained in place, and its copy in single precision if it has a lower one."""

    value: Tensor
    master: Tensor | None = None


def list_trained_tensors(model: nn.Module, masters: Mapping[str, nn.Parameter]) -> list[TrainedTensor]:
    """Return what the model trains now, in the order of the names: other classes of one model order it otherwise."""
    named = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    return [TrainedTensor(named[name], masters[name].detach() if name in masters else None) for name in sorted(named)]


@torch.no_grad()
def shift_weights(trained: Sequence[TrainedTensor], seed: int, before: float, after: float) -> None:
    """Shift values that are ``before`` times a direction away from their weights, so that they are ``after`` away.

    Without a master, a value is where its weight is, and both move by the rounding of the sums.
    """
    for value, master, direction in _draw(trained, seed):
        if master is None:
            value.add_(direction.mul_(after - before))
        else:
            value.copy_(direction.mul_(after).add_(master))


@torch.no_grad()
def move_weights(trained: Sequence[TrainedTensor], seed: int, change: float | Tensor) -> None:
    """Add ``change`` times the direction of a seed to the weights."""
    for value, master, direction in _draw(trained, seed):
        if master is None:
            value.add_(direction.mul_(change))
        else:
            value.copy_(master.add_(direction.mul_(change)))


def _draw(trained: Sequence[TrainedTensor], seed: int) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Yield pieces of each tensor with those of its master and of the direction, on its device.

    The memory is allocated before the first piece, so that weights are not left half moved where it is short.
    """
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.empty(max((_split(one.value)[0].numel() for one in trained), default=0))
    for value, master in trained:
        masters = [None] * len(_split(value)) if master is None else _split(master)
        for piece, of_master in zip(_split(value), masters, strict=True):
            drawn = buffer[: piece.numel()].view(piece.shape).normal_(generator=generator)
            yield piece, of_master, drawn.to(piece.device)


def _split(tensor: Tensor) -> Sequence[Tensor]:
    """Return views of some rows each; a small tensor is one piece."""
    if tensor.numel() <= _PIECE:
        return (tensor,)
    pieces: tuple[Tensor, ...] = torch.split(tensor, max(1, _PIECE // tensor[0].numel()))
    return pieces
