"""Low-rank pairs of different ranks in one federation: slice the shared pair for a client, and pad its deltas.

Clients may train LoRA pairs of a smaller rank than the server. The shared pair has rank R and scale s; a client has
rank r <= R and its own scale. The client receives the first r columns of B, multiplied by s and divided by its own
scale, and the first r rows of A. The server divides the delta of B by the same factor and pads both deltas with zeros
up to rank R. The client's product and the columns it never received then add up without cross terms: s (B + dB)(A + dA)
= (client's product) + s B[:, r:] A[r:]. Merges of products, or of one factor, stay exact.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune.wire.client_update import LowRankPair

__all__ = ["pad_to_rank", "truncate_to_rank"]

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


def truncate_to_rank(
    state: Tensors, shapes: Shapes, pairs: Sequence[LowRankPair], own: Sequence[LowRankPair]
) -> dict[str, Tensor]:
    """Return the state's tensors in the ``shapes`` of a client. ``own`` are its pairs, ``pairs`` those of the state."""
    factors = _left_factors(pairs, own)
    return {name: _truncate(state[name], shape) * factors.get(name, 1) for name, shape in shapes.items()}


def pad_to_rank(
    deltas: Tensors, shapes: Shapes, pairs: Sequence[LowRankPair], own: Sequence[LowRankPair]
) -> dict[str, Tensor]:
    """Return a client's deltas in the ``shapes`` of the shared state. Other tensors of its update stay the same."""
    factors = _left_factors(pairs, own)
    return {
        name: _pad(delta / factors.get(name, 1), shapes[name]) if name in shapes else delta
        for name, delta in deltas.items()
    }


def _left_factors(pairs: Sequence[LowRankPair], own: Sequence[LowRankPair]) -> dict[str, float]:
    """Return the factor that multiplies B for the client, by name."""
    scales = {pair.left: pair.scale for pair in pairs}
    return {pair.left: scales[pair.left] / pair.scale for pair in own}


def _truncate(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor[tuple(slice(size) for size in shape)]


def _pad(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) == shape:
        return tensor
    whole = torch.zeros(shape, dtype=tensor.dtype)
    whole[tuple(slice(size) for size in tensor.shape)] = tensor
    return whole
