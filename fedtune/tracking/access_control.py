"""Who may take part: a server's devices, enrolment tokens and operators and seats in runs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, Engine, delete, insert, select, update

from fedtune.errors import StoreError
from fedtune.tracking import tables
from fedtune.tracking.audit import AuditLog
from fedtune.tracking.database import reader, writer
from fedtune.tracking.records import Assignment, DeviceRecord, OperatorRecord, TokenRecord

__all__ = ["Access"]


class Access:
    """The part of a store that a server adds; only hashes of secrets are kept."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.audit = AuditLog(engine)

    def add_device(self, *, name: str, node: str, public_key: str, tags: Sequence[str] = ()) -> None:
        """Enrol a device, which takes the places that one of its name had in runs; StoreError when there is one."""
        said = {"name": name, "node": node, "public_key": public_key, "profile": "{}"}
        row = said | {"enrolled": datetime.now(UTC), "tags": _in_order(tags)}
        with writer(self._engine) as connection:
            if _device(connection, name) is not None:
                raise StoreError(f"there is a device {name!r} already; remove it first or choose another name")
            connection.execute(insert(tables.devices), row)
            connection.execute(update(tables.assignments).where(tables.assignments.c.device == name), {"node": node})

    def devices(self) -> list[DeviceRecord]:
        """Every enrolled device, by name."""
        with reader(self._engine) as connection:
            found = connection.execute(select(tables.devices).order_by(tables.devices.c.name)).mappings()
            return [DeviceRecord(**row) for row in found]

    def device(self, name: str) -> DeviceRecord | None:
        """One device, if it is enrolled."""
        with reader(self._engine) as connection:
            return _device(connection, name)

    def save_device_profile(self, name: str, profile: str) -> None:
        """Keep what a device says of itself, and that it was seen now."""
        change = {"profile": profile, "seen": datetime.now(UTC)}
        with writer(self._engine) as connection:
            connection.execute(update(tables.devices).where(tables.devices.c.name == name), change)

    def change_device_tags(self, name: str, add: Sequence[str], remove: Sequence[str]) -> tuple[str, ...]:
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

    def use_enrolment_token(self, sha256: str) -> str:
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

    def get_token_tags(self, sha256: str) -> tuple[str, ...]:
        """The tags a token gives; none when it is not known."""
        wanted = select(tables.tokens.c.tags).where(tables.tokens.c.sha256 == sha256)
        with reader(self._engine) as connection:
            return connection.execute(wanted).scalar() or ()

    def restore_token(self, sha256: str) -> None:
        """Make a token good again whose enrolment could not be carried out."""
        with writer(self._engine) as connection:
            connection.execute(update(tables.tokens).where(tables.tokens.c.sha256 == sha256), {"spent": None})

    def unspent_tokens(self) -> list[TokenRecord]:
        """Tokens that were never used, also those that have expired, newest first."""
        table = tables.tokens.c
        columns = table.sha256, table.device, table.created, table.expires, table.tags
        wanted = select(*columns).where(table.spent.is_(None)).order_by(table.created.desc(), table.sha256)
        with reader(self._engine) as connection:
            return [TokenRecord(**row) for row in connection.execute(wanted).mappings()]

    def remove_token(self, beginning: str) -> TokenRecord:
        """Make the unspent token worthless whose hash begins so; StoreError unless there is exactly one."""
        found = [token for token in self.unspent_tokens() if beginning and token.sha256.startswith(beginning)]
        if len(found) != 1:
            what = "no" if not found else "more than one"
            raise StoreError(f"there is {what} unspent token {beginning!r}; see them with fedtune server tokens")
        with writer(self._engine) as connection:
            connection.execute(delete(tables.tokens).where(tables.tokens.c.sha256 == found[0].sha256))
        return found[0]

    def set_operator(self, name: str, sha256: str, role: str = "admin") -> None:
        """Keep the hash of an operator's key and what it lets them do, in place of an earlier one."""
        row = {"name": name, "sha256": sha256, "created": datetime.now(UTC), "role": role}
        with writer(self._engine) as connection:
            connection.execute(delete(tables.operators).where(tables.operators.c.name == name))
            connection.execute(insert(tables.operators), row)

    def operators(self) -> list[OperatorRecord]:
        """Every operator, by name; those from before there were roles may do everything."""
        with reader(self._engine) as connection:
            found = connection.execute(select(tables.operators).order_by(tables.operators.c.name)).mappings()
            return [OperatorRecord(**dict(row) | {"role": row["role"] or "admin"}) for row in found]

    def remove_operator(self, name: str) -> None:
        """Make an operator's key worthless; StoreError when there is none of that name, or no other admin is left."""
        known = {operator.name: operator.role for operator in self.operators()}
        if name not in known:
            raise StoreError(f"there is no operator {name!r}; see them with fedtune server operators")
        if "admin" not in {role for other, role in known.items() if other != name}:
            raise StoreError(f"operator {name!r} is the only admin; make another first: fedtune server add-operator")
        with writer(self._engine) as connection:
            connection.execute(delete(tables.operators).where(tables.operators.c.name == name))

    def assign_clients(self, run_id: str, seats: Sequence[Assignment]) -> None:
        """Record who is which client of a run, once and for all its rounds."""
        with writer(self._engine) as connection:
            connection.execute(insert(tables.assignments), [{"run_id": run_id} | asdict(seat) for seat in seats])

    def list_assignments(self, run_id: str) -> list[Assignment]:
        """Who is which client of a run, by client; nobody before it was started or in a simulation."""
        table = tables.assignments.c
        wanted = select(table.client, table.device, table.node).where(table.run_id == run_id).order_by(table.client)
        with reader(self._engine) as connection:
            return [Assignment(**row) for row in connection.execute(wanted).mappings()]


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
