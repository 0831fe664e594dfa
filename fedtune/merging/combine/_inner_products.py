"""Inner products of deltas, chunk by chunk. Rows are added in order, so that bits do not depend on the chunks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Literal

import torch
from torch import Tensor

from fedtune.merging._step import MergeInput, Shape
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["Granularity", "add_rows_in_order", "compute_gram", "compute_model_gram", "compute_row_dots", "flatten_rows"]

Granularity = Literal["tensor", "row", "column"]
_COLUMNS_PER_SUM = 1 << 14
"""Columns summed at a time: few enough for torch to stay on one thread."""


def flatten_rows(rows: Tensor) -> Tensor:
    """Rows as a matrix [rows, width]; a delta without dimensions is one row."""
    return rows.reshape(len(rows), -1) if rows.dim() else rows.reshape(1, 1)


def compute_model_gram(shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput]) -> Tensor:
    """Inner products [K, K, 1] of whole models."""
    total = torch.zeros(len(merge_inputs), len(merge_inputs), 1, dtype=torch.float64)
    for name, shape in shapes.items():
        total += compute_gram(name, shape, merge_inputs)
    return total


def compute_gram(name: str, shape: Shape, merge_inputs: Sequence[MergeInput], over: Granularity = "tensor") -> Tensor:
    """Inner products [K, K, groups] of one tensor's deltas, double; a group is the tensor, a row or a column."""
    return (
        _compute_per_row(name, shape, merge_inputs)
        if over == "row"
        else _compute_summed(name, shape, merge_inputs, over)
    )


def _compute_per_row(name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Tensor:
    found = torch.empty(len(merge_inputs), len(merge_inputs), shape[0], dtype=torch.float64)
    for start, stop, parts in _iter_chunks(name, shape, merge_inputs):
        for i, j in _list_pairs(merge_inputs):
            found[i, j, start:stop] = found[j, i, start:stop] = compute_row_dots(parts[i], parts[j])
    return found


def _compute_summed(name: str, shape: Shape, merge_inputs: Sequence[MergeInput], over: Granularity) -> Tensor:
    groups = math.prod(shape[1:]) if over == "column" else 1
    total = torch.zeros(len(merge_inputs), len(merge_inputs), groups, dtype=torch.float64)
    for _, _, parts in _iter_chunks(name, shape, merge_inputs):
        for i, j in _list_pairs(merge_inputs):
            terms = parts[i] * parts[j] if over == "column" else compute_row_dots(parts[i], parts[j])[:, None]
            total[i, j] = total[j, i] = add_rows_in_order(total[i, j], terms)
    return total


def _iter_chunks(
    name: str, shape: Shape, merge_inputs: Sequence[MergeInput]
) -> Iterator[tuple[int, int, list[Tensor]]]:
    """First row, last row (exclusive) and the rows of each model as matrices, double."""
    for start, stop in iter_row_chunks(shape):
        yield (
            start,
            stop,
            [flatten_rows(merge_input.read_rows(name, start, stop)).double() for merge_input in merge_inputs],
        )


def _list_pairs(merge_inputs: Sequence[MergeInput]) -> Iterator[tuple[int, int]]:
    return combinations_with_replacement(range(len(merge_inputs)), 2)


def add_rows_in_order(total: Tensor, terms: Tensor) -> Tensor:
    """``total`` and the rows of ``terms``, one after the other."""
    return torch.cat([total[None], terms]).cumsum(0)[-1]


def compute_row_dots(one: Tensor, other: Tensor) -> Tensor:
    """The inner product of each row [rows]."""
    found = torch.zeros(len(one), dtype=torch.float64)
    for a, b in zip(one.split(_COLUMNS_PER_SUM, 1), other.split(_COLUMNS_PER_SUM, 1), strict=True):
        found += torch.linalg.vecdot(a, b)
    return found
