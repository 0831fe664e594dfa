"""Invented rows of a stream for the tests of the store: three tasks in four visits of two rounds each."""

import json
from collections.abc import Sequence
from typing import Any

from fedtune.tracking import MetricRecord, RoundRecord, Store, TaskRecord, TaskScore
from fedtune.tracking.task_matrix import Score
from tests.store_examples import a_client_record, a_metric, a_round, start

__all__ = ["ROWS", "STREAM", "TASKS", "a_stream_round", "fill_stream", "score_by_clients"]

TASKS = ("films", "tweets", "news")
VISITS = ("films", "tweets", "news", "films")
ROWS: Sequence[Sequence[Score]] = (
    (0.1, 0.1, 0.1),
    (0.9, 0.2, 0.1),
    (0.6, 0.8, 0.3),
    (0.7, 0.5, 0.95),
    (0.85, 0.45, 0.9),
)
"""Row 0, then the ends of the four visits."""
STREAM: dict[str, Any] = {
    "setting": "domain",
    "by": "domain",
    "tasks": [{"name": name, "rounds": 2} for name in VISITS],
}
_EXAMPLES = {"films": 100, "tweets": 200, "news": 100}


def border_metrics(row: Sequence[Score]) -> tuple[MetricRecord, ...]:
    scored = [(name, score) for name, score in zip(TASKS, row, strict=True) if score is not None]
    return tuple(a_metric(score, "border", name) for name, score in scored)


def score_by_clients(moment: str, scores: Sequence[float]) -> tuple[TaskScore, ...]:
    """Client 0 is a phone with 10 predictions a task, client 2 a tablet with 30, which scores a tenth less."""
    return tuple(
        TaskScore(scope=scope, moment=moment, task=task, num_predictions=count, accuracy=score - less, loss=1 - score)
        for scope, count, less in (
            ("class:phone", 10, 0.0),
            ("class:tablet", 30, 0.1),
            ("client:0", 10, 0.0),
            ("client:2", 30, 0.1),
        )
        for task, score in zip(TASKS, scores, strict=False)
    )


def a_stream_round(number: int, rows: Sequence[Sequence[Score]] = ROWS) -> RoundRecord:
    """Odd rounds begin a visit, even ones end it. Validation falls by 0.2 in the first round of a visit."""
    visit, begins = (number + 1) // 2, number % 2 == 1
    seen = dict.fromkeys(VISITS[:visit])
    later = [(name, rows[visit][TASKS.index(name)]) for name in seen]
    validation = [a_metric(score - 0.2 * begins, "validation", name) for name, score in later if score is not None]
    name = VISITS[visit - 1]
    opened = TaskRecord(visit=visit, name=name, first_round=number, test_examples=_EXAMPLES[name], labels=("no", "a b"))
    ended = [score for score in rows[visit][: len(seen)] if score is not None]
    return a_round(
        number,
        metrics=(*validation, *(() if begins else border_metrics(rows[visit]))),
        client_records=tuple(a_client_record(k, stored_bytes=1000 * number + k) for k in range(3)) if number else (),
        tasks=(opened,) if begins else (),
        ends_visit=None if begins or not number else visit,
        task_scores=() if begins or not number else score_by_clients("shared", ended),
    )


def fill_stream(
    store: Store, run_id: str = "stream-1a2b", rounds: int = 8, rows: Sequence[Sequence[Score]] = ROWS, **changes: Any
) -> list[RoundRecord]:
    """A run with a stream that completed so many rounds."""
    recipe = {"name": "stream", "seed": 3, "stream": {**STREAM, **changes}}
    start(store, run_id, name="stream", recipe=json.dumps(recipe), rounds_planned=8)
    recorded = [a_stream_round(number, rows) for number in range(rounds + 1)]
    for record in recorded:
        store.commit_round(run_id, record)
    store.finish(run_id, "completed")
    return recorded
