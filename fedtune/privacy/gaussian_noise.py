"""Gaussian noise from a secret key: reproducible with the key, unpredictable without it.

What: ChaCha20, keyed by HMAC-SHA256(secret, place), gives uniform numbers, and Box-Muller makes them normal. Four of
them are added and divided by two, because the rounding errors of a single one can reveal the value it was added to.

Why not the run's seed: every device knows the recipe, and could subtract the noise. Why not only the system's
randomness: a repeated round must release the same bits, otherwise it would release the result twice.

Source: Box and Muller (1958); four summands after Holohan and Braghin, "Secure Random Sampling in Differential Privacy"
(arXiv 2107.10138). Sums are rounded to fp32 once. This does not prevent every attack on floating-point numbers.
"""

import hmac
import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.wire.client_update import iter_row_chunks

__all__ = ["NormalStream", "add_gaussian_noise"]

_SUMMANDS = 4
_BLOCK = 2 * _SUMMANDS * 8
"""Bytes of ChaCha20 output per normal number: two words of eight bytes for each summand."""


class NormalStream:
    """A stream of standard normal numbers. Streams of different places or secrets are unrelated."""

    def __init__(self, secret: bytes, *place: int | str) -> None:
        self._key = hmac.digest(secret, "/".join(str(part) for part in place).encode(), "sha256")

    def draw_normals(self, start: int, count: int) -> NDArray[np.float64]:
        """Return numbers ``start`` to ``start + count`` of the stream. Each uses one of the cipher's 2^32 blocks."""
        from cryptography.hazmat.primitives.ciphers import Cipher  # only runs with noise need it
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

        stream = Cipher(ChaCha20(self._key, start.to_bytes(4, "little") + bytes(12)), mode=None).encryptor()
        words = np.frombuffer(stream.update(bytes(count * _BLOCK)), dtype="<u8")
        uniform = ((words >> np.uint64(11)) + 0.5) * 2.0**-53  # the midpoints of 2^53 equal intervals of (0, 1)
        first, second = uniform.reshape(count, 2, _SUMMANDS).swapaxes(0, 1)
        normal = np.sqrt(-2 * np.log(first)) * np.cos(2 * math.pi * second)
        total: NDArray[np.float64] = normal.sum(axis=1) / math.sqrt(_SUMMANDS)
        return total

    def add_noise(self, values: Tensor, start: int, deviation: float) -> Tensor:
        """Return fp32 values with N(0, deviation^2) added in double precision.

        ``start`` is the index of the first value in its tensor.
        """
        noise = torch.from_numpy(self.draw_normals(start, values.numel())).reshape(values.shape)
        return (values.double() + deviation * noise).float()


def add_gaussian_noise(
    tensors: Mapping[str, Tensor], deviation: float, secret: bytes, *place: int | str
) -> dict[str, Tensor]:
    """Return fp32 tensors with N(0, deviation^2) added to every element.

    ``place`` identifies the purpose of the noise.
    """
    return {name: _noised(tensor, deviation, NormalStream(secret, *place, name)) for name, tensor in tensors.items()}


def _noised(tensor: Tensor, deviation: float, normals: NormalStream) -> Tensor:
    values = tensor.reshape(-1)
    parts = [
        normals.add_noise(values[a:b], a, deviation)
        for a, b in iter_row_chunks((tensor.numel(),), together=2 * _SUMMANDS)
    ]
    return torch.cat(parts).reshape(tensor.shape)
