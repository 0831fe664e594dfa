"""Low-rank pairs of different ranks in one federation: what a narrower client is given, and what becomes of its deltas.

The shared pair has rank R and scale s, a client's r <= R and its own scale. Of s B A it is given the first r terms: the
first r columns of B, times s over its scale, and the first r rows of A. Deltas come back the other way, zero past r:
then the client's pair and the terms it was never given add up without cross terms,
s (B + dB)(A + dA) = (its product) + s B[:, r:] A[r:], so that merges of products, and of one factor, stay exact.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune.contribution import LowRankPair

__all__ = ["pad_to_rank", "truncate_to_rank"]

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


def truncate_to_rank(
    state: Tensors, shapes: Shapes, pairs: Sequence[LowRankPair], own: Sequence[LowRankPair]
) -> dict[str, Tensor]:
    """The tensors a client has, in its ``shapes``; ``own`` are its pairs, ``pairs`` those of the state."""
    factors = _left_factors(pairs, own)
    return {name: _cut(state[name], shape) * factors.get(name, 1) for name, shape in shapes.items()}


def pad_to_rank(
    deltas: Tensors, shapes: Shapes, pairs: Sequence[LowRankPair], own: Sequence[LowRankPair]
) -> dict[str, Tensor]:
    """A client's deltas in the ``shapes`` of the shared state; what belongs to no pair as it is."""
    factors = _left_factors(pairs, own)
    return {name: _filled(delta / factors.get(name, 1), shapes[name]) for name, delta in deltas.items()}


def _left_factors(pairs: Sequence[LowRankPair], own: Sequence[LowRankPair]) -> dict[str, float]:
    """What B is multiplied by on its way to the client, by name."""
    scales = {pair.left: pair.scale for pair in pairs}
    return {pair.left: scales[pair.left] / pair.scale for pair in own}


def _cut(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor[tuple(slice(size) for size in shape)]


def _filled(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) == shape:
        return tensor
    whole = torch.zeros(shape, dtype=tensor.dtype)
    whole[tuple(slice(size) for size in tensor.shape)] = tensor
    return whole
