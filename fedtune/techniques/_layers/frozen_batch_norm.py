"""A batch norm with frozen statistics and scale, which stores nothing for the backward pass.

With a = scale / sqrt(variance + eps), y = a x + (shift - a mean). The gradient of the shift is the sum of g over
examples and pixels, and that of x is a g. Neither needs x, but PyTorch stores it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedtune.techniques._layers.layer_replacement import ReplacementLayer, convert_layer_class

__all__ = ["FrozenBatchNorm2d", "make_frozen_batch_norm"]


class FrozenBatchNorm2d(nn.BatchNorm2d, ReplacementLayer):
    """Its statistics stay fixed in training. If its scale is trained, it stores its input."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.BatchNorm2d gives it
        """[n, c, h, w] -> [n, c, h, w], bit-equal to the norm in evaluation mode, gradients too."""
        if self.weight.requires_grad:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        out: Tensor = _Shift.apply(input, self.weight, self.bias, self.running_mean, self.running_var, self.eps)
        return out

    def to_plain_layer(self) -> nn.BatchNorm2d:
        """The plain batch norm."""
        return convert_layer_class(self, nn.BatchNorm2d)


def make_frozen_batch_norm(norm: nn.Module) -> nn.Module:
    """The frozen batch norm; norms without parameters or statistics, and other layers, are returned as they are."""
    able = isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats
    return convert_layer_class(norm, FrozenBatchNorm2d) if able and type(norm) is nn.BatchNorm2d else norm


class _Shift(torch.autograd.Function):
    """Stores its parameters and statistics, which the layer holds anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(weight, mean, var)
        ctx.eps, ctx.strides = eps, x.stride()
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """PyTorch's own backward pass, so that bits are equal. Without a gradient of the scale, x does not matter.

        The memory layout of x decides the order in which g is summed, so the placeholder for x has the same layout.
        """
        [g] = gradients
        like_x = g if g.stride() == ctx.strides else g.new_empty_strided(g.shape, ctx.strides)
        of_x, of_shift = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        by_x, _, by_shift = torch.ops.aten.native_batch_norm_backward(
            g, like_x, *ctx.saved_tensors, None, None, False, ctx.eps, [of_x, False, of_shift]
        )
        return by_x if of_x else None, None, by_shift if of_shift else None, None, None, None
