"""A client for the page, and stores of invented runs to show."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.testclient import TestClient

from fedtune.tracking import Store, make_file_url
from fedtune.web.application import make_application

__all__ = ["copy_runs", "open_page"]


@contextmanager
def open_page(path: Path) -> Iterator[tuple[Store, TestClient]]:
    """Open a store and a client of its page. Errors inside a page are raised in the test."""
    with Store.open(make_file_url(path)) as store:
        yield store, TestClient(make_application(store), base_url="http://127.0.0.1:8787", follow_redirects=False)


def copy_runs(path: Path, runs: int) -> None:
    """Copy the only run of a store until there are ``runs``, in SQL: much faster than through the store."""
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(
            "CREATE TEMP TABLE n AS WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c "
            f"WHERE i < {runs - 1}) SELECT i FROM c"
        )
        for table, key in (("runs", "id"), ("rounds", "run_id"), ("client_records", "run_id"), ("metrics", "run_id")):
            names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            values = ", ".join(f"{name} || '-' || n.i" if name == key else name for name in names)
            connection.execute(f"INSERT INTO {table} SELECT {values} FROM {table} CROSS JOIN n")
