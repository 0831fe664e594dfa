"""What ``fedtune evaluate`` does with options that do not go together, and which examples it scores."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedtune import paths as homes
from fedtune.cli.main import cli
from tests.federations import execute, trivial


def evaluate(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["evaluate", *arguments])
    return done.exit_code, done.output + str(done.exception or "")


@pytest.fixture
def checkpoint(home: Path) -> str:
    ended = execute(trivial("federation.rounds=1"), run="run-1")
    saved = ended.rounds[0].checkpoint
    assert saved is not None
    return str(homes.get_runs_folder() / saved.path)


def test_options_that_would_do_nothing_are_refused(checkpoint: str) -> None:
    for command in (["evaluate", checkpoint, "--round", "1"], ["export", checkpoint, "--round", "0", "-o", "x"]):
        done = CliRunner().invoke(cli, command)
        assert done.exit_code
        assert "is already the checkpoint of one round; remove --round" in str(done.exception)
    assert not Path("x").exists()
    code, said = evaluate("run-1", "--data", "sample:digits", "--split", "test")
    assert code == 2
    assert "--split selects a split of the run's own data" in said
    code, said = evaluate("run-1", "--columns", "label=label")
    assert code == 2
    assert "--columns names the columns of --data" in said


def test_the_validation_part_is_scored_unless_another_is_named(checkpoint: str) -> None:
    told = [json.loads(evaluate(*words, "--json")[1]) for words in ([checkpoint], ["run-1", "--round", "0"])]
    assert told[0] == told[1]
    assert told[0]["data"] == "validation"
    assert json.loads(evaluate("run-1", "--split", "test", "--json")[1])["data"] == "test"
    assert json.loads(evaluate("run-1", "--data", "sample:digits", "--json")[1])["data"] == "sample:digits"
