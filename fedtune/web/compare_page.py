"""The page that compares runs: curves, settings that differ, and results with paired differences over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.recipe.metric_names import LOWER_IS_BETTER
from fedtune.tracking import MetricRecord, RunRecord, Store
from fedtune.tracking.run_summary import find_main_metric_name
from fedtune.web.chart_scale import RoundAxis, ValueAxis, make_value_axis
from fedtune.web.line_chart import Curve, LineChart, draw_chart
from fedtune.web.number_text import format_score
from fedtune.web.page_error import PageError
from fedtune.web.paired_difference import PairedDifference, compute_paired_difference
from fedtune.web.run_page import find_run
from fedtune.web.seed_groups import SeedGroup, group_by_seed, list_differences

__all__ = ["MOST_RUNS", "Result", "make_compare_view", "split_run_ids"]

MOST_RUNS = 50
RoundMetric = tuple[int, MetricRecord]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A group in the table of results. ``difference`` is from the baseline, None for the baseline itself."""

    group: SeedGroup
    seeds: int
    mean: float
    deviation: float
    difference: PairedDifference | None
    interval: tuple[float, float, float] | None = None


def split_run_ids(given: Sequence[str]) -> list[str]:
    """Return the ids of ``runs=a,b`` and of ``runs=a&runs=b``, each once; PageError if there are too many."""
    found = list(dict.fromkeys(one for text in given for one in text.split(",") if one))
    if len(found) > MOST_RUNS:
        raise PageError(400, f"{len(found)} runs are too many for one page; choose at most {MOST_RUNS}.")
    return found


def make_compare_view(store: Store, ids: Sequence[str], asked: Mapping[str, str]) -> dict[str, Any]:
    """Return what the template shows. ``asked`` may name a ``metric`` and the ``base``, a run of the baseline."""
    runs = list({run.id: run for run in (find_run(store, one) for one in ids)}.values())
    scores = store.costs.list_scores([run.id for run in runs])
    metrics = _list_metric_names(runs, scores)
    name = asked.get("metric") or next(iter(metrics), "")
    if name and name not in metrics:
        raise PageError(400, f"None of these runs has the metric {name[:40]!r}; write one of {', '.join(metrics)}.")
    split, values = _get_finals(scores, name)
    groups = _put_base_first(group_by_seed(runs), asked.get("base", ""))
    results, axis = _place_intervals(_make_results(groups, values))
    return {
        "runs": runs,
        "groups": groups,
        "metric": name,
        "metrics": metrics,
        "split": split,
        "values": values,
        "costs": store.costs.sum_up([run.id for run in runs]),
        "results": results,
        "zero": axis.place(0.0),
        "verdicts": [_describe(one, results[0].group.label, name) for one in results[1:]],
        "repeated": sorted({run.id for group in groups for run in group.list_repeated()}),
        "unfinished": [run.id for run in runs if run.status != "completed"],
        "chart": _draw_curves(groups, scores, name),
        "differences": list_differences(groups),
        "address": ",".join(run.id for run in runs),
    }


def _list_metric_names(runs: Sequence[RunRecord], scores: Mapping[str, Sequence[RoundMetric]]) -> list[str]:
    """Return the names of all metrics; the main metric of the first run that has one is the first."""
    main = (find_main_metric_name(run, scores.get(run.id, ())) for run in runs)
    names = sorted({metric.name for found in scores.values() for _, metric in found})
    return list(dict.fromkeys([*(one for one in main if one), *names]))


def _get_finals(scores: Mapping[str, Sequence[RoundMetric]], name: str) -> tuple[str, dict[str, float]]:
    """Return the split that most runs were scored on after training, test before others, and the last values on it."""
    found: dict[str, dict[str, float]] = {"test": {}, "validation": {}, "local": {}}
    for run_id, every in scores.items():
        for number, metric in every:
            if number > 0 and metric.name == name and metric.split in found:
                found[metric.split][run_id] = metric.value
    split = max(found, key=lambda one: len(found[one]))
    return split, found[split]


def _put_base_first(groups: list[SeedGroup], base: str) -> list[SeedGroup]:
    return sorted(groups, key=lambda group: base not in {run.id for run in group.runs})


def _make_results(groups: Sequence[SeedGroup], values: Mapping[str, float]) -> list[Result]:
    by_seed = [group.collect_values(values) for group in groups]
    return [
        Result(
            group=group,
            seeds=len(own),
            mean=math.fsum(own.values()) / len(own) if own else math.nan,
            deviation=_compute_deviation(list(own.values())),
            difference=compute_paired_difference(by_seed[0], own) if index else None,
        )
        for index, (group, own) in enumerate(zip(groups, by_seed, strict=True))
    ]


def _compute_deviation(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((one - mean) ** 2 for one in values) / (len(values) - 1))


def _place_intervals(results: Sequence[Result]) -> tuple[list[Result], ValueAxis]:
    """Return the results with the places of mean, low and high, in percent of the width from the left."""
    known = [one.difference for one in results if one.difference and math.isfinite(one.difference.mean)]
    ends = [value for one in known for value in (one.mean, one.low, one.high) if math.isfinite(value)]
    axis, _ = make_value_axis([0.0, *ends], 100)
    mirrored = ValueAxis(axis.high, axis.low, axis.height)  # the lowest value is on the left
    return [
        Result(**(vars(one) | {"interval": _place(one.difference, mirrored)})) if one.difference in known else one
        for one in results
    ], mirrored


def _place(found: PairedDifference | None, axis: ValueAxis) -> tuple[float, float, float] | None:
    if found is None:
        return None
    ends = (found.mean, found.low, found.high)
    return (axis.place(ends[0]), *(axis.place(one if math.isfinite(one) else found.mean) for one in ends[1:]))  # type: ignore[return-value]


def _describe(result: Result, base: str, name: str) -> str:
    """Return one sentence: whether the difference from the baseline is real."""
    found, label = result.difference, result.group.label
    if found is None:
        return f"{label} and {base} have no completed run with the same seed, so they have no paired difference."
    size = format_score(abs(found.mean), name)
    if found.pairs < 2:
        return f"{label} differs from {base} by {size} on one seed; two or more seeds tell whether it is real."
    ends = (
        f"95 % interval {format_score(found.low, name)} to {format_score(found.high, name)}, {found.pairs} paired seeds"
    )
    if not found.is_clear:
        return f"{label} differs from {base} by {size}, and the interval includes 0 ({ends})."
    better = (found.mean > 0) != (name in LOWER_IS_BETTER)
    return f"{label} is {'better' if better else 'worse'} than {base} by {size} ({ends})."


def _draw_curves(
    groups: Sequence[SeedGroup], scores: Mapping[str, Sequence[RoundMetric]], name: str
) -> LineChart | None:
    """Draw the progress of each group: the mean of its runs in the rounds that all of them scored."""
    for split in ("validation", "local", "test"):
        curves = [Curve(group.label, _average(group, scores, split, name)) for group in groups]
        if any(curve.values for curve in curves):
            last = max(number for curve in curves for number in curve.values)
            return draw_chart(f"{split.capitalize()} {name} by round", name, curves, RoundAxis(0, last), [])
    return None


def _average(group: SeedGroup, scores: Mapping[str, Sequence[RoundMetric]], split: str, name: str) -> dict[int, float]:
    series = [
        {number: one.value for number, one in scores.get(run.id, ()) if (one.split, one.name) == (split, name)}
        for run in group.runs
    ]
    known = [one for one in series if one]
    common = set.intersection(*(set(one) for one in known)) if known else set()
    return {number: math.fsum(one[number] for one in known) / len(known) for number in sorted(common)}
