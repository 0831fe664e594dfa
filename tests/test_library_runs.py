"""``fedtune.simulate`` and ``fedtune.runs``: the bits of the command, callbacks, and what the store holds."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

import fedtune
from fedtune.cli.simulate import simulate as simulate_command
from fedtune.errors import RecipeError, StoreError
from fedtune.tracking import Store
from tests.federations import TRIVIAL

ROUNDS = 3


def list_hashes(rounds: list[Any]) -> list[str]:
    return [record.checkpoint.sha256 for record in rounds]


def list_metrics(rounds: list[Any]) -> list[Any]:
    return [record.metrics for record in rounds]


@pytest.fixture
def recipe_file(home: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TRIVIAL, encoding="utf-8")
    return path


def test_a_simulation_has_the_bits_of_the_command_also_when_a_callback_stopped_it(recipe_file: Path) -> None:
    words = [str(recipe_file), "--set", f"federation.rounds={ROUNDS}", "--workers", "1", "--json"]
    assert CliRunner().invoke(simulate_command, words, catch_exceptions=False).exit_code == 0
    with Store.open() as store:
        expected = store.rounds(store.run("latest").id)
    given = yaml.safe_load(TRIVIAL)
    overrides = {"federation.rounds": ROUNDS}
    whole = fedtune.simulate(given, overrides=overrides, workers=1)
    assert whole.status == "completed"
    assert list_hashes(whole.rounds) == list_hashes(expected)
    assert list_metrics(whole.rounds) == list_metrics(expected)

    def stop_after_one(event: object) -> None:
        if isinstance(event, fedtune.RoundEnded) and event.record.number == 1:
            raise fedtune.StopRun

    recipe = fedtune.load_recipe(recipe_file, [f"federation.rounds={ROUNDS}"])
    stopped = fedtune.simulate(recipe, callbacks=[stop_after_one], workers=1)
    assert stopped.status == "interrupted"
    assert [record.number for record in stopped.rounds] == [0, 1]
    seen: list[Any] = []
    resumed = fedtune.simulate(stopped, callbacks=[seen.append], workers=1)
    assert (resumed, resumed.status) == (stopped, "completed")
    assert list_hashes(resumed.rounds) == list_hashes(expected)
    assert [one.record.number for one in seen if isinstance(one, fedtune.RoundEnded)] == [2, 3]


def test_a_run_has_tables_and_its_model(recipe_file: Path, tmp_path: Path) -> None:
    run = fedtune.simulate(recipe_file, workers=1)
    found = fedtune.runs()
    assert list(found) == [run]
    assert found["latest"] == found[0] == found[run.id[:8]] == run
    frame = found.to_pandas("metrics")
    assert frame.equals(run.metrics.to_pandas())
    told = [metric.value for record in run.rounds for metric in record.metrics]
    assert frame["value"].tolist() == told
    assert found.to_pandas()["status"].tolist() == ["completed"]
    assert run.recipe.federation.rounds == 2
    with pytest.raises(ValueError, match="there is no table 'metric'; choose one of runs, rounds, "):
        found.to_arrow("metric")  # type: ignore[arg-type]
    first, last = run.load_model(0), run.load_model()
    assert not last.training
    changed = [not torch.equal(one, other) for one, other in zip(first.parameters(), last.parameters(), strict=True)]
    assert any(changed)
    exported = run.export(tmp_path / "exported", form="model")
    assert run.id in (exported / "README.md").read_text(encoding="utf-8")


def test_wrong_recipes_and_resumes_are_refused(recipe_file: Path) -> None:
    given = yaml.safe_load(TRIVIAL)
    with pytest.raises(RecipeError, match=r"the recipe, line \d+: unknown key 'train.lrr'; did you mean 'lr'\?"):
        fedtune.simulate({**given, "train": {**given["train"], "lrr": 1}})
    with pytest.raises(RecipeError, match=r"--set train\.lr=-1"):
        fedtune.simulate(recipe_file, overrides={"train.lr": -1})
    assert list(fedtune.runs()) == []
    run = fedtune.simulate(recipe_file, workers=1)
    with pytest.raises(StoreError, match="keeps its recipe"):
        fedtune.simulate(run, overrides={"train.lr": 1})
    with pytest.raises(StoreError, match="is completed; there is nothing to resume"):
        fedtune.simulate(run)


def test_an_error_of_a_callback_reaches_the_caller(recipe_file: Path) -> None:
    def fail(event: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fedtune.simulate(recipe_file, callbacks=[fail], workers=1)
    assert [run.status for run in fedtune.runs()] == ["interrupted"]


def test_import_fedtune_imports_nothing_slow() -> None:
    code = "import sys, fedtune; dir(fedtune); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.partition(".")[0] == "fedtune"}
    assert ours == {"fedtune"}
    assert not set(done.stdout.split()) & {"torch", "numpy", "pydantic", "transformers", "sqlalchemy", "flwr"}


def test_every_public_name_exists_and_is_documented() -> None:
    names = [name for name in dir(fedtune) if name in fedtune._MODULES]
    assert {"prepare", "measure", "merge", "simulate", "runs", "load_recipe", "Recipe"} <= set(names)
    for name in names:
        assert inspect.getdoc(getattr(fedtune, name)), name
    with pytest.raises(AttributeError, match="module 'fedtune' has no attribute 'prepair'"):
        _ = fedtune.prepair
