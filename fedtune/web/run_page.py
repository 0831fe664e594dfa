"""The page of one run: its figures, curves, clients, costs, memory, tasks, recipe, events, samples and files."""

import math
from collections.abc import Sequence
from typing import Any

from fedtune.library.attack_text import describe_attackers
from fedtune.library.privacy_text import describe_privacy
from fedtune.recipe.versions import read_stored_recipe
from fedtune.tracking import RoundRecord, RunRecord, Store
from fedtune.tracking.run_detail import ClassSums, RoundSums
from fedtune.tracking.run_summary import compare_before_and_after, find_main_metric_name, list_metrics
from fedtune.tracking.stream_ledger import compute_stream_figures, list_visits, make_matrix
from fedtune.web.chart_scale import RoundAxis, choose_round_step
from fedtune.web.client_grid import MOST_CLIENTS, draw_class_rows, draw_client_rows, sort_clients
from fedtune.web.client_scores import summarise_scores
from fedtune.web.outcome_bars import draw_outcome_bars
from fedtune.web.page_error import PageError
from fedtune.web.recipe_view import list_changed_settings, make_command
from fedtune.web.run_curves import draw_run_charts, list_borders
from fedtune.web.run_events import list_events
from fedtune.web.run_query import RunQuery

__all__ = ["find_run", "make_run_view"]

MOST_ROUNDS = 60
"""So many rounds the grid shows at once."""
_PROBLEMS = 50
_MOST_SAMPLES = 20


def find_run(store: Store, run_id: str) -> RunRecord:
    """Return the run with exactly this id, or the ``latest``; PageError of status 404 without one."""
    if run_id == "latest":
        return store.run(run_id)
    found = store.find(run_id)
    if found is None:
        raise PageError(404, f"There is no run {run_id[:80]!r} in this store.")
    return found


def make_run_view(store: Store, run: RunRecord, query: RunQuery) -> dict[str, Any]:
    """Return what the template of a run's page shows."""
    rounds, sums = store.details.read_rounds(run.id), store.details.sum_by_round(run.id)
    name = find_main_metric_name(run, list_metrics(rounds)) or ""
    last = max((record.number for record in rounds), default=0)
    classes = store.details.sum_by_class(run.id)
    return (
        {
            "run": run,
            "query": query,
            "metric": name,
            "last": last,
            "seconds": math.fsum(one.seconds for one in rounds if math.isfinite(one.seconds)),
            "domains": _list_domains(rounds, name),
            "charts": draw_run_charts(rounds, sums, name, RoundAxis(0, last)),
            "outcomes": _sum_outcomes(sums),
            "bars": draw_outcome_bars(sums, RoundAxis(0, last)),
            "axis": RoundAxis(0, last),
            "borders": list_borders(rounds),
            "classes": classes,
            "totals": _sum_classes(classes),
            "budgets": _list_budgets(run),
            "scores": summarise_scores(*store.details.list_last_scores(run.id)),
            "stream": _make_stream(run, rounds),
            "changed": list_changed_settings(run),
            "command": make_command(run),
            "events": list_events(run, rounds),
            "samples": _list_samples(rounds),
            "files": [(one.number, one.checkpoint) for one in reversed(rounds) if one.checkpoint],
            "privacy": describe_privacy(run, rounds),
            "attackers": describe_attackers(run),
        }
        | _make_grid(store, query, sums, last)
        | _list_problems(store, query)
    )


def _make_grid(store: Store, query: RunQuery, sums: dict[int, RoundSums], last: int) -> dict[str, Any]:
    """Return the rows of the grid: clients up to 64, device classes above unless one class is asked for."""
    start = query.start if 0 < query.start <= last else max(0, last - MOST_ROUNDS + 1)
    rounds = range(start, min(last, start + MOST_ROUNDS - 1) + 1)
    clients = store.details.sum_by_client(query.run_id)
    own = [one for one in clients if query.device_class in (None, one.device_class)]
    by_class = len(clients) > MOST_CLIENTS and query.device_class is None
    order = query.order or ("problems" if len(own) > MOST_CLIENTS else "name")
    shown = [] if by_class else sort_clients(own, order)[:MOST_CLIENTS]
    records = store.details.list_records(query.run_id, rounds, [one.client for one in shown])
    classes = list(dict.fromkeys(one.device_class for one in clients))
    by_client = draw_client_rows(shown, records, rounds, query.colour)
    return {
        "grid": draw_class_rows(classes, sums, rounds) if by_class else by_client,
        "grid_rounds": rounds,
        "step": choose_round_step(len(rounds)),
        "by_class": by_class,
        "order": order,
        "clients": len(clients),
        "own": len(own),
        "shown": len(shown),
        "earlier": max(1, start - MOST_ROUNDS) if start > 1 else None,
        "later": start + MOST_ROUNDS if rounds.stop <= last else None,
    }


def _list_problems(store: Store, query: RunQuery) -> dict[str, Any]:
    found, count = store.details.list_problems(query.run_id, (query.problems - 1) * _PROBLEMS, _PROBLEMS)
    return {"problems": found, "problem_count": count, "problem_pages": max(1, math.ceil(count / _PROBLEMS))}


def _list_domains(rounds: Sequence[RoundRecord], name: str) -> list[tuple[str, str, float, float]]:
    """Return split, domain, and the main metric before and after training; the test split if it was scored."""
    for split in ("test", "validation", "local"):
        found = compare_before_and_after(rounds, split, name) if name else {}
        if found:
            return [(split, domain, before, after) for domain, (before, after) in found.items()]
    return []


def _sum_outcomes(sums: dict[int, RoundSums]) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in sums.values():
        for outcome, count in one.outcomes.items():
            found[outcome] = found.get(outcome, 0) + count
    return found


def _sum_classes(classes: Sequence[ClassSums]) -> dict[str, int]:
    return {
        "up": sum(one.bytes_up for one in classes),
        "down": sum(one.bytes_down for one in classes),
        "peak": max((one.peak_memory for one in classes), default=0),
        "predicted": max((one.predicted_total or 0 for one in classes), default=0),
    }


def _list_budgets(run: RunRecord) -> dict[str, int]:
    """Return the memory that the recipe allows a trainer of each device class, in bytes."""
    devices = read_stored_recipe(run.recipe).get("devices")
    found = [one for one in devices if isinstance(one, dict)] if isinstance(devices, list) else []
    return {str(one.get("name", "device")): one["memory"] for one in found if isinstance(one.get("memory"), int)}


def _make_stream(run: RunRecord, rounds: Sequence[RoundRecord]) -> dict[str, Any] | None:
    matrix = make_matrix(run, rounds)
    if matrix is None:
        return None
    return {
        "matrix": matrix,
        "visits": [one for one in list_visits(rounds) if one.last_round is not None],
        "figures": {key: one for key, one in compute_stream_figures(matrix, rounds).items() if one is not None},
    }


def _list_samples(rounds: Sequence[RoundRecord]) -> dict[str, Any]:
    """Return the samples of the first and of the last round that have any, by prompt."""
    sampled = [record for record in rounds if record.samples]
    if not sampled:
        return {"rounds": [], "rows": [], "hidden": 0}
    ends = sampled if len(sampled) == 1 else [sampled[0], sampled[-1]]
    texts = [{one.number: one for one in record.samples} for record in ends]
    shown = sampled[-1].samples[:_MOST_SAMPLES]
    return {
        "rounds": [record.number for record in ends],
        "rows": [(one, [each.get(one.number) for each in texts]) for one in shown],
        "hidden": len(sampled[-1].samples) - len(shown),
    }
