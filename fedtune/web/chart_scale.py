"""Where a value stands in a chart. The horizontal axis has one column for each round, shared by charts and the grid."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["RoundAxis", "ValueAxis", "choose_round_step", "choose_ticks", "make_value_axis", "spread_labels"]

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_MOST_LABELS = 16


@dataclass(frozen=True)
class RoundAxis:
    """Columns for the rounds from ``first`` to ``last``."""

    first: int
    last: int

    @property
    def columns(self) -> int:
        """The number of columns."""
        return self.last - self.first + 1

    def place(self, number: float) -> float:
        """Return the middle of a round's column, in percent of the width; ``number + 0.5`` is its right edge."""
        return 100 * (number - self.first + 0.5) / self.columns

    def list_labels(self) -> list[tuple[float, int]]:
        """Return the place and number of the labelled rounds, at most 17 of them."""
        step = choose_round_step(self.columns)
        return [(self.place(number), number) for number in range(self.first, self.last + 1) if number % step == 0]


@dataclass(frozen=True)
class ValueAxis:
    """Values from ``low`` at the bottom to ``high`` at the top, over ``height`` pixels."""

    low: float
    high: float
    height: float

    def place(self, value: float) -> float:
        """Return the distance of a value from the top in pixels."""
        return self.height * (self.high - value) / (self.high - self.low)


def choose_round_step(columns: int) -> int:
    """Return 1, 2, 5, 10, 20, ...: every so many rounds have a label, at most 17 of them."""
    step, factors = 1, itertools.cycle((2, 2.5, 2))
    while columns > step * _MOST_LABELS:
        step = int(step * next(factors))
    return step


def make_value_axis(values: Sequence[float], height: float) -> tuple[ValueAxis, list[float]]:
    """Return an axis that holds all values, and its round ticks; from 0 to 1 without a value."""
    ticks = choose_ticks(min(values, default=0.0), max(values, default=1.0))
    return ValueAxis(ticks[0], ticks[-1], height), ticks


def choose_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return equally spaced round numbers around ``low`` and ``high``, about ``wanted`` steps."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one * power for one in _STEPS if one * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def spread_labels(places: Sequence[float], gap: float, height: float) -> list[float]:
    """Return places near the wanted ones that are at least ``gap`` apart and end at ``height``, in the same order.

    Labels that do not fit are at the top, ``gap`` apart.
    """
    ranked = sorted(range(len(places)), key=lambda index: places[index])
    found, floor = dict.fromkeys(ranked, 0.0), -math.inf
    for index in ranked:
        floor = found[index] = max(places[index], floor + gap)
    ceiling = height
    for index in reversed(ranked):
        ceiling = found[index] = min(found[index], ceiling)
        ceiling -= gap
    return [found[index] for index in range(len(places))]
