"""A convolution and its backward pass as functions, for layers that choose what they store in between."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Geometry", "convolve", "convolve_backward"]


class Geometry(NamedTuple):
    """The settings of a convolution; ``zero_padding`` (left, right, top, bottom) is added to the input first.

    ``memory_format`` is that of the input; a recomputed input gets the same.
    """

    zero_padding: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    memory_format: torch.memory_format = torch.contiguous_format


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """[n, c, h, w] -> [n, c', h', w']."""
    return F.conv2d(
        _padded(x, geometry), weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )


def convolve_backward(
    grad: Tensor,
    x: Tensor | None,
    shape: torch.Size,
    weight: Tensor,
    geometry: Geometry,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """PyTorch's gradients of input, weight and bias, as far as ``needs_grad`` asks for them.

    Only the gradient of the weight reads ``x``; without it, the ``shape`` [n, c, h, w] is enough.
    """
    seen = grad.new_empty(1).expand(_wide(shape, geometry)) if x is None else _padded(x, geometry)
    by_x, by_weight, by_bias = torch.ops.aten.convolution_backward(
        grad,
        seen,
        weight,
        [len(weight)],
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0, 0),
        geometry.groups,
        needs_grad,
    )
    if needs_grad[0] and any(geometry.zero_padding):
        by_x = F.pad(by_x, [-margin for margin in geometry.zero_padding])
    return by_x, by_weight, by_bias


def _padded(x: Tensor, geometry: Geometry) -> Tensor:
    return F.pad(x, geometry.zero_padding) if any(geometry.zero_padding) else x


def _wide(shape: torch.Size, geometry: Geometry) -> tuple[int, ...]:
    n, c, h, w = shape
    left, right, top, bottom = geometry.zero_padding or (0, 0, 0, 0)
    return n, c, top + h + bottom, left + w + right
