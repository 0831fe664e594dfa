"""Inner products of deltas, piece by piece; rows add up in order, so that bits depend on no piece or thread."""

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


def compute_model_gram(shapes: Mapping[str, Shape], operands: Sequence[MergeInput]) -> Tensor:
    """Inner products [K, K, 1] of whole models."""
    total = torch.zeros(len(operands), len(operands), 1, dtype=torch.float64)
    for name, shape in shapes.items():
        total += compute_gram(name, shape, operands)
    return total


def compute_gram(name: str, shape: Shape, operands: Sequence[MergeInput], over: Granularity = "tensor") -> Tensor:
    """Inner products [K, K, groups] of one tensor's deltas, double; a group is the tensor, a row or a column."""
    return _by_row(name, shape, operands) if over == "row" else _summed(name, shape, operands, over)


def _by_row(name: str, shape: Shape, operands: Sequence[MergeInput]) -> Tensor:
    found = torch.empty(len(operands), len(operands), shape[0], dtype=torch.float64)
    for start, stop, parts in _parts(name, shape, operands):
        for i, j in _pairs(operands):
            found[i, j, start:stop] = found[j, i, start:stop] = compute_row_dots(parts[i], parts[j])
    return found


def _summed(name: str, shape: Shape, operands: Sequence[MergeInput], over: Granularity) -> Tensor:
    groups = math.prod(shape[1:]) if over == "column" else 1
    total = torch.zeros(len(operands), len(operands), groups, dtype=torch.float64)
    for _, _, parts in _parts(name, shape, operands):
        for i, j in _pairs(operands):
            terms = parts[i] * parts[j] if over == "column" else compute_row_dots(parts[i], parts[j])[:, None]
            total[i, j] = total[j, i] = add_rows_in_order(total[i, j], terms)
    return total


def _parts(name: str, shape: Shape, operands: Sequence[MergeInput]) -> Iterator[tuple[int, int, list[Tensor]]]:
    """First row, last row (exclusive) and the rows of each model as matrices, double."""
    for start, stop in iter_row_chunks(shape):
        yield start, stop, [flatten_rows(operand.read_rows(name, start, stop)).double() for operand in operands]


def _pairs(operands: Sequence[MergeInput]) -> Iterator[tuple[int, int]]:
    return combinations_with_replacement(range(len(operands)), 2)


def add_rows_in_order(total: Tensor, terms: Tensor) -> Tensor:
    """``total`` and the rows of ``terms``, one after the other."""
    return torch.cat([total[None], terms]).cumsum(0)[-1]


def compute_row_dots(one: Tensor, other: Tensor) -> Tensor:
    """The inner product of each row [rows]."""
    found = torch.zeros(len(one), dtype=torch.float64)
    for a, b in zip(one.split(_COLUMNS_PER_SUM, 1), other.split(_COLUMNS_PER_SUM, 1), strict=True):
        found += torch.linalg.vecdot(a, b)
    return found
