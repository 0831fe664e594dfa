"""Which revision of the schema a database has, and bringing it to the one this code reads."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    insert,
    inspect,
    select,
    text,
)

from fedtune.tracking.database import get_sqlite_path, reader, translate_database_errors, writer
from fedtune.tracking.run_lock import hold_file_lock
from fedtune.tracking.tables import metadata

__all__ = ["HEAD_REVISION", "prepare_schema", "read_revision"]

HEAD_REVISION = "0008"

_PATIENCE = 60.0  # seconds
_ADVISORY_LOCK = 0x66656474756E65  # "fedtune" in ASCII: the number by which PostgreSQL sessions take turns
_at = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


def prepare_schema(engine: Engine) -> None:
    """Create or upgrade the schema where needed; StoreError when the database is newer than this code."""
    with reader(engine) as connection:
        if read_revision(connection) == HEAD_REVISION:
            return
    with _alone(engine), writer(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        current = read_revision(connection)
        if current is None:
            _create(connection)
        else:
            # Alembic takes longer to import than a whole `fedtune runs list`; few commands meet an old database.
            from fedtune.tracking.schema_upgrade import upgrade_schema

            upgrade_schema(connection, current, HEAD_REVISION)


def read_revision(connection: Connection) -> str | None:
    """The Alembic revision a database is at; None before its first."""
    if not inspect(connection).has_table(_at.name):
        return None
    return connection.execute(select(_at.c.version_num)).scalar()


def _create(connection: Connection) -> None:
    """The newest tables at once: what the migrations make one after another."""
    _at.metadata.create_all(connection)
    metadata.create_all(connection, checkfirst=False)
    connection.execute(insert(_at).values(version_num=HEAD_REVISION))


@contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    """Keep other processes from creating the same SQLite file, and make it one that readers and a writer share."""
    path = get_sqlite_path(engine.url)
    if path is None:
        yield
        return
    # Switching to WAL does not wait for other connections, however long the timeout: hence a lock beside the file.
    refusal = f"the store {path} is being upgraded by another process; wait until that one has ended"
    with hold_file_lock(path.with_name(f"{path.name}.lock"), _PATIENCE, refusal):
        with translate_database_errors(engine.url), engine.connect() as connection:
            connection.connection.cursor().execute("PRAGMA journal_mode = WAL")
        yield
