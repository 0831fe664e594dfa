"""A matrix whose rows are in a store. One buffer for bytes and one for numbers serve all matrices of a thread."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedtune.models.paging.byte_readers import ByteReader
from fedtune.models.paging.row_formats import ROW_FORMATS, decode_rows

__all__ = ["LARGEST_PIECE", "PagedMatrix", "release_buffers"]

LARGEST_PIECE = 48 << 20
"""Bytes of numbers that exist at a time. Smaller matrices are read whole, so that a product is one call."""
_STAGED = 1 << 16
"""Numbers that are turned from bytes at a time: few enough for the processor's cache."""


@dataclass(frozen=True, eq=False)
class PagedMatrix:
    """Numbers [rows, width] of type ``dtype``, stored from ``offset`` on in a row format."""

    name: str
    reader: ByteReader
    form: str
    rows: int
    width: int
    offset: int
    dtype: torch.dtype = torch.float32

    @property
    def row_bytes(self) -> int:
        """The bytes of a row in the store."""
        return ROW_FORMATS[self.form].count_row_bytes(self.width)

    @property
    def nbytes(self) -> int:
        """The bytes of the matrix in the store."""
        return self.rows * self.row_bytes

    def list_pieces(self) -> list[tuple[int, int]]:
        """Return the ranges of rows that are read at a time: one, unless the matrix is larger than a piece."""
        height = max(1, LARGEST_PIECE // (self.width * self.dtype.itemsize))
        return [(start, min(start + height, self.rows)) for start in range(0, self.rows, height)]

    def read_pieces(self, *, backwards: bool = False) -> Iterator[tuple[int, int, Tensor]]:
        """Yield each range of rows and its numbers, and let the system read the next matrix in this direction."""
        self.reader.prefetch_bytes(self.offset + (-1 if backwards else 1) * self.nbytes, self.nbytes)
        for start, end in self.list_pieces():
            yield start, end, self.read_rows(start, end)

    def read_rows(self, start: int, end: int) -> Tensor:
        """Return rows ``start`` to ``end``. They are in a shared buffer and valid until the next read."""
        out = _get_buffer("numbers", (end - start) * self.width, self.dtype).view(end - start, self.width)
        self.read_rows_into(out, start)
        return out

    def copy_whole(self) -> Tensor:
        """Return all numbers in a tensor of their own."""
        out = torch.empty(self.rows, self.width, dtype=self.dtype)
        self.read_rows_into(out, 0)
        return out

    def gather_rows(self, numbers: Tensor) -> Tensor:
        """Return the rows with these numbers, ascending and without repetition, in a tensor of their own."""
        out = torch.empty(len(numbers), self.width, dtype=self.dtype)
        done = 0
        for start, count in _list_runs(numbers.tolist()):
            self.read_rows_into(out[done : done + count], start)
            done += count
        return out

    def read_rows_into(self, out: Tensor, start: int) -> None:
        """Write the rows from ``start`` on into ``out``."""
        form = ROW_FORMATS[self.form]
        if form.dtype == self.dtype:
            self.reader.read_into(out, self.offset + start * self.row_bytes)
            return
        height = max(1, _STAGED // self.width)
        for at in range(0, len(out), height):
            part = out[at : at + height]
            raw = _get_buffer("bytes", len(part) * self.row_bytes, torch.uint8).view(len(part), -1)
            self.reader.read_into(raw, self.offset + (start + at) * self.row_bytes)
            if form.dtype is None and self.dtype != torch.float32:  # rounded once, at the end
                part.copy_(decode_rows(self.form, raw, self.width))
            else:
                form.decode(raw, part)


def _list_runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Return the first number and the length of each run of consecutive numbers."""
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[start], at - start
            start = at


_buffers = threading.local()


def release_buffers() -> None:
    """Let go of the thread's buffers. The next read makes them again."""
    _buffers.__dict__.clear()


def _get_buffer(purpose: str, count: int, dtype: torch.dtype) -> Tensor:
    """Return the first ``count`` elements of the thread's buffer for a purpose, which grows to the largest request."""
    held: dict[Any, Tensor] = _buffers.__dict__
    if (purpose, dtype) not in held or len(held[purpose, dtype]) < count:
        held.pop((purpose, dtype), None)
        held[purpose, dtype] = torch.empty(count, dtype=dtype)
    return held[purpose, dtype][:count]
