"""Merges of task vectors: thin out each, then add them up, with or without an election of signs.

Each published name is a row of switches: how a model's delta is thinned, whether signs are elected, and the settings.

Low-rank pairs: with A common to all models, sum_i c_i (B_i A) = (sum_i c_i B_i) A, so a sum may act on B alone, and so
may one of entries dropped at random and rescaled, in the mean. What elects signs or keeps the largest may not: for any
invertible M the pairs (B_i M)(M^-1 A) are the same products, but other entries of B_i M win. It is refused there.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.contribution import pieces
from fedtune.merging._gram import flat
from fedtune.merging._span import Normalise, Scale
from fedtune.merging._step import Combine, Operand, Shape

__all__ = ["Density", "TaskVectors", "deltas", "elected_sum", "plain_sum"]

Density = Annotated[float, Field(gt=0, le=1)]
_NOTHING = 1e-8
"""A divisor nearer to zero than this is not divided by."""
_CACHED = 1 << 16
"""Entries whose half a dozen sums in double stay in a processor's cache: three times as fast as a whole piece."""


class TaskVectors(Combine, ABC):
    """scale * the sum of thinned task vectors, over the sum of the weights that took part with ``normalise``."""

    thinning: ClassVar[bool] = True
    elect: ClassVar[bool]
    scale: Scale = 1.0
    normalise: Normalise = False

    @abstractmethod
    def thinned(self, index: int, name: str, shape: Shape, operand: Operand) -> Iterator[Tensor]:
        """One tensor's delta of model number ``index`` with most entries at zero, as matrices [rows, width]."""

    def combine(self, name: str, shape: Shape, operands: Sequence[Operand]) -> Iterator[Tensor]:
        """The merged delta of each piece."""
        add = elected_sum if self.elect else plain_sum
        weights = [operand.weight for operand in operands]
        streams = [self.of(one).thinned(index, name, shape, one) for index, one in enumerate(operands)]
        for start, stop in pieces(shape):
            total = add([next(stream) for stream in streams], weights, self.normalise).mul_(self.scale)
            yield total.float().reshape(stop - start, *shape[1:])


def deltas(name: str, shape: Shape, operand: Operand) -> Iterator[Tensor]:
    """One model's delta of a tensor, piece by piece, as matrices [rows, width]."""
    for start, stop in pieces(shape):
        yield flat(operand.rows(name, start, stop))


def plain_sum(parts: Sequence[Tensor], weights: Sequence[float], normalise: bool) -> Tensor:
    """sum_i w_i x_i, over sum_i w_i with ``normalise``; double."""
    total = parts[0].double() * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part.double(), alpha=weight)
    divisor = sum(weights)
    return total.div_(divisor) if normalise and abs(divisor) > _NOTHING else total


def elected_sum(parts: Sequence[Tensor], weights: Sequence[float], normalise: bool) -> Tensor:
    """The sum of the entries w_i x_i that have the sign of their whole sum, a tie being positive; double.

    With ``normalise`` over the sum of these entries' weights.
    """
    rows = max(1, _CACHED // max(1, parts[0].shape[1]))
    blocks = zip(*(part.split(rows) for part in parts), strict=True)
    return torch.cat([_elected(block, weights, normalise) for block in blocks])


def _elected(parts: Sequence[Tensor], weights: Sequence[float], normalise: bool) -> Tensor:
    up, down = (torch.zeros(parts[0].shape, dtype=torch.float64) for _ in range(2))
    for part, weight in zip(parts, weights, strict=True):
        entry = part.double() * weight
        up += entry.clamp_min(0)
        down += entry.clamp_max_(0)
    positive = (up + down >= 0).double()
    total = _either(positive, up, down)
    if not normalise:
        return total
    elected, divisor = 2 * positive - 1, torch.zeros_like(total)
    for part, weight in zip(parts, weights, strict=True):
        taken = part.sign().double().mul_(elected if weight > 0 else -elected).clamp_min_(0)
        divisor.add_(taken, alpha=weight)
    nothing = (divisor.abs() <= _NOTHING).double()
    return total / _either(nothing, torch.ones_like(total), divisor)


def _either(first: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """``one`` where ``first`` is 1 and ``other`` where it is 0, of finite values; half the time of torch.where."""
    return one * first + other * (1 - first)
