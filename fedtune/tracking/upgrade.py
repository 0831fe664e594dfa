"""Alembic, run on an open connection: a schema is created or upgraded in one transaction, by one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

import migrations
from fedtune.errors import StoreError
from fedtune.tracking import schema
from fedtune.tracking.database import explained, file_of, writer
from fedtune.tracking.lock import held

__all__ = ["settings", "upgrade"]

_PATIENCE = 60.0  # seconds
_ADVISORY_LOCK = 0x66656474756E65  # "fedtune" in ASCII: the number by which PostgreSQL sessions take turns


def settings(connection: Connection | None = None) -> Config:
    """Alembic's configuration for fedtune's migrations, on a connection that is already open."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade(engine: Engine) -> None:
    """Bring a database to the newest revision; StoreError when it is at one this code does not know."""
    with _alone(engine), writer(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        _refuse_unknown(schema.revision(connection))
        command.upgrade(settings(connection), "head")


@contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    """Keep other processes from creating the same SQLite file, and make it one that readers and a writer share."""
    path = file_of(engine.url)
    if path is None:
        yield
        return
    # Switching to WAL does not wait for other connections, however long the timeout: hence a lock beside the file.
    refusal = f"the store {path} is being upgraded by another process; wait until that one has ended"
    with held(path.with_name(f"{path.name}.lock"), _PATIENCE, refusal):
        with explained(engine.url), engine.connect() as connection:
            connection.connection.cursor().execute("PRAGMA journal_mode = WAL")
        yield


def _refuse_unknown(current: str | None) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(settings()).walk_revisions()}
    if current is not None and current not in known:
        raise StoreError(
            f"the store is at revision {current}, but this fedtune knows it only up to {schema.HEAD}; "
            "upgrade fedtune or choose another store"
        )
