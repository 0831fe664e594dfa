"""The ledger of a recorded stream: the accuracy matrices of the run, its device classes and its clients."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.recipe.versions import read_stored_recipe
from fedtune.tracking.records import RoundRecord, RunRecord
from fedtune.tracking.run_summary import get_metric_series
from fedtune.tracking.stability_gap import compute_stability_gap
from fedtune.tracking.stream_figures import compute_figures
from fedtune.tracking.task_matrix import Score, TaskMatrix
from fedtune.tracking.task_records import TaskRecord

__all__ = [
    "compute_stream_figures",
    "find_task_ends",
    "get_final_scores",
    "list_task_names",
    "list_visits",
    "make_matrix",
    "make_scope_matrices",
]

Rounds = Sequence[RoundRecord]


def list_visits(rounds: Rounds) -> list[TaskRecord]:
    """Return the visits of a run that have begun, in order."""
    return sorted((one for record in rounds for one in record.tasks), key=lambda one: one.visit)


def list_task_names(run: RunRecord, rounds: Rounds) -> list[str]:
    """Return the distinct tasks of a run: those of its recipe in order, then those that drift opened."""
    stream = read_stored_recipe(run.recipe).get("stream") or {}
    planned = [str(task["name"]) for task in _list_mappings(stream.get("tasks")) if "name" in task]
    return list(dict.fromkeys(planned + [one.name for one in list_visits(rounds)]))


def make_matrix(run: RunRecord, rounds: Rounds) -> TaskMatrix | None:
    """Make the accuracy matrix of a run from its border metrics: row 0 and the ends of visits; None without tasks."""
    names = list_task_names(run, rounds)
    if not names:
        return None
    borders = {name: get_metric_series(rounds, "border", name, "accuracy") for name in names}
    numbers = [0, *_list_ends(rounds)]
    rows = [[_score(borders[name].get(number)) for name in names] for number in numbers]
    return _matrix(run, rounds, rows)


def make_scope_matrices(run: RunRecord, rounds: Rounds) -> dict[str, TaskMatrix]:
    """Make the matrix of each device class and client that scored tasks, by scope.

    Row 0 is the score of the start state. Another row has the first score from the end of its visit up to the end of
    the next one, because a client is not asked in every round; of tasks to come, only that of the end itself. Where
    clients arrive one after another, a client's visits end when it ends them itself, and those of a device class when
    all clients have.
    """
    names = list_task_names(run, rounds)
    found = _collect_scope_scores(rounds)
    visited = [one.name for one in list_visits(rounds)]
    rows = {
        scope: _scope_rows(names, visited, _list_scope_ends(run, rounds, scope), found[scope])
        for scope in sorted(found)
    }
    return {scope: _matrix(run, rounds, own) for scope, own in rows.items()}


def compute_stream_figures(matrix: TaskMatrix, rounds: Rounds) -> dict[str, float | None]:
    """Compute the figures of a run's matrix, with the stability gap of its validation scores."""
    ends = find_task_ends(rounds)
    series = {name: get_metric_series(rounds, "validation", name, "accuracy") for name in ends}
    gap = compute_stability_gap(series, ends) if matrix.has_order else None
    return compute_figures(matrix) | {"gap": gap and gap.gap, "worst_case": gap and gap.worst_case}


def get_final_scores(run: RunRecord, rounds: Rounds) -> dict[str, float]:
    """Return the accuracy of a run's end on each task: its last border, else its test split by domain."""
    matrix = make_matrix(run, rounds)
    if matrix is not None:
        row = zip(matrix.tasks, matrix.rows[matrix.last], strict=True)
        return {name: score for name, score in row if score is not None}
    tests = [one for record in rounds for one in record.metrics if (one.split, one.name) == ("test", "accuracy")]
    return {one.domain: one.value for one in tests if one.domain not in ("all", "mean") and not math.isnan(one.value)}


def find_task_ends(rounds: Rounds) -> dict[str, int]:
    """Return the last round of each task's first visit, in the order of the stream."""
    ends: dict[str, int] = {}
    for one in list_visits(rounds):
        if one.last_round is not None:
            ends.setdefault(one.name, one.last_round)
    return ends


def _matrix(run: RunRecord, rounds: Rounds, rows: Sequence[Sequence[Score]]) -> TaskMatrix:
    visits, names = list_visits(rounds), list_task_names(run, rounds)
    stream = read_stored_recipe(run.recipe).get("stream") or {}
    examples = {one.name: one.test_examples for one in visits}
    return TaskMatrix(
        tasks=tuple(names),
        visits=tuple(names.index(one.name) for one in visits),
        rows=tuple(tuple(row) for row in rows),
        examples=tuple(examples.get(name) for name in names),
        has_order=stream.get("arrival") != "own",
    )


def _list_ends(rounds: Rounds) -> list[int]:
    return [one.last_round for one in list_visits(rounds) if one.last_round is not None]


def _collect_scope_scores(rounds: Rounds) -> dict[str, dict[tuple[int, str], float]]:
    """Return scores by scope, then by the round whose end state was scored and the task."""
    found: dict[str, dict[tuple[int, str], float]] = defaultdict(dict)
    for record in rounds:
        for one in record.task_scores:
            scored = record.number - (one.moment == "before")
            found[one.scope].setdefault((scored, one.task), one.accuracy)  # of all in a class before of some
    return found


def _list_scope_ends(run: RunRecord, rounds: Rounds, scope: str) -> list[int]:
    """Return the rounds in which visits ended for a client or a device class."""
    ends, arrival = _list_ends(rounds), (read_stored_recipe(run.recipe).get("stream") or {}).get("arrival")
    kind, _, number = scope.partition(":")
    if kind != "client" or not isinstance(arrival, Mapping):
        return ends
    waves = int(arrival["waves"])
    early = int(arrival["staggered"]) * (waves - 1 - int(number) % waves)
    return [end - early for end in ends]


def _scope_rows(
    names: Sequence[str], visited: Sequence[str], ends: Sequence[int], scores: Mapping[tuple[int, str], float]
) -> list[list[Score]]:
    """Return the rows of a scope whose visits ended in the rounds ``ends``.

    A task that comes later counts only as the state of the border was scored: later states have begun to train it.
    """
    spans = [range(1), *(range(first, last) for first, last in zip(ends, [*ends[1:], _NEVER], strict=True))]
    return [
        [_first(scores, span if name in visited[:row] else span[:1], name) for name in names]
        for row, span in enumerate(spans)
    ]


_NEVER = 1 << 62


def _first(scores: Mapping[tuple[int, str], float], span: range, name: str) -> Score:
    numbers = sorted(number for number, task in scores if task == name and number in span)
    return _score(scores[numbers[0], name]) if numbers else None


def _score(value: float | None) -> Score:
    return None if value is None or math.isnan(value) else value


def _list_mappings(found: Any) -> list[Mapping[str, Any]]:
    """Return the mappings in a part of a stored recipe, which may be of any form."""
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []
