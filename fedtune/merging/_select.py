"""The k largest of a stream by magnitude, ties in order of appearance, without sorting or holding it.

Magnitudes of fp32 order like their bits. Two passes count them, by the upper half and then, in the one bin where the
k-th falls, by the lower half: the threshold is exact, with 2^16 counters whatever the length.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Cut", "between", "count_kept", "cut", "largest"]

Stream = Callable[[], Iterable[Tensor]]
_LOW = 0xFFFF


class Cut(NamedTuple):
    """Magnitudes above ``threshold`` are in, and the first ``ties`` that equal it."""

    threshold: float
    ties: int

    def inside(self) -> Callable[[Tensor], Tensor]:
        """What tells of each next piece of a stream which entries are in; it counts the ties it has passed."""
        left = self.ties

        def mask(piece: Tensor) -> Tensor:
            nonlocal left
            magnitude = piece.abs()
            found = magnitude > self.threshold
            if left:
                equal = (magnitude == self.threshold).view(-1).nonzero()[:left, 0]
                found.view(-1)[equal] = True
                left -= len(equal)
            return found

        return mask


def count_kept(density: float, size: int) -> int:
    """floor(density * size), at least one where there is one."""
    return min(size, max(1, math.floor(density * size)))


def largest(stream: Stream, keep: int, size: int) -> Iterator[Tensor]:
    """The stream of ``size`` entries with all but its ``keep`` largest set to zero; no piece is held between two."""
    if keep >= size:
        return iter(stream())
    inside = cut(stream, keep).inside()

    def keep_inside(piece: Tensor) -> Tensor:
        return piece * inside(piece)

    return map(keep_inside, stream())


def between(stream: Stream, first: int, last: int, size: int) -> Iterator[Tensor]:
    """The stream with only its entries number ``first`` to ``last`` (exclusive) from the largest down."""
    inside = cut(stream, first).inside()

    def keep_outside(piece: Tensor) -> Tensor:
        return piece * ~inside(piece)

    return map(keep_outside, largest(stream, last, size))


def cut(stream: Stream, keep: int) -> Cut:
    """Where the ``keep`` largest of a stream end; none of it is above a cut at infinity."""
    if keep == 0:
        return Cut(math.inf, 0)
    upper, above = _bin(_counts(_bits(piece) >> 16 for piece in stream()), keep)
    lower, ties = _bin(_counts(_within(_bits(piece), upper) for piece in stream()), keep - above)
    bits = torch.tensor((upper << 16) | lower, dtype=torch.int32)
    return Cut(float(bits.view(torch.float32)), keep - above - ties)


def _bits(piece: Tensor) -> Tensor:
    return piece.abs().view(-1).view(torch.int32)


def _within(bits: Tensor, upper: int) -> Tensor:
    """The lower halves of those whose upper half is as given."""
    return bits[(bits >> 16) == upper] & _LOW


def _counts(halves: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(1 << 16, dtype=torch.int64)
    for half in halves:
        total += torch.bincount(half, minlength=1 << 16)
    return total


def _bin(counts: Tensor, keep: int) -> tuple[int, int]:
    """The bin that holds the ``keep``-th from the top, and how many lie above it."""
    above = counts.flip(0).cumsum(0).flip(0) - counts
    found = int((above < keep).nonzero()[0, 0])
    return found, int(above[found])
