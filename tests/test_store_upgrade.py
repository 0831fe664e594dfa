"""A store that revision 0007 filled is upgraded whole or not at all, and everything in it works on.

The code of that revision made the fixture: a run with privacy that ended, one that was killed after its first of three
rounds, and the tables of a server with a run on devices.
"""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
from contextlib import closing
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from click.testing import CliRunner
from sqlalchemy import create_engine

from fedtune.cli.main import cli
from fedtune.errors import StoreError
from fedtune.tracking import MetricRecord, Store, claim_run, schema_upgrade
from fedtune.tracking.schema_version import HEAD_REVISION
from tests.machine_bits import skip_on_other_bits

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests" / "fixtures" / "store-0007.tar.xz"
KILLED, PRIVATE, SERVED = "plain-0a1b2c", "private-3d4e5f", "served-6a7b8c"
WHOLE = "40423808bc1faf2218b7f24b6cc227bf73a9a102d28f9d41e144024674eb21c6"
"""SHA-256 of the killed run's last checkpoint, by the code of then in a process that nobody killed."""
Rows = dict[str, list[tuple[Any, ...]]]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store of a home as that code left it."""
    with tarfile.open(FIXTURE) as packed:
        packed.extractall(tmp_path / "home", filter="data")
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path / "home" / "store.sqlite"


def read_all(path: Path) -> Rows:
    """Every row of every table."""
    with closing(sqlite3.connect(path)) as connection:
        names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        return {name: sorted(connection.execute(f"SELECT * FROM {name}"), key=repr) for (name,) in names.fetchall()}


def say(*argv: str) -> str:
    done = CliRunner().invoke(cli, argv, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_client_records_keep_their_values_and_tell_classes_from_devices(old: Path) -> None:
    with closing(sqlite3.connect(old)) as connection:
        before = connection.execute("SELECT * FROM contributions ORDER BY run_id, round, client").fetchall()
    with Store.open() as store:
        found = [
            (run, number, record)
            for run in (KILLED, PRIVATE, SERVED)
            for number, records in enumerate(one.client_records for one in store.rounds(run))
            for record in records
        ]
    after = [(run, number, one.client, one.device, *list(asdict(one).values())[3:-8]) for run, number, one in found]
    assert {(one.device_type, one.accelerator_memory, one.accelerator_reserved) for *_, one in found} == {(None,) * 3}
    assert {(one.anonymous_memory, one.file_memory) for *_, one in found} == {(None, None)}
    assert {(one.predicted_anonymous, one.predicted_total) for *_, one in found} == {(None, None)}
    assert len(after) == 4 + 8 + 2
    assert repr(after) == repr(
        [tuple("rejected" if value == "refused" else value for value in row) for row in before]
    ).replace("None, None)", "nan, None)")
    assert {(run, one.device_class, one.device_name) for run, _, one in found} == {
        (KILLED, "toy", None),
        (PRIVATE, "toy", None),
        (SERVED, None, "dev-0"),
        (SERVED, None, "dev-1"),
    }
    assert [one.status for run, number, one in found if (run, number) == (PRIVATE, 1)] == [
        *("merged", "rejected", "merged", "merged")
    ]


def read_metrics(run: str) -> list[MetricRecord]:
    with Store.open() as store:
        return [one for record in store.rounds(run) for one in record.metrics]


def test_what_clients_hold_out_is_the_split_local(old: Path) -> None:
    with Store.open() as store:
        splits = {
            one.split for run in (KILLED, PRIVATE, SERVED) for record in store.rounds(run) for one in record.metrics
        }
        scores = [one for record in store.rounds(KILLED) for one in record.client_scores]
    assert splits == {"validation", "test", "test-before", "local", "privacy", "updates", "train"}
    assert {one.moment for one in scores} == {"before", "after", "shared"}
    assert all(one.num_predictions > 0 for one in scores)
    assert {one.device_type for one in scores} == {None}  # not known
    assert {one.device_type for run in (KILLED, SERVED) for one in read_metrics(run)} == {None}


def test_a_servers_tables_keep_their_rows(old: Path) -> None:
    with Store.open() as store:
        access = store.access
        first, second = access.list_devices()
        tokens = access.list_unused_tokens()
        with pytest.raises(StoreError, match="has been used already"):
            access.use_enrolment_token("c" * 64)
        assert [(one.client, one.device_name, one.node_id) for one in access.list_assignments(SERVED)] == [
            (0, "dev-0", "10"),
            (1, "dev-1", "11"),
        ]
        assert [(one.name, one.key_sha256, one.role) for one in access.list_operators()] == [
            ("ada", "d" * 64, "admin"),
            ("bob", "e" * 64, "read"),
        ]
        refused, done = access.audit.list_lines()
    assert (first.name, first.node_id, first.quarantine_reason) == ("dev-0", "10", None)
    assert first.last_seen_at is not None
    assert first.last_seen_at >= first.enrolled_at
    assert (second.tags, second.quarantine_reason) == (("garden",), "3 refused in a row: it holds nonsense")
    assert {(one.sha256[0], one.device_name, one.tags) for one in tokens} == {
        ("a", None, ("garden",)),
        ("b", "dev-2", ()),
    }
    assert {one.expires_at - one.created_at for one in tokens} == {timedelta(hours=24)}
    assert (done.outcome, done.actor, done.message, done.times) == ("done", "ada", f"run {SERVED} submitted", 1)
    assert done.last_recorded_at == done.recorded_at
    assert (refused.outcome, refused.actor, refused.times) == ("refused", "10.0.0.9", 5)
    assert refused.last_recorded_at >= refused.recorded_at


def test_opening_it_again_changes_nothing(old: Path) -> None:
    Store.open().close()
    once = read_all(old)
    Store.open().close()
    assert read_all(old) == once
    assert once["alembic_version"] == [(HEAD_REVISION,)]


def test_downgrading_gives_every_row_back(old: Path) -> None:
    before = read_all(old)
    Store.open().close()
    engine = create_engine(f"sqlite:///{old}")
    with engine.begin() as connection:
        command.downgrade(schema_upgrade.make_alembic_config(connection), "0007")
    engine.dispose()
    assert read_all(old) == before


DIE = """
import os, signal, sys
from sqlalchemy import Engine, event
from fedtune.tracking import Store

