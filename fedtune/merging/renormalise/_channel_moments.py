"""Measure the mean and standard deviation of each channel over batches, rows and positions."""

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, move_tensors
from fedtune.merging._layer_hooks import hook_layers

__all__ = ["Batches", "ChannelMoments", "measure_channel_moments"]

Batches = Sequence[Mapping[str, Tensor]]


class ChannelMoments(NamedTuple):
    """Of every channel of a layer's output, in double precision; the deviation is that of a population."""

    mean: Tensor
    std: Tensor


class _Pool:
    """Pools batches (Chan et al. 1979): count, mean and sum of squared deviations [c]."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Samples [m, c]."""
        mean = rows.mean(0)
        total, shift = self._count + len(rows), mean - self._mean
        self._squares = self._squares + (rows - mean).square().sum(0) + shift.square() * self._count * len(rows) / total
        self._mean = self._mean + shift * len(rows) / total
        self._count = total

    def moments(self) -> ChannelMoments:
        return ChannelMoments(self._mean, (self._squares / self._count).sqrt())


class _StopForwardError(Exception):
    """Raised when all layers have been measured, to skip the rest of the forward pass."""


def measure_channel_moments(net: nn.Module, batches: Batches, layers: Set[str]) -> dict[str, ChannelMoments]:
    """Moments of each layer's output over all batches; a pass ends with the last layer that is asked for."""
    pools = {layer: _Pool() for layer in layers}
    for batch in batches:
        unseen = set(layers)

        def note(layer: str, _: Tensor, output: Tensor, unseen: set[str] = unseen) -> None:
            pools[layer].add(_rows(output, net.get_submodule(layer)))
            unseen.discard(layer)
            if not unseen:
                raise _StopForwardError

        with hook_layers(net, layers, note), torch.no_grad():
            try:
                net(**move_tensors(batch, find_device(net)))
            except _StopForwardError:
                continue
    return {layer: pool.moments() for layer, pool in pools.items()}


def _rows(output: Tensor, layer: nn.Module) -> Tensor:
    """[n, c, h, w] of a convolution or its norm, or [..., c] of a linear layer, as samples [m, c]."""
    moved = output if isinstance(layer, nn.Linear) else output.movedim(1, -1)
    return moved.reshape(-1, moved.shape[-1]).cpu().double()
