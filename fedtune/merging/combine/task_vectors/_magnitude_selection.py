"""Select the k largest entries of a stream by magnitude, ties in order of appearance, without storing the stream.

Magnitudes in fp32 have the order of their bits. One pass counts the upper 16 of the 31 bits, a second one the lower 15
bits in the bin that contains the k-th largest. The threshold is exact and needs 2^16 counters for any length. The
magnitudes of a short stream are stored and partitioned instead, which takes one pass and less than half of the time.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "MagnitudeThreshold",
    "Stream",
    "count_entries_to_keep",
    "find_threshold",
    "keep_largest",
    "keep_magnitude_band",
]

Stream = Callable[[], Iterable[Tensor]]
"""Starts reading the chunks of a tensor again."""
Counts = np.ndarray[tuple[int], np.dtype[np.int64]]
_SHORT = 1 << 20
"""Entries whose magnitudes are held: four megabytes."""
_LOWER = 15
_UPPER_MASK, _LOWER_MASK = (1 << 16) - 1, (1 << _LOWER) - 1


class MagnitudeThreshold(NamedTuple):
    """Magnitudes above ``threshold`` are in, and the first ``ties`` that equal it; ``whole`` if no more equal it."""

    threshold: float
    ties: int
    whole: bool

    def make_mask_function(self) -> Callable[[Tensor], Tensor]:
        """A function from each next chunk to a mask of the selected entries.

        The function counts the ties it has passed, so call it once per chunk and in order.
        """
        tied = self._make_tie_finder()

        def mask(piece: Tensor) -> Tensor:
            if self.whole:
                return piece.abs() >= self.threshold
            found = piece.abs() > self.threshold
            found.view(-1)[tied(piece)] = True
            return found

        return mask

    def keep(self) -> Callable[[Tensor], Tensor]:
        """A function from each next chunk to a copy with zeros for the entries that are not selected."""
        tied = self._make_tie_finder()
        below = float(torch.nextafter(torch.tensor(self.threshold), torch.zeros(())))

        def kept(piece: Tensor) -> Tensor:
            if self.whole or not self.threshold:  # zeros that are in or out are zeros
                return F.hardshrink(piece, below)
            found = F.hardshrink(piece, self.threshold)
            places = tied(piece)
            found.view(-1)[places] = piece.view(-1)[places]
            return found

        return kept

    def _make_tie_finder(self) -> Callable[[Tensor], Tensor]:
        """A function from each next chunk to the places of selected entries that equal the threshold, int64 [n]."""
        left = self.ties

        def tied(piece: Tensor) -> Tensor:
            nonlocal left
            if not left:
                return torch.empty(0, dtype=torch.int64)
            found = torch.from_numpy(
                np.flatnonzero(np.abs(piece.view(-1).numpy()) == np.float32(self.threshold))[:left]
            )
            left -= len(found)
            return found

        return tied


def count_entries_to_keep(density: float, size: int) -> int:
    """floor(density * size), at least one where there is one."""
    return min(size, max(1, math.floor(density * size)))


def keep_largest(stream: Stream, keep: int, size: int) -> Stream:
    """The stream of ``size`` entries with all but its ``keep`` largest set to zero; no piece is held between two."""
    if keep >= size:
        return stream
    found = find_threshold(stream, keep, size)
    return lambda: map(found.keep(), stream())


def keep_magnitude_band(stream: Stream, first: int, last: int, size: int) -> Stream:
    """The stream with zeros for all entries but those ranked ``first`` to ``last`` (exclusive) by magnitude."""
    found = keep_largest(stream, last, size)
    if not first:
        return found
    top = find_threshold(stream, first, size)
    return lambda: map(_make_outside_filter(top), found())


def _make_outside_filter(found: MagnitudeThreshold) -> Callable[[Tensor], Tensor]:
    """A function that sets the selected entries of each next chunk to zero."""
    inside = found.make_mask_function()
    return lambda piece: piece * ~inside(piece)


def find_threshold(stream: Stream, keep: int, size: int) -> MagnitudeThreshold:
    """Where the ``keep`` largest of a stream of ``size`` entries end; none of it is above a cut at infinity."""
    if keep == 0:
        return MagnitudeThreshold(math.inf, 0, whole=False)
    return (
        _find_threshold_by_partition(stream(), keep, size)
        if size <= _SHORT
        else _find_threshold_by_counting(stream, keep)
    )


def _find_threshold_by_partition(pieces: Iterable[Tensor], keep: int, size: int) -> MagnitudeThreshold:
    magnitudes, done = np.empty(size, dtype=np.float32), 0
    for piece in pieces:
        np.abs(piece.view(-1).numpy(), out=magnitudes[done : done + piece.numel()])
        done += piece.numel()
    magnitudes.partition(size - keep)
    smallest = magnitudes[size - keep]
    ties = keep - int(np.count_nonzero(magnitudes[size - keep :] > smallest))
    return MagnitudeThreshold(float(smallest), ties, whole=int(np.count_nonzero(magnitudes == smallest)) == ties)


def _find_threshold_by_counting(stream: Stream, keep: int) -> MagnitudeThreshold:
    upper, above, _ = _find_bin(_count_values((_get_upper_bits(piece) for piece in stream()), _UPPER_MASK + 1), keep)
    lower, beyond, equal = _find_bin(
        _count_values((_get_lower_bits(piece, upper) for piece in stream()), _LOWER_MASK + 1), keep - above
    )
    bits, ties = torch.tensor((upper << _LOWER) | lower, dtype=torch.int32), keep - above - beyond
    return MagnitudeThreshold(float(bits.view(torch.float32)), ties, whole=ties == equal)


def _get_upper_bits(piece: Tensor) -> Tensor:
    """The upper 16 bits of each magnitude; the sign is shifted past them."""
    return (piece.view(-1).view(torch.int32) >> _LOWER).bitwise_and_(_UPPER_MASK)


def _get_lower_bits(piece: Tensor, upper: int) -> Tensor:
    """The lower 15 bits of those magnitudes whose upper ones are as given."""
    found = torch.from_numpy(np.flatnonzero(_get_upper_bits(piece).numpy() == upper))
    return piece.view(-1).view(torch.int32)[found] & _LOWER_MASK


def _count_values(numbers: Iterable[Tensor], bins: int) -> Counts:
    total = torch.zeros(bins, dtype=torch.int64)
    for some in numbers:
        total += torch.bincount(some, minlength=bins)
    return total.numpy()


def _find_bin(counts: Counts, keep: int) -> tuple[int, int, int]:
    """The bin that holds the ``keep``-th from the top, how many lie above it, and how many in it."""
    down = np.cumsum(counts[::-1])
    place = int(np.searchsorted(down, keep))
    found = len(counts) - 1 - place
    return found, int(down[place] - counts[found]), int(counts[found])
