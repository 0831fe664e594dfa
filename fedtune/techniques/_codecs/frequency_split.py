"""DIVISION's form of a feature map: local means, and what remains in a few bits.

x = up(mean(x)) + rest. The means of blocks vary slowly and carry most of the information, so there are few of them and
they stay precise. The rest has small values. It is quantised per sample and channel, with stochastic rounding, so that
its expectation is exact.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedtune.techniques._codecs.bit_codes import pack_codes, unpack_codes

__all__ = ["FrequencySplit"]


class _Packed(NamedTuple):
    means: Tensor
    codes: Tensor
    least: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    layout: tuple[torch.dtype, torch.memory_format]


@dataclass(frozen=True)
class FrequencySplit:
    """Means over ``block`` x ``block`` pixels, or over ``block`` tokens, in bfloat16, and ``bits`` for each entry."""

    least_bytes: int
    block: int
    bits: int
    tokens: bool

    def accepts(self, x: Tensor) -> bool:
        """Return whether there is a map [n, c, h, w] of several pixels, or several tokens [n, tokens, c]."""
        return (x.dim() == 4 and x.shape[-1] * x.shape[-2] > 1) or (self.tokens and x.dim() == 3 and x.shape[1] > 1)

    def pack(self, x: Tensor) -> _Packed:
        """Return means [n, c, ceil(h / block), ceil(w / block)] and codes of the rest."""
        image = _to_image(x).float().contiguous()
        means = self._pool(image).bfloat16()
        rest = (image - self._repeat(means, image.shape)).flatten(2)
        least, scales = _find_range(rest, self.bits)
        levels = (rest - least) / scales
        codes = (levels + torch.rand_like(levels)).floor_().nan_to_num_(0.0).clamp_(0, 2**self.bits - 1)
        last = x.dim() == 4 and not x.is_contiguous()
        layout = (x.dtype, torch.channels_last if last else torch.contiguous_format)
        return _Packed(means, pack_codes(codes.to(torch.uint8), self.bits), least, scales, tuple(x.shape), layout)

    def unpack(self, packed: _Packed) -> Tensor:
        """Return the sum of both parts."""
        dtype, memory_format = packed.layout
        size = _image_size(packed.shape)
        codes = unpack_codes(packed.codes, self.bits, torch.Size(size).numel()).view(*size[:2], -1)
        rest = (codes * packed.scales + packed.least).view(size)
        image = (rest + self._repeat(packed.means, size)).to(dtype)
        if len(packed.shape) == 3:
            return image[..., 0].transpose(1, 2).contiguous()
        return image.contiguous(memory_format=memory_format)

    def _pool(self, image: Tensor) -> Tensor:
        kernel = [min(self.block, side) for side in image.shape[2:]]
        return F.avg_pool2d(image, kernel, ceil_mode=True)

    def _repeat(self, means: Tensor, size: tuple[int, ...]) -> Tensor:
        """Repeat each mean over its block. The last blocks may be smaller."""
        high, wide = (min(self.block, side) for side in size[2:])
        image = means.float().repeat_interleave(high, 2).repeat_interleave(wide, 3)
        return image[:, :, : size[2], : size[3]]


def _to_image(x: Tensor) -> Tensor:
    """Tokens [n, tokens, c] become a map [n, c, tokens, 1]."""
    return x if x.dim() == 4 else x.transpose(1, 2)[..., None]


def _image_size(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 4 else (shape[0], shape[2], shape[1], 1)


def _find_range(rest: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the least value and the step between two codes, per sample and channel.

    Both are rounded to bfloat16 so that the codes still reach the largest value: the least down, the step up.
    """
    least = rest.amin(-1, keepdim=True)
    coarse = (least - least.abs() / 128).bfloat16()
    steps = (rest.amax(-1, keepdim=True) - coarse.float()) / (2**bits - 1)
    return coarse, (steps + steps / 128).bfloat16().clamp(min=torch.finfo(torch.bfloat16).tiny)
