"""The tensors of a model's files, without reading their contents."""

import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.errors import SourceError
from fedtune.models.paging.row_formats import ROW_FORMATS, decode_rows

__all__ = ["SourceTensor", "list_safetensors", "reverse_rope_pairs"]

_FORMATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a file. Rows run over its last dimension."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    form: str
    rope_heads: int = 0
    """llama.cpp stores the rows of queries and keys in another order within each head; 0 where it does not."""

    @property
    def rows(self) -> int:
        """The number of rows."""
        return math.prod(self.shape[:-1])

    @property
    def width(self) -> int:
        """The numbers of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """The bytes of a row."""
        return ROW_FORMATS[self.form].count_row_bytes(self.width)

    def read_bytes(self, start: int, end: int) -> Tensor:
        """Return the bytes [end - start, row_bytes] of some rows; SourceError if the file is too short."""
        if self.rope_heads:
            return self._read(0, self.rows)[reverse_rope_pairs(self.rows, self.rope_heads)[start:end]]
        return self._read(start, end)

    def _read(self, start: int, end: int) -> Tensor:
        size = (end - start) * self.row_bytes
        with self.file.open("rb") as opened:
            opened.seek(self.offset + start * self.row_bytes)
            content = bytearray(opened.read(size))
        if len(content) < size:
            raise SourceError(f"{self.file} is cut short; fetch it again")
        return torch.frombuffer(content, dtype=torch.uint8).view(end - start, -1)

    def read_whole(self) -> Tensor:
        """Return all numbers, in single precision unless they are stored otherwise as they are."""
        return decode_rows(self.form, self.read_bytes(0, self.rows), self.width).reshape(self.shape)


def reverse_rope_pairs(rows: int, heads: int) -> Tensor:
    """Return, for each row in transformers' order, its number in llama.cpp's, which puts rotated pairs side by side."""
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).flatten()


def list_safetensors(files: Sequence[Path]) -> dict[str, SourceTensor]:
    """Return the tensors of numbers in safetensors files by name; SourceError for a type that cannot be paged."""
    found: dict[str, SourceTensor] = {}
    for file in files:
        for name, entry, start in _read_header(file):
            if entry["dtype"] in _FORMATS:
                shape, begin = tuple(entry["shape"]), entry["data_offsets"][0]
                found[name] = SourceTensor(file, start + begin, shape, _FORMATS[entry["dtype"]])
            elif entry["dtype"].startswith("F"):
                raise SourceError(
                    f"{file} holds {name} as {entry['dtype']}, which model.paged does not read; convert it to BF16"
                )
    return found


def _read_header(file: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield each tensor's name and entry, and where the contents start."""
    with file.open("rb") as opened:
        opening = opened.read(8)
        size = struct.unpack("<Q", opening)[0] if len(opening) == 8 else _HEADER_LIMIT + 1
        text = opened.read(size) if size <= _HEADER_LIMIT else b""
    try:
        header = json.loads(text)
    except ValueError as error:
        raise SourceError(f"{file} is not a safetensors file, or is cut short; fetch it again") from error
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, entry, 8 + size
