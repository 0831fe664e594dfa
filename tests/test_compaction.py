"""Database files give back what was deleted from them."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedtune.flower import superlink as superlinks
from fedtune.tracking import Store
from fedtune.tracking.compaction import shrink_database, trim_log
from tests.store_examples import fill

MEGABYTE = 1 << 20


def insert(path: Path, count: int) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS objects (content BLOB)")
        connection.executemany("INSERT INTO objects VALUES (zeroblob(?))", [(MEGABYTE,)] * count)


def delete(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM objects")


def test_a_database_shrinks_once_and_then_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "some.sqlite"
    insert(path, 8)
    delete(path)
    assert path.stat().st_size > 8 * MEGABYTE
    shrink_database(path)
    assert path.stat().st_size < MEGABYTE
    insert(path, 8)
    delete(path)
    assert path.stat().st_size < MEGABYTE


def test_a_file_that_is_not_there_is_made_to_shrink_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite"
    shrink_database(path)
    insert(path, 8)
    delete(path)
    assert path.stat().st_size < MEGABYTE


def test_a_database_in_use_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.tracking.compaction._TIMEOUT", 0.05)
    path = tmp_path / "some.sqlite"
    insert(path, 2)
    with closing(sqlite3.connect(path, isolation_level=None)) as user:
        user.execute("BEGIN EXCLUSIVE")
        shrink_database(path)
        user.execute("INSERT INTO objects VALUES (1)")
        user.execute("COMMIT")
        assert user.execute("SELECT count(*) FROM objects").fetchone() == (3,)


def test_the_log_of_a_database_in_use_is_trimmed_when_it_is_large(tmp_path: Path) -> None:
    path, log = tmp_path / "some.sqlite", tmp_path / "some.sqlite-wal"
    with closing(sqlite3.connect(path)) as user:
        user.execute("PRAGMA journal_mode = WAL")
        user.execute("SELECT count(*) FROM sqlite_master").fetchall()
        insert(path, 4)
        user.execute("SELECT count(*) FROM objects").fetchall()
        trim_log(path)
        assert log.stat().st_size > 4 * MEGABYTE, "it is small"
        insert(path, 20)
        trim_log(path)
        assert log.stat().st_size == 0


def test_the_store_gives_back_what_a_deleted_run_took(home: Path) -> None:
    path = home / "store.sqlite"
    with Store.open() as store:
        fill(store)
        [run, *_] = store.runs()
        store.set_run_reason(run.id, "x" * (8 * MEGABYTE))
        store.delete(run.id)
        store.compact()
    assert path.stat().st_size < MEGABYTE
    assert not path.with_name("store.sqlite-wal").exists() or path.with_name("store.sqlite-wal").stat().st_size == 0


def test_the_superlinks_own_database_shrinks_before_its_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "superlink.sqlite"
    insert(path, 8)
    delete(path)
    seen: list[int] = []

    def refuse(*_: object, **__: object) -> None:
        seen.append(path.stat().st_size)
        raise OSError("no process is started here")

    monkeypatch.setattr("fedtune.flower.superlink.subprocess.Popen", refuse)
    link = superlinks.SuperLink(tmp_path)
    with pytest.raises(OSError, match="no process"):
        link.start()
    link.close()
    assert len(seen) == 1
    assert seen[0] < MEGABYTE


def test_the_log_of_the_superlinks_database_is_trimmed(tmp_path: Path) -> None:
    link, log = superlinks.SuperLink(tmp_path), tmp_path / "superlink.sqlite-wal"
    with closing(sqlite3.connect(tmp_path / "superlink.sqlite")) as user:
        user.execute("PRAGMA journal_mode = WAL")
        user.execute("SELECT count(*) FROM sqlite_master").fetchall()
        insert(tmp_path / "superlink.sqlite", 24)
        assert log.stat().st_size > 20 * MEGABYTE
        link.trim()
        assert log.stat().st_size == 0
    link.close()
