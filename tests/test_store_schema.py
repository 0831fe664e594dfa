"""The schema's history: migrations and tables agree, old databases open, newer ones are refused."""

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect

from fedtune import data, tasks
from fedtune.errors import StoreError
from fedtune.recipe.preprocessor_settings import Preprocessor
from fedtune.recipe.schema import EqualDirichlet, Recipe
from fedtune.shipped import shipped_folder
from fedtune.tracking import Store, schema_upgrade, schema_version
from fedtune.tracking.tables import metadata
from tests.store_examples import fill

HEAD = schema_version.HEAD_REVISION
NEXT = f"{int(HEAD) + 1:04}"
ADD_NOTE = f'''"""Add a note to runs."""
import sqlalchemy as sa
from alembic import op

revision, down_revision = "{NEXT}", "{HEAD}"


def upgrade() -> None:
    op.add_column("runs", sa.Column("note", sa.Text, nullable=False, server_default="none"))


def downgrade() -> None:
    op.drop_column("runs", "note")
'''


@pytest.fixture
def scratch() -> Iterator[Connection]:
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    return tmp_path / "store.sqlite"


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Inside, the code is one release on: its schema has one revision more."""
    folder = tmp_path / "migrations"
    shutil.copytree(shipped_folder("migrations"), folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions" / f"{NEXT}_add_note.py").write_text(ADD_NOTE)
    with monkeypatch.context() as patched:
        patched.setattr(schema_upgrade, "shipped_folder", lambda name: tmp_path / name)
        patched.setattr(schema_version, "HEAD_REVISION", NEXT)
        yield patched


def columns(path: Path, table: str) -> list[str]:
    connection = sqlite3.connect(path)
    names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    connection.close()
    return names


def test_head_is_the_newest_revision() -> None:
    assert ScriptDirectory.from_config(schema_upgrade.make_alembic_config()).get_heads() == [
        schema_version.HEAD_REVISION
    ]


def test_upgrading_to_head_makes_the_tables_the_code_reads(scratch: Connection) -> None:
    command.upgrade(schema_upgrade.make_alembic_config(scratch), "head")
    context = MigrationContext.configure(scratch, opts={"compare_type": True, "compare_server_default": True})
    assert compare_metadata(context, metadata) == []
    for table in metadata.sorted_tables:
        [*expected] = [(key.name, key.ondelete) for key in table.foreign_key_constraints]
        found = inspect(scratch).get_foreign_keys(table.name)
        assert [(key["name"], key["options"].get("ondelete")) for key in found] == expected
        assert inspect(scratch).get_pk_constraint(table.name)["constrained_columns"] == list(
            table.primary_key.columns.keys()
        )


def shape(connection: Connection) -> dict[str, Any]:
    """All that a database says of its tables."""
    found = inspect(connection)
    return {
        table: (
            [{**column, "type": str(column["type"])} for column in found.get_columns(table)],
            found.get_pk_constraint(table),
            found.get_foreign_keys(table),
            found.get_unique_constraints(table),
            found.get_indexes(table),
        )
        for table in found.get_table_names()
    }


def test_a_new_store_is_what_the_migrations_make(scratch: Connection, path: Path) -> None:
    command.upgrade(schema_upgrade.make_alembic_config(scratch), "head")
    Store.open().close()
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert shape(connection) == shape(scratch)
    engine.dispose()


def test_the_baseline_is_frozen() -> None:
    baseline = shipped_folder("migrations") / "versions" / "0001_baseline.py"
    assert "fedtune" not in baseline.read_text()


def test_downgrading_to_nothing_and_up_again_works(scratch: Connection) -> None:
    config = schema_upgrade.make_alembic_config(scratch)
    command.upgrade(config, "head")
    command.downgrade(config, "base")
    assert inspect(scratch).get_table_names() == ["alembic_version"]
    command.upgrade(config, "head")
    assert set(metadata.tables) < set(inspect(scratch).get_table_names())


def test_a_database_of_the_first_schema_opens_with_its_rows_and_takes_a_servers(path: Path) -> None:
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        command.upgrade(schema_upgrade.make_alembic_config(connection), "0001")
        connection.exec_driver_sql(
            "INSERT INTO runs VALUES ('old', 'old', 'completed', '', '{}', 0, 'local', '2026-01-01 00:00:00', NULL, 1)"
        )
    engine.dispose()
    with Store.open() as store:
        assert store.run("old").status == "completed"
        store.access.add_device(name="dev", node_id="1", public_key="pem")
        assert [device.name for device in store.access.list_devices()] == ["dev"]


def test_recipes_of_old_runs_keep_their_split_and_how_they_read_pictures(path: Path) -> None:
    """A run begun before ``dirichlet`` meant unequal sizes resumes with the split and the pixels it had."""
    old = """
    {"name":"old","task":"image-classification","model":{"source":"sample:logistic","dtype":"float32"},
    "data":{"source":"sample:digits","columns":{"text":"text","image":"image","label":"label","group":null,
    "domain":null},"parts":{"validation":0.1,"test":0.2},"split":{"kind":"dirichlet","alpha":0.5,"min_examples":1},
    "limit":null},"devices":[{"name":"phone","count":4,"memory":512000000}],"train":{"steps":1,"image":28},
    "federation":{"rounds":1},"seed":3}"""
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        command.upgrade(schema_upgrade.make_alembic_config(connection), "0003")
        for name, text in {"old": old, "odd": "[]", "new": "{}"}.items():
            values = (name, name, "interrupted", "", text, 3, "local", "2026-01-01 00:00:00", None, 1)
            connection.exec_driver_sql(f"INSERT INTO runs VALUES ({', '.join('?' * 10)})", values)
    engine.dispose()
    with Store.open() as store:
        recipe = Recipe.model_validate_json(store.run("old").recipe)
        assert (store.run("odd").recipe, store.run("new").recipe) == ("[]", "{}")
    assert recipe.data.partition == EqualDirichlet(alpha=0.5)
    assert recipe.model.preprocessor == Preprocessor(side=28)
    corpus = tasks.load_data(recipe)
    assert digest(data.partition_examples(recipe, corpus.train)) == OLD_SPLIT


OLD_SPLIT = "650783778d386e597b2bb4712b66bd97035a51dd5cc7a0a40d13f3a24ed843ff"
"""Of the clients' rows under that recipe, as they were before the kind had its new name."""


