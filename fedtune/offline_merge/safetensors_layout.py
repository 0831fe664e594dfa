"""The layout of a safetensors file: the place of each tensor's rows, to read and write them in place.

Rows are read with plain reads, because the pages of a memory map would accumulate in the process.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtune.errors import SourceError

__all__ = [
    "Reader",
    "TensorInfo",
    "TensorLocation",
    "build_file_layout",
    "fits",
    "read_tensor_locations",
    "too_large",
    "write_rows",
]

Shape = tuple[int, ...]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_ALIGNED = 8


class TensorInfo(NamedTuple):
    """The shape and data type of a tensor."""

    shape: Shape
    dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        """Number of rows; a tensor without dimensions is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return self.num_rows * self.row_bytes


class TensorLocation(NamedTuple):
    """The place of a tensor in a file."""

    form: TensorInfo
    offset: int


def read_tensor_locations(path: Path) -> dict[str, TensorLocation]:
    """Return the place of each tensor; SourceError for a file that is not safetensors, or is damaged."""
    try:
        with safe_open(path, "pt"):
            pass  # checks that the header fits the file
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"{path} is no whole safetensors file ({error}); fetch it again") from error
    header.pop("__metadata__", None)
    try:
        return {
            name: TensorLocation(
                TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]]), 8 + length + entry["data_offsets"][0]
            )
            for name, entry in header.items()
        }
    except KeyError as error:
        raise SourceError(f"{path} holds tensors of type {error}, which torch does not have; convert it") from error


def build_file_layout(forms: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, TensorLocation], int]:
    """Return the header for these tensors in this order, the place of each, and the size of the file in bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, form in forms.items():
        offsets[name], end = end, end + form.num_bytes
        entries[name] = {
            "dtype": _CODES[form.dtype],
            "shape": list(form.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    head = struct.pack("<Q", len(text)) + text
    return (
        head,
        {name: TensorLocation(form, len(head) + offsets[name]) for name, form in forms.items()},
        len(head) + end,
    )


class Reader:
    """Read rows from files. The last file stays open, because a merge reads thousands of pieces."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: IO[bytes] | None = None

    def rows(self, path: Path, place: TensorLocation, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop`` as they are stored. A tensor without dimensions is one row."""
        form = place.form
        shape = (stop - start, *form.shape[1:]) if form.shape else ()
        found = torch.empty(shape, dtype=form.dtype)
        if found.numel():
            try:
                file = self._opened(path)
                file.seek(place.offset + start * form.row_bytes)
                _fill(file, found.view(-1).view(torch.uint8).numpy().data, path)
            except OSError as error:
                raise SourceError(f"cannot read {path}: {error.strerror}; fetch it again") from error
        return found

    def _opened(self, path: Path) -> IO[bytes]:
        if self._file is None or self._path is not path:
            self._close()
            self._path, self._file = path, path.open("rb", buffering=0)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    __del__ = _close


def _fill(file: IO[bytes], content: memoryview, path: Path) -> None:
    """Read in a loop, because one read returns at most two gigabytes."""
    done = 0
    while done < len(content):
        count = file.readinto(content[done:])  # type: ignore[attr-defined]
        if not count:
            raise SourceError(f"{path} became shorter while it was read; fetch it again")
        done += count


def fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether finite values are within the range of a data type, up to rounding."""
    if not dtype.is_floating_point or not values.numel():
        return True
    kind = torch.finfo(dtype)
    return float(values.abs().max()) <= kind.max * (1 + kind.eps / 4)


def too_large(name: str, values: Tensor, dtype: torch.dtype, mend: str = "choose dtype: bfloat16 or float32") -> str:
    """Return the error message for a tensor that does not fit its data type."""
    kind, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    found = float(values.abs().max())
    return f"{name} reaches {found:.6g}, but {kind} ends at {most:.6g}; {mend}"


def write_rows(file: IO[bytes], place: TensorLocation, start: int, rows: Tensor) -> None:
    """Cast rows to the stored data type, and write them from row ``start`` on."""
    if rows.numel():
        file.seek(place.offset + start * place.form.row_bytes)
        file.write(rows.to(place.form.dtype).contiguous().flatten().view(torch.uint8).numpy().data)
