"""The audit: what a server refused and what it did. Its size is bounded. Refusals never displace what was done."""

from datetime import UTC, datetime

from sqlalchemy import Connection, Engine, Select, delete, func, insert, select, update

from fedtune.tracking.database import reader, writer
from fedtune.tracking.records import AuditRecord
from fedtune.tracking.tables import audit
from fedtune.untrusted import clean_text

__all__ = ["AuditLog"]

_DONE, _REFUSED, _REFUSED_PER_SOURCE = 100_000, 20_000, 500
"""The most lines that are kept: of what was done, of all refusals, and of the refusals of one source."""
_PRUNE_EVERY = 50
_ACTOR_LENGTH, _MESSAGE_LENGTH = 128, 500


class AuditLog:
    """The audit table of a store. Beyond the bound, refusals of the source with the most lines are deleted first."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def write_line(self, outcome: str, actor: str, message: str, source: str = "") -> int:
        """Write a line, and return its number. ``source`` is the address or the device that caused a refusal."""
        row = {"recorded_at": datetime.now(UTC), "outcome": outcome, "actor": clean_text(actor, _ACTOR_LENGTH)}
        row |= {"message": clean_text(message, _MESSAGE_LENGTH), "source": clean_text(source, _ACTOR_LENGTH) or None}
        with writer(self._engine) as connection:
            made = connection.execute(insert(audit), row)
            [number] = made.inserted_primary_key or [0]
            if number % _PRUNE_EVERY == 0:
                _prune(connection, source)
        return int(number)

    def count_repeats(self, number: int, times: int) -> None:
        """Add ``times`` to the count of a line. The last of them was now."""
        counted = func.coalesce(audit.c.times, 1) + times
        with writer(self._engine) as connection:
            repeated = update(audit).where(audit.c.id == number)
            connection.execute(repeated.values(times=counted, last_recorded_at=datetime.now(UTC)))

    def list_lines(
        self, limit: int = 100, *, since: datetime | None = None, before: int | None = None
    ) -> list[AuditRecord]:
        """Return the newest lines, newest first: repeated after ``since``, and numbered below ``before``."""
        table = audit.c
        last = func.coalesce(table.last_recorded_at, table.recorded_at)
        columns = table.id, table.recorded_at, table.outcome, table.actor, table.message, table.last_recorded_at
        wanted = select(*columns, func.coalesce(table.times, 1).label("times")).order_by(table.id.desc()).limit(limit)
        if since is not None:
            wanted = wanted.where(last >= since)
        if before is not None:
            wanted = wanted.where(table.id < before)
        with reader(self._engine) as connection:
            return [_record(dict(row)) for row in connection.execute(wanted).mappings()]


def _record(row: dict[str, object]) -> AuditRecord:
    return AuditRecord(**row | {"last_recorded_at": row["last_recorded_at"] or row["recorded_at"]})  # type: ignore[arg-type]


def _prune(connection: Connection, source: str) -> None:
    """Delete the lines beyond the bounds."""
    _keep(connection, select(audit.c.id).where(audit.c.outcome == "done"), _DONE)
    if source:
        _keep(connection, select(audit.c.id).where(audit.c.source == source), _REFUSED_PER_SOURCE)
    refused = audit.c.outcome != "done"
    beyond = connection.execute(select(func.count()).select_from(audit).where(refused)).scalar_one() - _REFUSED
    if beyond > 0:
        count = func.count()
        heaviest = select(audit.c.source, count).where(refused).group_by(audit.c.source).order_by(count.desc()).limit(1)
        most, lines = connection.execute(heaviest).one()
        its = select(audit.c.id).where(refused, audit.c.source.is_not_distinct_from(most))
        _keep(connection, its, max(0, lines - beyond))


def _keep(connection: Connection, lines: Select[tuple[int]], newest: int) -> None:
    """Delete all but the newest of the selected lines."""
    first_beyond = connection.execute(lines.order_by(audit.c.id.desc()).offset(newest).limit(1)).scalar()
    if first_beyond is not None:
        chosen = lines.where(audit.c.id <= first_beyond).scalar_subquery()
        connection.execute(delete(audit).where(audit.c.id.in_(chosen)))
