"""The stability gap: how low a learned task falls between borders, on the validation rows of every round.

De Lange et al., arXiv 2205.13452. A border shows the end of a visit only; a task may fall in the first rounds of the
next one and recover before its border.
"""

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["StabilityGap", "compute_stability_gap"]

Series = Mapping[int, float]
"""Scores by round."""


class StabilityGap(NamedTuple):
    """``gap`` is the mean over earlier tasks of their lowest minus their last score, which is 0 or negative.

    ``worst_case`` is the worst-case accuracy: the mean of the last task's last and the earlier tasks' lowest scores.
    """

    gap: float
    worst_case: float


def compute_stability_gap(series: Mapping[str, Series], ends: Mapping[str, int]) -> StabilityGap | None:
    """Compute the gap from validation scores by task and round; None before an earlier task was scored again.

    ``ends`` are the last rounds of the tasks' first visits, in the order of the stream; only rounds after them count.
    """
    later = {
        task: {number: value for number, value in series.get(task, {}).items() if number > end}
        for task, end in ends.items()
    }
    lowest = [(min(values.values()), values[max(values)]) for values in later.values() if values]
    if not lowest:
        return None
    gap = sum(low - last for low, last in lowest) / len(lowest)
    newest = max(ends, key=lambda task: ends[task])
    final = [values[max(values)] for values in [series.get(newest, {})] if values and not later[newest]]
    scores = [low for low, _ in lowest] + final
    return StabilityGap(gap, sum(scores) / len(scores))
