"""bfloat16: values with eight significant bits.

What: each value is rounded to the nearest bfloat16, ties to even. The relative error is at most 2^-8.
Sends: 2 bytes a value, half of single precision.
Defaults: no settings.
Use when: nothing may be lost that matters. It is also the mildest codec for ``wire.down``.
Avoid when: bytes are dear: int8 takes half as many and hardly loses more.
Trap: values above 3.39e38 become infinite, and such an update is refused.
Source: Wang and Kanwar, BFloat16 (Google, 2019).
"""

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedtune.wire.codecs._codec import Codec, CodecKind, Coded, Layout, Shape

__all__ = ["Bf16"]

_CODE = np.dtype("<i2")


class Bf16(Codec):
    """Rounds values to bfloat16."""

    name: ClassVar[str] = "bf16"
    kind: ClassVar[CodecKind] = "quantises"
    suits_weights: ClassVar[bool] = True

    def get_layout(self, shape: Shape) -> Layout:
        """Two bytes a value."""
        return Layout(2 * prod(shape))

    def encode(self, tensor: Tensor, seed: int) -> Coded:
        """Round each value."""
        codes = tensor.detach().flatten().to(torch.bfloat16).view(torch.int16)
        return Coded(codes.numpy().astype(_CODE).tobytes())

    def decode(self, content: bytes, tensors: Sequence[Tensor], shape: Shape, seed: int) -> Tensor:
        """Return the rounded values, fp32."""
        codes = torch.from_numpy(np.frombuffer(content, _CODE).astype(np.int16))
        return codes.view(torch.bfloat16).float().reshape(shape)
