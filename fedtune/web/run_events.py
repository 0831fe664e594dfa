"""What happened in a run, from the store: its begin and end, failed rounds, tasks, alarms. Newest first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from fedtune.tracking import RoundRecord, RunRecord
from fedtune.untrusted import clean_text

__all__ = ["Event", "list_events"]

_LONGEST = 500


@dataclass(frozen=True)
class Event:
    """An event; ``round`` or ``time`` is None where the store does not have it."""

    round: int | None
    time: datetime | None
    kind: str
    text: str


def list_events(run: RunRecord, rounds: Sequence[RoundRecord]) -> list[Event]:
    """Return the events of a run, newest first."""
    begun = Event(None, run.created_at, "queued" if run.status == "queued" else "started", f"engine {run.engine}")
    events = [begun, *(event for record in rounds for event in _iter_round(record))]
    if run.status in ("completed", "failed", "interrupted"):
        events.append(Event(None, run.finished_at, run.status, clean_text(run.reason, _LONGEST)))
    return events[::-1]


def _iter_round(record: RoundRecord) -> Iterator[Event]:
    for one in record.tasks:
        yield Event(record.number, None, "task", f"{clean_text(one.name)} begins, opened by {one.opened_by}")
    if record.status == "failed":
        yield Event(record.number, None, "failed", clean_text(record.reason, _LONGEST))
    for metric in record.metrics:
        if metric.split == "end":
            yield Event(record.number, None, "ended", f"ends early: {clean_text(metric.name)}")
    if record.ends_visit is not None:
        yield Event(record.number, None, "task", f"visit {record.ends_visit} ends")
