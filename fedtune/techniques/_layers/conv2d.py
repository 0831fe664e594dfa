"""Convolutions that store their input only if their weight is trained, and then without padding.

PyTorch stores the input whenever a gradient passes through the layer, although a frozen weight does not need it. If the
input is padded outside, PyTorch stores the padded one, such as 7 x 7 for 3 x 3.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedtune.models.efficientnet_lite import SameConv2d
from fedtune.techniques._layers.convolution_functions import Geometry, convolve, convolve_backward
from fedtune.techniques._layers.layer_replacement import ReplacementLayer, convert_layer_class

__all__ = ["MemoryEfficientConv2d", "MemoryEfficientSameConv2d", "make_efficient_conv2d"]


class MemoryEfficientConv2d(nn.Conv2d, ReplacementLayer):
    """A convolution with the same zero padding on both sides."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Conv2d gives it
        """[n, c, h, w] -> [n, c', h', w'], bit-equal to the plain layer, gradients too."""
        return _convolve(self, input, (0, 0, 0, 0))

    def to_plain_layer(self) -> nn.Conv2d:
        """The convolution it was."""
        return convert_layer_class(self, nn.Conv2d)


class MemoryEfficientSameConv2d(SameConv2d, ReplacementLayer):
    """A convolution with TensorFlow's "same" padding."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Conv2d gives it
        """[n, c, h, w] -> [n, c', ceil(h / stride), ceil(w / stride)], bit-equal to the plain layer."""
        return _convolve(self, input, self.compute_same_padding(*input.shape[-2:]))

    def to_plain_layer(self) -> SameConv2d:
        """The convolution it was."""
        return convert_layer_class(self, SameConv2d)


def make_efficient_conv2d(convolution: nn.Module) -> nn.Module:
    """The memory-efficient convolution; unknown layers are returned as they are."""
    if type(convolution) is SameConv2d:
        keeps_more = convolution.stride != (1, 1) or not convolution.weight.requires_grad
        return convert_layer_class(convolution, MemoryEfficientSameConv2d) if keeps_more else convolution
    if type(convolution) is nn.Conv2d and not convolution.weight.requires_grad:
        known = convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
        return convert_layer_class(convolution, MemoryEfficientConv2d) if known else convolution
    return convolution


def _convolve(layer: nn.Conv2d, x: Tensor, margins: tuple[int, int, int, int]) -> Tensor:
    assert not isinstance(layer.padding, str)
    geometry = Geometry(margins, layer.stride, layer.padding, layer.dilation, layer.groups)
    out: Tensor = _Convolution.apply(x, layer.weight, layer.bias, geometry)
    return out


class _Convolution(torch.autograd.Function):
    """Stores the weight, which the layer holds anyway, and x if the weight has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.geometry, ctx.size = geometry, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return convolve(x, weight, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *convolve_backward(gradients[0], x, ctx.size, weight, ctx.geometry, ctx.needs_input_grad[:3]), None
