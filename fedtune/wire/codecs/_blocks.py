"""Blocks of equally many values, each with a scale of its own in single precision."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["count_blocks", "decode_scales", "encode_scales", "expand_scales", "split_blocks"]

_SCALE = np.dtype("<f4")


def count_blocks(values: int, block: int) -> int:
    """Return the number of blocks; the last one may be shorter."""
    return -(-values // block)


def split_blocks(tensor: Tensor, block: int) -> Tensor:
    """Return the values in memory order as blocks [n, block], with zeros at the end."""
    flat = tensor.detach().flatten()
    return pad(flat, (0, -len(flat) % block)).reshape(-1, block)


def expand_scales(scales: Tensor, values: int, block: int) -> Tensor:
    """Return the scale of each value [values]."""
    return scales.repeat_interleave(block)[:values]


def encode_scales(scales: Tensor) -> bytes:
    """Return the bytes of scales, four each."""
    content: bytes = scales.numpy().astype(_SCALE).tobytes()
    return content


def decode_scales(content: bytes, count: int) -> Tensor:
    """Return the first ``count`` scales. One that is not finite makes its block so, which checks of values find."""
    scales: NDArray[np.float32] = np.frombuffer(content, _SCALE, count).astype(np.float32)
    return torch.from_numpy(scales)