left = int(sys.argv[1])


@event.listens_for(Engine, "after_cursor_execute")
def die(connection, cursor, statement, *_):
    global left
    if statement.split()[0] in ("ALTER", "CREATE", "DROP", "INSERT", "UPDATE"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


Store.open()
"""


@pytest.mark.parametrize("statement", [1, 12, 20, 23, 27, 30, 40, 42, 43, 45, 46])
def test_a_process_that_is_killed_leaves_the_old_store(old: Path, statement: int) -> None:
    """The upgrade has 46 statements that write, the last of which records the revision."""
    before = read_all(old)
    killed = subprocess.run([sys.executable, "-c", DIE, str(statement)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read_all(old) == before
    with Store.open() as store:
        assert [run.id for run in store.runs()] == [SERVED, PRIVATE, KILLED]


def test_it_is_not_upgraded_under_a_run_that_is_executed(old: Path) -> None:
    before = read_all(old)
    with (
        claim_run(KILLED),
        pytest.raises(StoreError, match=f"while an older fedtune executes run {KILLED}; wait for it"),
    ):
        Store.open()
    assert read_all(old) == before


def test_runs_are_listed_shown_drawn_and_exported(old: Path, tmp_path: Path) -> None:
    assert all(run in say("runs", "list") for run in (KILLED, PRIVATE, SERVED))
    assert "rejected, " in say("runs", "show", PRIVATE)
    shown = json.loads(say("runs", "show", PRIVATE, "--json"))
    assert (shown["schema_version"], shown["privacy"]["noise_added_by"]) == (2, "server")
    assert shown["finished_at"] > shown["created_at"]
    say("runs", "plot", KILLED, PRIVATE, SERVED, "-o", str(tmp_path / "runs.png"))
    for kind in ("csv", "parquet"):
        say("runs", "export", KILLED, PRIVATE, SERVED, "--format", kind, "-o", str(tmp_path / kind))
    assert len((tmp_path / "csv" / "client_records.csv").read_text().splitlines()) == 1 + 4 + 8 + 2
    say("export", PRIVATE, "-o", str(tmp_path / "model"))
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_killed_run_ends_with_the_bits_it_would_have_had(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(old.parent, old.parents[1] / "copy")
    found = json.loads(say("simulate", "--resume", KILLED, "--json"))["checkpoint"]["sha256"]
    if found != WHOLE:
        skip_on_other_bits(copy, KILLED, 1, monkeypatch)
    assert found == WHOLE
