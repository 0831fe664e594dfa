"""How a database is opened, locked and shared, and what its errors mean in words."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from fedtune import paths
from fedtune.errors import StoreError
from fedtune.interrupts import hold_interrupts

__all__ = [
    "get_default_url",
    "get_sqlite_path",
    "make_engine",
    "make_file_url",
    "reader",
    "translate_database_errors",
    "writer",
]

_TIMEOUT = "30"  # seconds SQLite waits for another process's transaction; ?timeout= in the URL says otherwise
_BEGIN = "fedtune_begin"
_MEANING = {
    sqlite3.SQLITE_BUSY: "is locked by another process; wait until that one has ended, or stop it",
    sqlite3.SQLITE_LOCKED: "is locked by another connection; wait until that one has ended",
    sqlite3.SQLITE_READONLY: "is read-only; make the file and its folder writable or choose another with --store",
    sqlite3.SQLITE_FULL: "cannot grow because the disk is full; free some space and try again",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; check that its folder exists and is writable, or use --store",
    sqlite3.SQLITE_NOTADB: "is not a SQLite database; choose another file with --store",
    sqlite3.SQLITE_CORRUPT: "is damaged; restore it from a copy or choose another with --store",
    sqlite3.SQLITE_IOERR: "cannot be read or written: the disk is full or failing; free some space or check it",
}


def get_default_url() -> str:
    """Return the SQLAlchemy URL of the default store: ``$FEDTUNE_STORE``, or a file in fedtune's home."""
    return os.environ.get("FEDTUNE_STORE") or make_file_url(paths.get_home_folder() / "store.sqlite")


def make_file_url(path: Path) -> str:
    """Return the URL of a SQLite file. Characters with a meaning in URLs are escaped."""
    return URL.create("sqlite", database=str(path.absolute())).render_as_string(hide_password=False)


def make_engine(url: str) -> Engine:
    """Create an engine for a SQLAlchemy URL, and the folder of a file. Nothing is read or written yet."""
    target = _parse_url(url)
    if path := get_sqlite_path(target):
        _make_folder(path)
    try:
        engine = create_engine(target)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise StoreError(_explain_missing_driver(target)) from error
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"--store {_describe_url(target)} has an option that does not hold: {error}") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _parse_url(text: str) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"--store {text} is no SQLAlchemy URL; write e.g. sqlite:////home/me/store.sqlite") from error
    if url.get_backend_name() == "sqlite" and "timeout" not in url.query:
        return url.update_query_dict({"timeout": _TIMEOUT})
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _explain_missing_driver(url: URL) -> str:
    mend = "pip install 'fedtune[postgresql]'" if url.get_backend_name() == "postgresql" else "install its driver"
    return f"no driver for the store {_describe_url(url)} is installed; {mend}"


def get_sqlite_path(url: URL) -> Path | None:
    """Return the file of a SQLite URL; None for a database in memory, a ``file:`` URI or a server."""
    database = url.database or ":memory:"
    plain = url.get_backend_name() == "sqlite" and not database.startswith((":memory:", "file:"))
    return Path(database) if plain else None


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make {path.parent} for the store: {error.strerror}; choose another place") from error


def _set_up_sqlite(connection: Any, _: object) -> None:
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")


def _begin_sqlite(connection: Connection) -> None:
    # The driver itself begins too late, and not at all for DDL and reads. A writer locks at once: a read transaction
    # that becomes a write transaction would fail instead of waiting.
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get(_BEGIN, 'DEFERRED')}")


@contextmanager
def reader(engine: Engine) -> Iterator[Connection]:
    """Open one consistent view of the database, which does not block writers. Ctrl-C waits for its end."""
    with hold_interrupts(), translate_database_errors(engine.url), engine.connect() as connection:
        yield connection


@contextmanager
def writer(engine: Engine) -> Iterator[Connection]:
    """Open one transaction, which waits for other writers and is committed whole or not at all.

    Ctrl-C waits for its end. An interrupted transaction would stay open while KeyboardInterrupt is handled, so that the
    end of the run could not be recorded.
    """
    immediate = engine.execution_options(**{_BEGIN: "IMMEDIATE"})
    with hold_interrupts(), translate_database_errors(engine.url), immediate.begin() as connection:
        yield connection


@contextmanager
def translate_database_errors(url: URL) -> Iterator[None]:
    """Turn the errors of a database driver into a StoreError of one sentence."""
    try:
        yield
    except DBAPIError as error:
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        meaning = _MEANING.get(code, f"cannot be used: {' '.join(str(error.orig).split())}")
        raise StoreError(f"the store {_describe_url(url)} {meaning}") from error


def _describe_url(url: URL) -> str:
    return str(get_sqlite_path(url) or url.set(query={}).render_as_string(hide_password=True))
