"""The run store. A round is written in one transaction, after its checkpoint is on disk."""

import difflib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Self

from sqlalchemy import Connection, Engine, Select, delete, func, insert, select, update

from fedtune.errors import StoreError
from fedtune.tracking import rows, schema_version, tables
from fedtune.tracking.access_control import Access
from fedtune.tracking.checkpoint_rows import CheckpointRows
from fedtune.tracking.compaction import shrink_database
from fedtune.tracking.database import get_default_url, get_sqlite_path, make_engine, reader, writer
from fedtune.tracking.prediction_rows import PredictionRows
from fedtune.tracking.records import MetricRecord, RoundRecord, RunRecord
from fedtune.tracking.run_costs import RunCostRows
from fedtune.tracking.run_detail import RunDetailRows
from fedtune.tracking.run_lock import is_run_active

__all__ = ["Store", "new_run_id"]

_LONGEST_ID = 64  # of the column; SQLite alone would take more


def new_run_id(name: str) -> str:
    """Make an id for a run: the name of its recipe, shortened if it is long, and six random digits."""
    ending = f"-{secrets.token_hex(3)}"
    return name[: _LONGEST_ID - len(ending)] + ending


class Store:
    """Runs and their records, in any database that SQLAlchemy supports. Several processes may use it at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.access, self.checkpoints, self.predictions = Access(engine), CheckpointRows(engine), PredictionRows(engine)
        self.costs, self.details = RunCostRows(engine), RunDetailRows(engine)

    @classmethod
    def open(cls, url: str | None = None) -> Self:
        """Open the store at a SQLAlchemy URL, or at ``get_default_url()``. It is created or upgraded when needed."""
        store = cls(make_engine(url or get_default_url()))
        try:
            schema_version.prepare_schema(store._engine)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close all connections to the database."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def create_run(
        self,
        *,
        id: str,  # noqa: A002
        name: str,
        recipe: str,
        seed: int,
        engine: str,
        rounds_planned: int,
        status: str = "running",
    ) -> None:
        """Record a run that starts now, or is ``queued``; ``recipe`` is JSON text."""
        row = {"id": id, "name": name, "recipe": recipe, "seed": seed, "engine": engine}
        with writer(self._engine) as connection:
            if _status(connection, id) is not None:
                raise StoreError(f"there is a run {id} already; choose another id")
            if len(id) > _LONGEST_ID:
                raise StoreError(f"the run id {id} has {len(id)} characters; choose one of at most {_LONGEST_ID}")
            state = {"status": status, "reason": "", "created_at": datetime.now(UTC), "rounds_planned": rounds_planned}
            connection.execute(insert(tables.runs), row | state)

    def commit_round(self, run_id: str, record: RoundRecord) -> None:
        """Write a round and all its records in one transaction; StoreError when its number is taken."""
        with writer(self._engine) as connection:
            _expect(connection, run_id)
            if _has_round(connection, run_id, record.number):
                raise StoreError(f"round {record.number} of run {run_id} is recorded already; go on at the next round")
            rows.write_round(connection, run_id, record)

    def finish(self, run_id: str, status: str, reason: str = "") -> None:
        """Record that a run ended, and how: completed, failed or interrupted."""
        change = {"status": status, "reason": reason, "finished_at": datetime.now(UTC)}
        with writer(self._engine) as connection:
            _expect(connection, run_id)
            connection.execute(update(tables.runs).where(tables.runs.c.id == run_id), change)

    def reopen(self, run_id: str, status: str = "running") -> None:
        """Make a run that did not complete a running one again, or a ``queued`` one, to resume it."""
        with writer(self._engine) as connection:
            if _expect(connection, run_id) == "completed":
                raise StoreError(f"run {run_id} is completed; there is nothing to resume")
            change = {"status": status, "reason": "", "finished_at": None}
            connection.execute(update(tables.runs).where(tables.runs.c.id == run_id), change)

    def forget_rounds(self, run_id: str, after: int, reason: str) -> None:
        """Delete the rounds of a run after number ``after``, and record it as interrupted for ``reason``."""
        with writer(self._engine) as connection:
            rows.delete_rounds(connection, run_id, after)
            change = {"status": "interrupted", "reason": reason, "finished_at": datetime.now(UTC)}
            connection.execute(update(tables.runs).where(tables.runs.c.id == run_id), change)

    def extend(self, run_id: str, recipe: str, rounds: int) -> None:
        """Make a run that has ended a running one with more rounds. ``recipe`` is JSON text with that number too."""
        change = {"recipe": recipe, "rounds_planned": rounds, "status": "running", "reason": "", "finished_at": None}
        with writer(self._engine) as connection:
            _expect(connection, run_id)
            connection.execute(update(tables.runs).where(tables.runs.c.id == run_id), change)

    def run(self, reference: str) -> RunRecord:
        """Return the run with this id or the only one whose id begins so; for ``latest`` the newest."""
        with reader(self._engine) as connection:
            found = _find(connection, _resolve(connection, reference))
        return mark_interrupted(found)

    def find(self, run_id: str) -> RunRecord | None:
        """Return the run with exactly this id; None if there is none."""
        with reader(self._engine) as connection:
            row = connection.execute(_newest_first().where(tables.runs.c.id == run_id)).mappings().first()
        return mark_interrupted(RunRecord(**row)) if row else None

    def runs(self) -> list[RunRecord]:
        """Return every run, newest first."""
        with reader(self._engine) as connection:
            found = [RunRecord(**row) for row in connection.execute(_newest_first()).mappings()]
        return [mark_interrupted(run) for run in found]

    def record_recipe(self, run_id: str, recipe: str) -> None:
        """Record the recipe of a run as JSON text, completed with what was read from its model."""
        with writer(self._engine) as connection:
            connection.execute(update(tables.runs).where(tables.runs.c.id == run_id), {"recipe": recipe})

    def set_run_reason(self, run_id: str, reason: str) -> None:
        """Record why a run that has not ended waits."""
        with writer(self._engine) as connection:
            connection.execute(update(tables.runs).where(tables.runs.c.id == run_id), {"reason": reason})

    def list_unfinished_runs(self, engine: str) -> list[RunRecord]:
        """Return the running and queued runs of an engine, oldest first, whether or not a process executes them."""
        wanted = tables.runs.c.engine == engine, tables.runs.c.status.in_(("running", "queued"))
        with reader(self._engine) as connection:
            found = [RunRecord(**row) for row in connection.execute(_newest_first().where(*wanted)).mappings()]
        return found[::-1]

    def rounds(self, run_id: str, after: int = -1) -> list[RoundRecord]:
        """Return the rounds of a run in order. Only those after number ``after`` are read."""
        with reader(self._engine) as connection:
            return rows.read_rounds(connection, [run_id], after)[run_id]

    def rounds_of(self, run_ids: Iterable[str]) -> dict[str, list[RoundRecord]]:
        """Return the rounds of several runs. The number of queries does not depend on the number of runs."""
        with reader(self._engine) as connection:
            return rows.read_rounds(connection, list(run_ids))

    def get_last_requested_rounds(self, run_id: str) -> dict[int, int]:
        """Return the last committed round in which each client was selected. Others are left out."""
        table = tables.client_records.c
        last = func.max(table.round).label("round")
        wanted = select(table.client, last).where(table.run_id == run_id).group_by(table.client)
        with reader(self._engine) as connection:
            return {row["client"]: row["round"] for row in connection.execute(wanted).mappings()}

    def get_latest_metrics(self) -> dict[str, list[tuple[int, MetricRecord]]]:
        """Return the newest value of each held-out metric over all domains, with its round, by run."""
        with reader(self._engine) as connection:
            return rows.read_latest_metrics(connection)

    def delete(self, run_id: str) -> None:
        """Delete a run and all its rows. The caller deletes its files."""
        with writer(self._engine) as connection:
            _expect(connection, run_id)
            connection.execute(delete(tables.runs).where(tables.runs.c.id == run_id))
        self.compact()

    def compact(self) -> None:
        """Return the free space of a SQLite file. A database server does so by itself."""
        path = get_sqlite_path(self._engine.url)
        if path is not None:
            self._engine.dispose()  # our own connections would block it
            shrink_database(path)


_completed = (
    select(func.count())
    .where(tables.rounds.c.run_id == tables.runs.c.id, tables.rounds.c.status == "completed")
    .where(tables.rounds.c.number > 0)
    .scalar_subquery()
    .label("rounds_completed")
)


def _newest_first() -> Select[tuple[object, ...]]:
    return select(tables.runs, _completed).order_by(tables.runs.c.created_at.desc(), tables.runs.c.id.desc())


def _find(connection: Connection, run_id: str) -> RunRecord:
    return RunRecord(**connection.execute(_newest_first().where(tables.runs.c.id == run_id)).mappings().one())


def mark_interrupted(run: RunRecord) -> RunRecord:
    """Return a run as interrupted if it is recorded as running but no process executes it."""
    return replace(run, status="interrupted") if run.status == "running" and not is_run_active(run.id) else run


def _status(connection: Connection, run_id: str) -> str | None:
    return connection.execute(select(tables.runs.c.status).where(tables.runs.c.id == run_id)).scalar()


def _expect(connection: Connection, run_id: str) -> str:
    status = _status(connection, run_id)
    if status is None:
        raise _unknown(connection, run_id)
    return status


def _has_round(connection: Connection, run_id: str, number: int) -> bool:
    key = (tables.rounds.c.run_id == run_id) & (tables.rounds.c.number == number)
    return connection.execute(select(tables.rounds.c.number).where(key)).first() is not None


def _resolve(connection: Connection, reference: str) -> str:
    """Return the only id that a reference matches."""
    ids = _ids(connection)
    if reference == "latest" and ids:
        return ids[0]
    if reference in ids:
        return reference
    matches = [run_id for run_id in ids if reference and run_id.startswith(reference)]
    if len(matches) > 1:
        raise StoreError(f"several runs begin with {reference!r}: {', '.join(matches[:5])}; write more of the id")
    if not matches:
        raise _unknown(connection, reference)
    return matches[0]


def _ids(connection: Connection) -> Sequence[str]:
    order = select(tables.runs.c.id).order_by(tables.runs.c.created_at.desc(), tables.runs.c.id.desc())
    return connection.execute(order).scalars().all()


def _unknown(connection: Connection, reference: str) -> StoreError:
    ids = _ids(connection)
    if not ids:
        return StoreError("the store holds no run yet; start one with fedtune simulate RECIPE")
    near = difflib.get_close_matches(reference, ids, n=3, cutoff=0.5) or ids[:3]
    return StoreError(f"there is no run {reference!r}; the nearest are {', '.join(near)}")
