"""A convolution and its backward pass as functions, for layers that choose what is kept between the two."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Geometry", "convolve", "convolve_backward"]


class Geometry(NamedTuple):
    """How a convolution walks over its input, ``margins`` of zeros (left, right, top, bottom) around it first.

    ``order`` is how that lies in memory; what is made again is put in it.
    """

    margins: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    order: torch.memory_format = torch.contiguous_format


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, how: Geometry) -> Tensor:
    """[n, c, h, w] -> [n, c', h', w']."""
    return F.conv2d(_padded(x, how), weight, bias, how.stride, how.padding, how.dilation, how.groups)


def convolve_backward(
    grad: Tensor, x: Tensor | None, shape: torch.Size, weight: Tensor, how: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by input, weight and bias as far as ``wanted``: PyTorch's own.

    Only the weight's reads ``x``; where that is not wanted its ``shape`` [n, c, h, w] will do.
    """
    seen = grad.new_empty(1).expand(_wide(shape, how)) if x is None else _padded(x, how)
    by_x, by_weight, by_bias = torch.ops.aten.convolution_backward(
        grad, seen, weight, [len(weight)], how.stride, how.padding, how.dilation, False, (0, 0), how.groups, wanted
    )
    if wanted[0] and any(how.margins):
        by_x = F.pad(by_x, [-margin for margin in how.margins])
    return by_x, by_weight, by_bias


def _padded(x: Tensor, how: Geometry) -> Tensor:
    return F.pad(x, how.margins) if any(how.margins) else x


def _wide(shape: torch.Size, how: Geometry) -> tuple[int, ...]:
    n, c, h, w = shape
    left, right, top, bottom = how.margins or (0, 0, 0, 0)
    return n, c, top + h + bottom, left + w + right
