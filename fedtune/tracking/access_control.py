"""Access to a server: devices, enrolment tokens, operators, and which device is which client of a run."""

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
    """The tables of a store that only a server uses. Of secrets they keep hashes only."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.audit = AuditLog(engine)

    def add_device(self, *, name: str, node_id: str, public_key: str, tags: Sequence[str] = ()) -> None:
        """Enrol a device. It gets the assignments of a removed one of that name; StoreError when one is there."""
        known = {"name": name, "node_id": node_id, "public_key": public_key, "profile": "{}"}
        row = known | {"enrolled_at": datetime.now(UTC), "tags": _sort_tags(tags)}
        with writer(self._engine) as connection:
            if _find_device(connection, name) is not None:
                raise StoreError(f"there is a device {name!r} already; remove it first or choose another name")
            connection.execute(insert(tables.devices), row)
            taken = update(tables.assignments).where(tables.assignments.c.device_name == name)
            connection.execute(taken, {"node_id": node_id})

    def list_devices(self) -> list[DeviceRecord]:
        """Return every enrolled device, sorted by name."""
        with reader(self._engine) as connection:
            found = connection.execute(select(tables.devices).order_by(tables.devices.c.name)).mappings()
            return [DeviceRecord(**row) for row in found]

    def find_device(self, name: str) -> DeviceRecord | None:
        """Return the device of this name; None when it is not enrolled."""
        with reader(self._engine) as connection:
            return _find_device(connection, name)

    def save_device_profile(self, name: str, profile: str) -> None:
        """Record what a device reports of itself, and that it was seen now."""
        change = {"profile": profile, "last_seen_at": datetime.now(UTC)}
        with writer(self._engine) as connection:
            connection.execute(update(tables.devices).where(tables.devices.c.name == name), change)

    def change_device_tags(self, name: str, add: Sequence[str], remove: Sequence[str]) -> tuple[str, ...]:
        """Add tags to a device, remove others, and return all it has then; StoreError when there is no such device."""
        with writer(self._engine) as connection:
            found = _expected_device(connection, name)
            tags = _sort_tags({*found.tags, *add} - set(remove))
            connection.execute(update(tables.devices).where(tables.devices.c.name == name), {"tags": tags})
        return tags

    def quarantine_device(self, name: str, reason: str) -> None:
        """Send a device no train requests until it is released. A device that was removed is left alone."""
        with writer(self._engine) as connection:
            connection.execute(
                update(tables.devices).where(tables.devices.c.name == name), {"quarantine_reason": reason}
            )

    def release_device(self, name: str) -> bool:
        """End a device's quarantine, and return whether there was one; StoreError when there is no such device."""
        with writer(self._engine) as connection:
            found = _expected_device(connection, name)
            connection.execute(update(tables.devices).where(tables.devices.c.name == name), {"quarantine_reason": None})
        return found.quarantine_reason is not None

    def remove_device(self, name: str) -> DeviceRecord:
        """Remove a device, and return its record; StoreError when there is none of that name."""
        with writer(self._engine) as connection:
            found = _expected_device(connection, name)
            connection.execute(delete(tables.devices).where(tables.devices.c.name == name))
        return found

    def add_token(self, sha256: str, device_name: str | None, hours: float, tags: Sequence[str] = ()) -> None:
        """Record the hash of a one-time secret for the device of that name, or for any with None.

        The device that enrols with it gets ``tags``.
        """
        now = datetime.now(UTC)
        row = {"sha256": sha256, "device_name": device_name, "created_at": now, "tags": _sort_tags(tags)}
        with writer(self._engine) as connection:
            connection.execute(insert(tables.enrolment_tokens), row | {"expires_at": now + timedelta(hours=hours)})

    def use_enrolment_token(self, sha256: str) -> str | None:
        """Use up a token, and return the name of the device it is for; None for any device.

        StoreError when the token is unknown, was used already or has expired.
        """
        table, now = tables.enrolment_tokens, datetime.now(UTC)
        with writer(self._engine) as connection:
            row = connection.execute(select(table).where(table.c.sha256 == sha256)).mappings().first()
            if row is None:
                raise StoreError("this token is not known here; ask the operator for a new one")
            if row["used_at"] is not None:
                raise StoreError("this token has been used already; ask the operator for a new one")
            if row["expires_at"] < now:
                raise StoreError("this token has expired; ask the operator for a new one")
            connection.execute(update(table).where(table.c.sha256 == sha256), {"used_at": now})
        device_name: str | None = row["device_name"]
        return device_name

    def get_token_tags(self, sha256: str) -> tuple[str, ...]:
        """Return the tags that a token gives; none when it is not known."""
        table = tables.enrolment_tokens.c
        wanted = select(table.tags).where(table.sha256 == sha256)
        with reader(self._engine) as connection:
            return connection.execute(wanted).scalar() or ()

    def restore_token(self, sha256: str) -> None:
        """Make a token usable again after an enrolment that failed."""
        table = tables.enrolment_tokens
        with writer(self._engine) as connection:
            connection.execute(update(table).where(table.c.sha256 == sha256), {"used_at": None})

    def list_unused_tokens(self) -> list[TokenRecord]:
        """Return the tokens that were never used, newest first. Expired ones are among them."""
        table = tables.enrolment_tokens.c
        columns = table.sha256, table.device_name, table.created_at, table.expires_at, table.tags
        wanted = select(*columns).where(table.used_at.is_(None)).order_by(table.created_at.desc(), table.sha256)
        with reader(self._engine) as connection:
            return [TokenRecord(**row) for row in connection.execute(wanted).mappings()]

    def remove_token(self, beginning: str) -> TokenRecord:
        """Remove the unused token whose hash begins so, and return its record; StoreError unless exactly one does."""
        found = [token for token in self.list_unused_tokens() if beginning and token.sha256.startswith(beginning)]
        if len(found) != 1:
            what = "no" if not found else "more than one"
            raise StoreError(f"there is {what} unused token {beginning!r}; see them with fedtune server tokens")
        with writer(self._engine) as connection:
            table = tables.enrolment_tokens
            connection.execute(delete(table).where(table.c.sha256 == found[0].sha256))
        return found[0]

    def set_operator(self, name: str, key_sha256: str, role: str = "admin") -> None:
        """Record the hash of an operator's key and their role. It replaces an earlier key of that name."""
        row = {"name": name, "key_sha256": key_sha256, "created_at": datetime.now(UTC), "role": role}
        with writer(self._engine) as connection:
            connection.execute(delete(tables.operators).where(tables.operators.c.name == name))
            connection.execute(insert(tables.operators), row)

    def list_operators(self) -> list[OperatorRecord]:
        """Return every operator, sorted by name. Those recorded before there were roles are admins."""
        with reader(self._engine) as connection:
            found = connection.execute(select(tables.operators).order_by(tables.operators.c.name)).mappings()
            return [OperatorRecord(**dict(row) | {"role": row["role"] or "admin"}) for row in found]

    def remove_operator(self, name: str) -> None:
        """Remove an operator and their key; StoreError when there is none of that name, or no other admin is left."""
        known = {operator.name: operator.role for operator in self.list_operators()}
        if name not in known:
            raise StoreError(f"there is no operator {name!r}; see them with fedtune server operators")
        if "admin" not in {role for other, role in known.items() if other != name}:
            raise StoreError(f"operator {name!r} is the only admin; make another first: fedtune server add-operator")
        with writer(self._engine) as connection:
            connection.execute(delete(tables.operators).where(tables.operators.c.name == name))

    def assign_clients(self, run_id: str, assignments: Sequence[Assignment]) -> None:
        """Record which device is which client of a run, for all its rounds."""
        with writer(self._engine) as connection:
            connection.execute(insert(tables.assignments), [{"run_id": run_id} | asdict(one) for one in assignments])

    def list_assignments(self, run_id: str) -> list[Assignment]:
        """Return which device is which client of a run, sorted by client; empty for a simulation or a queued run."""
        table = tables.assignments.c
        columns = table.client, table.device_name, table.node_id
        wanted = select(*columns).where(table.run_id == run_id).order_by(table.client)
        with reader(self._engine) as connection:
            return [Assignment(**row) for row in connection.execute(wanted).mappings()]


def _sort_tags(tags: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(tags)))


def _expected_device(connection: Connection, name: str) -> DeviceRecord:
    found = _find_device(connection, name)
    if found is None:
        raise StoreError(f"there is no device {name!r}; see them with fedtune server devices")
    return found


def _find_device(connection: Connection, name: str) -> DeviceRecord | None:
    row = connection.execute(select(tables.devices).where(tables.devices.c.name == name)).mappings().first()
    return None if row is None else DeviceRecord(**row)
