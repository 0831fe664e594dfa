"""Packs boolean masks into one bit per element; the lowest bit of a byte is the first of its eight elements."""

import torch
from torch import Tensor

__all__ = ["pack_bits", "unpack_bits"]

_BYTE = 8


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor of any shape as ceil(n / 8) uint8; bits behind the last element are 0."""
    flat = mask.reshape(-1)
    rest = -flat.numel() % _BYTE
    whole = torch.cat([flat, flat.new_zeros(rest)]) if rest else flat
    eights = whole.view(torch.uint8).view(-1, _BYTE)
    packed = eights[:, 0].clone()
    for bit in range(1, _BYTE):
        packed |= eights[:, bit] << bit
    return packed


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The first ``count`` elements of a packed mask, as a flat bool tensor."""
    places = torch.arange(_BYTE, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> places) & 1).view(torch.bool).view(-1)[:count]