def digest(rows: list[Any]) -> str:
    return hashlib.sha256(json.dumps([own.tolist() for own in rows]).encode()).hexdigest()


def test_an_old_database_opens_after_an_upgrade_with_its_rows(path: Path, request: pytest.FixtureRequest) -> None:
    with Store.open() as store:
        recorded = fill(store)
    request.getfixturevalue("next_release")
    with Store.open() as store:
        assert store.rounds("film-1a2b") == recorded
    assert "note" in columns(path, "runs")


def test_down_and_up_again_keeps_the_rows(path: Path, request: pytest.FixtureRequest) -> None:
    with Store.open() as store:
        recorded = fill(store)
    request.getfixturevalue("next_release")
    Store.open().close()
    engine = create_engine(f"sqlite:///{path}")
    for step, there in ((command.downgrade, False), (command.upgrade, True)):
        with engine.begin() as connection:
            step(schema_upgrade.make_alembic_config(connection), NEXT if there else HEAD)
        assert ("note" in columns(path, "runs")) == there
    engine.dispose()
    with Store.open() as store:
        assert store.rounds("film-1a2b") == recorded


def test_a_database_newer_than_the_code_is_refused_naming_both_revisions(path: Path, next_release: Any) -> None:
    Store.open().close()
    next_release.undo()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=f"at revision {NEXT}, .* only up to {HEAD}; upgrade fedtune"):
        Store.open()
    assert path.read_bytes() == before


def test_a_migration_that_fails_leaves_the_database_as_it_was(path: Path, next_release: Any, tmp_path: Path) -> None:
    next_release.setattr(schema_version, "HEAD_REVISION", HEAD)
    script = tmp_path / "migrations" / "versions" / f"{NEXT}_add_note.py"
    script.rename(tmp_path / "later.py")
    with Store.open() as store:
        recorded = fill(store)
    script.write_text(ADD_NOTE.replace("\n\n\ndef downgrade", '\n    raise RuntimeError("planted")\n\n\ndef downgrade'))
    next_release.setattr(schema_version, "HEAD_REVISION", NEXT)
    with pytest.raises(RuntimeError, match="planted"):
        Store.open()
    assert "note" not in columns(path, "runs")
    script.write_text(ADD_NOTE)
    with Store.open() as store:
        assert store.rounds("film-1a2b") == recorded


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()
    with Store.open() as store:
        assert store.runs() == []


def test_a_store_at_head_opens_without_alembic(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.open().close()
    monkeypatch.setattr(schema_upgrade, "upgrade_schema", None)
    with Store.open() as store:
        assert store.runs() == []
