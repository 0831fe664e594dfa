"""Whatever is wrong with a store is said in one sentence, and nothing is half-written."""

import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from fedtune.errors import StoreError
from fedtune.tracking import Store, claim_run
from fedtune.tracking.database import make_engine, reader
from fedtune.tracking.run_lock import hold_file_lock
from tests.store_examples import a_metric, a_round, fill, start

NOBODY = 65534


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    return tmp_path


@contextmanager
def as_a_plain_user() -> Iterator[None]:
    """File permissions count: the superuser, whom they do not stop, steps down for a while."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder a plain user may look into but not write."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setenv("FEDTUNE_HOME", name)
        Path(name).chmod(0o755)
        yield Path(name)
        Path(name).chmod(0o755)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another connection in the middle of writing."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


def sentence(caught: pytest.ExceptionInfo[StoreError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def test_the_database_is_set_up_to_be_shared_and_durable(home: Path) -> None:
    Store.open().close()
    engine = make_engine(f"sqlite:///{home / 'store.sqlite'}")
    names = ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
    with reader(engine) as connection:
        assert [connection.execute(text(f"PRAGMA {name}")).scalar() for name in names] == ["wal", 1, 2, 30_000]
    engine.dispose()


def test_a_store_locked_for_too_long_is_said_so(home: Path) -> None:
    with Store.open(f"sqlite:///{home / 'store.sqlite'}?timeout=0.1") as store:
        start(store)
        with locked(home / "store.sqlite"), pytest.raises(StoreError) as caught:
            store.commit_round("film-1a2b", a_round(1))
        assert f"the store {home / 'store.sqlite'} is locked by another process" in sentence(caught)
        store.commit_round("film-1a2b", a_round(1))
        assert store.rounds("film-1a2b") == [a_round(1)]


def test_a_writer_waits_for_another_one_instead_of_failing(home: Path) -> None:
    with Store.open() as store:
        start(store)
        lock = locked(home / "store.sqlite")
        lock.__enter__()
        timer = threading.Timer(0.3, lambda: lock.__exit__(None, None, None))
        timer.start()
        began = time.monotonic()
        store.commit_round("film-1a2b", a_round(1))
        assert time.monotonic() - began > 0.2
        timer.join()
        assert store.rounds("film-1a2b") == [a_round(1)]


def test_readers_neither_wait_for_a_writer_nor_hold_one_up(home: Path) -> None:
    url = f"sqlite:///{home / 'store.sqlite'}?timeout=0.1"
    with Store.open(url) as store:
        recorded = fill(store)
        with locked(home / "store.sqlite"), Store.open(url) as other:
            assert other.rounds("film-1a2b") == recorded
            assert other.run("latest").id == "film-1a2b"
        engine = make_engine(url)
        with reader(engine) as connection:
            connection.execute(text("SELECT * FROM runs")).all()
            start(store, "second")
        engine.dispose()


def test_a_full_disk_is_said_so_and_costs_only_the_round_in_flight(home: Path) -> None:
    with Store.open() as store:
        start(store)
        store.commit_round("film-1a2b", a_round(1))

    def fill_the_disk(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # no fewer than there are already: none to spare

    event.listen(Engine, "connect", fill_the_disk)
    many = tuple(a_metric(0.5, domain=f"domain-{index:05d}") for index in range(2000))
    try:
        with Store.open() as store, pytest.raises(StoreError) as caught:
            store.commit_round("film-1a2b", a_round(2, metrics=many))
    finally:
        event.remove(Engine, "connect", fill_the_disk)
    assert "the disk is full" in sentence(caught)
    with Store.open() as store:
        assert store.rounds("film-1a2b") == [a_round(1)]
        store.commit_round("film-1a2b", a_round(2, metrics=many))
        assert store.rounds("film-1a2b")[1].metrics == many


def test_a_read_only_store_can_be_read_and_says_so_when_written(home: Path) -> None:
    with Store.open() as store:
        recorded = fill(store)
    with Store.open(f"sqlite:///file:{home / 'store.sqlite'}?mode=ro&uri=true") as store:
        assert store.rounds("film-1a2b") == recorded
        with pytest.raises(StoreError, match="is read-only") as caught:
            start(store, "other")
    sentence(caught)


def test_a_store_one_may_not_write_can_be_read_and_says_so_when_written(folder: Path) -> None:
    with Store.open() as store:
        recorded = fill(store)
    folder.chmod(0o777)
    (folder / "store.sqlite").chmod(0o444)
    with as_a_plain_user(), Store.open() as store:
        assert store.rounds("film-1a2b") == recorded
        with pytest.raises(StoreError, match="is read-only; make the file and its folder writable") as caught:
            store.finish("film-1a2b", "failed")
    sentence(caught)


def test_a_folder_one_may_not_write_is_said_so(folder: Path) -> None:
    folder.chmod(0o555)
    with as_a_plain_user():
        with pytest.raises(StoreError, match="check that its folder exists and is writable") as caught:
            Store.open()
        sentence(caught)
        with pytest.raises(StoreError, match=r"cannot make .*/deeper for the store: Permission denied") as caught:
            Store.open(f"sqlite:///{folder}/deeper/store.sqlite")
        sentence(caught)
        with (
            pytest.raises(StoreError, match=r"cannot write .*/runs/a/lock: Permission denied") as caught,
            claim_run("a"),
        ):
            pass
        sentence(caught)
    assert list(folder.iterdir()) == []


def test_a_store_that_another_process_is_upgrading_is_said_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.tracking.schema_version._TIMEOUT", 0.1)
    lock = hold_file_lock(home / "store.sqlite.lock", 1, "")
    with lock, pytest.raises(StoreError, match="is being upgraded by another process") as caught:
        Store.open()
    sentence(caught)
    Store.open().close()


def test_a_file_that_is_no_database_is_refused_and_left_alone(home: Path) -> None:
    (home / "store.sqlite").write_text("Dear diary, " * 500)
    with pytest.raises(StoreError, match="is not a SQLite database; choose another file with --store") as caught:
        Store.open()
    sentence(caught)
    assert (home / "store.sqlite").read_text() == "Dear diary, " * 500


def test_a_folder_in_place_of_the_file_is_refused(home: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened") as caught:
        Store.open(f"sqlite:///{home}")
    sentence(caught)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("store.sqlite", "--store store.sqlite is no SQLAlchemy URL; write e.g. sqlite:////"),
        ("sqlite:///x?timeout=soon", "--store x has an option that does not hold: .*'soon'"),
        ("db2://me:secret@host/fedtune", "no driver for the store db2://me:\\*\\*\\*@host/fedtune is installed"),
    ],
)
def test_a_url_that_leads_nowhere_is_refused(url: str, expected: str) -> None:
    with pytest.raises(StoreError, match=expected) as caught:
        Store.open(url)
    assert "secret" not in sentence(caught)
