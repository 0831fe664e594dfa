"""A home whose name means something in a URL, a configuration parser or a shell is used as it is."""

import json
import shutil
from pathlib import Path

import pytest
from alembic import command
from click.testing import CliRunner
from sqlalchemy import create_engine

from fedtune import shipped
from fedtune.cli.main import cli
from fedtune.flower.superlink import SuperLink
from fedtune.paths import get_cache_folder
from fedtune.server.server_home import create_server_home
from fedtune.shipped import shipped_folder
from fedtune.tracking import Store, get_default_url, make_file_url, schema_upgrade, schema_version
from tests.federations import TRIVIAL
from tests.store_examples import fill

ODD = ["a%20b", "a?b=1", "a#b", "a b", "%(here)s", "100%", "ünï-🙂", "a&b;c", "a+b@c:8", "a'b\"c", "a[1]*"]


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / str(request.param)
    monkeypatch.setenv("FEDTUNE_HOME", str(home))
    monkeypatch.delenv("FEDTUNE_STORE", raising=False)
    return home


def test_the_store_lies_in_the_home_of_that_name_and_nowhere_else(odd: Path) -> None:
    with Store.open() as store:
        recorded = fill(store)
    assert [path.name for path in odd.parent.iterdir()] == [odd.name]
    assert (odd / "store.sqlite").is_file()
    with Store.open(get_default_url()) as store:
        assert store.rounds("film-1a2b") == recorded


def test_an_old_store_there_is_upgraded(odd: Path) -> None:
    odd.mkdir()
    engine = create_engine(make_file_url(odd / "store.sqlite"))
    with engine.begin() as connection:
        command.upgrade(schema_upgrade.make_alembic_config(connection), "0001")
    engine.dispose()
    with Store.open() as store:
        assert store.runs() == []
    with engine.connect() as connection:
        assert schema_version.read_revision(connection) == schema_version.HEAD_REVISION
    engine.dispose()
    assert [path.name for path in odd.parent.iterdir()] == [odd.name]


def test_migrations_that_are_installed_there_are_found(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = odd / "fedtune" / "shipped" / "migrations"
    shutil.copytree(shipped_folder("migrations"), installed, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(shipped, "_PACKAGE", odd / "fedtune")
    assert shipped_folder("migrations") == installed
    with create_engine("sqlite://").connect() as connection:
        command.upgrade(schema_upgrade.make_alembic_config(connection), "head")
        assert schema_version.read_revision(connection) == schema_version.HEAD_REVISION


@pytest.mark.slow
@pytest.mark.parametrize("odd", ["a%20b?c=1#d"], indirect=True)
def test_flower_opens_its_own_database_in_a_servers_home_of_that_name(odd: Path) -> None:
    superlink = SuperLink(create_server_home(["localhost"], "127.0.0.1:8443").flower_home)
    try:
        superlink.start()
        assert superlink.get_control_client().list_online_nodes() == set()
    finally:
        superlink.close()
    found = [path.name for path in (odd / "server" / "flower").glob("*.sqlite")]
    assert found == ["superlink.sqlite"]
    assert [path.name for path in odd.parent.iterdir()] == [odd.name]


def test_a_federation_runs_and_is_exported_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "a%20b?c=1#d ü"
    monkeypatch.setenv("FEDTUNE_HOME", str(home))
    (tmp_path / "recipe.yaml").write_text(TRIVIAL, encoding="utf-8")
    for words in (["simulate", str(tmp_path / "recipe.yaml"), "--workers", "1"], ["runs", "plot", "latest"]):
        done = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    shown = json.loads(CliRunner().invoke(cli, ["runs", "show", "latest", "--json"]).output)
    assert Path(shown["checkpoint"]["path"]).is_relative_to(home)
    assert Path(shown["checkpoint"]["path"]).is_file()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [home.name]


def test_a_cache_below_the_users_home_may_be_written_with_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.setenv("FEDTUNE_CACHE", "~/kept")
    assert get_cache_folder() == Path("/somebody/kept")
