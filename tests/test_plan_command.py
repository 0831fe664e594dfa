"""``fedtune plan`` on given traces: its table, its JSON, its recipe and its exit code; and plans for device classes."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fedtune.cli.main import cli
from fedtune.errors import RecipeError
from fedtune.plan.auto_techniques import (
    CompatiblePlans,
    choose_compatible_plans,
    has_auto_techniques,
    plan_auto_techniques,
)
from fedtune.plan.cache import read_entry, write_entry
from fedtune.plan.candidates import list_candidates
from fedtune.plan.plans import list_plans
from fedtune.recipe.schema import Train
from fedtune.recipe.yaml_file import parse_recipe, read_recipe
from fedtune.tracking import Store
from tests.plan_examples import MB, RUNTIMES, TRACES, give_traces
from tests.profile_examples import TEXT
from tests.store_examples import a_client_record, a_round, start


@pytest.fixture(autouse=True)
def _given_traces(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    give_traces(monkeypatch)


def run(*words: str) -> Result:
    start = ["plan", "--model", "path:model", "--task", "text-classification", "--batch", "4"]
    return CliRunner().invoke(cli, [*start, *words], env={"COLUMNS": "100"})


def test_the_fastest_plan_that_fits_is_recommended() -> None:
    told = json.loads(run("--memory", "600MB", "--json").stdout)
    assert told["budget"] == 600 * MB
    assert (told["recommended"]["name"], told["recommended"]["micro_batch"]) == ("lora", 4)
    smaller = json.loads(run("--memory", "400MB", "--json").stdout)
    assert (smaller["recommended"]["name"], smaller["recommended"]["micro_batch"]) == ("lora", 2)
    assert smaller["with_25_percent_more"]["name"] == "lora"
    assert {plan["name"] for plan in told["plans"]} == {"lora", "lora+gradient-checkpointing", "meft"}


def test_the_table_names_what_more_and_less_memory_give() -> None:
    done = run("--memory", "280MB")
    assert done.exit_code == 0, done.output
    assert "recommended: lora with micro-batches of 1 has exact gradients" in done.output
    assert (
        "25 % more memory: lora with micro-batches of 1, the same time" in done.output or "the same plan" in done.output
    )
    assert "25 % less memory: " in done.output


def test_nothing_fits_says_how_much_is_missing() -> None:
    done = run("--memory", "150MB")
    assert done.exit_code == 2
    assert (
        "nothing fits 150 MB: the smallest setting, meft with micro-batches of 1, needs 177 MB, 27 MB more"
        in done.stderr
    )


def test_a_budget_is_asked_for() -> None:
    done = run()
    assert done.exit_code == 2
    assert "--memory 512MB" in done.stderr


def test_the_plan_becomes_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "planned.yaml"
    assert run("--memory", "400MB", "--write", str(path)).exit_code == 0
    written = read_recipe(path)
    assert (written.train.batch_size, [unit.name for unit in written.train.techniques]) == (2, ["lora"])
    again = run("--memory", "400MB", "--write", str(path))
    assert again.exit_code == 2
    assert "exists" in again.stderr


def choose(budgets: dict[str, int], **corrections: float) -> CompatiblePlans:
    plans = list_plans(TRACES, RUNTIMES, Train(local_steps=1))
    return choose_compatible_plans(plans, TRACES, budgets, corrections)


def test_each_device_class_gets_a_plan_and_all_can_be_merged() -> None:
    plans = choose({"phone": 260 * MB, "laptop": 900 * MB})
    assert {name: plan.name for name, plan in plans.by_class.items()} == {
        "phone": "lora+gradient-checkpointing",
        "laptop": "lora",
    }
    assert {plan.name for plan in plans.options} == {"lora+gradient-checkpointing", "lora"}
    tight = choose({"phone": 180 * MB, "laptop": 900 * MB})
    assert {plan.name for plan in tight.by_class.values()} == {"meft"}  # whose rank no other plan has
    with pytest.raises(RecipeError, match="no plan fits phone with 100 MB; meft with micro-batches of 1 needs 177 MB"):
        choose({"phone": 100 * MB})


def test_a_class_that_held_more_than_predicted_gets_a_smaller_plan() -> None:
    assert choose({"phone": 280 * MB}).by_class["phone"].name == "lora"
    corrected = choose({"phone": 280 * MB}, phone=1.2).by_class["phone"]
    assert (corrected.name, corrected.micro_batch) == ("lora+gradient-checkpointing", 2)
    assert corrected.needed_bytes == 190 * MB + (16 << 20)  # what the planner predicts stays as it is
    assert choose({"phone": 280 * MB}, laptop=1.2).by_class["phone"].name == "lora"
    with pytest.raises(RecipeError, match="needs 202 MB, the least of all, 20% more than predicted"):
        choose({"phone": 190 * MB}, phone=1.2)


def test_a_recipe_with_auto_names_the_techniques_of_each_class() -> None:
    devices = "devices=[{name: phone, count: 1, memory: 260MB}, {name: laptop, count: 1, memory: 900MB}]"
    recipe = parse_recipe(TEXT.format(folder="model"), "tiny", ["train.techniques=auto", "train.batch_size=4", devices])
    assert has_auto_techniques(recipe)
    planned, plans = plan_auto_techniques(recipe, ())
    assert not has_auto_techniques(planned)
    assert [unit.name for unit in planned.train.techniques] == ["lora"]
    phone, laptop = planned.devices
    assert phone.techniques is not None
    assert [unit.name for unit in phone.techniques] == ["lora", "gradient-checkpointing"]
    assert (laptop.techniques, laptop.batch_size, plans["laptop"].micro_batch) == (None, None, 4)


def test_auto_beside_techniques_is_refused() -> None:
    mixed = parse_recipe(TEXT.format(folder="model"), "tiny", ["train.techniques=[auto, bias]"])
    with pytest.raises(RecipeError, match="auto chooses all techniques"):
        plan_auto_techniques(mixed, ())
    own = parse_recipe(
        TEXT.format(folder="model"), "tiny", ["train.techniques=auto", "devices=[{count: 1, techniques: lora}]"]
    )
    with pytest.raises(RecipeError, match="device has techniques of its own"):
        plan_auto_techniques(own, ())


def test_a_damaged_entry_of_the_cache_is_made_again(home: Path) -> None:
    write_entry(["a"], [1, 2])
    assert read_entry(["a"]) == [1, 2]
    assert read_entry(["b"]) is None
    for file in (home / "plans").iterdir():
        file.write_text("{")
    assert read_entry(["a"]) is None


def test_a_plan_for_a_recipe_is_corrected_by_what_its_smallest_class_held(tmp_path: Path) -> None:
    path = tmp_path / "auto.yaml"
    devices = "[{name: phone, count: 1, memory: 300MB}, {name: laptop, count: 1, memory: 900MB}]"
    settings = ["train.techniques=auto", "train.batch_size=4", f"devices={devices}"]
    recipe = parse_recipe(TEXT.format(folder="model"), "tiny", settings)
    path.write_text(recipe.model_dump_json())
    words = ["plan", "--recipe", str(path), "--json"]
    before = json.loads(CliRunner().invoke(cli, words, catch_exceptions=False).stdout)
    with Store.open() as store:
        start(store)
        known: dict[str, Any] = {"device_class": "phone", "device_name": "dev", "predicted_anonymous": 100 * MB}
        held = [a_client_record(client, anonymous_memory=120 * MB, **known) for client in range(3)]
        store.commit_round("film-1a2b", a_round(1, client_records=tuple(held)))
    after = json.loads(CliRunner().invoke(cli, words).stdout)
    assert (before["correction"], after["correction"]) == (1.0, 1.2)
    least = before["smallest"]["anonymous_bytes"]
    assert after["smallest"]["anonymous_bytes"] == round(least * 1.2)
    assert after["smallest"]["needed_bytes"] - before["smallest"]["needed_bytes"] == round(least * 1.2) - least
    told = CliRunner().invoke(cli, words[:-1], env={"COLUMNS": "100"}).stdout
    assert "memory: 20% more than traced, as devices of this class held in earlier runs" in told


def test_auto_is_no_candidate_of_a_plan() -> None:
    recipe = parse_recipe(TEXT.format(folder="model"), "tiny", ["train.techniques=auto", "data.source=csv:a.csv"])
    found = list_candidates(recipe, None, is_own_image_model=False)
    assert found
    assert all(unit.name != "auto" for one in found for unit in one.techniques)
