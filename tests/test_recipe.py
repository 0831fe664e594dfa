import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.errors import RecipeError
from fedtune.recipe import Dirichlet, Natural, Recipe, Unit, nearest, parse, read
from fedtune.simulation import resolve

TEXT = """\
name: example
task: sequence-classification
model:
  source: path:nowhere
data:
  source: sample:sentiment
  split: {kind: dirichlet, alpha: 0.5}
devices:
  - {name: phone, count: 3, memory: 512MB}
  - {name: laptop, count: 2, memory: 2GiB}
train:
  techniques:
    - lora: {rank: 4}
    - checkpointing
  steps: 2
federation:
  rounds: 3
"""
SHIPPED = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def with_line(old: str, new: str) -> str:
    assert TEXT.count(old) == 1
    return TEXT.replace(old, new)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(text, "a.yaml", overrides)
    return str(caught.value)


def test_a_recipe_is_read_with_its_types(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(TEXT)
    recipe = read(tmp_path / "a.yaml")
    assert recipe.data.split == Dirichlet(alpha=0.5)
    assert recipe.train.techniques == [Unit(name="lora", settings={"rank": 4}), Unit(name="checkpointing")]
    assert [int(device.memory) for device in recipe.devices] == [512 * 10**6, 2 * 2**30]
    assert (recipe.clients, recipe.clients_per_round, recipe.seed) == (5, 5, 0)


@pytest.mark.parametrize(
    ("written", "names"),
    [("lora+checkpointing", ["lora", "checkpointing"]), ("bias", ["bias"]), ("[bias, {full: {}}]", ["bias", "full"])],
)
def test_techniques_are_a_list_or_joined_by_plus(written: str, names: list[str]) -> None:
    assert [unit.name for unit in parse(TEXT, "a", [f"train.techniques={written}"]).train.techniques] == names


@pytest.mark.parametrize("settings", ["{lora: {rank: 4}}", "{name: lora, settings: {rank: 4}}"])
def test_a_unit_is_written_short_or_long(settings: str) -> None:
    recipe = parse(TEXT, "a", [f"train.techniques=[{settings}]"])
    assert recipe.train.techniques == [Unit(name="lora", settings={"rank": 4})]


def test_a_unit_with_nothing_behind_its_name_has_no_settings() -> None:
    assert parse(TEXT, "a", ["train.techniques=[{lora: }]"]).train.techniques == [Unit(name="lora")]


def test_overrides_go_deep_make_what_is_absent_and_the_last_one_wins() -> None:
    overrides = ["train.lr=1e-3", "evaluation.every=2", "train.lr=5e-4", "data.split={kind: natural, by: author}"]
    recipe = parse(TEXT, "a.yaml", overrides)
    assert recipe.train.lr == 5e-4
    assert recipe.evaluation.every == 2
    assert recipe.data.split == Natural(by="author")
    assert recipe.train.steps == 2


def test_a_value_may_hold_an_equals_sign() -> None:
    assert parse(TEXT, "a", ["model.source=path:a=b"]).model.source == "path:a=b"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("  steps: 2", "  step: 2", "a.yaml, line 15: unknown key 'train.step'; did you mean 'steps'?"),
        ("name: example\n", "nme: example\n", "a.yaml, line 1: unknown key 'nme'; did you mean 'name'?"),
        ("alpha: 0.5", "alfa: 0.5", "a.yaml, line 7: unknown key 'data.split.alfa'; did you mean 'alpha'?"),
        ("count: 3", "cuont: 3", "a.yaml, line 9: unknown key 'devices.0.cuont'; did you mean 'count'?"),
        ("  steps: 2", "  zzz: 2", "a.yaml, line 15: unknown key 'train.zzz'; allowed: batch, by_length, clip, "),
        ("steps: 2", "steps: few", "a.yaml, line 15: train.steps is 'few', but must be a valid integer"),
        ("steps: 2", "steps: 0", "a.yaml, line 15: train.steps is 0, but must be greater than or equal to 1"),
        ("rounds: 3", "rounds: 1.5", "a.yaml, line 17: federation.rounds is 1.5, but must be a valid integer"),
        ("alpha: 0.5", "alpha: 0", "a.yaml, line 7: data.split.alpha is 0, but must be greater than 0"),
        ("kind: dirichlet, ", "", "a.yaml, line 7: the key 'data.split.kind' is missing"),
        ("kind: dirichlet", "kind: skew", "line 7: data.split.kind is 'skew', but must be one of 'iid', 'dirichlet'"),
        ("memory: 2GiB", "memory: 2XB", "a.yaml, line 10: devices.1.memory is '2XB': could not interpret byte unit"),
        ("  source: path:nowhere", "  dtype: float32", "a.yaml, line 3: the key 'model.source' is missing"),
        ("task: sequence-classification\n", "", "a.yaml: the key 'task' is missing"),
        ("sequence-classification", "regression", "a.yaml, line 2: task is 'regression', but must be 'sequence-class"),
        ("name: example\n", "name: An Example\n", "a.yaml, line 1: name is 'An Example', but must match pattern"),
        ("lora: {rank: 4}", "lora: 4", "line 13: train.techniques.0.settings is 4, but must be a mapping of keys to"),
        ("lora: {rank: 4}", "3", "a.yaml, line 13: train.techniques.0 is 3, but must be a mapping of keys to values"),
        ("  steps: 2", "  steps: 2\n  lr: .inf", "a.yaml, line 16: train.lr is inf, but must be a finite number"),
        ("  steps: 2\n", "", "a.yaml, line 11: train: say either steps or epochs, exactly one of them"),
        ("  steps: 2", "  steps: 2\n  epochs: 1", "line 11: train: say either steps or epochs, exactly one of them"),
        ("name: example\n", "1: 2\nname: example\n", "a.yaml: 1 is 1, but must be strings"),
    ],
)
def test_an_error_names_file_line_key_and_what_is_allowed(old: str, new: str, sentence: str) -> None:
    assert sentence in refusal(with_line(old, new))


