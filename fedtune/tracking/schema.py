"""Which revision of the schema a database has, and bringing it to the one this code reads."""

from sqlalchemy import Connection, Engine, inspect, text

from fedtune.tracking.database import reader

__all__ = ["HEAD", "prepare", "revision"]

HEAD = "0001"


def prepare(engine: Engine) -> None:
    """Create or upgrade the schema where needed; StoreError when the database is newer than this code."""
    with reader(engine) as connection:
        current = revision(connection)
    if current != HEAD:
        # Alembic takes longer to import than a whole `fedtune runs list`; few commands meet an old database.
        from fedtune.tracking.upgrade import upgrade

        upgrade(engine)


def revision(connection: Connection) -> str | None:
    """The Alembic revision a database is at; None before its first."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
