"""Conversion between records and rows. Fields are named like columns, so one function serves every table."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeVar

from sqlalchemy import Connection, Table, and_, delete, func, insert, select

from fedtune.tracking import tables, task_rows
from fedtune.tracking.records import (
    CheckpointRecord,
    ClientRecord,
    ClientScore,
    MetricRecord,
    RoundRecord,
    SampleRecord,
)
from fedtune.tracking.task_records import TaskScore

__all__ = [
    "delete_rounds",
    "make_record",
    "read_checkpoint_scores",
    "read_latest_metrics",
    "read_round_results",
    "read_rounds",
    "write_round",
]

Child = TypeVar("Child", ClientRecord, MetricRecord, CheckpointRecord, ClientScore, SampleRecord, TaskScore)
Row = dict[str, Any]
Key = tuple[str, int]


def write_round(connection: Connection, run_id: str, record: RoundRecord) -> None:
    """Write the rows of a round in all tables."""
    connection.execute(insert(tables.rounds), _make_round_row(run_id, record))
    for table, children in _make_child_rows(run_id, record):
        connection.execute(insert(table), children)
    task_rows.write_visits(connection, run_id, record)


def _make_round_row(run_id: str, record: RoundRecord) -> Row:
    """Return the row of the table of rounds."""
    own = ("number", "status", "reason", "seconds", "device_type")
    return {"run_id": run_id} | {name: getattr(record, name) for name in own}


def _make_child_rows(run_id: str, record: RoundRecord) -> list[tuple[Table, list[Row]]]:
    """Return the rows of a round in the other tables, by table. Tables without a row are left out."""
    key = {"run_id": run_id, "round": record.number}
    checkpoint = (record.checkpoint,) if record.checkpoint else ()
    groups = zip(
        tables.ROUND_CHILD_TABLES,
        (record.client_records, record.metrics, checkpoint, record.client_scores, record.samples, record.task_scores),
        strict=True,
    )
    return [(table, [key | asdict(child) for child in children]) for table, children in groups if children]


def delete_rounds(connection: Connection, run_id: str, after: int) -> None:
    """Delete the rounds of a run after number ``after``, with their rows in all tables."""
    task_rows.delete_visits(connection, run_id, after)
    for table in (*tables.ROUND_CHILD_TABLES, tables.rounds):
        number = table.c.number if table is tables.rounds else table.c.round
        connection.execute(delete(table).where(table.c.run_id == run_id, number > after))


def read_rounds(connection: Connection, run_ids: Sequence[str], after: int = -1) -> dict[str, list[RoundRecord]]:
    """Return the rounds of several runs in order, from the one after number ``after`` on.

    Client records are sorted by client, metrics by split, domain and name.
    """
    client_records = _read_children(connection, tables.client_records, ClientRecord, run_ids, after)
    metrics = _read_children(connection, tables.metrics, MetricRecord, run_ids, after)
    checkpoints = _read_children(connection, tables.checkpoints, CheckpointRecord, run_ids, after)
    client_scores = _read_children(connection, tables.client_scores, ClientScore, run_ids, after)
    samples = _read_children(connection, tables.samples, SampleRecord, run_ids, after)
    task_scores = _read_children(connection, tables.task_scores, TaskScore, run_ids, after)
    visits = task_rows.read_visits(connection, run_ids)
    found: dict[str, list[RoundRecord]] = {run_id: [] for run_id in run_ids}
    for row in _select(connection, tables.rounds, run_ids, after):
        run_id = row.pop("run_id")
        key = (run_id, row["number"])
        checkpoint = next(iter(checkpoints[key]), None)
        found[run_id].append(
            RoundRecord(
                **row,
                client_records=tuple(client_records[key]),
                metrics=tuple(metrics[key]),
                checkpoint=checkpoint,
                client_scores=tuple(client_scores[key]),
                samples=tuple(samples[key]),
                task_scores=tuple(task_scores[key]),
                tasks=tuple(one for one in visits[run_id] if one.first_round == row["number"]),
                ends_visit=next((one.visit for one in visits[run_id] if one.last_round == row["number"]), None),
            )
        )
    return found


def read_round_results(connection: Connection, run_id: str) -> list[RoundRecord]:
    """Return the rounds of a run in order with their results, but without client records and scores of clients."""
    metrics = _read_children(connection, tables.metrics, MetricRecord, [run_id], -1)
    checkpoints = _read_children(connection, tables.checkpoints, CheckpointRecord, [run_id], -1)
    samples = _read_children(connection, tables.samples, SampleRecord, [run_id], -1)
    visits = task_rows.read_visits(connection, [run_id])[run_id]
    return [
        RoundRecord(
            **{name: value for name, value in row.items() if name != "run_id"},
            client_records=(),
            metrics=tuple(metrics[run_id, row["number"]]),
            checkpoint=next(iter(checkpoints[run_id, row["number"]]), None),
            samples=tuple(samples[run_id, row["number"]]),
            tasks=tuple(one for one in visits if one.first_round == row["number"]),
            ends_visit=next((one.visit for one in visits if one.last_round == row["number"]), None),
        )
        for row in _select(connection, tables.rounds, [run_id], -1)
    ]


def read_latest_metrics(connection: Connection) -> dict[str, list[tuple[int, MetricRecord]]]:
    """Return the newest value of each held-out metric over all domains, with its round, by run."""
    table = tables.metrics.c
    own = (table.run_id, table.split, table.domain, table.name)
    newest = select(*own, func.max(table.round).label("round")).group_by(*own)
    last = newest.where(table.domain == "all", table.split != "train").subquery()
    key = [table[column.name] == column for column in last.c]
    found: dict[str, list[tuple[int, MetricRecord]]] = defaultdict(list)
    for row in connection.execute(select(tables.metrics).join(last, and_(*key))).mappings():
        found[row["run_id"]].append((row["round"], make_record(MetricRecord, row)))
    return found


def read_checkpoint_scores(connection: Connection, run_id: str) -> dict[int, dict[tuple[str, str], float]]:
    """Return the held-out metrics over all domains of each round whose checkpoint is on disk, by split and name."""
    table, metric = tables.checkpoints.c, tables.metrics.c
    there = select(table.round).where(table.run_id == run_id, table.pruned.isnot(True))
    found: dict[int, dict[tuple[str, str], float]] = {number: {} for number in connection.execute(there).scalars()}
    scored = select(metric.round, metric.split, metric.name, metric.value).where(
        metric.run_id == run_id, metric.domain == "all", metric.split != "train", metric.round.in_(there)
    )
    for row in connection.execute(scored).mappings():
        found[row["round"]][row["split"], row["name"]] = row["value"]
    return found


def make_record(record: type[Child], row: Mapping[Any, Any]) -> Child:
    """Make a record of a row, which may have more columns."""
    return record(**{field.name: row[field.name] for field in fields(record)})


def _read_children(
    connection: Connection, table: Table, record: type[Child], run_ids: Sequence[str], after: int
) -> defaultdict[Key, list[Child]]:
    found: defaultdict[Key, list[Child]] = defaultdict(list)
    for row in _select(connection, table, run_ids, after):
        found[row["run_id"], row["round"]].append(make_record(record, row))
    return found


def _select(connection: Connection, table: Table, run_ids: Sequence[str], after: int) -> list[Row]:
    number = table.c.number if table is tables.rounds else table.c.round
    wanted = select(table).where(table.c.run_id.in_(run_ids), number > after).order_by(*table.primary_key.columns)
    return [dict(row) for row in connection.execute(wanted).mappings()]
