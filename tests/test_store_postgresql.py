"""The same store on a real PostgreSQL server: one named by FEDTUNE_TEST_POSTGRESQL, or a scratch one started here."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData, create_engine, insert, select, text

from fedtune.errors import StoreError
from fedtune.tracking import Store, make_file_url, schema_upgrade
from fedtune.tracking.tables import metadata
from tests.store_examples import a_client_record, a_metric, a_round, fill, start

ROOT = Path(__file__).parents[1]
SERVER_USER = "postgres"  # a PostgreSQL server refuses to run as the superuser


def programs() -> Path | None:
    """The folder of the newest server installed here."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def run(*command: str | Path) -> None:
    prefix = ["runuser", "-u", SERVER_USER, "--"] if os.geteuid() == 0 else []
    done = subprocess.run([*prefix, *command], cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        pytest.skip(f"PostgreSQL does not start here: {done.stderr.strip()[-200:]}")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pytest.importorskip("psycopg", reason="the driver is not installed: pip install 'fedtune[postgresql]'")
    if "FEDTUNE_TEST_POSTGRESQL" in os.environ:
        yield os.environ["FEDTUNE_TEST_POSTGRESQL"]
        return
    folder = programs()
    if folder is None:
        pytest.skip("no PostgreSQL server is installed and FEDTUNE_TEST_POSTGRESQL names none")
    with tempfile.TemporaryDirectory() as name:
        if os.geteuid() == 0:
            shutil.chown(name, SERVER_USER)
        data = f"{name}/data"
        run(folder / "initdb", "--auth=trust", "--no-sync", "-U", SERVER_USER, "-D", data)
        options = f"-k {name} -c listen_addresses= -c fsync=off"
        run(folder / "pg_ctl", "-D", data, "-w", "-l", f"{name}/log", "-o", options, "start")
        try:
            yield f"postgresql://{SERVER_USER}@/postgres?host={name}"
        finally:
            run(folder / "pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")


@pytest.fixture
def connection(server: str) -> Iterator[Connection]:
    engine = create_engine(server.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as opened:
        yield opened
    engine.dispose()


@pytest.fixture
def url(server: str, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty database."""
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    found = MetaData()
    found.reflect(connection)
    found.drop_all(connection)
    connection.commit()
    return server


def test_rounds_come_back_as_they_were_committed(url: str) -> None:
    with Store.open(url) as store:
        recorded = fill(store)
        odd = a_round(
            9, metrics=(a_metric(float("inf")),), client_records=(a_client_record(0, train_loss=float("nan")),)
        )
        store.commit_round("film-1a2b", odd)
    with Store.open(url) as store:
        assert store.rounds("film-1a2b")[:-1] == recorded
        assert repr(store.rounds("film-1a2b")[-1]) == repr(odd)
        run = store.run("latest")
        assert (run.status, run.rounds_completed, run.created_at.utcoffset()) == (
            "completed",
            4,
            run.created_at.utcoffset(),
        )
        store.delete("film-1a2b")
        assert store.runs() == []
        start(store)
        assert store.rounds("film-1a2b") == []


def test_migrations_make_the_tables_the_code_reads(url: str, connection: Connection) -> None:
    Store.open(url).close()
    context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
    assert compare_metadata(context, metadata) == []


def copy_rows(old: Path, connection: Connection) -> None:
    """Fill a database from a SQLite file that has the same tables."""
    connection.execute(text("SET TIME ZONE 'UTC'"))
    engine, theirs, ours = create_engine(make_file_url(old)), MetaData(), MetaData()
    ours.reflect(connection)
    with engine.connect() as source:
        theirs.reflect(source)
        for table in theirs.sorted_tables:
            if table.name != "alembic_version":
                rows = [dict(row) for row in source.execute(select(table)).mappings()]
                connection.execute(insert(ours.tables[table.name]), rows)
    engine.dispose()
    connection.commit()


def list_everything(store: Store) -> list[str]:
    """What a store holds, as text in which NaN is equal to NaN."""
    access, runs = store.access, store.runs()
    held = [
        *runs,
        *store.rounds_of([run.id for run in runs]).values(),
        *access.list_devices(),
        *access.list_operators(),
    ]
    seated = [access.list_assignments(run.id) for run in runs]
    return [repr(one) for one in (*held, *seated, *access.list_unused_tokens(), *access.audit.list_lines())]


def test_a_store_of_revision_0007_is_upgraded_and_downgraded_with_its_rows(
    url: str, connection: Connection, tmp_path: Path
) -> None:
    with tarfile.open(ROOT / "tests" / "fixtures" / "store-0007.tar.xz") as packed:
        packed.extractall(tmp_path / "old", filter="data")
    old, config = tmp_path / "old" / "store.sqlite", schema_upgrade.make_alembic_config(connection)
    command.upgrade(config, "0007")
    connection.commit()
    copy_rows(old, connection)
    for _ in range(2):
        with Store.open(url) as store, Store.open(make_file_url(old)) as same:
            assert list_everything(store) == list_everything(same)
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        command.downgrade(config, "0007")
        connection.commit()


def test_sums_for_the_page_are_those_of_sqlite(url: str, tmp_path: Path) -> None:
    with Store.open(url) as store, Store.open(make_file_url(tmp_path / "same.sqlite")) as same:
        for opened in (store, same):
            start(opened)
            for number in range(3):
                records = tuple(
                    a_client_record(client, status=("merged", "error")[(client + number) % 2], device_class=name)
                    for client, name in enumerate((None, "", "phone", "phone"))
                )
                opened.commit_round("film-1a2b", a_round(number, client_records=records if number else ()))
        for read in (
            lambda one: one.details.sum_by_round("film-1a2b"),
            lambda one: one.details.sum_by_client("film-1a2b"),
            lambda one: one.details.sum_by_class("film-1a2b"),
            lambda one: one.details.list_problems("film-1a2b", 0, 50),
            lambda one: one.details.list_records("film-1a2b", range(3), [0, 2]),
            lambda one: one.details.list_last_scores("film-1a2b"),
            lambda one: one.details.read_rounds("film-1a2b"),
            lambda one: one.costs.sum_up(["film-1a2b"]),
            lambda one: one.costs.list_scores(["film-1a2b"]),
            lambda one: one.costs.list_last_scores(),
        ):
            assert read(store) == read(same)


def test_a_round_is_recorded_once_and_whole(url: str) -> None:
    with Store.open(url) as store:
        start(store)
        with pytest.raises(StoreError):
            store.commit_round("film-1a2b", a_round(1, metrics=(a_metric(0.5), a_metric(0.6))))
        store.commit_round("film-1a2b", a_round(1))
        with pytest.raises(StoreError, match="round 1 of run film-1a2b is recorded already"):
            store.commit_round("film-1a2b", a_round(1))
        assert store.rounds("film-1a2b") == [a_round(1)]


def test_a_database_newer_than_the_code_is_refused(url: str, connection: Connection) -> None:
    Store.open(url).close()
    connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0999'")
    connection.commit()
    with pytest.raises(StoreError, match="at revision 0999"):
        Store.open(url)


WRITE = """
import sys
from fedtune.tracking import Store, make_file_url, schema_upgrade
from tests.store_examples import fill
with Store.open(sys.argv[1]) as store:
    fill(store, sys.argv[2], rounds=20)
"""


def test_two_processes_create_the_schema_and_write_at_once_and_lose_nothing(url: str) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, url, run_id], cwd=ROOT) for run_id in ("one", "two")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    with Store.open(url) as store:
        expected = [a_round(number) for number in range(21)]
        assert store.rounds_of(["one", "two"]) == {"one": expected, "two": expected}


def test_a_server_that_does_not_answer_is_said_so_without_the_password(server: str) -> None:
    with pytest.raises(
        StoreError, match=r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/fedtune cannot be used"
    ) as caught:
        Store.open("postgresql://me:secret@127.0.0.1:1/fedtune")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
