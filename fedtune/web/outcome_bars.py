"""Outcomes per round as stacked bars, in the columns of the charts and the grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedtune.tracking.run_detail import OUTCOMES, RoundSums
from fedtune.web.chart_scale import RoundAxis

__all__ = ["Bar", "OutcomeBars", "draw_outcome_bars"]

_HEIGHT = 48
_FILLED = 0.9


@dataclass(frozen=True)
class Bar:
    """A rectangle: left edge and width in percent, top and height in pixels, and the outcome it stands for."""

    x: float
    width: float
    y: float
    height: float
    outcome: str


@dataclass(frozen=True)
class OutcomeBars:
    """The bars, the height of the drawing, and the number of clients that fills it."""

    bars: Sequence[Bar]
    height: int
    most: int


def draw_outcome_bars(sums: Mapping[int, RoundSums], axis: RoundAxis) -> OutcomeBars:
    """Draw a bar for each round, with merged clients at the bottom."""
    most = max((sum(one.outcomes.values()) for one in sums.values()), default=1) or 1
    width = 100 * _FILLED / axis.columns
    bars = []
    for number, one in sums.items():
        floor = float(_HEIGHT)
        for outcome in OUTCOMES if axis.first <= number <= axis.last else ():
            height = _HEIGHT * one.outcomes.get(outcome, 0) / most
            floor -= height
            if height:
                bars.append(Bar(axis.place(number) - width / 2, width, floor, height, outcome))
    return OutcomeBars(bars, _HEIGHT, most)
