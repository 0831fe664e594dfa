"""A run that begins with what another one learned, and a run that goes on past its end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fedtune import checkpoint
from fedtune import paths as homes
from fedtune.cli.main import cli
from fedtune.errors import FedtuneError, RecipeError, SourceError, StoreError
from fedtune.models.sources import resolve_model_source, run_folder
from fedtune.server.selection import check_base_for_devices
from fedtune.tracking import Store, claim_run
from tests.federations import TRIVIAL, WORDS, execute, outcome, trivial, words

CONSTANT = "train.lr_schedule=constant"


@pytest.fixture(autouse=True)
def own_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = homes.get_cache_folder()
    monkeypatch.setenv("FEDTUNE_CACHE", str(home / "cache"))
    for name in kept.iterdir() if kept.is_dir() else ():
        if len(name.name) == 64:  # samples that were fetched
            (home / "cache").mkdir(parents=True, exist_ok=True)
            (home / "cache" / name.name).symlink_to(name)


def command(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(cli, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def simulated(folder: Path, text: str, *overrides: str) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    settings = [word for override in overrides for word in ("--set", override)]
    return command("simulate", str(path), "--workers", "1", *settings)


def value(run: dict[str, Any], part: str, number: int, name: str = "loss") -> float:
    [found] = [
        m["value"]
        for m in run["metrics"]
        if (m["split"], m["round"], m["domain"], m["name"]) == (part, number, "all", name)
    ]
    return float(found)


def test_a_run_begins_with_the_very_weights_another_ended_with(home: Path, tmp_path: Path) -> None:
    first = simulated(tmp_path, TRIVIAL)
    second = simulated(tmp_path, TRIVIAL, "model.source=run:latest", "federation.rounds=1")
    assert second["recipe"]["model"]["source"] == f"run:{first['id']}@2"
    start = checkpoint.read_checkpoint(homes.get_runs_folder() / second["id"] / "round-0000.safetensors")
    end = checkpoint.read_checkpoint(homes.get_runs_folder() / first["id"] / "round-0002.safetensors")
    assert start.keys() == end.keys()
    assert all(torch.equal(start[name], end[name]) for name in end)
    assert value(second, "validation", 0) == value(first, "validation", 2)
    third = simulated(tmp_path, TRIVIAL, f"model.source=run:{first['id'][:-2]}@0", "federation.rounds=1")
    assert value(third, "validation", 0) == value(first, "validation", 0)
    assert third["checkpoint"]["sha256"] == simulated(tmp_path, TRIVIAL, "federation.rounds=1")["checkpoint"]["sha256"]


def test_low_rank_pairs_are_folded_into_the_base_they_are_trained_on_next(home: Path, tmp_path: Path) -> None:
    words(tmp_path)  # writes the model and the data
    text = WORDS.format(folder=tmp_path)
    first = simulated(tmp_path, text)
    second = simulated(tmp_path, text, "model.source=run:latest", "train.techniques=bias", "federation.rounds=1")
    assert value(second, "validation", 0) == pytest.approx(value(first, "validation", 2), abs=1e-6)
    assert value(second, "validation", 0) != value(first, "validation", 0)
    again = command("simulate", "--extend", second["id"], "--rounds", "2")
    assert again["recipe"]["model"] == second["recipe"]["model"]
    shown = command("evaluate", second["id"], "--round", "0")
    assert {m["name"]: m["value"] for m in shown["metrics"] if m["domain"] == "all"}["loss"] == value(
        second, "validation", 0
    )


def test_a_run_goes_on_though_its_base_is_gone_from_the_cache_and_is_made_again(home: Path, tmp_path: Path) -> None:
    simulated(tmp_path, TRIVIAL)
    second = simulated(tmp_path, TRIVIAL, "model.source=run:latest", CONSTANT)
    source = second["recipe"]["model"]["source"]
    shutil.rmtree(run_folder(source.removeprefix("run:")))
    with pytest.raises(SourceError, match="is not at hand here; start with fedtune simulate, or export it"):
        resolve_model_source(source)
    longer = command("simulate", "--extend", second["id"], "--rounds", "3")
    whole = simulated(tmp_path, TRIVIAL, f"model.source={source}", CONSTANT, "federation.rounds=3")
    assert longer["checkpoint"]["sha256"] == whole["checkpoint"]["sha256"]


def test_a_base_whose_round_was_done_again_since_is_made_again(home: Path, tmp_path: Path) -> None:
    first = simulated(tmp_path, TRIVIAL)
    simulated(tmp_path, TRIVIAL, "model.source=run:latest", "federation.rounds=1")
    folder = run_folder(f"{first['id']}@2")
    (folder / "README.md").write_text("of other weights", encoding="utf-8")
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"")
    simulated(tmp_path, TRIVIAL, f"model.source=run:{first['id']}@2", "federation.rounds=1")
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("run:nobody", "the store holds no run yet"),
        ("run:x@two", "'two' is not a round number; write run:ID@ROUND"),
        ("'run:'", "the store holds no run yet"),
    ],
)
def test_a_run_that_is_not_there_is_refused_before_anything_is_recorded(
    home: Path, tmp_path: Path, source: str, said: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TRIVIAL, encoding="utf-8")
    done = CliRunner().invoke(cli, ["simulate", str(path), "--set", f"model.source={source}"])
    assert isinstance(done.exception, FedtuneError)
    assert said in str(done.exception)
    with Store.open() as store:
        assert store.runs() == []


def test_devices_are_not_asked_to_begin_with_a_run_of_somebody_elses_store() -> None:
    with pytest.raises(RecipeError, match="devices have no run store; export it"):
        check_base_for_devices(trivial("model.source=run:film-1a2b@3"))


@pytest.mark.parametrize("more", [(), ("federation.asynchronous={buffer: 2}",)])
def test_an_extended_run_has_the_bits_of_one_planned_that_long(home: Path, more: tuple[str, ...]) -> None:
    whole = execute(trivial(CONSTANT, "federation.rounds=4", *more), run="whole")
    execute(trivial(CONSTANT, *more), run="short")
    command("simulate", "--extend", "short", "--rounds", "4")
    longer = outcome("short")
    assert longer.hashes == whole.hashes
    assert (longer.run.status, longer.run.rounds_planned, longer.run.rounds_completed) == ("completed", 4, 4)
    tests = [record.number for record in longer.rounds if any(m.split == "test" for m in record.metrics)]
    assert tests == [2, 4]


def test_epsilon_goes_on_from_where_it_was(home: Path) -> None:
    recipe = trivial(CONSTANT, "privacy={clip: 0.03, noise: 1.5}")
    execute(recipe, run="short")
    command("simulate", "--extend", "short", "--rounds", "4")
    whole = execute(trivial(CONSTANT, "privacy={clip: 0.03, noise: 1.5}", "federation.rounds=4"), run="whole")
    spent = [
        [m.value for r in run.rounds for m in r.metrics if m.split == "privacy"] for run in (outcome("short"), whole)
    ]
    assert spent[0] == spent[1]
    assert len(spent[0]) == 4


def test_a_schedule_that_counts_rounds_is_said_to_begin_again(home: Path) -> None:
    execute(trivial(), run="short")
    done = CliRunner().invoke(cli, ["simulate", "--extend", "short", "--rounds", "4", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "the linear schedule now covers 4 rounds: round 3 starts at 0.5 of train.lr" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--extend", "short", "--rounds", "2"],
            "already has 2 rounds; --rounds is the total, so give a larger number",
        ),
        (["--extend", "remote", "--rounds", "3"], "belongs to a server; submit a recipe"),
        (["--extend", "short"], "--extend RUN and --rounds N go together"),
        (["--resume", "short", "--rounds", "3"], "--extend RUN and --rounds N go together"),
        (["--resume", "short", "--extend", "short", "--rounds", "3"], "name either a RECIPE or a run"),
        (["--extend", "short", "--rounds", "3", "--set", "seed=1"], "a resumed run keeps its recipe"),
    ],
)
def test_what_cannot_be_extended_is_refused_and_left_as_it_was(home: Path, arguments: list[str], said: str) -> None:
    before = execute(trivial("federation.rounds=2"), run="short")
    with Store.open() as store:
        store.create_run(id="remote", name="r", recipe=before.run.recipe, seed=0, engine="devices", rounds_planned=2)
    done = CliRunner().invoke(cli, ["simulate", *arguments])
    assert done.exit_code != 0
    assert said in done.output + str(done.exception)
    assert outcome("short") == before


def test_a_run_that_is_being_executed_is_not_extended(home: Path) -> None:
    execute(trivial(), run="short")
    with claim_run("short"):
        done = CliRunner().invoke(cli, ["simulate", "--extend", "short", "--rounds", "4"])
    assert isinstance(done.exception, StoreError)
    assert outcome("short").run.rounds_planned == 2
