"""The schema revision of a database, and its upgrade to the revision that this code reads."""

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

HEAD_REVISION = "0015"

_TIMEOUT = 60.0  # seconds
_ADVISORY_LOCK = 0x66656474756E65  # "fedtune" in ASCII: the key of the lock in PostgreSQL
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
    with _lock_schema(engine), writer(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        current = read_revision(connection)
        if current is None:
            _create_tables(connection)
        else:
            # Importing Alembic takes longer than a whole `fedtune runs list`, and few commands open an old database.
            from fedtune.tracking.schema_upgrade import upgrade_schema

            upgrade_schema(connection, current, HEAD_REVISION)


def read_revision(connection: Connection) -> str | None:
    """Return the Alembic revision of a database; None for an empty one."""
    if not inspect(connection).has_table(_at.name):
        return None
    return connection.execute(select(_at.c.version_num)).scalar()


def _create_tables(connection: Connection) -> None:
    """Create the newest tables directly. The result is the same as that of all migrations."""
    _at.metadata.create_all(connection)
    metadata.create_all(connection, checkfirst=False)
    connection.execute(insert(_at).values(version_num=HEAD_REVISION))


@contextmanager
def _lock_schema(engine: Engine) -> Iterator[None]:
    """Lock other processes out while a SQLite file is created or upgraded, and switch it to write-ahead logging."""
    path = get_sqlite_path(engine.url)
    if path is None:
        yield
        return
    # The switch to WAL does not wait for other connections, whatever the timeout is. Hence a lock file.
    refusal = f"the store {path} is being upgraded by another process; wait until that one has ended"
    with hold_file_lock(path.with_name(f"{path.name}.lock"), _TIMEOUT, refusal):
        with translate_database_errors(engine.url), engine.connect() as connection:
            connection.connection.cursor().execute("PRAGMA journal_mode = WAL")
        yield
