"""The page of runs: the latest run, and the table of all runs, searched, filtered, sorted and paged on the server."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.recipe.metric_names import LOWER_IS_BETTER
from fedtune.tracking import MetricRecord, RunRecord, Store
from fedtune.tracking.run_costs import RunCosts
from fedtune.tracking.run_summary import find_main_metric_name, get_headline_metric
from fedtune.web.run_search import matches_search
from fedtune.web.runs_query import STATUSES, RunsQuery
from fedtune.web.sparkline import draw_sparkline

__all__ = ["PAGE_SIZE", "RunRow", "choose_runs", "make_run_row", "make_runs_view"]

PAGE_SIZE = 25
RoundMetric = tuple[int, MetricRecord]
Scores = Mapping[str, Sequence[RoundMetric]]


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A line of the table. ``before`` and ``after`` are the main metric ``metric``, NaN where it was not scored."""

    run: RunRecord
    costs: RunCosts
    metric: str
    before: float
    after: float
    split: str
    spark: str


def make_runs_view(store: Store, query: RunsQuery) -> dict[str, Any]:
    """Return what the template of the page of runs shows."""
    runs = store.runs()
    last = store.costs.list_last_scores() if query.sort.endswith("result") else {}
    chosen = choose_runs(runs, query, last)
    pages = max(1, math.ceil(len(chosen) / PAGE_SIZE))
    page = min(query.page, pages)
    shown = chosen[(page - 1) * PAGE_SIZE : page * PAGE_SIZE]
    ids = [run.id for run in {run.id: run for run in [*runs[:1], *shown]}.values()]
    costs, scores = store.costs.sum_up(ids), store.costs.list_scores(ids)
    rows = {run.id: make_run_row(run, costs[run.id], scores.get(run.id, ())) for run in [*runs[:1], *shown]}
    return {
        "query": query,
        "page": page,
        "pages": pages,
        "total": len(runs),
        "found": len(chosen),
        "counts": Counter(run.status for run in runs),
        "statuses": STATUSES,
        "rows": [rows[run.id] for run in shown],
        "latest": rows[runs[0].id] if runs else None,
    }


def make_run_row(run: RunRecord, costs: RunCosts, scores: Sequence[RoundMetric]) -> RunRow:
    """Make the line of a run from its costs and its scores over all domains."""
    name = find_main_metric_name(run, scores) or ""
    series = {split: _get_series(scores, split, name) for split in ("validation", "local", "test", "test-before")}
    split = next((one for one in ("test", "validation", "local") if series[one]), "")
    values = series.get(split, {})
    start = dict(sorted(series["test-before"].items())) if split == "test" else {}
    before = values.get(0, next(iter(start.values()), math.nan))
    after = values[max(values)] if values and max(values) > 0 else math.nan
    progress = next((series[one] for one in ("validation", "local", "test") if len(series[one]) > 1), {})
    return RunRow(
        run=run, costs=costs, metric=name, before=before, after=after, split=split, spark=draw_sparkline(progress)
    )


def choose_runs(runs: Sequence[RunRecord], query: RunsQuery, last: Scores) -> list[RunRecord]:
    """Return the runs that match the filters, sorted. Runs without a value come last in both directions."""
    found = [run for run in runs if (not query.status or run.status in query.status) and matches_search(run, query.q)]
    key, descending = query.sort.removeprefix("-"), query.sort.startswith("-")
    if key == "started":
        return found if descending else found[::-1]
    values = {run.id: _SORTED_BY[key](run, last) for run in found}
    known = [run for run in found if values[run.id] is not None]
    known.sort(key=lambda run: values[run.id], reverse=descending)
    return known + [run for run in found if values[run.id] is None]


def _get_series(scores: Sequence[RoundMetric], split: str, name: str) -> dict[int, float]:
    return {number: one.value for number, one in scores if (one.split, one.name) == (split, name)}


def _get_result(run: RunRecord, last: Scores) -> float | None:
    """Return the result so that a larger one is better; None without any."""
    found = get_headline_metric(run, last.get(run.id, ()))
    if found is None or math.isnan(found[2]):
        return None
    return -found[2] if found[1] in LOWER_IS_BETTER else found[2]


def _get_seconds(run: RunRecord, _: Scores) -> float | None:
    return (run.finished_at - run.created_at).total_seconds() if run.finished_at else None


_SORTED_BY: Mapping[str, Callable[[RunRecord, Scores], Any]] = {
    "status": lambda run, _: STATUSES.index(run.status) if run.status in STATUSES else None,
    "run": lambda run, _: (run.name, run.id),
    "seed": lambda run, _: run.seed,
    "rounds": lambda run, _: run.rounds_completed,
    "result": _get_result,
    "time": _get_seconds,
}
