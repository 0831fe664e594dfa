"""Eight bits per number, with one scale per row: per token, or per channel of an image."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Int8Rows"]

_LARGEST = 127


class _Packed(NamedTuple):
    codes: Tensor
    scales: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Int8Rows:
    """code = round(127 x / max |x|) over a row. The error of an entry is at most max |x| / 254.

    A row with an entry that is infinite or not a number becomes not a number as a whole.
    """

    least_bytes: int

    def accepts(self, x: Tensor) -> bool:
        """Return whether there are rows of several numbers."""
        return x.dim() > 1 and x.shape[-1] > 0

    def pack(self, x: Tensor) -> _Packed:
        """Return codes of the shape of ``x``, and the scales."""
        rows = (2, 3) if x.dim() == 4 else (-1,)
        scales = x.abs().amax(rows, keepdim=True).float() / _LARGEST
        codes = (x.float() / scales).nan_to_num_(0.0).round_().clamp_(-_LARGEST, _LARGEST)
        return _Packed(codes.to(torch.int8), scales, x.dtype)

    def unpack(self, packed: _Packed) -> Tensor:
        """Return the numbers with the strides of the input."""
        return (packed.codes * packed.scales).to(packed.dtype)
