from pathlib import Path

import pytest

from fedtune.errors import RecipeError
from fedtune.recipe.yaml_file import read_recipe
from tests.recipe_examples import TEXT, refusal


def with_line(old: str, new: str) -> str:
    assert TEXT.count(old) == 1
    return TEXT.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "  steps: 2",
            "  local_step: 2",
            "a.yaml, line 15: unknown key 'train.local_step'; did you mean 'local_steps'?",
        ),
        ("name: example\n", "nme: example\n", "a.yaml, line 1: unknown key 'nme'; did you mean 'name'?"),
        ("alpha: 0.5", "alfa: 0.5", "a.yaml, line 7: unknown key 'data.partition.alfa'; did you mean 'alpha'?"),
        ("count: 3", "cuont: 3", "a.yaml, line 9: unknown key 'devices.0.cuont'; did you mean 'count'?"),
        (
            "  steps: 2",
            "  zzz: 2",
            "a.yaml, line 15: unknown key 'train.zzz'; allowed: augmentation, batch_size, device, gr",
        ),
        ("steps: 2", "steps: few", "a.yaml, line 15: train.local_steps is 'few', but must be a valid integer"),
        ("steps: 2", "steps: 0", "a.yaml, line 15: train.local_steps is 0, but must be greater than or equal to 1"),
        ("rounds: 3", "rounds: 1.5", "a.yaml, line 17: federation.rounds is 1.5, but must be a valid integer"),
        ("alpha: 0.5", "alpha: 0", "a.yaml, line 7: data.partition.alpha is 0, but must be greater than 0"),
        ("kind: dirichlet, ", "", "a.yaml, line 7: the key 'data.partition.kind' is missing"),
        (
            "kind: dirichlet",
            "kind: skew",
            "line 7: data.partition.kind is 'skew', but must be one of 'iid', 'dirichlet'",
        ),
        ("memory: 2GiB", "memory: 2XB", "a.yaml, line 10: devices.1.memory is '2XB': could not interpret byte unit"),
        ("  source: path:nowhere", "  dtype: float32", "a.yaml, line 3: the key 'model.source' is missing"),
        ("task: text-classification\n", "", "a.yaml: the key 'task' is missing"),
        (
            "text-classification",
            "regression",
            "a.yaml, line 2: task: there is no 'regression'; allowed: audio-classification, feature-extr",
        ),
        ("name: example\n", "name: An Example\n", "a.yaml, line 1: name is 'An Example', but must match pattern"),
        ("lora: {rank: 4}", "lora: 4", "line 13: train.techniques.0.settings is 4, but must be a mapping of keys to"),
        ("lora: {rank: 4}", "3", "a.yaml, line 13: train.techniques.0 is 3, but must be a mapping of keys to values"),
        ("  steps: 2", "  steps: 2\n  lr: .inf", "a.yaml, line 16: train.lr is inf, but must be a finite number"),
        ("  steps: 2\n", "", "a.yaml, line 11: train: say either local_steps or local_epochs, exactly one of them"),
        (
            "  steps: 2",
            "  steps: 2\n  epochs: 1",
            "line 11: train: say either local_steps or local_epochs, exactly one of them",
        ),
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
        ("train.bach_size=1", "--set train.bach_size=1: unknown key 'train.bach_size'; did you mean 'batch_size'?"),
        (
            "rounds=3",
            "--set rounds=3: unknown key 'rounds'; allowed: checkpoints, data, devices, evaluation, federation",
        ),
        ("devices=[]", "--set devices=[]: devices is [], but must have at least 1 item"),
        ("devices=[{count: 1, memory: 5XB}]", "--set devices=[{count: 1, memory: 5XB}]: devices.0.memory is '5XB'"),
        ("model=minilm", "--set model=minilm: model is 'minilm', but must be a mapping of keys to values"),
        ("data.partition={alpha: 1}", "--set data.partition={alpha: 1}: the key 'data.partition.kind' is missing"),
        ("data.splits={validation: 0.5, test: 0.5}", "data.splits: validation and test together must leave something"),
    ],
)
def test_an_override_that_does_not_hold_is_named_itself(override: str, sentence: str) -> None:
    assert sentence in refusal(TEXT, "evaluation.every_n_rounds=2", override)


def test_an_override_below_a_setting_is_blamed_though_the_file_has_the_setting() -> None:
    text = with_line("  split: {kind: dirichlet, alpha: 0.5}", "  split: {}")
    assert refusal(text, "data.partition.alpha=2").startswith("--set data.partition.alpha=2: ")


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
            read_recipe(tmp_path / name)
