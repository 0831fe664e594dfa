"""Counts the ledger of a client of a stream by hand: loops over the rows of a SQLite store, none of fedtune's code.

A client's row i is the first score of each task from the end of its i-th visit on, before its next visit ends. A task
that it has not begun by then has only the score of the end itself.
"""

import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Count", "count_client"]


class Count(NamedTuple):
    """The rounds of a client by what became of them, its matrix, and its figures, None where nothing was scored."""

    rounds: dict[str, int]
    matrix: list[list[float | None]]
    figures: dict[str, float | None]


def count_client(store: Path, run: str, client: int) -> Count:
    """Count the rows of one client of a run."""
    with sqlite3.connect(store) as database:
        [(text,)] = database.execute("SELECT recipe FROM runs WHERE id = ?", (run,)).fetchall()
        statuses = database.execute(
            "SELECT status FROM client_records WHERE run_id = ? AND client = ?", (run, client)
        ).fetchall()
        rows = database.execute(
            "SELECT round, moment, task, accuracy FROM task_scores WHERE run_id = ? AND scope = ?",
            (run, f"client:{client}"),
        ).fetchall()
    stream = json.loads(text)["stream"]
    visits = [task["name"] for task in stream["tasks"]]
    scores: dict[tuple[int, str], float] = {}
    for number, moment, task, accuracy in rows:  # what a client says before a round is of the round before
        if moment == "shared":
            scores[number, task] = accuracy
    for number, moment, task, accuracy in rows:
        if moment == "before" and (number - 1, task) not in scores:
            scores[number - 1, task] = accuracy
    matrix = _fill(visits, _list_ends(stream, client), scores)
    return Count(dict(Counter(status for (status,) in statuses)), matrix, _compute(matrix, visits))


def _list_ends(stream: dict[str, Any], client: int) -> list[int]:
    arrival, ends, now = stream["arrival"], [], 0
    if isinstance(arrival, dict):
        now = arrival["staggered"] * (client % arrival["waves"])
    for task in stream["tasks"]:
        now += task["rounds"]
        ends.append(now)
    return ends


def _fill(visits: list[str], ends: list[int], scores: dict[tuple[int, str], float]) -> list[list[float | None]]:
    tasks = sorted(set(visits), key=visits.index)
    matrix: list[list[float | None]] = [[scores.get((0, task)) for task in tasks]]
    for row, end in enumerate(ends):
        until = ends[row + 1] if row + 1 < len(ends) else 10**9
        found: list[float | None] = []
        for task in tasks:
            begun = task in visits[: row + 1]
            known = sorted(number for number, name in scores if name == task and end <= number < until)
            usable = [number for number in known if begun or number == end]
            found.append(scores[usable[0], task] if usable else None)
        matrix.append(found)
    return matrix


def _compute(matrix: list[list[float | None]], visits: list[str]) -> dict[str, float | None]:
    tasks = sorted(set(visits), key=visits.index)
    last = max((row for row, scores in enumerate(matrix) if any(score is not None for score in scores)), default=0)
    final: list[float] = []
    lost: list[float] = []
    learned: list[float] = []
    for column, task in enumerate(tasks):
        first_end = visits.index(task) + 1
        known = [(row, score) for row in range(first_end, last + 1) if (score := matrix[row][column]) is not None]
        if not known:
            continue
        learned.append(known[0][1])
        if known[-1][0] == last:
            final.append(known[-1][1])
            if known[:-1]:
                lost.append(max(score for _, score in known[:-1]) - known[-1][1])
    return {"accuracy": _mean(final), "forgetting": _mean(lost), "learning": _mean(learned)}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
