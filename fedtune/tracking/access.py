"""Who may take part: a server's devices, enrolment tokens and operators, seats in runs, and the audit of refusals."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, Engine, delete, insert, select, update

from fedtune.errors import StoreError
from fedtune.tracking import tables
from fedtune.tracking.database import reader, writer
from fedtune.tracking.records import AuditRecord, DeviceRecord, Seat

__all__ = ["Access"]


class Access:
    """The part of a store that a server adds; only hashes of secrets are kept."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add_device(self, *, name: str, node: str, public_key: str, tags: Sequence[str] = ()) -> None:
        """Enrol a device, which takes the places that one of its name had in runs; StoreError when there is one."""
        said = {"name": name, "node": node, "public_key": public_key, "profile": "{}"}
        row = said | {"enrolled": datetime.now(UTC), "tags": _in_order(tags)}
        with writer(self._engine) as connection:
            if _device(connection, name) is not None:
                raise StoreError(f"there is a device {name!r} already; remove it first or choose another name")
            connection.execute(insert(tables.devices), row)
            connection.execute(update(tables.seats).where(tables.seats.c.device == name), {"node": node})

    def devices(self) -> list[DeviceRecord]:
        """Every enrolled device, by name."""
        with reader(self._engine) as connection:
            found = connection.execute(select(tables.devices).order_by(tables.devices.c.name)).mappings()
            return [DeviceRecord(**row) for row in found]

    def device(self, name: str) -> DeviceRecord | None:
        """One device, if it is enrolled."""
        with reader(self._engine) as connection:
            return _device(connection, name)

    def profile_device(self, name: str, profile: str) -> None:
        """Keep what a device says of itself, and that it was seen now."""
        change = {"profile": profile, "seen": datetime.now(UTC)}
        with writer(self._engine) as connection:
            connection.execute(update(tables.devices).where(tables.devices.c.name == name), change)

    def tag_device(self, name: str, add: Sequence[str], remove: Sequence[str]) -> tuple[str, ...]:
        """Give a device tags and take others from it; the tags it has then. StoreError when there is no such device."""
        with writer(self._engine) as connection:
            found = _expected_device(connection, name)
            tags = _in_order({*found.tags, *add} - set(remove))
            connection.execute(update(tables.devices).where(tables.devices.c.name == name), {"tags": tags})
        return tags

    def quarantine(self, name: str, reason: str) -> None:
        """Give a device no more orders until it is released; one that has been removed has no need of it."""
        with writer(self._engine) as connection:
            connection.execute(update(tables.devices).where(tables.devices.c.name == name), {"quarantined": reason})

    def release_device(self, name: str) -> bool:
        """End a device's quarantine; whether it was in one. StoreError when there is no such device."""
        with writer(self._engine) as connection:
            found = _expected_device(connection, name)
            connection.execute(update(tables.devices).where(tables.devices.c.name == name), {"quarantined": None})
        return found.quarantined is not None

    def remove_device(self, name: str) -> DeviceRecord:
        """Forget a device; StoreError when there is none of that name."""
        with writer(self._engine) as connection:
            found = _expected_device(connection, name)
            connection.execute(delete(tables.devices).where(tables.devices.c.name == name))
        return found

    def add_token(self, sha256: str, device: str, hours: float, tags: Sequence[str] = ()) -> None:
        """Keep the hash of a one-time secret; ``device`` is the name it is for, or empty for any.

        ``tags`` are given to the device that enrols with it.
        """
        now = datetime.now(UTC)
        row = {"sha256": sha256, "device": device, "created": now, "expires": now + timedelta(hours=hours)}
        with writer(self._engine) as connection:
            connection.execute(insert(tables.tokens), row | {"tags": _in_order(tags)})

    def spend_token(self, sha256: str) -> str:
        """The device a token is for; from now on it is refused with a StoreError, like one that is unknown or old."""
        table, now = tables.tokens, datetime.now(UTC)
        with writer(self._engine) as connection:
            row = connection.execute(select(table).where(table.c.sha256 == sha256)).mappings().first()
            if row is None:
                raise StoreError("this token is not known here; ask the operator for a new one")
            if row["spent"] is not None:
                raise StoreError("this token has been used already; ask the operator for a new one")
            if row["expires"] < now:
                raise StoreError("this token has expired; ask the operator for a new one")
            connection.execute(update(table).where(table.c.sha256 == sha256), {"spent": now})
        device: str = row["device"]
        return device

    def token_tags(self, sha256: str) -> tuple[str, ...]:
        """The tags a token gives; none when it is not known."""
        wanted = select(tables.tokens.c.tags).where(tables.tokens.c.sha256 == sha256)
        with reader(self._engine) as connection:
            return connection.execute(wanted).scalar() or ()

    def restore_token(self, sha256: str) -> None:
        """Make a token good again whose enrolment could not be carried out."""
        with writer(self._engine) as connection:
            connection.execute(update(tables.tokens).where(tables.tokens.c.sha256 == sha256), {"spent": None})

    def set_operator(self, name: str, sha256: str) -> None:
        """Keep the hash of an operator's key, in place of an earlier one."""
        row = {"name": name, "sha256": sha256, "created": datetime.now(UTC)}
        with writer(self._engine) as connection:
            connection.execute(delete(tables.operators).where(tables.operators.c.name == name))
            connection.execute(insert(tables.operators), row)

    def operators(self) -> dict[str, str]:
        """Hashes of the operators' keys, by name."""
        with reader(self._engine) as connection:
            found = connection.execute(select(tables.operators)).mappings()
            return {row["name"]: row["sha256"] for row in found}

    def remove_operator(self, name: str) -> None:
        """Make an operator's key worthless; StoreError when there is none of that name."""
        with writer(self._engine) as connection:
            if not connection.execute(delete(tables.operators).where(tables.operators.c.name == name)).rowcount:
                raise StoreError(f"there is no operator {name!r}; see them with fedtune server operators")

    def seat(self, run_id: str, seats: Sequence[Seat]) -> None:
        """Record who is which client of a run, once and for all its rounds."""
        with writer(self._engine) as connection:
            connection.execute(insert(tables.seats), [{"run_id": run_id} | asdict(seat) for seat in seats])

    def seats(self, run_id: str) -> list[Seat]:
        """Who is which client of a run, by client; nobody before it was started or in a simulation."""
        table = tables.seats.c
        wanted = select(table.client, table.device, table.node).where(table.run_id == run_id).order_by(table.client)
        with reader(self._engine) as connection:
            return [Seat(**row) for row in connection.execute(wanted).mappings()]

    def note(self, kind: str, who: str, what: str) -> None:
        """Write a line into the audit."""
        row = {"at": datetime.now(UTC), "kind": kind, "who": who[:128], "what": what}
        with writer(self._engine) as connection:
            connection.execute(insert(tables.audit), row)

    def audit(self, limit: int = 100) -> list[AuditRecord]:
        """The newest lines of the audit, newest first."""
        table = tables.audit.c
        wanted = select(table.at, table.kind, table.who, table.what).order_by(table.id.desc()).limit(limit)
        with reader(self._engine) as connection:
            return [AuditRecord(**row) for row in connection.execute(wanted).mappings()]


def _in_order(tags: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(tags)))


def _expected_device(connection: Connection, name: str) -> DeviceRecord:
    found = _device(connection, name)
    if found is None:
        raise StoreError(f"there is no device {name!r}; see them with fedtune server devices")
    return found


def _device(connection: Connection, name: str) -> DeviceRecord | None:
    row = connection.execute(select(tables.devices).where(tables.devices.c.name == name)).mappings().first()
    return None if row is None else DeviceRecord(**row)
