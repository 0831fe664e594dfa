"""Numbers of GGUF's quantised blocks. The three simplest kinds are read here; the others by the package gguf, slower.

Q4_0: a half-precision scale d and 16 bytes; the lower halves of the bytes are numbers 0 to 15 of the block, the upper
halves 16 to 31; a number is d (code - 8). Q4_1: d, an offset m and such bytes; d code + m. Q8_0: d and 32 signed bytes.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["GGUF_BLOCKS", "decode_gguf_blocks", "view_bytes_as"]

GGUF_BLOCKS: Mapping[str, tuple[int, int]] = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "iq4_nl": (32, 18),
    "iq4_xs": (256, 136),
}
"""The numbers and the bytes of a block."""


def decode_gguf_blocks(name: str, raw: Tensor, out: Tensor) -> None:
    """Write the numbers of uint8 [rows, row_bytes] into fp32 [rows, width], as the package gguf computes them."""
    decode = _DECODERS.get(name)
    if decode is None:
        out.copy_(_decode_by_library(name, raw))
    else:
        numbers, size = GGUF_BLOCKS[name]
        decode(raw.view(len(raw), -1, size), out.view(len(out), -1, numbers))


def view_bytes_as(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of bytes as numbers. A slice of a single row passes for contiguous, but its rows are too wide."""
    return raw.clone(memory_format=torch.contiguous_format).view(dtype)


def _read_halves(blocks: Tensor, start: int) -> Tensor:
    return view_bytes_as(blocks[..., start : start + 2], torch.float16).float()


def _unpack_codes(packed: Tensor, out: Tensor) -> Tensor:
    out[..., :16] = packed & 15
    out[..., 16:] = packed >> 4
    return out


def _decode_q4_0(blocks: Tensor, out: Tensor) -> None:
    _unpack_codes(blocks[..., 2:], out).sub_(8).mul_(_read_halves(blocks, 0))


def _decode_q4_1(blocks: Tensor, out: Tensor) -> None:
    _unpack_codes(blocks[..., 4:], out).mul_(_read_halves(blocks, 0)).add_(_read_halves(blocks, 2))


def _decode_q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[..., 2:].view(torch.int8)).mul_(_read_halves(blocks, 0))


_DECODERS: Mapping[str, Callable[[Tensor, Tensor], None]] = {
    "q4_0": _decode_q4_0,
    "q4_1": _decode_q4_1,
    "q8_0": _decode_q8_0,
}


def _decode_by_library(name: str, raw: Tensor) -> Tensor:
    from gguf import GGMLQuantizationType  # imported here: only files with these blocks need it
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[name.upper()]))
