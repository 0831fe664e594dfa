"""Curves over rounds as SVG numbers: which points a line has, where its marks, its label and the task borders are.

Horizontal places are percent of the plot's width, vertical ones pixels from its top. So text keeps its size on every
screen. Lines are in a box of 1000 units, which the browser stretches to the width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedtune.web.chart_scale import RoundAxis, ValueAxis, make_value_axis, spread_labels
from fedtune.web.number_text import format_score

__all__ = ["Curve", "Line", "LineChart", "draw_chart", "reduce_points"]

_HEIGHT = 140
_LABEL_GAP = 13
_SERIES = 5
_MOST_POINTS, _MOST_MARKS = 2000, 40


@dataclass(frozen=True)
class Curve:
    """Values by round under a label. A ``main`` curve is drawn thicker, in the colour of text."""

    label: str
    values: Mapping[int, float]
    main: bool = False


@dataclass(frozen=True, kw_only=True)
class Line:
    """A drawn curve. ``style`` is ``main``, ``s1`` to ``s5``, or ``other`` beyond five; ``marks`` are places."""

    label: str
    style: str
    points: str
    marks: Sequence[tuple[float, float]]
    label_y: float | None


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """A chart for the template. ``values`` are rows of a table: the round, and the value of each line."""

    title: str
    note: str
    name: str
    height: int
    ticks: Sequence[tuple[float, str]]
    rounds: Sequence[tuple[float, int]]
    borders: Sequence[float]
    lines: Sequence[Line]
    labels: Sequence[str]
    values: Sequence[tuple[int, Sequence[float | None]]]
    summary: str


def draw_chart(title: str, name: str, curves: Sequence[Curve], axis: RoundAxis, borders: Sequence[int]) -> LineChart:
    """Draw curves of the metric ``name``. ``borders`` are the last rounds of tasks; each has a line at its right."""
    finite = [{key: one for key, one in curve.values.items() if math.isfinite(one)} for curve in curves]
    values, ticks = make_value_axis([one for each in finite for one in each.values()], _HEIGHT)
    styles = _choose_styles(curves)
    places = _place_labels(finite, styles, values)
    lines = [
        _draw_line(curve.label, style, [(axis.place(key), values.place(one)) for key, one in sorted(each.items())], y)
        for curve, style, each, y in zip(curves, styles, finite, places, strict=True)
    ]
    rounds = sorted({number for curve in curves for number in curve.values})
    return LineChart(
        title=title,
        note=" ".join(filter(None, (_describe_gaps(curves), _describe_others(styles)))),
        name=name,
        height=_HEIGHT,
        ticks=[(values.place(one), format_score(one, name)) for one in ticks],
        rounds=axis.list_labels(),
        borders=[axis.place(number + 0.5) for number in borders if axis.first <= number < axis.last],
        lines=lines,
        labels=[curve.label for curve in curves],
        values=[(number, [curve.values.get(number) for curve in curves]) for number in rounds],
        summary=_summarise(curves, finite, name),
    )


def reduce_points(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most about ``most`` points: the lowest and the highest of each of ``most / 2`` equal stretches."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    found: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        pair = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        found += sorted(pair)
    return found


def _draw_line(label: str, style: str, places: Sequence[tuple[float, float]], label_y: float | None) -> Line:
    points = reduce_points(places, _MOST_POINTS)
    marks = points if len(points) <= _MOST_MARKS else points[-1:]
    text = " ".join(f"{10 * x:.2f},{y:.2f}" for x, y in points)
    return Line(label=label, style=style, points=text, marks=marks, label_y=label_y)


def _place_labels(finite: Sequence[Mapping[int, float]], styles: Sequence[str], axis: ValueAxis) -> list[float | None]:
    """Return where the label of each curve stands; None for those beyond five, which would hide each other."""
    ends = {
        index: axis.place(each[max(each)])
        for index, (each, style) in enumerate(zip(finite, styles, strict=True))
        if each and style != "other"
    }
    places = dict(zip(ends, spread_labels(list(ends.values()), _LABEL_GAP, _HEIGHT), strict=True))
    return [places.get(index) for index in range(len(finite))]


def _describe_others(styles: Sequence[str]) -> str:
    others = styles.count("other")
    return f"{others} more curves are grey; the table names them." if others else ""


def _choose_styles(curves: Sequence[Curve]) -> list[str]:
    numbers = iter(range(1, len(curves) + 1))
    styles = ["main" if curve.main else f"s{next(numbers)}" for curve in curves]
    return [one if one == "main" or int(one[1:]) <= _SERIES else "other" for one in styles]


def _describe_gaps(curves: Sequence[Curve]) -> str:
    """Return a sentence on rounds whose value is not a number: no line shows them."""
    broken = sorted({number for curve in curves for number, one in curve.values.items() if not math.isfinite(one)})
    if not broken:
        return ""
    return f"{len(broken)} rounds have a value that is not a number, the first is round {broken[0]}."


def _summarise(curves: Sequence[Curve], finite: Sequence[Mapping[int, float]], name: str) -> str:
    """Return the result of each curve in words, the text alternative of the drawing."""
    parts = [
        f"{curve.label} from {format_score(each[min(each)], name)} to {format_score(each[max(each)], name)}"
        for curve, each in zip(curves, finite, strict=True)
        if each
    ]
    return "; ".join(parts) or "no value"
