"""What ``--json`` prints is JSON that every reader takes."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

import fedtune
from fedtune.cli.main import cli
from fedtune.json_text import json_text
from tests.federations import TRIVIAL


def strict(text: str) -> object:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null_at_any_depth() -> None:
    told = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "ü": "NaN"}
    assert strict(json_text(told)) == {"a": [1.5, None, [None, {"b": None}]], "ü": "NaN"}


def test_what_a_terminal_would_act_on_is_escaped_and_the_rest_is_readable() -> None:
    told = {"why": "\x1b]0;x\x07 \x9b2J \u202e \u200b ü 漢 🙂 \udc80", "\u2028": 1}
    text = json_text(told)
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "ü 漢 🙂" in text
    assert strict(text) == told
    text.encode("utf-8")


def test_every_command_prints_by_it() -> None:
    folder = Path(fedtune.__file__).parent / "cli"
    assert [path.name for path in folder.glob("*.py") if "json.dumps(" in path.read_text()] == []


def test_a_score_that_is_no_number_is_null(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune import training
    from fedtune.training import Metric

    path = tmp_path / "recipe.yaml"
    path.write_text(TRIVIAL, encoding="utf-8")
    CliRunner().invoke(cli, ["simulate", str(path), "--workers", "1", "--json"], catch_exceptions=False)
    monkeypatch.setattr(training, "evaluate_model", lambda *_, **__: [Metric("all", "loss", math.nan)])
    done = CliRunner().invoke(cli, ["evaluate", "latest", "--json"], catch_exceptions=False)
    told = strict(done.stdout)
    assert isinstance(told, dict)
    assert told["metrics"] == [{"domain": "all", "name": "loss", "value": None}]
