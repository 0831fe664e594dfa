"""Packs codes of one, two, four or eight bits into bytes; the first code is in the lowest bits."""

import torch
from torch import Tensor

__all__ = ["pack_codes", "unpack_codes"]

_BYTE = 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 codes below 2 ** ``bits``, of any shape, as ceil(bits n / 8) bytes."""
    each = _BYTE // bits
    flat = codes.reshape(-1)
    rest = -flat.numel() % each
    groups = (torch.cat([flat, flat.new_zeros(rest)]) if rest else flat).view(-1, each)
    packed = groups[:, 0].clone()
    for place in range(1, each):
        packed |= groups[:, place] << (bits * place)
    return packed


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` codes, flat."""
    shifts = torch.arange(0, _BYTE, bits, dtype=torch.uint8, device=packed.device)
    codes: Tensor = (packed[:, None] >> shifts) & (2**bits - 1)
    return codes.view(-1)[:count]
