"""A run that older code began and left after two of four rounds is listed, ended, extended and exported."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedtune.cli.main import cli
from fedtune.tracking import Store
from tests.machine_bits import skip_on_other_bits

RUN = "old-run-e41304"
WHOLE = "ec5e1b147571afbc4343f8d7a957743c782c3804a35ea25f91ae3d5daa2c4e22"
"""SHA-256 of the last checkpoint of the same recipe, run by that code without a stop."""


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home as that code left it: killed with -9 when round 2 was committed."""
    home = tmp_path / "home"
    shutil.copytree(Path(__file__).parent / "fixtures" / "store-v1", home)
    monkeypatch.setenv("FEDTUNE_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "120")
    return home


def say(*argv: str) -> tuple[str, str]:
    """What a command prints, and what it says on standard error."""
    done = CliRunner().invoke(cli, argv, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def test_it_is_listed_and_shown_with_the_keys_of_today(old: Path) -> None:
    assert "old-run" in say("runs", "list")[0]
    shown = json.loads(say("runs", "show", RUN, "--json")[0])
    assert shown["recipe"]["train"]["batch_size"] == 8
    assert shown["recipe"]["data"]["partition"] == {"kind": "power-law", "exponent": 0.5}
    assert shown["recipe"]["federation"]["selection"]["sampling"] == "least-recent"
    assert shown["recipe"]["merge"] == [{"mean": {"weighting": "equal"}}]
    assert shown["status"] == "interrupted"


def test_it_ends_with_the_bits_it_would_have_had(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(old, old.parent / "copy")
    printed, said = say("simulate", "--resume", RUN, "--json")
    assert f"{RUN} has a recipe of version 1; it is read as version 2" in said
    if (found := json.loads(printed)["checkpoint"]["sha256"]) != WHOLE:
        skip_on_other_bits(copy, RUN, 2, monkeypatch)
    assert found == WHOLE


def test_it_takes_more_rounds(old: Path) -> None:
    printed, said = say("simulate", "--extend", RUN, "--rounds", "5", "--json")
    assert f"{RUN} has a recipe of version 1; it is read as version 2" in said
    assert json.loads(printed)["checkpoint"]["round"] == 5
    with Store.open() as store:
        assert json.loads(store.run(RUN).recipe)["version"] == 2


def test_it_is_exported_as_a_table_and_as_a_model(old: Path, tmp_path: Path) -> None:
    say("runs", "export", RUN, "--format", "csv", "-o", str(tmp_path / "rows"))
    assert (tmp_path / "rows").exists()
    say("export", RUN, "-o", str(tmp_path / "model"))
    assert (tmp_path / "model" / "model.safetensors").is_file()
