"""Cache the deltas of a tensor that are read more than once, if they fit a budget."""

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


def cache_small_deltas(name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Sequence[MergeInput]:
    """The merge inputs with the deltas of one tensor in memory, in the chunks of ``iter_row_chunks``, if they fit.

    Each chunk is read from all models before the next one, so that a base that caches its last rows is read once.
    """
    if 4 * math.prod(shape) * len(merge_inputs) > _BUDGET:
        return merge_inputs
    found = [_Pieces() for _ in merge_inputs]
    for start, stop in iter_row_chunks(shape):
        for own, merge_input in zip(found, merge_inputs, strict=True):
            own.by_start[start] = merge_input.read_rows(name, start, stop)
    return [merge_input._replace(read_rows=own) for own, merge_input in zip(found, merge_inputs, strict=True)]
