"""A convolution whose input is the product of a tensor and its gate: stores the factors and recomputes the product.

The backward pass of the product stores both factors anyway, so a squeeze-excite block stores one wide tensor less.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedtune.techniques._layers.convolution_functions import Geometry, convolve, convolve_backward
from fedtune.techniques._layers.layer_replacement import ReplacementLayer, convert_layer_class

__all__ = ["make_product_input_conv2d"]

_PRODUCT = "MulBackward0"


class ProductInputConv2d(nn.Conv2d, ReplacementLayer):
    """A convolution whose input is a product of two tensors with gradients; for other inputs it is plain."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Conv2d gives it
        """[n, c, h, w] -> [n, c', h', w'], bit-equal to the plain layer, gradients too."""
        factors = _factors(input)
        if not factors or not self.weight.requires_grad:
            return super().forward(input)
        assert not isinstance(self.padding, str)
        geometry = Geometry((), self.stride, self.padding, self.dilation, self.groups)
        out: Tensor = _OfProduct.apply(input, self.weight, self.bias, geometry, *factors)
        return out

    def to_plain_layer(self) -> nn.Conv2d:
        """The convolution it was."""
        return convert_layer_class(self, nn.Conv2d)


def make_product_input_conv2d(convolution: nn.Module) -> nn.Module:
    """The convolution that stores factors; other layers are returned as they are."""
    known = type(convolution) is nn.Conv2d and convolution.padding_mode == "zeros"
    return (
        convert_layer_class(convolution, ProductInputConv2d)
        if known and not isinstance(convolution.padding, str)
        else convolution
    )


def _factors(product: Tensor) -> tuple[Tensor, ...]:
    """The two factors of a product if autograd stores both; otherwise an empty tuple."""
    made: Any = product.grad_fn
    if made is None or made.name() != _PRODUCT or not torch.is_grad_enabled():
        return ()
    pair = made._saved_self, made._saved_other
    return tuple(one.detach() for one in pair) if all(isinstance(one, Tensor) for one in pair) else ()


class _OfProduct(torch.autograd.Function):
    """Stores the weight, which the layer holds anyway, and the factors, which the product stores anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, one: Tensor, other: Tensor
    ) -> Tensor:
        ctx.geometry = geometry
        ctx.save_for_backward(weight, one, other)
        return convolve(x, weight, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, one, other = ctx.saved_tensors
        x = one * other
        found = convolve_backward(gradients[0], x, x.shape, weight, ctx.geometry, ctx.needs_input_grad[:3])
        return (*found, None, None, None)
