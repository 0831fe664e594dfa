"""TinyTL's lite residual: a narrow branch beside a block, at half its resolution."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.techniques._layers.layer_replacement import ForwardOverride
from fedtune.techniques._layers.one_bit_activation import EXACT_GRADIENTS, make_one_bit_activation

__all__ = ["LiteResidual", "attach_lite_residual"]

_PER_GROUP = 8
"""Channels a norm treats together, as published."""


class LiteResidual(nn.Module):
    """Pool 2 x 2, filter in groups, norm, ReLU, mix pixel by pixel, norm; drawn from the global generator.

    Weights are initialised as in He et al. 2015, by fan-out. The scale of the last norm starts at 0, so that the
    network initially computes the same.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.filter = nn.Conv2d(
            inputs, inputs, kernel, padding=kernel // 2, groups=math.gcd(groups, inputs), bias=False
        )
        self.norm = _norm(inputs)
        self.activation = make_one_bit_activation(nn.ReLU(), EXACT_GRADIENTS)
        self.mix = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.last_norm = _norm(outputs)
        for convolution in (self.filter, self.mix):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
        nn.init.zeros_(self.last_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] -> [n, outputs, h / 2, w / 2]."""
        hidden = self.activation(self.norm(self.filter(_mean_pool(x))))
        out: Tensor = self.last_norm(self.mix(hidden))
        return out


def attach_lite_residual(block: nn.Module, lite: LiteResidual) -> None:
    """Give a block the branch as ``lite_residual``; its output is stretched to the block's and added."""
    block.add_module("lite_residual", lite)
    _AddedBranch(block).install(block)


class _AddedBranch(ForwardOverride):
    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, x: Tensor) -> Tensor:
        """[n, c, h, w] -> [n, c', h', w']."""
        out: Tensor = type(self.block).forward(self.block, x)
        lite = self.block.get_submodule("lite_residual")(x)
        return out + F.interpolate(lite, size=out.shape[-2:], mode="bilinear")


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // math.gcd(channels, _PER_GROUP), channels)


def _mean_pool(x: Tensor) -> Tensor:
    """Means of 2 x 2 pixels, an odd last row or column left out; unlike PyTorch's pooling it keeps nothing."""
    n, c, h, w = x.shape
    if min(h, w) < 2:
        return x
    return x[..., : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).mean(dim=(3, 5))
