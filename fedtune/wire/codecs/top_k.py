"""top-k: only the entries of largest magnitude.

What: of each tensor, the k entries of largest magnitude are sent with their positions; the others are read as zero.
Sends: k values, and about 2 + log2(n / k) bits for each position.
Defaults: share 0.05 of each tensor, at least one entry.
Use when: with ``wire.error_feedback: ef21``, which sends what was left out in later rounds.
Avoid when: there is no error feedback: entries that are never among the largest do not train, and training stalls.
Trap: positions are known in advance in size only, so they are not free: at a share of one half, bf16 is as small.
Source: Alistarh et al. (arXiv 1809.10505); as a contraction Stich et al. (arXiv 1809.07599), Definition 2.1. Positions
are in Elias-Fano code.
"""

from collections.abc import Sequence
from math import ceil, prod
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedtune.wire.codecs._codec import Codec, CodecKind, Coded, Layout, Shape
from fedtune.wire.codecs._sorted_positions import count_position_bytes, pack_positions, unpack_positions

__all__ = ["TopK"]


class TopK(Codec):
    """Sends the largest entries of each tensor."""

    name: ClassVar[str] = "top-k"
    kind: ClassVar[CodecKind] = "selects"
    share: float = Field(0.05, gt=0, le=1, description="share of each tensor's entries")
    k: int | None = Field(None, ge=1, description="number of entries of each tensor; replaces share")

    def get_layout(self, shape: Shape) -> Layout:
        """The positions; the values are left to the next codec."""
        size = prod(shape)
        count = count_selected(self.share, self.k, size)
        return Layout(count_position_bytes(count, size), ((count,),))

    def encode(self, tensor: Tensor, seed: int) -> Coded:
        """Of entries with equal magnitudes, the first ones are sent."""
        flat = tensor.detach().flatten()
        count = count_selected(self.share, self.k, len(flat))
        chosen = flat.abs().sort(descending=True, stable=True).indices[:count].sort().values
        return Coded(pack_positions(chosen.numpy(), len(flat)), (flat[chosen],))

    def decode(self, content: bytes, tensors: Sequence[Tensor], shape: Shape, seed: int) -> Tensor:
        """Return zeros but for the sent entries."""
        positions = unpack_positions(content, len(tensors[0]), prod(shape))
        return spread_values(tensors[0], positions, shape)

    def count_too_many(self, shape: Shape) -> int:
        """By how much k is above the number of entries."""
        return max(0, (self.k or 0) - prod(shape))


def count_selected(share: float, k: int | None, size: int) -> int:
    """Return how many of ``size`` entries are sent: at least one, unless there is none."""
    return min(size, k or max(1, ceil(share * size)))


def spread_values(values: Tensor, positions: np.ndarray[tuple[int], np.dtype[np.int64]], shape: Shape) -> Tensor:
    """Return zeros of a shape with values at positions of its memory order."""
    flat = torch.zeros(prod(shape), dtype=values.dtype)
    flat[torch.from_numpy(positions)] = values
    return flat.reshape(shape)
