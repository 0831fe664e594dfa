"""Inner products of deltas, piece by piece; rows add up in order, so that bits depend on no piece or thread."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Literal

import torch
from torch import Tensor

from fedtune.contribution import pieces
from fedtune.merging._step import Operand, Shape

__all__ = ["Over", "add_up", "dots", "flat", "gram", "model_gram"]

Over = Literal["tensor", "row", "column"]
_SPAN = 1 << 14
"""Columns summed at a time: few enough for torch to stay on one thread."""


def flat(rows: Tensor) -> Tensor:
    """Rows as a matrix [rows, width]; a delta without dimensions is one row."""
    return rows.reshape(len(rows), -1) if rows.dim() else rows.reshape(1, 1)


def model_gram(shapes: Mapping[str, Shape], operands: Sequence[Operand]) -> Tensor:
    """Inner products [K, K, 1] of whole models."""
    total = torch.zeros(len(operands), len(operands), 1, dtype=torch.float64)
    for name, shape in shapes.items():
        total += gram(name, shape, operands)
    return total


def gram(name: str, shape: Shape, operands: Sequence[Operand], over: Over = "tensor") -> Tensor:
    """Inner products [K, K, groups] of one tensor's deltas, double; a group is the tensor, a row or a column."""
    return _by_row(name, shape, operands) if over == "row" else _summed(name, shape, operands, over)


def _by_row(name: str, shape: Shape, operands: Sequence[Operand]) -> Tensor:
    found = torch.empty(len(operands), len(operands), shape[0], dtype=torch.float64)
    for start, stop, parts in _parts(name, shape, operands):
        for i, j in _pairs(operands):
            found[i, j, start:stop] = found[j, i, start:stop] = dots(parts[i], parts[j])
    return found


def _summed(name: str, shape: Shape, operands: Sequence[Operand], over: Over) -> Tensor:
    groups = math.prod(shape[1:]) if over == "column" else 1
    total = torch.zeros(len(operands), len(operands), groups, dtype=torch.float64)
    for _, _, parts in _parts(name, shape, operands):
        for i, j in _pairs(operands):
            terms = parts[i] * parts[j] if over == "column" else dots(parts[i], parts[j])[:, None]
            total[i, j] = total[j, i] = add_up(total[i, j], terms)
    return total


def _parts(name: str, shape: Shape, operands: Sequence[Operand]) -> Iterator[tuple[int, int, list[Tensor]]]:
    """First row, last row (exclusive) and the rows of each model as matrices, double."""
    for start, stop in pieces(shape):
        yield start, stop, [flat(operand.rows(name, start, stop)).double() for operand in operands]


def _pairs(operands: Sequence[Operand]) -> Iterator[tuple[int, int]]:
    return combinations_with_replacement(range(len(operands)), 2)


def add_up(total: Tensor, terms: Tensor) -> Tensor:
    """``total`` and the rows of ``terms``, one after the other."""
    return torch.cat([total[None], terms]).cumsum(0)[-1]


def dots(one: Tensor, other: Tensor) -> Tensor:
    """The inner product of each row [rows]."""
    found = torch.zeros(len(one), dtype=torch.float64)
    for a, b in zip(one.split(_SPAN, 1), other.split(_SPAN, 1), strict=True):
        found += torch.linalg.vecdot(a, b)
    return found
