"""The audit: what a server refused and what it did. Its size is bounded, and refusals never push out what was done."""

from datetime import UTC, datetime

from sqlalchemy import Connection, Engine, Select, delete, func, insert, select, update

from fedtune.tracking.database import reader, writer
from fedtune.tracking.records import AuditRecord
from fedtune.tracking.tables import audit
from fedtune.untrusted import clean_text

__all__ = ["AuditLog"]

_DONE, _REFUSED, _OF_ONE_SOURCE = 100_000, 20_000, 500
"""Lines that are kept: of what was done, of what was refused, and of the latter for one address or device."""
_PRUNE_EVERY = 50
_WHO, _WHAT = 128, 500


class AuditLog:
    """Lines of a store's audit. Of refusals beyond the bound, those of the source with the most lines go first."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def write_line(self, kind: str, who: str, what: str, source: str = "") -> int:
        """Write a line; its number. ``source`` is the address or the device a refusal is blamed on."""
        row = {"at": datetime.now(UTC), "kind": kind, "who": clean_text(who, _WHO), "what": clean_text(what, _WHAT)}
        with writer(self._engine) as connection:
            made = connection.execute(insert(audit), row | {"source": clean_text(source, _WHO) or None})
            [number] = made.inserted_primary_key or [0]
            if number % _PRUNE_EVERY == 0:
                _prune(connection, source)
        return int(number)

    def repeat(self, number: int, times: int) -> None:
        """Count ``times`` more of what a line says, of which the last was now."""
        counted = func.coalesce(audit.c.times, 1) + times
        with writer(self._engine) as connection:
            connection.execute(update(audit).where(audit.c.id == number).values(times=counted, last=datetime.now(UTC)))

    def lines(self, limit: int = 100, *, since: datetime | None = None, before: int | None = None) -> list[AuditRecord]:
        """The newest lines, newest first: those not all older than ``since``, and numbered below ``before``."""
        table = audit.c
        last = func.coalesce(table.last, table.at)
        columns = table.id, table.at, table.kind, table.who, table.what, func.coalesce(table.times, 1).label("times")
        wanted = select(*columns, table.last).order_by(table.id.desc()).limit(limit)
        if since is not None:
            wanted = wanted.where(last >= since)
        if before is not None:
            wanted = wanted.where(table.id < before)
        with reader(self._engine) as connection:
            return [_record(dict(row)) for row in connection.execute(wanted).mappings()]


def _record(row: dict[str, object]) -> AuditRecord:
    return AuditRecord(**row | {"last": row["last"] or row["at"]})  # type: ignore[arg-type]


def _prune(connection: Connection, source: str) -> None:
    """Bring the table back to its bounds."""
    _keep(connection, select(audit.c.id).where(audit.c.kind == "done"), _DONE)
    if source:
        _keep(connection, select(audit.c.id).where(audit.c.source == source), _OF_ONE_SOURCE)
    refused = audit.c.kind != "done"
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
