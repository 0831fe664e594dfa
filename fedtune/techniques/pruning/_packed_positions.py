"""Packs sorted positions in a flat tensor at one byte each: the offset in a block, and the count of each block.

A block is as long as what a byte can count, so that neither number ever needs a second one: n places among m entries
take n + ceil(m / 255) bytes in place of 4 n.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtune.wire.client_update import TensorSpec

__all__ = ["declare_positions", "pack_positions", "scatter_positions"]

_BLOCK = 255


def pack_positions(name: str, places: Tensor, entries: int) -> dict[str, Tensor]:
    """Pack sorted positions [n] below ``entries`` as two uint8 tensors: offsets [n] and counts [blocks]."""
    counts = torch.bincount(places // _BLOCK, minlength=_blocks(entries))
    return {f"{name}_offset": (places % _BLOCK).to(torch.uint8), f"{name}_count": counts.to(torch.uint8)}


def declare_positions(name: str, places: int, entries: int) -> dict[str, TensorSpec]:
    """The tensors that ``pack_positions`` returns for so many positions."""
    counts = TensorSpec((_blocks(entries),), "U8", _BLOCK + 1, required_sum=places)
    return {f"{name}_offset": TensorSpec((places,), "U8", _BLOCK), f"{name}_count": counts}


def scatter_positions(name: str, tensors: Mapping[str, Tensor], values: Tensor, entries: int) -> Tensor:
    """``values`` [n] at the packed places among zeros, double [entries]; one said to lie behind the end is let go."""
    offsets, counts = tensors[f"{name}_offset"].long(), tensors[f"{name}_count"].long()
    places = _BLOCK * torch.arange(len(counts)).repeat_interleave(counts) + offsets
    dense = torch.zeros(_BLOCK * len(counts), dtype=torch.float64)
    return dense.index_add_(0, places, values.double())[:entries]


def _blocks(entries: int) -> int:
    return -(-entries // _BLOCK)
