"""Deltas that are read more than once: those of a tensor that fits a budget are read once and held."""

import math
from collections.abc import Sequence

from torch import Tensor

from fedtune.merging._step import MergeInput, Shape
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["cache_small_deltas"]

_BUDGET = 1 << 24
"""Bytes of all models' deltas of one tensor, in fp32."""


class _Pieces:
    """The pieces of one tensor's delta by their first row."""

    def __init__(self) -> None:
        self.by_start: dict[int, Tensor] = {}

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """A piece as ``iter_row_chunks`` cuts it; it must not be changed."""
        return self.by_start[start]


def cache_small_deltas(name: str, shape: Shape, operands: Sequence[MergeInput]) -> Sequence[MergeInput]:
    """The operands with the deltas of one tensor in memory, cut by ``iter_row_chunks``, where they fit the budget.

    Each piece is read of all models before the next one, so that a base that keeps its last rows is read once.
    """
    if 4 * math.prod(shape) * len(operands) > _BUDGET:
        return operands
    found = [_Pieces() for _ in operands]
    for start, stop in iter_row_chunks(shape):
        for own, operand in zip(found, operands, strict=True):
            own.by_start[start] = operand.read_rows(name, start, stop)
    return [operand._replace(read_rows=own) for own, operand in zip(found, operands, strict=True)]
