"""Charts: every point stands where the values put it, and labels do not hide each other."""

import itertools
import math

import pytest

from fedtune.tracking.run_detail import RoundSums
from fedtune.web.chart_scale import RoundAxis, ValueAxis, choose_round_step, choose_ticks, spread_labels
from fedtune.web.client_grid import find_step
from fedtune.web.line_chart import Curve, draw_chart, reduce_points
from fedtune.web.outcome_bars import draw_outcome_bars


def parse_points(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in text.split())]


def test_points_stand_at_their_round_and_value() -> None:
    axis = RoundAxis(0, 4)
    chart = draw_chart("Test", "accuracy", [Curve("film", {0: 0.2, 2: 0.5, 4: 0.8})], axis, [2, 4])
    [line] = chart.lines
    height = chart.height
    # Five columns of 20 %: their middles are at 10, 50 and 90 %. The axis goes from .2 to .8.
    assert parse_points(line.points) == [(100, height), (500, height / 2), (900, 0)]
    assert line.marks == [(10, height), (50, height / 2), (90, 0)]
    assert [text for _, text in chart.ticks] == [".200", ".400", ".600", ".800"]
    assert [place for place, _ in chart.ticks] == pytest.approx([height, height * 2 / 3, height / 3, 0])
    assert chart.borders == [60], "after round 2; the end of the run is no border"
    assert chart.rounds == [(10, 0), (30, 1), (50, 2), (70, 3), (90, 4)]
    assert chart.summary == "film from .200 to .800"
    assert chart.values == [(0, [0.2]), (2, [0.5]), (4, [0.8])]


def test_values_that_are_no_numbers_are_told_and_not_drawn() -> None:
    curves = [Curve("a", {0: 1.0, 1: math.nan, 2: math.inf, 3: 2.0}), Curve("b", {1: math.nan})]
    chart = draw_chart("Test", "loss", curves, RoundAxis(0, 3), [])
    assert [len(parse_points(line.points)) for line in chart.lines] == [2, 0]
    assert chart.note == "2 rounds have a value that is not a number, the first is round 1."
    empty = draw_chart("Test", "loss", [Curve("a", {0: math.nan})], RoundAxis(0, 0), [])
    assert empty.summary == "no value"


def test_the_main_curve_and_five_others_differ_in_style() -> None:
    curves = [Curve(str(number), {0: number}) for number in range(7)]
    chart = draw_chart("Test", "accuracy", [*curves, Curve("mean", {0: 3}, main=True)], RoundAxis(0, 0), [])
    assert [line.style for line in chart.lines] == ["s1", "s2", "s3", "s4", "s5", "other", "other", "main"]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.2, 0.8), (-3, 17), (1e-9, 2e-9), (5, 5), (0, 0), (1e12, 3e12), (-2, -1)]
)
def test_ticks_are_round_equally_spaced_and_hold_the_values(low: float, high: float) -> None:
    ticks = choose_ticks(low, high)
    steps = {f"{b - a:.5e}" for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1
    assert float(steps.pop()[0]) in (1, 2, 5)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low
    assert ticks[-1] >= high


def test_labels_of_rounds_are_few() -> None:
    for columns in (1, 16, 17, 33, 81, 201, 100_001):
        labels = RoundAxis(0, columns - 1).list_labels()
        assert 1 <= len(labels) <= 17
        assert {number % choose_round_step(columns) for _, number in labels} == {0}


def test_labels_are_apart_in_order_and_inside() -> None:
    assert spread_labels([50, 10, 52], 13, 140) == [50, 10, 63]
    assert spread_labels([140, 139, 138], 13, 140) == [140, 127, 114]
    assert spread_labels([], 13, 140) == []
    places = spread_labels([3.0 * (number % 5) for number in range(8)], 13, 140)
    ranked = sorted(places)
    assert all(b - a >= 13 - 1e-9 for a, b in itertools.pairwise(ranked))
    assert ranked[-1] <= 140


def test_long_curves_keep_their_extremes() -> None:
    points = [(float(number), math.sin(number)) for number in range(10_001)]
    points[5000] = (5000.0, 99.0)
    points[7001] = (7001.0, -99.0)
    found = reduce_points(points, 2000)
    assert len(found) <= 2002
    assert (5000.0, 99.0) in found
    assert (7001.0, -99.0) in found
    assert found == sorted(found)
    assert reduce_points(points[:2000], 2000) == points[:2000]


def test_bars_stack_to_the_number_of_clients() -> None:
    def sums(**outcomes: int) -> RoundSums:
        return RoundSums(outcomes=outcomes, by_class={}, bytes_up=0, bytes_down=0, train_loss=None)

    drawn = draw_outcome_bars({1: sums(merged=3, failed=1), 2: sums(merged=2)}, RoundAxis(0, 3))
    assert drawn.most == 4
    found = [(bar.x, bar.width, bar.y, bar.height, bar.outcome) for bar in drawn.bars]
    assert found == [
        (37.5 - 11.25, 22.5, drawn.height / 4, drawn.height * 3 / 4, "merged"),
        (37.5 - 11.25, 22.5, 0, drawn.height / 4, "failed"),
        (62.5 - 11.25, 22.5, drawn.height / 2, drawn.height / 2, "merged"),
    ]
    assert draw_outcome_bars({}, RoundAxis(0, 0)).bars == []


def test_the_ramp_has_seven_steps() -> None:
    assert [find_step(value, 0, 7) for value in (0, 0.9, 1, 3.5, 6.9, 7)] == [1, 1, 2, 4, 7, 7]
    assert find_step(5, 5, 5) == 1
    assert ValueAxis(0, 10, 100).place(2.5) == 75
