"""The stability gap: how low a learned task falls between borders, on the validation rows of every round.

De Lange et al., arXiv 2205.13452. A border shows the end of a visit only; a task may fall in the first rounds of the
next one and recover before its border.
"""

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["LowestScore", "StabilityGap", "compute_stability_gap", "find_lowest_scores"]

Series = Mapping[int, float]
"""Scores by round."""


class LowestScore(NamedTuple):
    """The lowest score of a task after it was learned, its round, and the last score."""

    round: int
    lowest: float
    last: float


class StabilityGap(NamedTuple):
    """``gap`` is the mean over earlier tasks of their lowest minus their last score, which is 0 or negative.

    ``worst_case`` is the worst-case accuracy: the mean of the last task's last and the earlier tasks' lowest scores.
    """

    gap: float
    worst_case: float


def find_lowest_scores(series: Mapping[str, Series], ends: Mapping[str, int]) -> dict[str, LowestScore]:
    """Return the lowest score of each task that was scored after its first visit.

    ``ends`` are the last rounds of the tasks' first visits; only rounds after them count.
    """
    found = {}
    for task, end in ends.items():
        later = {number: value for number, value in series.get(task, {}).items() if number > end}
        if later:
            number = min(later, key=lambda one: later[one])
            found[task] = LowestScore(number, later[number], later[max(later)])
    return found


def compute_stability_gap(series: Mapping[str, Series], ends: Mapping[str, int]) -> StabilityGap | None:
    """Compute the gap from validation scores by task and round; None before an earlier task was scored again."""
    lowest = find_lowest_scores(series, ends)
    if not lowest:
        return None
    gap = sum(one.lowest - one.last for one in lowest.values()) / len(lowest)
    newest = max(ends, key=lambda task: ends[task])
    final = [values[max(values)] for values in [series.get(newest, {})] if values and newest not in lowest]
    scores = [one.lowest for one in lowest.values()] + final
    return StabilityGap(gap, sum(scores) / len(scores))