def test_a_misspelt_key_is_named_before_the_one_it_leaves_missing() -> None:
    sentence = refusal(with_line("  rounds: 3", "  ronds: 3"))
    assert sentence == "a.yaml, line 17: unknown key 'federation.ronds'; did you mean 'rounds'?"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.lr", "--set train.lr: write it as key.key=value, e.g. train.lr=1e-3"),
        ("=3", "--set =3: write it as key.key=value"),
        ("train..lr=3", "--set train..lr=3: write it as key.key=value"),
        ("train.lr=[1", "--set train.lr=[1: the value is not YAML"),
        ("name=2020-13-45", "--set name=2020-13-45: the value is not YAML"),
        ("devices.0.count=1", "--set devices.0.count=1: devices has no keys below it"),
        ("name.first=x", "--set name.first=x: name has no keys below it"),
        ("seed.x=1", "--set seed.x=1: seed is {'x': 1}, but must be a valid integer"),
        ("train.lr=x", "--set train.lr=x: train.lr is 'x', but must be a valid number"),
        ("train.lr=-1", "--set train.lr=-1: train.lr is -1, but must be greater than 0"),
        ("train.bach=1", "--set train.bach=1: unknown key 'train.bach'; did you mean 'batch'?"),
        ("rounds=3", "--set rounds=3: unknown key 'rounds'; allowed: data, devices, evaluation, federation"),
        ("devices=[]", "--set devices=[]: devices is [], but must have at least 1 item"),
        ("devices=[{count: 1, memory: 5XB}]", "--set devices=[{count: 1, memory: 5XB}]: devices.0.memory is '5XB'"),
        ("model=minilm", "--set model=minilm: model is 'minilm', but must be a mapping of keys to values"),
        ("data.split={alpha: 1}", "--set data.split={alpha: 1}: the key 'data.split.kind' is missing"),
        ("data.parts={validation: 0.5, test: 0.5}", "data.parts: validation and test together must leave something"),
    ],
)
def test_an_override_that_does_not_hold_is_named_itself(override: str, sentence: str) -> None:
    assert sentence in refusal(TEXT, "evaluation.every=2", override)


def test_an_override_below_a_setting_is_blamed_though_the_file_has_the_setting() -> None:
    text = with_line("  split: {kind: dirichlet, alpha: 0.5}", "  split: {}")
    assert refusal(text, "data.split.alpha=2").startswith("--set data.split.alpha=2: ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a.yaml holds no recipe: it must be a mapping with keys such as name, task, model, data"),
        ("- a\n- b", "a.yaml holds no recipe"),
        ("a: [", "a.yaml is not YAML: while parsing"),
        ("a: &x [*x]", "a.yaml is not YAML"),
        ("a: 2020-13-45", "a.yaml is not YAML: month must be in 1..12"),
        ("? [a]\n: b", "a.yaml is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "a.yaml is not YAML: could not determine a constructor"),
    ],
)
def test_a_text_that_is_no_recipe_is_one_sentence(text: str, sentence: str) -> None:
    assert refusal(text).startswith(sentence)
    assert "\n" not in refusal(text)


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: fünf".encode("latin-1"))
    for name, reason in (("none.yaml", "No such file"), ("latin.yaml", "not UTF-8"), (".", "Is a directory")):
        with pytest.raises(RecipeError, match=rf"cannot read the recipe .*{reason}.*; check the path"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("federation", "clients", "sampled"),
    [("{rounds: 1, fraction: 0.5}", 5, 2), ("{rounds: 1, fraction: 0.01}", 5, 1), ("{rounds: 1, clients: 3}", 5, 3)],
)
def test_clients_per_round_follow_the_fraction_or_the_count(federation: str, clients: int, sampled: int) -> None:
    recipe = parse(TEXT, "a", [f"federation={federation}"])
    assert (recipe.clients, recipe.clients_per_round) == (clients, sampled)


