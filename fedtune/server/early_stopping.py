"""Ends a run before its last round: a target was met, or the main metric has not improved for a while.

The decision is a metric of the round that ends the run, in the split ``end``: ``target`` with the value of the main
metric, or ``patience`` with the best round. A resumed run reads it from the store. The round has test scores, as the
last one of a whole run has.
"""

import math
from collections.abc import Sequence

from fedtune.recipe.metric_names import LOWER_IS_BETTER
from fedtune.tracking import MetricRecord, RoundRecord
from fedtune.training import RunContext

__all__ = ["SPLIT", "EarlyEnd"]

SPLIT = "end"
Metrics = Sequence[MetricRecord]


class EarlyEnd:
    """The watch over the main metric of one run. ``done`` are its committed rounds."""

    def __init__(self, context: RunContext, done: Sequence[RoundRecord]) -> None:
        self._settings, self._name = context.recipe.federation.early_stopping, context.main_metric
        self._split = "local" if context.local_tensors else "validation"
        self._best = (0, -math.inf)
        self.reason = ""
        """Why the run has ended early; empty as long as it has not."""
        for record in done:
            self.record_commit(record.number, record.metrics)

    def record_commit(self, round_number: int, metrics: Metrics) -> None:
        """Read the best round so far, and the end of the run, from a committed round."""
        self._best = self._improve(round_number, metrics)
        for metric in metrics:
            if metric.split == SPLIT:
                self.reason = _explain(metric, round_number, self._name)

    def judge_round(self, round_number: int, metrics: Metrics) -> MetricRecord | None:
        """Return the metric that says that the run ends with a round; None if it goes on, or ends there anyway."""
        settings, score = self._settings, self._find_score(metrics)
        if settings is None or score is None:
            return None
        if settings.target is not None and score >= self._sign * settings.target:
            return _make("target", self._sign * score)
        best, _ = self._improve(round_number, metrics)
        if settings.patience is not None and round_number - best >= settings.patience:
            return _make("patience", float(best))
        return None

    @property
    def _sign(self) -> int:
        return -1 if self._name in LOWER_IS_BETTER else 1

    def _improve(self, round_number: int, metrics: Metrics) -> tuple[int, float]:
        """Return the best round and its score, by which a higher one is better."""
        score, settings = self._find_score(metrics), self._settings
        least = 0.0 if settings is None else settings.min_improvement
        improved = score is not None and score > self._best[1] + least
        return (round_number, score) if improved and score is not None else self._best

    def _find_score(self, metrics: Metrics) -> float | None:
        wanted = (self._split, "all", self._name)
        found = next((one.value for one in metrics if (one.split, one.domain, one.name) == wanted), None)
        if found is None:
            return None
        return -math.inf if math.isnan(found) else self._sign * found


def _make(name: str, value: float) -> MetricRecord:
    return MetricRecord(split=SPLIT, domain="all", name=name, value=value)


def _explain(metric: MetricRecord, round_number: int, name: str) -> str:
    if metric.name == "target":
        return f"ended early after round {round_number}: {name} {metric.value:.4g} has met the target"
    return f"ended early after round {round_number}: {name} has not improved since round {metric.value:.0f}"
