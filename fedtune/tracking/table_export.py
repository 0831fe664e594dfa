"""Export of runs: a folder of tables as CSV or Parquet, or one JSON file of detailed documents."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fedtune import files
from fedtune.errors import StoreError
from fedtune.tracking import run_json
from fedtune.tracking.records import (
    CheckpointRecord,
    ClientRecord,
    ClientScore,
    MetricRecord,
    RoundRecord,
    RunRecord,
    SampleRecord,
)
from fedtune.tracking.stream_ledger import list_visits
from fedtune.tracking.task_records import TaskRecord, TaskScore

__all__ = ["FORMATS", "export_runs"]

Recorded = Sequence[tuple[RunRecord, Sequence[RoundRecord]]]

FORMATS = ("csv", "parquet", "json")
_WRITERS: Mapping[str, Callable[[pa.Table, Path], None]] = {
    "csv": pa.csv.write_csv,
    "parquet": pa.parquet.write_table,
}
_TYPES: Mapping[Any, pa.DataType] = {
    int: pa.int64(),
    int | None: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
    str | None: pa.string(),
    tuple[str, ...]: pa.string(),  # as JSON
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
    datetime | None: pa.timestamp("us", tz="UTC"),
}
_RUN = {"run_id": pa.string()}
_ROUND = {"run_id": pa.string(), "round": pa.int64()}


def export_runs(recorded: Recorded, format: str, path: Path) -> list[Path]:  # noqa: A002
    """Write runs and return the files.

    ``json``: ``path`` is one file. ``csv`` and ``parquet``: ``path`` becomes a folder with one file each for runs,
    rounds, client records, metrics, client scores, checkpoints, samples, task scores and tasks, joined by ``run_id``
    and ``round``.
    StoreError when the folder is there already or cannot be written; nothing is left half-written.
    """
    if format == "json":
        documents = [run_json.make_run_document(run, rounds, detailed=True) for run, rounds in recorded]
        files.write_bytes_atomically(path, f"{run_json.json_text(documents)}\n".encode())
        return [path]
    if path.exists():
        raise StoreError(f"{path} is there already; choose a new folder for the tables with -o")
    try:
        return _write_folder(make_arrow_tables(recorded), format, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; free or choose another place") from error


def _write_folder(written: Mapping[str, pa.Table], format: str, path: Path) -> list[Path]:  # noqa: A002
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
        whole = Path(beside) / path.name
        whole.mkdir()
        for name, table in written.items():
            _WRITERS[format](table, whole / f"{name}.{format}")
        os.rename(whole, path)
    return sorted(path.iterdir())


def make_arrow_tables(recorded: Recorded) -> dict[str, pa.Table]:
    """Make the nine tables. Each row has the keys that join it to the others."""
    every = [(run.id, record) for run, rounds in recorded for record in rounds]
    return {
        "runs": _table({}, RunRecord, [asdict(run) for run, _ in recorded]),
        "rounds": _table(_RUN, RoundRecord, [{"run_id": run_id, **_own(record)} for run_id, record in every]),
        "client_records": _table(_ROUND, ClientRecord, _children(every, lambda record: record.client_records)),
        "metrics": _table(_ROUND, MetricRecord, _children(every, lambda record: record.metrics)),
        "client_scores": _table(_ROUND, ClientScore, _children(every, lambda record: record.client_scores)),
        "checkpoints": _table(
            _ROUND, CheckpointRecord, _children(every, lambda record: filter(None, [record.checkpoint]))
        ),
        "samples": _table(_ROUND, SampleRecord, _children(every, lambda record: record.samples)),
        "task_scores": _table(_ROUND, TaskScore, _children(every, lambda record: record.task_scores)),
        "tasks": _table(_RUN, TaskRecord, [row for run, rounds in recorded for row in _visits(run.id, rounds)]),
    }


def _visits(run_id: str, rounds: Sequence[RoundRecord]) -> list[dict[str, Any]]:
    return [{"run_id": run_id, **asdict(one), "labels": json.dumps(one.labels)} for one in list_visits(rounds)]


def _own(record: RoundRecord) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record) if field.type in _TYPES}


def _children(every: Sequence[tuple[str, RoundRecord]], of: Callable[[RoundRecord], Any]) -> list[dict[str, Any]]:
    return [
        {"run_id": run_id, "round": record.number, **asdict(child)} for run_id, record in every for child in of(record)
    ]


def _table(key: Mapping[str, pa.DataType], record: type[Any], rows: list[dict[str, Any]]) -> pa.Table:
    columns = {field.name: _TYPES[field.type] for field in fields(record) if field.type in _TYPES}
    return pa.Table.from_pylist(rows, schema=pa.schema({**key, **columns}))
