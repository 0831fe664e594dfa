"""Smaller SQLite files. By default SQLite keeps pages that became free, and never shortens its log."""

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

__all__ = ["shrink_database", "trim_log"]

_FULL = 1
"""The value of ``auto_vacuum`` with which every commit returns the pages it freed."""
_TIMEOUT = 2.0  # seconds
_LARGE_LOG = 16 << 20


def shrink_database(path: Path) -> None:
    """Return free pages to the file system, now and after each later commit.

    A file that does not exist yet is created with that setting. A file that is in use is left as it is.
    """
    with suppress(sqlite3.OperationalError), closing(_open_database(path)) as connection:
        if _read_pragma(connection, "auto_vacuum") != _FULL:
            connection.execute(f"PRAGMA auto_vacuum = {_FULL}")
            connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def trim_log(path: Path) -> None:
    """Empty the write-ahead log of a database in use, if it is large and nobody reads from it now."""
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size > _LARGE_LOG:
        with suppress(sqlite3.OperationalError), closing(_open_database(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _open_database(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=_TIMEOUT, isolation_level=None)


def _read_pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
