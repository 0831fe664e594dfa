import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.errors import RecipeError
from fedtune.recipe.schema import (
    DataSettings,
    DeviceClass,
    Dirichlet,
    Federation,
    ModelSettings,
    Natural,
    Recipe,
    TaskUnit,
    Train,
    Unit,
)
from fedtune.recipe.validation_errors import suggest_nearest
from fedtune.recipe.yaml_file import parse_recipe, read_recipe
from fedtune.simulation import resolve_recipe
from tests.recipe_examples import TEXT, refusal

SHIPPED = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def test_a_recipe_is_read_with_its_types(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(TEXT)
    recipe = read_recipe(tmp_path / "a.yaml")
    assert recipe.data.partition == Dirichlet(alpha=0.5)
    assert recipe.train.techniques == [Unit(name="lora", settings={"rank": 4}), Unit(name="gradient-checkpointing")]
    assert [int(device.memory) for device in recipe.devices] == [512 * 10**6, 2 * 2**30]
    assert (recipe.num_clients, recipe.cohort_size, recipe.seed) == (5, 5, 0)


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("lora+gradient-checkpointing", ["lora", "gradient-checkpointing"]),
        ("bias", ["bias"]),
        ("[bias, {full: {}}]", ["bias", "full"]),
    ],
)
def test_techniques_are_a_list_or_joined_by_plus(written: str, names: list[str]) -> None:
    assert [unit.name for unit in parse_recipe(TEXT, "a", [f"train.techniques={written}"]).train.techniques] == names


@pytest.mark.parametrize("settings", ["{lora: {rank: 4}}", "{name: lora, settings: {rank: 4}}"])
def test_a_unit_is_written_short_or_long(settings: str) -> None:
    recipe = parse_recipe(TEXT, "a", [f"train.techniques=[{settings}]"])
    assert recipe.train.techniques == [Unit(name="lora", settings={"rank": 4})]


def test_a_unit_with_nothing_behind_its_name_has_no_settings() -> None:
    assert parse_recipe(TEXT, "a", ["train.techniques=[{lora: }]"]).train.techniques == [Unit(name="lora")]


def test_overrides_go_deep_make_what_is_absent_and_the_last_one_wins() -> None:
    overrides = [
        "train.lr=1e-3",
        "evaluation.every_n_rounds=2",
        "train.lr=5e-4",
        "data.partition={kind: natural, by: author}",
    ]
    recipe = parse_recipe(TEXT, "a.yaml", overrides)
    assert recipe.train.lr == 5e-4
    assert recipe.evaluation.every_n_rounds == 2
    assert recipe.data.partition == Natural(column="author")
    assert recipe.train.local_steps == 2


def test_a_value_may_hold_an_equals_sign() -> None:
    assert parse_recipe(TEXT, "a", ["model.source=path:a=b"]).model.source == "path:a=b"


@pytest.mark.parametrize(
    ("federation", "clients", "sampled"),
    [("{rounds: 1, fraction: 0.5}", 5, 2), ("{rounds: 1, fraction: 0.01}", 5, 1), ("{rounds: 1, clients: 3}", 5, 3)],
)
def test_clients_per_round_follow_the_fraction_or_the_count(federation: str, clients: int, sampled: int) -> None:
    recipe = parse_recipe(TEXT, "a", [f"federation={federation}"])
    assert (recipe.num_clients, recipe.cohort_size) == (clients, sampled)


@pytest.mark.parametrize(
    ("federation", "sentence"),
    [
        ("{rounds: 1, clients: 6}", "a.yaml: federation.clients_per_round is 6, but devices has only 5"),
        ("{rounds: 1, quorum: 6}", "a.yaml: federation.quorum is above the 5 clients sampled each round"),
        ("{rounds: 1, clients: 2, quorum: 3}", "a.yaml: federation.quorum is above the 2 clients sampled each round"),
        ("{rounds: 1, fraction: 0.4, quorum: 3}", "a.yaml: federation.quorum is above the 2 clients"),
    ],
)
def test_a_round_cannot_ask_for_more_clients_than_there_are(federation: str, sentence: str) -> None:
    assert refusal(TEXT, f"federation={federation}").startswith(sentence)


def test_a_quorum_of_all_sampled_clients_holds() -> None:
    assert parse_recipe(TEXT, "a", ["federation={rounds: 1, clients: 2, quorum: 2}"]).federation.quorum == 2


