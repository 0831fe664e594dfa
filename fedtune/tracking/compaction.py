"""SQLite files that shrink: of itself SQLite keeps the pages that became free, and the size of the log beside them."""

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

__all__ = ["shrink", "trim_log"]

_FULL = 1
"""The value of ``auto_vacuum`` with which every commit gives back the pages it freed."""
_PATIENCE = 2.0  # seconds
_LARGE_LOG = 16 << 20


def shrink(path: Path) -> None:
    """Give back what is free in a database, and see to it that it gives back by itself from now on.

    A new file is made that way. One that others are using now is left for another time.
    """
    with suppress(sqlite3.OperationalError), closing(_opened(path)) as connection:
        if _pragma(connection, "auto_vacuum") != _FULL:
            connection.execute(f"PRAGMA auto_vacuum = {_FULL}")
            connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def trim_log(path: Path) -> None:
    """Bring the log beside a database that is in use to nothing, if it is large and nobody reads from it now."""
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size > _LARGE_LOG:
        with suppress(sqlite3.OperationalError), closing(_opened(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _opened(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
