"""Keys and values of version 1, wherever they are written, mean what they meant."""

from pathlib import Path
from typing import Any, get_args

import click
import pytest
import yaml
from click.testing import CliRunner

from fedtune.cli.main import cli
from fedtune.cli.task_choice import TaskChoice
from fedtune.errors import RecipeError
from fedtune.recipe.schema import PartitionSettings, Recipe, Train, Unit
from fedtune.recipe.task_settings import list_task_names
from fedtune.recipe.unit_registry import build_unit, list_unit_names
from fedtune.recipe.version_names import KEYS, NESTED_UNIT_KEYS, UNIT_KEYS, UNIT_NAMES, UNIT_VALUES, VALUES
from fedtune.recipe.versions import translate_path, translate_recipe, translate_unit
from fedtune.recipe.yaml_file import parse_recipe, read_recipe
from tests.recipe_examples import TEXT, refusal

ROOMS = ("fedtune.techniques", "fedtune.merging")


def room_of(unit: str) -> str:
    [room] = [room for room in ROOMS if unit in list_unit_names(room)]
    return room


def models_in(annotation: Any) -> list[Any]:
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [model for inner in get_args(annotation) for model in models_in(inner)]


def fields_at(key: str) -> dict[str, Any]:
    """The fields of a recipe below a key of version 2."""
    models: list[Any] = [Recipe]
    for part in key.split(".") if key else []:
        found = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        models = [model for annotation in found for model in models_in(annotation)]
    return {name: field for model in models for name, field in model.model_fields.items()}


@pytest.mark.parametrize("key", sorted(KEYS))
def test_an_old_key_leads_to_a_key_of_today_and_is_none_itself(key: str) -> None:
    *above, new = translate_path(tuple(key.split(".")))
    fields = fields_at(".".join(map(str, above)))
    assert new in fields
    assert key.rpartition(".")[2] not in fields


@pytest.mark.parametrize("key", sorted(VALUES))
def test_an_old_value_is_none_of_today_and_its_successor_is(key: str) -> None:
    *above, new = translate_path(tuple(key.split(".")))
    fields = fields_at(".".join(map(str, above)))
    assert new in fields
    allowed = set(get_args(fields[str(new)].annotation))
    if new == "kind":
        allowed = {model.model_fields["kind"].default for model in models_in(PartitionSettings)}
    if key == "task":
        allowed = set(list_task_names())
    assert set(VALUES[key].values()) <= allowed
    assert not set(VALUES[key]) & allowed


@pytest.mark.parametrize("unit", sorted(UNIT_KEYS))
def test_old_settings_of_units_lead_to_settings_of_today(unit: str) -> None:
    fields = type(build_unit(room_of(unit), Unit(name=unit), "here")).model_fields
    assert set(UNIT_KEYS[unit].values()) <= set(fields)
    assert not set(UNIT_KEYS[unit]) & set(fields)
    for old, values in UNIT_VALUES.get(unit, {}).items():
        allowed = set(get_args(fields[UNIT_KEYS[unit][old]].annotation))
        assert set(values.values()) <= allowed
        assert not set(values) & allowed


def test_old_names_of_units_are_aliases() -> None:
    known = list_unit_names("fedtune.techniques")
    assert set(UNIT_NAMES.values()) <= set(known)
    assert not set(UNIT_NAMES) & set(known)
    assert [Unit.model_validate(old).name for old in UNIT_NAMES] == list(UNIT_NAMES.values())
    assert set(UNIT_VALUES) <= set(UNIT_KEYS)
    assert {unit for unit, _ in NESTED_UNIT_KEYS} <= set(UNIT_KEYS)


def test_settings_below_a_setting_follow() -> None:
    old = {"deft": {"skip": {"gamma": 1.0, "below": 0.1}}}
    new = {"deft": {"skip_mlps": {"penalty": 1.0, "skip_below": 0.1}}}
    assert translate_unit(old) == translate_unit(new) == new
    long = {"name": "deft", "settings": {"skip": {"gamma": 1.0}}}
    assert translate_unit(long) == {"name": "deft", "settings": {"skip_mlps": {"penalty": 1.0}}}


def test_translating_twice_changes_nothing() -> None:
    once = translate_recipe(yaml.safe_load(TEXT))
    assert translate_recipe(once) == once
    assert Recipe.model_validate(once) == parse_recipe(TEXT, "a")