def test_clients_are_numbered_through_the_device_classes() -> None:
    recipe = parse_recipe(TEXT, "a")
    assert [recipe.get_device_class(client).name for client in range(5)] == ["phone"] * 3 + ["laptop"] * 2
    with pytest.raises(IndexError):
        recipe.get_device_class(5)


def test_a_recipe_is_a_value() -> None:
    assert parse_recipe(TEXT, "a") == parse_recipe(TEXT, "b")
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(TEXT, "a").seed = 3  # type: ignore[misc]


def test_json_and_yaml_give_the_recipe_back() -> None:
    recipe = resolve_recipe(parse_recipe(TEXT, "a", ["train.max_grad_norm=null", "merge=[{mean: {weight: equal}}]"]))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    again = parse_recipe(yaml.safe_dump(recipe.model_dump(mode="json")), "again")
    assert again == recipe
    assert again.train.max_grad_norm is None


def test_resolving_writes_every_setting_out_and_changes_nothing_the_second_time() -> None:
    recipe = parse_recipe(TEXT, "a")
    resolved = resolve_recipe(recipe)
    assert resolved.train.techniques[0].settings["rank"] == 4
    assert set(resolved.train.techniques[0].settings) == {
        "rank",
        "alpha",
        "dropout",
        "target_modules",
        "trained_factors",
    }
    assert resolved.merge == [Unit(name="mean", settings={"weighting": "examples"})]
    assert resolve_recipe(resolved) == resolved
    assert recipe.train.techniques[0].settings == {"rank": 4}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.techniques=lroa", "train.techniques: there is no 'lroa'; did you mean 'lora'?"),
        ("train.techniques=[{lora: {rnk: 2}}]", "train.techniques, lora: unknown key 'rnk'; did you mean 'rank'?"),
        ("train.techniques=[{lora: {rank: 0}}]", "train.techniques, lora: rank is 0, but must be greater than or"),
        (
            "train.techniques=lora+full",
            "train.techniques: lora cannot be combined with full: full trains the weights that lora freezes; drop one",
        ),
        ("merge=[maen]", "merge: there is no 'maen'; did you mean 'mean'?"),
        ("merge=[mean, mean]", "merge: 2 steps combine, but exactly one must; keep or add one, e.g. mean"),
    ],
)
def test_resolving_refuses_units_that_do_not_hold(override: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(parse_recipe(TEXT, "a", [override]))
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_holds_resolves_and_survives_json(path: Path) -> None:
    resolved = resolve_recipe(read_recipe(path))
    assert resolved.name == read_recipe(path).name
    assert Recipe.model_validate_json(resolved.model_dump_json()) == resolved


def test_the_demo_is_shipped() -> None:
    assert {"sentiment", "lm", "digits"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize(
    ("word", "answer"), [("stps", "did you mean 'steps'?"), ("zzz", "allowed: epochs, steps"), ("", "allowed: epochs")]
)
def test_the_nearest_word_or_all_that_are_allowed(word: str, answer: str) -> None:
    assert suggest_nearest(word, ["steps", "epochs"]).startswith(answer)


def test_a_number_that_json_cannot_hold_never_enters_a_recipe() -> None:
    stored: dict[str, Any] = json.loads(parse_recipe(TEXT, "a").model_dump_json())
    stored["train"]["lr"] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        Recipe.model_validate(stored)


def test_a_recipe_is_built_by_keywords() -> None:
    built = Recipe(
        name="trivial",
        task=TaskUnit(name="image-classification"),
        model=ModelSettings(source="sample:logistic"),
        data=DataSettings(source="sample:digits"),
        devices=[DeviceClass(name="toy", count=4)],
        train=Train(techniques=[Unit(name="full")], optimiser="sgd", local_steps=2),
        federation=Federation(rounds=2),
    )
    written = """
version: 2
name: trivial
task: image-classification
model: {source: "sample:logistic"}
data: {source: "sample:digits"}
devices: [{name: toy, count: 4}]
train: {techniques: full, optimiser: sgd, local_steps: 2}
federation: {rounds: 2}
"""
    assert built == parse_recipe(written, "here")
    assert resolve_recipe(built) == resolve_recipe(parse_recipe(written, "here"))
