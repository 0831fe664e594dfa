"""One run in parts: sums by round, client and device class, and the client records of a few rounds.

A run of many clients has hundreds of thousands of client records. The page of a run reads only those that it shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Engine, and_, case, func, or_, select

from fedtune.tracking import rows, tables
from fedtune.tracking.database import reader
from fedtune.tracking.records import ClientRecord, ClientScore, RoundRecord

__all__ = ["OUTCOMES", "ClassSums", "ClientSums", "Problem", "RoundSums", "RunDetailRows"]

OUTCOMES = ("merged", "late", "declined", "failed", "refused", "unused")
"""What became of a client in a round. Late is merged with a staleness; failed is an error or no reply in time."""
_record = tables.client_records.c
_is_late = and_(_record.status == "merged", func.coalesce(_record.staleness, 0) > 0)
_OUTCOME = case(
    (_is_late, "late"),
    (_record.status.in_(("error", "missing")), "failed"),
    (_record.status == "rejected", "refused"),
    else_=_record.status,
)
_HAS_LOSS = and_(
    _record.status == "merged",
    _record.train_loss.isnot(None),
    or_(_record.train_loss != 0, _record.num_examples != 1),
)


@dataclass(frozen=True, kw_only=True)
class RoundSums:
    """A round: the number of clients by outcome, bytes, and the mean loss of merged clients, None if none reports it.

    ``by_class`` has the numbers by device class and outcome.
    """

    outcomes: Mapping[str, int]
    by_class: Mapping[str, Mapping[str, int]]
    bytes_up: int
    bytes_down: int
    train_loss: float | None


@dataclass(frozen=True, kw_only=True)
class ClientSums:
    """A client: its device, the number of its rounds by outcome, and its mean seconds of training."""

    client: int
    device_class: str
    device_name: str
    outcomes: Mapping[str, int]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ClassSums:
    """A device class: bytes of all rounds, and the largest measured and predicted memory in bytes, None if unknown."""

    device_class: str
    clients: int
    bytes_up: int
    bytes_down: int
    peak_memory: int
    anonymous_memory: int | None
    predicted_anonymous: int | None
    predicted_total: int | None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A client update that was late or not merged, or has a reason."""

    round: int
    record: ClientRecord
    outcome: str


