"""Plots of a stream of tasks: the accuracy matrix as a heat map, task borders, and the stability gap of the curves."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from fedtune.tracking.records import RoundRecord
from fedtune.tracking.run_summary import get_metric_series
from fedtune.tracking.stability_gap import find_lowest_scores
from fedtune.tracking.stream_ledger import find_task_ends, list_visits
from fedtune.tracking.task_matrix import TaskMatrix
from fedtune.untrusted import clean_text

__all__ = ["draw_borders", "draw_matrix", "draw_stability_gap"]

Rounds = Sequence[RoundRecord]

_MOST_NUMBERS = 12
"""In a matrix of more tasks, numbers would not fit into the cells."""
_NAME, _SHORT = 16, 45


def draw_matrix(axes: Axes, matrix: TaskMatrix) -> None:
    """Draw accuracies: a row per visit, a column per task. Tasks that were not trained yet have grey numbers."""
    axes.set_title("Accuracy on each task after each visit, test, %")
    shades = [[float("nan") if score is None else score for score in row] for row in matrix.rows]
    axes.imshow(shades, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")  # 1.25: black numbers stay readable
    names = [clean_text(name, _NAME) for name in matrix.tasks]
    rows = ["start", *(f"after {names[task]}" for task in matrix.visits)][: len(matrix.rows)]
    axes.set_yticks(range(len(rows)), rows)
    few = len(names) <= _MOST_NUMBERS
    short = sum(map(len, names)) < _SHORT
    axes.set_xticks(range(len(names)), names, rotation=0 if short else 30, ha="center" if short else "right")
    for number, row in enumerate(matrix.rows if few else ()):
        for task, score in enumerate(row):
            if score is not None:
                colour = "black" if task in matrix.list_seen(number) else "0.55"
                axes.text(task, number, f"{100 * score:.0f}", ha="center", va="center", color=colour, fontsize=9)


def draw_borders(axes: Axes, rounds: Rounds) -> None:
    """Draw a line at the last round of each visit but the last."""
    ends = [one.last_round for one in list_visits(rounds) if one.last_round is not None]
    for end in ends[: len(list_visits(rounds)) - 1]:
        axes.axvline(end, color="0.6", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)


def draw_stability_gap(axes: Axes, rounds: Rounds, split: str) -> None:
    """Mark the lowest score of each task after its first visit, up to its last score."""
    ends = find_task_ends(rounds)
    series = {name: get_metric_series(rounds, split, name, "accuracy") for name in ends}
    for number, one in enumerate(find_lowest_scores(series, ends).values()):
        label = None if number else "lowest to last: stability gap"
        axes.plot([one.round] * 2, [one.lowest, one.last], "-", color="0.35", linewidth=1, label=label)
        axes.plot([one.round], [one.lowest], "v", color="0.35", markersize=5)