@pytest.mark.parametrize("text", [TEXT, yaml.safe_dump(translate_recipe(yaml.safe_load(TEXT)))])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("train.batch=3", "train.batch_size=3"),
        ("data.split={kind: natural, by: author}", "data.partition={kind: natural, column: author}"),
        ("data.split.alpha=3", "data.partition.alpha=3"),
        ("federation.late.buffer=2", "federation.asynchronous.buffer_size=2"),
        ("federation.selection={prefer: longest-ago}", "federation.selection.sampling=least-recent"),
        ("task=causal-language-modelling", "task=text-generation"),
        ("train.techniques=norm", "train.techniques=[batch-norm]"),
        ("merge=[mean: {weight: equal}]", "merge=[mean: {weighting: equal}]"),
        ("train.optimizer=sgd", "train.optimiser=sgd"),
    ],
)
def test_an_override_may_say_it_in_the_old_words(text: str, old: str, new: str) -> None:
    assert parse_recipe(text, "a", [old]) == parse_recipe(text, "a", [new]) != parse_recipe(text, "a")


def test_a_key_under_both_names_is_refused_in_the_line_of_the_old_one() -> None:
    text = TEXT.replace("  steps: 2", "  steps: 2\n  local_steps: 3")
    assert refusal(text).startswith("a.yaml, line 15: unknown key 'train.steps'")
    both = {"techniques": "full", "optimizer": "sgd", "optimiser": "sgd", "local_steps": 1}
    with pytest.raises(ValueError, match="optimizer"):
        Train.model_validate(both)
    twice = Unit(name="nuslerp", settings={"over": "row", "granularity": "row"})
    with pytest.raises(RecipeError, match="unknown key 'over'"):
        build_unit("fedtune.merging", twice, "merge")


def test_a_file_of_version_2_knows_no_old_keys() -> None:
    assert refusal(f"version: 2\n{TEXT}").startswith("a.yaml, line 8: unknown key 'data.split'")


@pytest.mark.parametrize("version", ["3", "0", "two", "2.5", "null"])
def test_an_unknown_version_is_refused_with_the_newest(version: str) -> None:
    said = refusal(f"version: {version}\n{TEXT}")
    assert said.startswith("a.yaml, line 1: version is ")
    assert said.endswith(", but the newest that is known here is 2; update fedtune")
    assert refusal(TEXT, "version=3") == "--set version=3: version is 3, but must be 2"


def test_one_line_says_that_a_file_is_old_where_that_changes_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(TEXT)
    read_recipe(path)
    said = f"fedtune: {path} is a recipe of version 1; fedtune recipe upgrade {path} writes version 2\n"
    assert capsys.readouterr().err == said
    upgraded = translate_recipe(yaml.safe_load(TEXT))
    for value in (upgraded, {key: entry for key, entry in upgraded.items() if key != "version"}):
        path.write_text(yaml.safe_dump(value))
        read_recipe(path)
    assert capsys.readouterr().err == ""


def test_the_page_on_versions_lists_every_old_name() -> None:
    page = (Path(__file__).parent.parent / "docs" / "recipe-versions.md").read_text()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    pairs = {(old.strip().strip("`"), new.strip().strip("`")) for old, new in rows}
    keys = {(key, ".".join(map(str, translate_path(tuple(key.split(".")))))) for key in KEYS}
    values = {(f"{key}: {old}", new) for key, found in VALUES.items() for old, new in found.items()}
    units = {(f"{unit}: {old}", new) for unit, found in UNIT_KEYS.items() for old, new in found.items()}
    unit_values = {
        (f"{unit}: {key}: {old}", new)
        for unit, found in UNIT_VALUES.items()
        for key, each in found.items()
        for old, new in each.items()
    }
    nested = {
        (f"{unit}: {key}.{old}", new) for (unit, key), found in NESTED_UNIT_KEYS.items() for old, new in found.items()
    }
    assert pairs == keys | values | set(UNIT_NAMES.items()) | units | unit_values | nested


def test_commands_take_old_names_of_techniques(tmp_path: Path) -> None:
    for old, new in UNIT_NAMES.items():
        cards = [CliRunner().invoke(cli, ["methods", name]) for name in (old, new)]
        assert cards[0].exit_code == 0
        assert cards[0].output == cards[1].output
    path = tmp_path / "a.yaml"
    path.write_text(TEXT)
    recipe = read_recipe(path, ["train.techniques=lora+checkpointing"])
    assert [unit.name for unit in recipe.train.techniques] == ["lora", "gradient-checkpointing"]


def test_the_option_task_takes_old_names() -> None:
    choice = TaskChoice(["text-generation", "text-classification", "image-classification"])
    for old, new in VALUES["task"].items():
        assert choice.convert(old, None, None) == choice.convert(new, None, None) == new
    with pytest.raises(click.BadParameter, match="'regression' is not one of 'text-generation'"):
        choice.convert("regression", None, None)
