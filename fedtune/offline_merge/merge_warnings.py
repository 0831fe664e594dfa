"""Warnings about a merge from its measurements, one sentence each, for the terminal and for the card."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from fedtune.merging import ActivationRelaxStep, ActivationStatistics, RelaxStep, find_dominated_weights
from fedtune.recipe.metric_names import LOWER_IS_BETTER

__all__ = ["RESULT_NAME", "warn_of_better_inputs", "warn_of_dominant_channels"]

RESULT_NAME = "merged"
"""Name of the result among the scored models."""
_OVER = ("mean", "all")


class _Figure(Protocol):
    @property
    def domain(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> float: ...


class _Rank(NamedTuple):
    better: float
    description: str


def warn_of_dominant_channels(steps: Sequence[RelaxStep], activity: Mapping[str, ActivationStatistics]) -> list[str]:
    """Warn of weights with one dominant input channel, where a step that follows activity has almost no effect."""
    found = []
    for step in (step for step in steps if isinstance(step, ActivationRelaxStep) and step.needs):
        medians = find_dominated_weights(activity, step.peak_quantile)
        if medians:
            name = min(medians, key=lambda weight: medians[weight])
            found.append(
                f"{step.name} has almost no effect on {len(medians)} of {len(activity)} weights, because one input "
                f"channel is far more active than the others (median relative activity {medians[name]:.1e} in "
                f"{name}); set peak_quantile below 1"
            )
    return found


def warn_of_better_inputs(scores: Mapping[str, Sequence[_Figure]], main_metric: str) -> list[str]:
    """Warn if an input or the base scores better than the result, over all domains if there are several.

    ``main_metric`` is the metric that ranks them.
    """
    ranks = {model: rank for model, figures in scores.items() if (rank := _rank(figures, main_metric)) is not None}
    merged = ranks.pop(RESULT_NAME, None)
    if merged is None or not ranks:
        return []
    best = max(ranks, key=lambda model: ranks[model].better)
    if ranks[best].better <= merged.better:
        return []
    return [
        f"{best} scores better than the merge: {ranks[best].description} against {merged.description}; "
        "try another method, other weights or a smaller scale"
    ]


def _rank(figures: Sequence[_Figure], name: str) -> _Rank | None:
    values = {one.domain: one.value for one in figures if one.name == name}
    for domain in _OVER:
        if (value := values.get(domain)) is not None:
            description = f"{name} {value:.4f}" if domain == "all" else f"{domain} {name} {value:.4f}"
            return _Rank(-value if name in LOWER_IS_BETTER else value, description)
    return None
