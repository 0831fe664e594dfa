"""Low-rank increments of base weights: a round's sum of products in fp32 factors, added with the same bits everywhere.

The factors come from the singular value decomposition of the sum, so that they reveal no more about single clients than
the dense sum does. The product of two fp32 numbers is exact in double precision, and the products are added rank by
rank, not by a matrix product, whose order of additions may differ between libraries. The weight before a round and the
increment therefore give the weight after it, bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.merging._factor_svd import compute_core
from fedtune.merging._low_rank_factors import LowRankFactors
from fedtune.wire.client_update import iter_row_chunks

__all__ = [
    "Increment",
    "Increments",
    "add_increment",
    "add_increments",
    "join_increments",
    "make_increment",
    "split_increments",
]

_PREFIX = "increments"
_SMALLER = 4
"""Pieces are smaller than elsewhere by this factor. Each is read once per rank, from the processor's cache."""


class Increment(NamedTuple):
    """left @ right with left [d, R] and right [R, k], both fp32; R may be zero."""

    left: Tensor
    right: Tensor


Increments = Mapping[str, Increment]
"""What one round adds to the base weights, by the weight's name."""


def make_increment(factors: LowRankFactors) -> Increment:
    """Return the product as fp32 factors with equal shares of its singular values, without those of rounding errors.

    The rounding of the factors is about 1e-7 of the product, and the sum with the weight is rounded to fp32 anyway.
    """
    q1, core, q2 = compute_core(factors)
    u, s, vh = torch.linalg.svd(core)
    least = s[:1] * max(len(q1), q2.shape[1]) * torch.finfo(s.dtype).eps
    root = s[s > least].sqrt()
    rank = len(root)
    return Increment((q1 @ (u[:, :rank] * root)).float(), ((root[:, None] * vh[:rank]) @ q2).float())


def add_increment(weight: Tensor, increment: Increment, transposed: bool = False) -> Tensor:
    """Return a copy of a weight [d, k, ...] plus the product, or its transpose. Each piece is rounded once at the end.

    ``transposed`` weights are [k, d]: embeddings, and the linear layers of GPT-2.
    """
    after = weight.clone(memory_format=torch.contiguous_format)
    view = after.flatten(1).T if transposed else after.flatten(1)
    left, right = increment.left.T.double().contiguous(), increment.right.double()
    for start, stop in iter_row_chunks(tuple(view.shape), together=_SMALLER):
        total = torch.zeros(view[start:stop].shape, dtype=torch.float64)
        for column, row in zip(left[:, start:stop], right, strict=True):
            total.addr_(column, row)  # exact products: with or without a fused multiply-add the same bits
        view[start:stop] = (view[start:stop].double() + total).to(weight.dtype)
    return after


def add_increments(weight: Tensor, name: str, steps: Sequence[Increments], transposed: bool = False) -> Tensor:
    """Return the weight called ``name`` after some rounds. Each round rounds it to its data type."""
    for step in steps:
        if name in step:
            weight = add_increment(weight, step[name], transposed)
    return weight


def join_increments(steps: Sequence[Increments]) -> dict[str, Tensor]:
    """Return the increments of some rounds as named tensors that can be sent with a state."""
    return {
        f"{_PREFIX}/{place:04d}/{side}/{name}": tensor
        for place, step in enumerate(steps)
        for name, increment in step.items()
        for side, tensor in increment._asdict().items()
    }


def split_increments(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Increment]]]:
    """Split received tensors into those of the state and the increments of each round.

    Raise KeyError if a factor of an increment is missing.
    """
    sent = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{_PREFIX}/")}
    steps: dict[str, dict[str, Increment]] = {}
    for place, name, left in _left_sides(tensors):
        right = tensors[f"{_PREFIX}/{place}/right/{name}"]
        steps.setdefault(place, {})[name] = Increment(left, right)
    return sent, [steps[place] for place in sorted(steps)]


def _left_sides(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the position of the round, the weight's name and the left factor of each increment."""
    for key in tensors:
        if key.startswith(f"{_PREFIX}/"):
            _, place, side, name = key.split("/", 3)
            if side == "left":
                yield place, name, tensors[key]
