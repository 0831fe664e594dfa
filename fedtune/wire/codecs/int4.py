"""int4: values in 4 bits, in blocks with a scale each.

What: a block of B values with the largest magnitude a becomes round(7 x / a), whole numbers from -7 to 7, and the scale
a / 7. The error of a value is at most a / 14. Two codes share a byte.
Sends: 1/2 + 4 / B bytes a value.
Defaults: block 64.
Use when: updates should take an eighth of the bytes, or their selected entries after top-k.
Avoid when: values differ by orders of magnitude within a block: small ones become zero. ``wire.error_feedback: ef21``
sends them later.
Trap: in ``wire.down``, weights are off by up to a fourteenth of the largest in their block; try bf16 or int8.
Source: Dettmers et al. (arXiv 2110.02861), Section 2.1, with 15 linear levels.
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
from fedtune.wire.codecs.int8 import round_to_levels

__all__ = ["Int4"]

_MOST, _OFFSET = 7, 8


class Int4(Codec):
    """Rounds values to 15 levels of their block."""

    name: ClassVar[str] = "int4"
    kind: ClassVar[CodecKind] = "quantises"
    suits_weights: ClassVar[bool] = True
    block: int = Field(64, ge=8, le=1 << 20, description="values that share a scale")

    def get_layout(self, shape: Shape) -> Layout:
        """Half a byte a value, and four a block."""
        values = prod(shape)
        return Layout(-(-values // 2) + 4 * count_blocks(values, self.block))

    def encode(self, tensor: Tensor, seed: int) -> Coded:
        """Scales first, then pairs of codes, the first one in the low bits."""
        scales, codes = round_to_levels(split_blocks(tensor, self.block), _MOST)
        nibbles = codes.flatten()[: tensor.numel()].numpy().astype(np.uint8) + np.uint8(_OFFSET)
        nibbles = np.append(nibbles, np.full(len(nibbles) % 2, _OFFSET, np.uint8))
        return Coded(encode_scales(scales) + (nibbles[0::2] | nibbles[1::2] << 4).tobytes())

    def decode(self, content: bytes, tensors: Sequence[Tensor], shape: Shape, seed: int) -> Tensor:
        """Return the levels, fp32."""
        values, blocks = prod(shape), count_blocks(prod(shape), self.block)
        pairs = np.frombuffer(content, np.uint8, -(-values // 2), 4 * blocks)
        codes = np.stack([pairs & 15, pairs >> 4], axis=1).ravel()[:values].astype(np.float32) - _OFFSET
        if (codes < -_MOST).any():
            raise ClientUpdateError("a value is below its block's range")
        scales = expand_scales(decode_scales(content, blocks), values, self.block)
        return (torch.from_numpy(codes) * scales).reshape(shape)