@pytest.mark.parametrize(
    ("federation", "sentence"),
    [
        ("{rounds: 1, clients: 6}", "a.yaml: federation.clients is 6, but devices has only 5"),
        ("{rounds: 1, quorum: 6}", "a.yaml: federation.quorum is above the 5 clients sampled each round"),
        ("{rounds: 1, clients: 2, quorum: 3}", "a.yaml: federation.quorum is above the 2 clients sampled each round"),
        ("{rounds: 1, fraction: 0.4, quorum: 3}", "a.yaml: federation.quorum is above the 2 clients"),
    ],
)
def test_a_round_cannot_ask_for_more_clients_than_there_are(federation: str, sentence: str) -> None:
    assert refusal(TEXT, f"federation={federation}").startswith(sentence)


def test_a_quorum_of_all_sampled_clients_holds() -> None:
    assert parse(TEXT, "a", ["federation={rounds: 1, clients: 2, quorum: 2}"]).federation.quorum == 2


def test_clients_are_numbered_through_the_device_classes() -> None:
    recipe = parse(TEXT, "a")
    assert [recipe.device_of(client).name for client in range(5)] == ["phone"] * 3 + ["laptop"] * 2
    with pytest.raises(IndexError):
        recipe.device_of(5)


def test_a_recipe_is_a_value() -> None:
    assert parse(TEXT, "a") == parse(TEXT, "b")
    with pytest.raises(ValueError, match="frozen"):
        parse(TEXT, "a").seed = 3  # type: ignore[misc]


def test_json_and_yaml_give_the_recipe_back() -> None:
    recipe = resolve(parse(TEXT, "a", ["train.clip=null", "merge=[{mean: {weight: equal}}]"]))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    again = parse(yaml.safe_dump(recipe.model_dump(mode="json")), "again")
    assert again == recipe
    assert again.train.clip is None


def test_resolving_writes_every_setting_out_and_changes_nothing_the_second_time() -> None:
    recipe = parse(TEXT, "a")
    resolved = resolve(recipe)
    assert resolved.train.techniques[0].settings["rank"] == 4
    assert set(resolved.train.techniques[0].settings) == {"rank", "alpha", "dropout", "targets", "exact"}
    assert resolved.merge == [Unit(name="mean", settings={"weight": "examples"})]
    assert resolve(resolved) == resolved
    assert recipe.train.techniques[0].settings == {"rank": 4}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.techniques=lroa", "train.techniques: there is no 'lroa'; did you mean 'lora'?"),
        ("train.techniques=[{lora: {rnk: 2}}]", "train.techniques, lora: unknown key 'rnk'; did you mean 'rank'?"),
        ("train.techniques=[{lora: {rank: 0}}]", "train.techniques, lora: rank is 0, but must be greater than or"),
        ("train.techniques=lora+full", "train.techniques: lora cannot be combined with full; drop one"),
        ("merge=[maen]", "merge: there is no 'maen'; did you mean 'mean'?"),
        ("merge=[mean, mean]", "merge: 2 steps combine, but exactly one may; keep one of them"),
    ],
)
def test_resolving_refuses_units_that_do_not_hold(override: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(parse(TEXT, "a", [override]))
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_holds_resolves_and_survives_json(path: Path) -> None:
    resolved = resolve(read(path))
    assert resolved.name == read(path).name
    assert Recipe.model_validate_json(resolved.model_dump_json()) == resolved


def test_the_demo_is_shipped() -> None:
    assert {"sentiment", "lm", "digits"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize(
    ("word", "answer"), [("stps", "did you mean 'steps'?"), ("zzz", "allowed: epochs, steps"), ("", "allowed: epochs")]
)
def test_the_nearest_word_or_all_that_are_allowed(word: str, answer: str) -> None:
    assert nearest(word, ["steps", "epochs"]).startswith(answer)


def test_a_number_that_json_cannot_hold_never_enters_a_recipe() -> None:
    stored: dict[str, Any] = json.loads(parse(TEXT, "a").model_dump_json())
    stored["train"]["lr"] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        Recipe.model_validate(stored)
