"""Rows of the visits of a stream. A visit begins in one round and ends in another, so it belongs to neither."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict

from sqlalchemy import Connection, delete, insert, select, update

from fedtune.tracking import tables
from fedtune.tracking.records import RoundRecord
from fedtune.tracking.task_records import TaskRecord

__all__ = ["delete_visits", "read_visits", "write_visits"]

_visits = tables.tasks.c


def write_visits(connection: Connection, run_id: str, record: RoundRecord) -> None:
    """Write the visits that begin in a round, and end the one that ends with it."""
    if record.tasks:
        connection.execute(insert(tables.tasks), [{"run_id": run_id} | asdict(one) for one in record.tasks])
    if record.ends_visit is not None:
        ended = update(tables.tasks).where(_visits.run_id == run_id, _visits.visit == record.ends_visit)
        connection.execute(ended, {"last_round": record.number})


def read_visits(connection: Connection, run_ids: Sequence[str]) -> defaultdict[str, list[TaskRecord]]:
    """Return the visits of several runs, in order."""
    found: defaultdict[str, list[TaskRecord]] = defaultdict(list)
    wanted = select(tables.tasks).where(_visits.run_id.in_(run_ids)).order_by(_visits.run_id, _visits.visit)
    for row in connection.execute(wanted).mappings():
        values = dict(row)
        found[values.pop("run_id")].append(TaskRecord(**values))
    return found


def delete_visits(connection: Connection, run_id: str, after: int) -> None:
    """Delete the visits that begin after round ``after``. One that ended after it has not ended any more."""
    of_run = _visits.run_id == run_id
    connection.execute(delete(tables.tasks).where(of_run, _visits.first_round > after))
    connection.execute(update(tables.tasks).where(of_run, _visits.last_round > after), {"last_round": None})
