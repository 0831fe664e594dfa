"""A tensor of which only the largest entries are stored, with their positions in the smallest form.

Of each row of w entries floor((1 - prune) w) are kept, at least one; of equals the first. With r the share kept, an
entry costs r times the value's size, and 1/8 byte for a bitmap or r times an index's size for a list: what is less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedtune.techniques._layers import bit_packing
from fedtune.techniques.pruning._largest_entries import INTEGER_DTYPES, mask_largest_per_row

__all__ = ["PackedLayout", "PackedTensor", "PruningRule", "count_kept_entries", "pack_pruned", "unpack_pruned"]

_HALF_MAX = 65504.0
"""The largest number of half precision."""


@dataclass(frozen=True)
class PruningRule:
    """What is stored: the share ``prune`` of each row is not, ``half`` are the values, ``centre`` the last dimension.

    Values too large for half precision keep the whole tensor in its own.
    """

    pruned_fraction: float
    half_precision: bool = False
    centre_features: bool = False


@dataclass(frozen=True)
class PackedLayout:
    """The values needed to restore the dense tensor from the stored ones; ``width`` is the length of a row."""

    shape: torch.Size
    dtype: torch.dtype
    width: int
    position_format: Literal["all", "bitmap", "list"]
    centred: bool


class PackedTensor(NamedTuple):
    """Stored tensors: values, their places unless all are stored, and the means if they were subtracted."""

    tensors: tuple[Tensor, ...]
    layout: PackedLayout


def count_kept_entries(width: int, prune: float) -> int:
    """floor((1 - prune) width), at least 1, for the decimal number that ``prune`` is written as."""
    return max(1, int((1 - Fraction(str(prune))) * width))


@torch.no_grad()
def pack_pruned(x: Tensor, rule: PruningRule, width: int) -> PackedTensor:
    """Prune a tensor whose number of entries is a multiple of ``width``; a tensor that is kept whole is not copied."""
    keep = count_kept_entries(width, rule.pruned_fraction)
    centred = rule.centre_features and (keep < width or rule.half_precision)
    means = [x.reshape(-1, x.shape[-1]).mean(0)] if centred else []
    taken = x - means[0] if centred else x.detach()
    if keep == width:
        return PackedTensor((_narrow(taken, rule), *means), PackedLayout(x.shape, x.dtype, width, "all", centred))
    rows = taken.reshape(-1, width)
    mask = mask_largest_per_row(rows, keep)
    values = _narrow(rows.masked_select(mask), rule)
    places, kind = _places(mask, keep)
    return PackedTensor((values, places, *means), PackedLayout(x.shape, x.dtype, width, kind, centred))


@torch.no_grad()
def unpack_pruned(tensors: Sequence[Tensor], layout: PackedLayout) -> Tensor:
    """The dense tensor, with zeros where nothing was stored, plus its means."""
    values = tensors[0].to(layout.dtype)
    dense = values if layout.position_format == "all" else _spread(values, tensors[1], layout)
    return dense + tensors[-1] if layout.centred else dense


def _narrow(values: Tensor, rule: PruningRule) -> Tensor:
    """Values in half precision if the rule asks for it, it saves memory and all values fit its range."""
    fits = rule.half_precision and values.element_size() > 2 and bool((values.abs() <= _HALF_MAX).all())
    return values.half() if fits else values


def _places(mask: Tensor, keep: int) -> tuple[Tensor, Literal["bitmap", "list"]]:
    """The places of ``keep`` entries per row [n, width]: one bit per entry, or each one's index in its row."""
    rows, width = mask.shape
    size = next(size for size, kind in INTEGER_DTYPES.items() if width - 1 <= torch.iinfo(kind).max)
    if -(-mask.numel() // 8) <= rows * keep * size:
        return bit_packing.pack_bits(mask), "bitmap"
    return mask.nonzero()[:, 1].to(INTEGER_DTYPES[size]), "list"


def _spread(values: Tensor, places: Tensor, layout: PackedLayout) -> Tensor:
    """Values at their places among zeros."""
    dense = values.new_zeros(layout.shape)
    if layout.position_format == "bitmap":
        return dense.masked_scatter_(bit_packing.unpack_bits(places, dense.numel()).view(layout.shape), values)
    rows = dense.view(-1, layout.width)
    rows.scatter_(1, places.view(len(rows), -1).long(), values.view(len(rows), -1))
    return dense
