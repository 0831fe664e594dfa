"""Sorted positions in a number of bytes that is known in advance (Elias-Fano coding).

The low bits of each position are written as they are. The high parts h_0 <= h_1 <= ... are a bit string, in which bit
h_i + i is set. With k positions of n this takes about k (2 + log2(n / k)) bits, half a bit per position above the least
that is possible. Elias (Journal of the ACM 21, 1974).
"""

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ClientUpdateError

__all__ = ["count_position_bytes", "pack_positions", "unpack_positions"]

Positions = NDArray[np.int64]


def count_position_bytes(count: int, size: int) -> int:
    """Return the bytes of ``count`` positions below ``size``."""
    low = _count_low_bits(count, size)
    return -(-count * low // 8) + -(-_count_high_bits(count, size) // 8)


def pack_positions(positions: Positions, size: int) -> bytes:
    """Return positions below ``size``, which must be strictly increasing, as bytes."""
    count = len(positions)
    low = _count_low_bits(count, size)
    each = (positions[:, None] >> np.arange(low)) & 1
    high = np.zeros(_count_high_bits(count, size), np.uint8)
    high[(positions >> low) + np.arange(count)] = 1
    return np.packbits(each.astype(np.uint8).ravel()).tobytes() + np.packbits(high).tobytes()


def unpack_positions(content: bytes, count: int, size: int) -> Positions:
    """Undo ``pack_positions``; ClientUpdateError unless there are ``count`` different positions below ``size``."""
    low = _count_low_bits(count, size)
    cut = -(-count * low // 8)
    each = np.unpackbits(np.frombuffer(content[:cut], np.uint8), count=count * low).reshape(count, low)
    high = np.unpackbits(np.frombuffer(content[cut:], np.uint8), count=_count_high_bits(count, size))
    ones = np.flatnonzero(high)
    if len(ones) != count:
        raise ClientUpdateError(f"it has {len(ones)} positions instead of {count}")
    found = ((ones - np.arange(count)) << low) + each.astype(np.int64) @ (1 << np.arange(low, dtype=np.int64))
    if count and (found[-1] >= size or (np.diff(found) <= 0).any()):
        raise ClientUpdateError(f"its positions are not sorted, repeat, or are not below {size}")
    return found


def _count_low_bits(count: int, size: int) -> int:
    return max(0, (size // max(1, count)).bit_length() - 1)


def _count_high_bits(count: int, size: int) -> int:
    return count + (max(0, size - 1) >> _count_low_bits(count, size))
