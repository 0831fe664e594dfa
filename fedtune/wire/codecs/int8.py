"""int8: values in 8 bits, in blocks with a scale each.

What: a block of B values with the largest magnitude a becomes round(127 x / a), whole numbers from -127 to 127, and the
scale a / 127. The error of a value is at most a / 254.
Sends: 1 + 4 / B bytes a value.
Defaults: block 256.
Use when: updates should take a quarter of the bytes and lose next to nothing; and for ``wire.down``.
Avoid when: nothing; with ``wire.error_feedback`` or many clients, int4 or top-k before int8 send much less.
Trap: one outlier makes the other values of its block coarse; smaller blocks cost more scales.
Source: Dettmers et al. (arXiv 2110.02861), Section 2.1, with linear codes; QSGD (arXiv 1610.02132) rounds at random.
"""

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedtune.errors import ClientUpdateError
from fedtune.wire.codecs._blocks import count_blocks, decode_scales, encode_scales, expand_scales, split_blocks
from fedtune.wire.codecs._codec import Codec, CodecKind, Coded, Layout, Shape

__all__ = ["Int8"]

_MOST = 127


class Int8(Codec):
    """Rounds values to 255 levels of their block."""

    name: ClassVar[str] = "int8"
    kind: ClassVar[CodecKind] = "quantises"
    suits_weights: ClassVar[bool] = True
    block: int = Field(256, ge=8, le=1 << 20, description="values that share a scale")

    def get_layout(self, shape: Shape) -> Layout:
        """A byte a value, and four a block."""
        values = prod(shape)
        return Layout(values + 4 * count_blocks(values, self.block))

    def encode(self, tensor: Tensor, seed: int) -> Coded:
        """Scales first, then the codes."""
        scales, codes = round_to_levels(split_blocks(tensor, self.block), _MOST)
        return Coded(encode_scales(scales) + codes.flatten()[: tensor.numel()].numpy().tobytes())

    def decode(self, content: bytes, tensors: Sequence[Tensor], shape: Shape, seed: int) -> Tensor:
        """Return the levels, fp32."""
        values, blocks = prod(shape), count_blocks(prod(shape), self.block)
        codes = np.frombuffer(content, np.int8, values, 4 * blocks).astype(np.float32)
        if (codes < -_MOST).any():
            raise ClientUpdateError("a value is below its block's range")
        scales = expand_scales(decode_scales(content, blocks), values, self.block)
        return (torch.from_numpy(codes) * scales).reshape(shape)


def round_to_levels(blocks: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the scale of each block, and codes from -most to most (int8) of the shape of ``blocks``."""
    scales = blocks.abs().amax(dim=1) / most if blocks.numel() else blocks.new_zeros(0)
    codes = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-most, most)
    return scales, codes.nan_to_num().to(torch.int8)
