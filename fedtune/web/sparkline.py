"""A small curve without axes, for a cell of a table."""

import math
from collections.abc import Mapping

__all__ = ["draw_sparkline"]

_WIDTH, _HEIGHT, _MARGIN = 96, 22, 3
_MOST_POINTS = 96


def draw_sparkline(values: Mapping[int, float]) -> str:
    """Return the ``points`` of an SVG polyline of 96 x 22 units; empty with fewer than two values.

    Rounds run from left to right. The lowest value is at the bottom and the highest at the top, each 3 units inside.
    """
    known = [(number, value) for number, value in sorted(values.items()) if math.isfinite(value)]
    known = known[:: math.ceil(len(known) / _MOST_POINTS) or 1] + known[-1:] if len(known) > _MOST_POINTS else known
    if len(known) < 2:
        return ""
    first, last = known[0][0], known[-1][0]
    low, high = min(value for _, value in known), max(value for _, value in known)
    width, height = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    spread = (high - low) or 1.0
    places = [
        (_MARGIN + width * (number - first) / (last - first), _MARGIN + height * (1 - (value - low) / spread))
        for number, value in known
    ]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
