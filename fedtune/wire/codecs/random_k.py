"""random-k: entries drawn from a seed.

What: of each tensor, k entries at positions that both ends draw from the seed of the run, the round, the client and the
tensor. With ``unbiased``, values are multiplied by n / k, so that their mean over draws is the whole tensor.
Sends: k values; no positions.
Defaults: share 0.1 of each tensor, unbiased false.
Use when: there are many clients, whose draws cover all entries; or with ``wire.error_feedback: ef21``, which needs
``unbiased: false``.
Avoid when: few clients train: unbiased values are large and noisy, and the others a part of the step. top-k with error
feedback learns faster with the same bytes.
Trap: ``federation.norm_bound`` sees the enlarged values; all clients have them, so the median has them too.
Source: Konečný et al. (arXiv 1610.05492), random mask; Wangni et al. (arXiv 1710.09854). Positions are those of the k
smallest splitmix64 numbers (Steele et al., OOPSLA 2014), which are the same on every machine.
"""

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fedtune.wire.codecs._codec import Codec, CodecKind, Coded, Layout, Shape
from fedtune.wire.codecs.top_k import count_selected, spread_values

__all__ = ["RandomK", "draw_positions"]

_GOLDEN, _FIRST, _SECOND = (np.uint64(one) for one in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_SHIFTS = tuple(np.uint64(one) for one in (30, 27, 31))


class RandomK(Codec):
    """Sends random entries of each tensor."""

    name: ClassVar[str] = "random-k"
    kind: ClassVar[CodecKind] = "selects"
    share: float = Field(0.1, gt=0, le=1, description="share of each tensor's entries")
    k: int | None = Field(None, ge=1, description="number of entries of each tensor; replaces share")
    unbiased: bool = Field(False, description="multiply what is sent by n / k")

    @property
    def is_contraction(self) -> bool:
        """Enlarged values are further from the tensor than zero is."""
        return not self.unbiased

    def get_layout(self, shape: Shape) -> Layout:
        """No bytes; the values are left to the next codec."""
        return Layout(0, ((count_selected(self.share, self.k, prod(shape)),),))

    def encode(self, tensor: Tensor, seed: int) -> Coded:
        """Values in the order of their positions."""
        flat = tensor.detach().flatten()
        positions = draw_positions(seed, count_selected(self.share, self.k, len(flat)), len(flat))
        return Coded(b"", (flat[torch.from_numpy(positions)],))

    def decode(self, content: bytes, tensors: Sequence[Tensor], shape: Shape, seed: int) -> Tensor:
        """Return zeros but for the sent entries."""
        size, count = prod(shape), len(tensors[0])
        values = tensors[0] * (size / count) if self.unbiased and count else tensors[0]
        return spread_values(values, draw_positions(seed, count, size), shape)

    def count_too_many(self, shape: Shape) -> int:
        """By how much k is above the number of entries."""
        return max(0, (self.k or 0) - prod(shape))


def draw_positions(seed: int, count: int, size: int) -> NDArray[np.int64]:
    """Return ``count`` different positions below ``size``, sorted. They depend on nothing but the arguments."""
    mixed = np.uint64(seed) + _GOLDEN * (np.arange(size, dtype=np.uint64) + np.uint64(1))
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _FIRST
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _SECOND
    order = np.argsort(mixed ^ (mixed >> _SHIFTS[2]), kind="stable")
    return np.sort(order[:count]).astype(np.int64)
