"""The difference of two settings over seeds, each seed with both: the paired t interval of Student (1908)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.special import stdtrit

__all__ = ["PairedDifference", "compute_paired_difference"]

_LEVEL = 0.95


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference over ``pairs`` seeds, and its 95 % interval; NaN with fewer than two pairs."""

    pairs: int
    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval is known and leaves out 0."""
        return self.low > 0 or self.high < 0


def compute_paired_difference(base: Mapping[int, float], other: Mapping[int, float]) -> PairedDifference | None:
    """Return ``other`` minus ``base``, both by seed, over the seeds that both have; None without a common seed.

    The interval is mean +- t(0.975, n - 1) s / sqrt(n), where s is the standard deviation of the n differences.
    """
    changes = [other[seed] - base[seed] for seed in sorted(base.keys() & other.keys())]
    if not changes:
        return None
    count, mean = len(changes), math.fsum(changes) / len(changes)
    if count < 2:
        return PairedDifference(count, mean, math.nan, math.nan)
    deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in changes) / (count - 1))
    half = float(stdtrit(count - 1, (1 + _LEVEL) / 2)) * deviation / math.sqrt(count)
    return PairedDifference(count, mean, mean - half, mean + half)
