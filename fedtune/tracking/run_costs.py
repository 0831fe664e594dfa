"""Figures of many runs at once, summed up by the database: a page of runs reads no client record."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Select, and_, case, func, select

from fedtune.tracking import tables
from fedtune.tracking.database import reader
from fedtune.tracking.records import MetricRecord
from fedtune.tracking.rows import make_record

__all__ = ["RunCostRows", "RunCosts"]

RoundMetric = tuple[int, MetricRecord]

_HELD_OUT = ("validation", "local", "test")
_metric, _round, _client = tables.metrics.c, tables.rounds.c, tables.client_records.c


@dataclass(frozen=True, kw_only=True)
class RunCosts:
    """Sums over the rounds of a run, in bytes and seconds. ``clients`` took part at least once."""

    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    peak_memory: int = 0
    clients: int = 0
    requested: int = 0
    merged: int = 0


class RunCostRows:
    """Sums and curves of several runs. The number of queries does not depend on the number of runs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def sum_up(self, run_ids: Sequence[str]) -> dict[str, RunCosts]:
        """Return the costs of each run, also of runs without a round."""
        with reader(self._engine) as connection:
            seconds = _sum_seconds(connection, run_ids)
            clients = _sum_clients(connection, run_ids)
        return {one: RunCosts(seconds=seconds.get(one, 0.0), **clients.get(one, {})) for one in run_ids}

    def list_scores(self, run_ids: Sequence[str]) -> dict[str, list[RoundMetric]]:
        """Return the scores on held-out examples over all domains of each run, by round."""
        wanted = _select_scores().where(_metric.run_id.in_(run_ids), _metric.split.in_((*_HELD_OUT, "test-before")))
        return self._read_scores(wanted)

    def list_last_scores(self) -> dict[str, list[RoundMetric]]:
        """Return the scores over all domains of the last round of each run that scored held-out examples."""
        own = tables.metrics.alias("own").c
        last = (
            select(func.max(own.round))
            .where(own.run_id == tables.runs.c.id, own.domain == "all", own.split.in_(_HELD_OUT))
            .scalar_subquery()
        )
        newest = select(tables.runs.c.id, last.label("round")).subquery()
        key = and_(_metric.run_id == newest.c.id, _metric.round == newest.c.round)
        return self._read_scores(_select_scores().join(newest, key).where(_metric.split.in_(_HELD_OUT)))

    def _read_scores(self, wanted: Select[Any]) -> dict[str, list[RoundMetric]]:
        found: dict[str, list[RoundMetric]] = defaultdict(list)
        with reader(self._engine) as connection:
            for row in connection.execute(wanted).mappings():
                found[row["run_id"]].append((row["round"], make_record(MetricRecord, row)))
        return found


def _select_scores() -> Select[Any]:
    return select(tables.metrics).where(_metric.domain == "all").order_by(_metric.run_id, _metric.round)


def _sum_seconds(connection: Connection, run_ids: Sequence[str]) -> dict[str, float]:
    wanted = select(_round.run_id, func.sum(_round.seconds)).where(_round.run_id.in_(run_ids)).group_by(_round.run_id)
    return {run_id: seconds or 0.0 for run_id, seconds in connection.execute(wanted)}


def _sum_clients(connection: Connection, run_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    wanted = (
        select(
            _client.run_id,
            func.sum(_client.bytes_down).label("bytes_down"),
            func.sum(_client.bytes_up).label("bytes_up"),
            func.max(_client.peak_memory).label("peak_memory"),
            func.count(_client.client.distinct()).label("clients"),
            func.count().label("requested"),
            func.sum(case((_client.status == "merged", 1), else_=0)).label("merged"),
        )
        .where(_client.run_id.in_(run_ids))
        .group_by(_client.run_id)
    )
    rows = [dict(row) for row in connection.execute(wanted).mappings()]
    return {row.pop("run_id"): {name: int(value or 0) for name, value in row.items()} for row in rows}