class RunDetailRows:
    """The parts of one run."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def read_rounds(self, run_id: str) -> list[RoundRecord]:
        """Return the rounds with metrics, checkpoints, samples and tasks, but without client records and scores."""
        with reader(self._engine) as connection:
            return rows.read_round_results(connection, run_id)

    def sum_by_round(self, run_id: str) -> dict[int, RoundSums]:
        """Return the sums of each round that selected a client."""
        found: dict[int, list[Mapping[str, Any]]] = {}
        wanted = (
            select(
                _record.round,
                _CLASS.label("class_name"),
                _OUTCOME.label("outcome"),
                func.count().label("count"),
                func.sum(_record.bytes_up).label("bytes_up"),
                func.sum(_record.bytes_down).label("bytes_down"),
                func.sum(case((_HAS_LOSS, _record.train_loss * _record.num_examples))).label("loss"),
                func.sum(case((_HAS_LOSS, _record.num_examples), else_=0)).label("examples"),
            )
            .where(_record.run_id == run_id)
            .group_by(_record.round, *_BY_LABEL)
        )
        for row in self._read(wanted):
            found.setdefault(row["round"], []).append(row)
        return {number: _sum_round(found[number]) for number in sorted(found)}

    def sum_by_client(self, run_id: str) -> list[ClientSums]:
        """Return the sums of each client that was selected at least once, in their order."""
        found: dict[int, list[Mapping[str, Any]]] = {}
        wanted = (
            select(
                _record.client,
                func.max(_CLASS).label("class_name"),
                func.max(func.coalesce(_record.device_name, "")).label("device_name"),
                _OUTCOME.label("outcome"),
                func.count().label("count"),
                func.sum(_record.seconds).label("seconds"),
            )
            .where(_record.run_id == run_id)
            .group_by(_record.client, "outcome")
        )
        for row in self._read(wanted):
            found.setdefault(row["client"], []).append(row)
        return [_sum_client(client, found[client]) for client in sorted(found)]

    def sum_by_class(self, run_id: str) -> list[ClassSums]:
        """Return bytes and memory by device class, by the order of its first client."""
        wanted = (
            select(
                _CLASS.label("class_name"),
                func.count(_record.client.distinct()).label("clients"),
                func.sum(_record.bytes_up).label("bytes_up"),
                func.sum(_record.bytes_down).label("bytes_down"),
                func.max(_record.peak_memory).label("peak_memory"),
                func.max(_record.anonymous_memory).label("anonymous_memory"),
                func.max(_record.predicted_anonymous).label("predicted_anonymous"),
                func.max(_record.predicted_total).label("predicted_total"),
            )
            .where(_record.run_id == run_id)
            .group_by("class_name")
            .order_by(func.min(_record.client))
        )
        found = [{name: _as_int(value) for name, value in row.items()} for row in self._read(wanted)]
        return [ClassSums(device_class=row.pop("class_name"), **row) for row in found]

    def list_records(self, run_id: str, rounds: range, clients: Sequence[int]) -> list[tuple[int, ClientRecord]]:
        """Return the records of these clients in these rounds, with their round."""
        wanted = _record.round.between(rounds.start, rounds.stop - 1), _record.client.in_(clients)
        query = select(tables.client_records).where(_record.run_id == run_id, *wanted)
        return [(row["round"], rows.make_record(ClientRecord, row)) for row in self._read(query)]

    def list_problems(self, run_id: str, offset: int, limit: int) -> tuple[list[Problem], int]:
        """Return the problems of a run, newest first, from number ``offset`` on, and the number of all."""
        of_run = and_(_record.run_id == run_id, _IS_PROBLEM)
        query = select(tables.client_records, _OUTCOME.label("outcome")).where(of_run)
        ordered = query.order_by(_record.round.desc(), _record.client).offset(offset).limit(limit)
        [count] = self._read(select(func.count().label("all")).where(of_run))
        return [
            Problem(round=row["round"], record=rows.make_record(ClientRecord, row), outcome=row["outcome"])
            for row in self._read(ordered)
        ], count["all"]

    def list_last_scores(self, run_id: str) -> tuple[int, list[ClientScore]]:
        """Return the newest round in which clients scored, and its scores; round 0 without any."""
        score = tables.client_scores.c
        last = select(func.max(score.round)).where(score.run_id == run_id).scalar_subquery()
        wanted = select(tables.client_scores).where(score.run_id == run_id, score.round == last)
        found = self._read(wanted)
        return (found[0]["round"] if found else 0), [rows.make_record(ClientScore, row) for row in found]

    def _read(self, query: Any) -> list[Mapping[str, Any]]:
        with reader(self._engine) as connection:
            return [dict(row) for row in connection.execute(query).mappings()]


_CLASS: ColumnElement[str] = func.coalesce(_record.device_class, "")
_BY_LABEL = ("class_name", "outcome")
"""Groups are named by label: PostgreSQL does not see that two expressions with parameters are the same."""
_IS_PROBLEM = or_(_record.status != "merged", func.coalesce(_record.staleness, 0) > 0, _record.reason != "")


def _sum_round(found: Sequence[Mapping[str, Any]]) -> RoundSums:
    by_class: dict[str, dict[str, int]] = {}
    for row in found:
        by_class.setdefault(row["class_name"], {})[row["outcome"]] = row["count"]
    examples = sum(int(row["examples"] or 0) for row in found)
    loss = sum(float(row["loss"]) for row in found if row["examples"])
    return RoundSums(
        outcomes=_add_outcomes(found),
        by_class=by_class,
        bytes_up=sum(int(row["bytes_up"]) for row in found),
        bytes_down=sum(int(row["bytes_down"]) for row in found),
        train_loss=loss / examples if examples else None,
    )


def _sum_client(client: int, found: Sequence[Mapping[str, Any]]) -> ClientSums:
    outcomes = _add_outcomes(found)
    return ClientSums(
        client=client,
        device_class=found[0]["class_name"],
        device_name=max(row["device_name"] for row in found),
        outcomes=outcomes,
        seconds=sum(row["seconds"] for row in found) / sum(outcomes.values()),
    )


def _add_outcomes(found: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: sum(row["count"] for row in found if row["outcome"] == name) for name in OUTCOMES}


def _as_int(value: Any) -> Any:
    """Return a sum as a whole number; PostgreSQL sums BIGINT to a decimal."""
    return value if value is None or isinstance(value, str) else int(value)
