"""How the bytes of a matrix row become numbers. Every row starts at a whole byte, so any range of rows can be read.

int8: a scale in single precision, then a byte for each number. nf4: for each 64 numbers a scale and 32 bytes of codes,
the larger half of a byte first; the last 64 are filled up with zeros. GGUF's blocks: see ``gguf_blocks``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedtune.models.paging.gguf_blocks import GGUF_BLOCKS, decode_gguf_blocks, view_bytes_as

__all__ = ["QUANTISED", "ROW_FORMATS", "RowFormat", "decode_rows", "find_gguf_format"]

_BLOCK = 64
_SCALE_BYTES = 4


@dataclass(frozen=True)
class RowFormat:
    """One way to store rows. ``decode`` writes the numbers of uint8 [rows, row_bytes] into [rows, width], fp32 unless
    they are stored as they are; ``encode`` goes the other way.
    """

    name: str
    count_row_bytes: Callable[[int], int]
    decode: Callable[[Tensor, Tensor], object]
    encode: Callable[[Tensor], Tensor] | None = None
    dtype: torch.dtype | None = None
    """The type of the numbers, where they are stored as they are."""


def _make_plain_format(name: str, dtype: torch.dtype) -> RowFormat:
    return RowFormat(
        name,
        lambda width: width * dtype.itemsize,
        lambda raw, out: out.copy_(raw.view(dtype)),
        lambda rows: rows.to(dtype).contiguous().view(torch.uint8),
        dtype,
    )


def _decode_int8(raw: Tensor, out: Tensor) -> None:
    out.copy_(raw[:, _SCALE_BYTES:].view(torch.int8)).mul_(view_bytes_as(raw[:, :_SCALE_BYTES], torch.float32))


def _encode_int8(rows: Tensor) -> Tensor:
    """The nearest of 255 numbers between the largest magnitude of the row and its opposite."""
    scales = rows.float().abs().amax(1, keepdim=True) / 127
    codes = (rows.float() / scales.masked_fill(scales == 0, 1)).round().to(torch.int8)
    return torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)], 1)


# Dettmers et al., "QLoRA" (arXiv 2305.14314), appendix E.
_LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
_PAIRS = torch.stack([_LEVELS.repeat_interleave(16), _LEVELS.repeat(16)], 1)
"""The two numbers that a byte of codes stands for."""


def _count_nf4_bytes(width: int) -> int:
    return -(-width // _BLOCK) * (_SCALE_BYTES + _BLOCK // 2)


def _decode_nf4(raw: Tensor, out: Tensor) -> None:
    blocks = raw.view(len(raw), -1, _SCALE_BYTES + _BLOCK // 2)
    scales = view_bytes_as(blocks[..., :_SCALE_BYTES], torch.float32)
    numbers = F.embedding(blocks[..., _SCALE_BYTES:].int(), _PAIRS).flatten(2)
    out.copy_(numbers.mul_(scales).flatten(1)[:, : out.shape[1]])


def _encode_nf4(rows: Tensor) -> Tensor:
    blocks = F.pad(rows.float(), (0, -rows.shape[1] % _BLOCK)).view(len(rows), -1, _BLOCK)
    scales = blocks.abs().amax(2, keepdim=True)
    parts = blocks / scales.masked_fill(scales == 0, 1)
    codes = torch.bucketize(parts, (_LEVELS[1:] + _LEVELS[:-1]) / 2).to(torch.uint8)
    packed = codes[..., 0::2] * 16 + codes[..., 1::2]
    return torch.cat([scales.view(torch.uint8), packed], 2).flatten(1)


def _make_gguf_format(name: str) -> RowFormat:
    numbers, size = GGUF_BLOCKS[name]
    return RowFormat(name, lambda width: width // numbers * size, lambda raw, out: decode_gguf_blocks(name, raw, out))


def decode_rows(form: str, raw: Tensor, width: int) -> Tensor:
    """Return the numbers [rows, width] of uint8 [rows, row_bytes], of the type they are stored in or fp32."""
    out = torch.empty(len(raw), width, dtype=ROW_FORMATS[form].dtype or torch.float32)
    ROW_FORMATS[form].decode(raw, out)
    return out


def find_gguf_format(name: str) -> RowFormat | None:
    """Return the format of a GGUF type such as Q4_0; None for one that is not known."""
    plain = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
    return ROW_FORMATS.get(plain.get(name, name.lower()))


QUANTISED = ("int8", "nf4")
ROW_FORMATS: Mapping[str, RowFormat] = {
    form.name: form
    for form in (
        _make_plain_format("fp32", torch.float32),
        _make_plain_format("bf16", torch.bfloat16),
        _make_plain_format("fp16", torch.float16),
        RowFormat("int8", lambda width: width + _SCALE_BYTES, _decode_int8, _encode_int8),
        RowFormat("nf4", _count_nf4_bytes, _decode_nf4, _encode_nf4),
        *map(_make_gguf_format, GGUF_BLOCKS),
    )
}
