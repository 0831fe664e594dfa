"""sign: one bit a value, in blocks with a scale each.

What: a block of B values becomes its signs and the mean m of |x|; it is read as m sign(x), zero counting as positive.
Sends: 1/8 + 4 / B bytes a value.
Defaults: block 1024.
Use when: clients come back often and ``wire.error_feedback: ef21`` keeps what the signs lose.
Avoid when: there is no error feedback: all values of a block get the same size, and small ones far too large a one.
Trap: after top-k all sent values are large, so that signs lose little there.
Source: Karimireddy et al. (arXiv 1901.09847), Algorithm 1 and Section 4: the scaled sign.
"""

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedtune.wire.codecs._blocks import count_blocks, decode_scales, encode_scales, expand_scales, split_blocks
from fedtune.wire.codecs._codec import Codec, CodecKind, Coded, Layout, Shape

__all__ = ["Sign"]


class Sign(Codec):
    """Sends signs and mean magnitudes."""

    name: ClassVar[str] = "sign"
    kind: ClassVar[CodecKind] = "quantises"
    block: int = Field(1024, ge=8, le=1 << 20, description="values that share a scale")

    def get_layout(self, shape: Shape) -> Layout:
        """A bit a value, and four bytes a block."""
        values = prod(shape)
        return Layout(-(-values // 8) + 4 * count_blocks(values, self.block))

    def encode(self, tensor: Tensor, seed: int) -> Coded:
        """Scales first, then the signs."""
        blocks, values = split_blocks(tensor, self.block), tensor.numel()
        starts = torch.arange(0, values, self.block)
        scales = blocks.abs().sum(dim=1) / (values - starts).clamp(max=self.block)
        signs = (tensor.detach().flatten() >= 0).numpy()
        return Coded(encode_scales(scales) + np.packbits(signs).tobytes())

    def decode(self, content: bytes, tensors: Sequence[Tensor], shape: Shape, seed: int) -> Tensor:
        """Return plus or minus the scale, fp32."""
        values, blocks = prod(shape), count_blocks(prod(shape), self.block)
        bits = np.unpackbits(np.frombuffer(content, np.uint8, offset=4 * blocks), count=values)
        scales = expand_scales(decode_scales(content, blocks), values, self.block)
        return (torch.from_numpy(bits * np.float32(2) - np.float32(1)) * scales).reshape(shape)
