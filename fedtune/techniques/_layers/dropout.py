"""Dropout that stores one bit per element; PyTorch stores a factor of 0 or 1 / (1 - p)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedtune.techniques._layers.bit_packing import pack_bits, unpack_bits
from fedtune.techniques._layers.layer_replacement import ReplacementLayer, convert_layer_class

__all__ = ["MemoryEfficientDropout", "make_efficient_dropout"]


class MemoryEfficientDropout(nn.Dropout, ReplacementLayer):
    """Draws the same random numbers as PyTorch; never in place."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Dropout gives it
        """Of any shape."""
        out: Tensor = _Dropout.apply(input, self.p) if self.training and 0 < self.p < 1 else super().forward(input)
        return out

    def to_plain_layer(self) -> nn.Dropout:
        """The plain dropout."""
        return convert_layer_class(self, nn.Dropout)


def make_efficient_dropout(layer: nn.Module) -> nn.Module:
    """The memory-efficient dropout; other layers are returned as they are."""
    return convert_layer_class(layer, MemoryEfficientDropout) if type(layer) is nn.Dropout else layer


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        factor = F.dropout(torch.ones_like(x), p, training=True)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(pack_bits(factor != 0))
            ctx.p = p
        return x * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [g] = gradients
        [bits] = ctx.saved_tensors
        factor = unpack_bits(bits, g.numel()).view(g.shape).to(g.dtype).div_(1 - ctx.p)
        return g * factor, None
