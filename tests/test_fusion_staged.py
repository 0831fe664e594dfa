"""Files of several merges, of which later ones use what earlier ones made; options that mergekit's users try."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from fedtune.cli.merge import merge
from fedtune.errors import FedtuneError, RecipeError, SourceError
from fedtune.offline_merge import parse_merge_config
from fedtune.offline_merge.merge_stages import stages_of
from fedtune.recipe.yaml_text import documents
from tests.fusion_models import base_and_tuned, change_json, moved, save, tensors
from tests.tiny import llama


@pytest.fixture(autouse=True)
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base_and_tuned(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(merge, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


STAGES = """
name: pair
merge_method: linear
models: [tuned1, tuned2]
---
merge_method: task_arithmetic
base_model: base
models:
  - {model: pair, parameters: {weight: 0.5}}
  - {model: {model: {path: tuned3}}, parameters: {weight: 0.5}}
"""


def written(text: str, *more: str) -> Result:
    Path("merge.yaml").write_text(text)
    return call("merge.yaml", "-o", "out", *more)


@pytest.mark.parametrize("text", [STAGES, "---".join(reversed(STAGES.split("---")))])
def test_later_merges_take_what_earlier_ones_made(text: str) -> None:
    result = written(text)
    assert result.exit_code == 0, result.output
    base, one, two, three = (tensors(Path(name)) for name in ("base", "tuned1", "tuned2", "tuned3"))
    for name, tensor in tensors(Path("out")).items():
        pair = (one[name] + two[name]) / 2
        wanted = base[name] + 0.5 * (pair - base[name]) + 0.5 * (three[name] - base[name])
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6)
    assert sorted(path.name for path in Path.cwd().iterdir() if "out" in path.name) == ["out"]


def test_one_document_of_json_is_told_of_the_result_alone() -> None:
    result = written(STAGES, "--json")
    assert json.loads(result.stdout)["path"] == str(Path("out").absolute())


def test_what_an_interrupted_merge_of_several_made_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.cli import merge_models

    whole, made = merge_models._merge_one, []

    def stopped(asked: Any, *more: Any, **keys: Any) -> None:
        if not str(asked.output).startswith(str(Path.cwd() / ".out.stages")):
            raise KeyboardInterrupt
        made.append(asked.output)
        whole(asked, *more, **keys)

    monkeypatch.setattr(merge_models, "_merge_one", stopped)
    assert written(STAGES).exit_code != 0
    assert len(made) == 1
    assert not Path("out").exists()
    again = []

    def noted(asked: Any, *more: Any, **keys: Any) -> None:
        again.append(asked.output)
        whole(asked, *more, **keys)

    monkeypatch.setattr(merge_models, "_merge_one", noted)
    assert written(STAGES).exit_code == 0
    assert again == [Path("out")]
    assert not Path(".out.stages").exists()


def test_an_earlier_merge_that_changed_is_made_anew() -> None:
    assert written(STAGES).exit_code == 0
    first = tensors(Path("out"))
    Path("out").rename("before")
    assert (
        written(
            STAGES.replace("merge_method: linear\n", "merge_method: linear\nparameters: {weight: 1}\n").replace(
                "tuned2", "tuned1"
            )
        ).exit_code
        == 0
    )
    assert any(not torch.equal(first[name], tensor) for name, tensor in tensors(Path("out")).items())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "models: [a]\n---\nmodels: [b]\n",
            "m.yaml: several documents have no name; give all but that of the result one",
        ),
        ("name: x\nmodels: [a]\n---\nname: x\nmodels: [b]\n", "m.yaml: two documents have one name; give each its own"),
        (
            "name: x\nmodels: [y]\n---\nname: y\nmodels: [x]\n---\nmodels: [x]\n",
            "m.yaml: x, y need each other; begin with",
        ),
        (
            "name: x\nmodels: [y]\n---\nname: y\nmodels: [a]\n---\nmodels: [a]\nmrge: b\n",
            "m.yaml, line 8: unknown key 'mrge'",
        ),
        ("name: a/b\nmodels: [y]\n---\nmodels: [x]\n", "m.yaml, line 1: name is 'a/b'"),
        ("name: x\nmodels: [a\n---\nmodels: [b]\n", "m.yaml is not YAML"),
    ],
)
def test_several_merges_that_make_no_result_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as refused:
        stages_of(text, "m.yaml")
    assert str(refused.value).startswith(sentence)


def test_one_merge_is_wanted_where_one_is_read() -> None:
    with pytest.raises(RecipeError, match=r"^merge\.yaml holds 2 merges; give one$"):
        parse_merge_config(STAGES, "merge.yaml")


def test_a_name_alone_is_the_results() -> None:
    stages = stages_of("name: x\nmodels: [a]\n---\nname: y\nmodels: [x, b+x]\n", "m.yaml")
    assert [stage.config.name for stage in stages] == ["x", "y"]
    assert stages[1].needs == {"x"}


def test_documents_keep_their_lines() -> None:
    found = documents("# one\na: 1\n---\n---\nb: 2\n...\n")
    assert [text.splitlines().index(line) for text, line in zip(found, ("a: 1", "b: 2"), strict=True)] == [1, 4]


@pytest.mark.parametrize("more", [("--dry-run",), ("--format", "adapter")])
def test_several_merges_are_neither_looked_at_nor_made_an_adapter(more: tuple[str, ...]) -> None:
    result = written(STAGES, *more)
    assert result.exit_code == 2
    assert "contains 2" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("option", ["--seed", "--random-seed"])
def test_the_seed_of_what_is_drawn_is_an_option(option: str) -> None:
    arguments = ("tuned1", "tuned2", "--base-model", "base", "--method", "dare_linear", "--set", "density=0.5")
    for place, seed in enumerate(("3", "3", "4")):
        assert call(*arguments, option, seed, "-o", f"out{place}").exit_code == 0
    one, same, other = (tensors(Path(f"out{place}")) for place in range(3))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    Path("merge.yaml").write_text(
        "merge_method: dare_linear\nbase_model: base\nmodels: [tuned1, tuned2]\nparameters: {density: 0.5}\n"
    )
    assert call("merge.yaml", option, "3", "-o", "filed").exit_code == 0
    assert all(torch.equal(one[name], tensor) for name, tensor in tensors(Path("filed")).items())


def test_what_is_said_of_a_folder_names_no_key_of_a_recipe() -> None:
    (Path("tuned1") / "config.json").unlink()
    with pytest.raises(SourceError, match=r"tuned1 is not a model folder: it has no config.json; check the path$"):
        call("tuned1", "tuned2", "-o", "out")
    (Path("tuned2") / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"tuned2 has no \*\.safetensors file; check the path$"):
        call("tuned2", "tuned3", "-o", "out")


def test_warnings_are_told_on_every_way_out() -> None:
    save(moved(llama(), 2), Path("tuned2"))
    change_json(Path("tuned2/config.json"), {"rms_norm_eps": 1e-3})
    start = "config.json of tuned2 differs from that of tuned1 in rms_norm_eps (0.001, not 1e-06)"
    dry = call("tuned1", "tuned2", "--dry-run")
    assert f"warning: {start}" in dry.stderr
    made = call("tuned1", "tuned2", "--set", "weight=[1, 1]", "-o", "out", "--json")
    [first, second] = json.loads(made.stdout)["warnings"]
    assert first.startswith(start)
    assert second.startswith("of values over the depth, lm_head.weight, model.norm.weight take the last")
    assert start in (Path("out") / "README.md").read_text()


@pytest.mark.parametrize("setting", ["weight=[1, 0]", "weight={filter: q_proj, value: 2}"])
def test_adapters_take_no_values_over_the_depth(setting: str) -> None:
    result = call("tuned1", "tuned2", "--format", "adapter", "--set", setting, "-o", "out")
    assert result.exit_code == 2
    assert "--format adapter takes one value for all modules" in " ".join(result.output.replace("│", " ").split())


def test_an_adapters_own_setting_of_the_whole_merge_is_refused() -> None:
    Path("merge.yaml").write_text("merge_method: slerp\nmodels: [{model: a, parameters: {t: 0.1}}, b]\n")
    with pytest.raises(
        RecipeError, match=r"the parameters of a: t of slerp is a setting of the whole merge, not of one"
    ):
        call("merge.yaml", "--format", "adapter", "-o", "out")


@pytest.mark.parametrize(
    ("option", "proposed"),
    [
        ("--weigths", "--weights"),
        ("--out-shard-size", "--max-shard-size"),
        ("--trust-remote-code", None),
        ("--lora", None),
    ],
)
def test_only_an_option_that_is_nearly_the_same_is_proposed(option: str, proposed: str | None) -> None:
    output = " ".join(call("tuned1", option, "1", "-o", "out").output.split())
    assert f"No such option: {option}" in output or f"No such option {option!r}" in output
    assert ("ossible options" in output or "id you mean" in output) == (proposed is not None)
    assert proposed is None or proposed in output


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("merge_method: task_arithmetic", "merge_method: tassk", "merge_method: there is no 'tassk'"),
        (
            "base_model: base",
            "base_model: base\nparameters: {densty: 1}",
            "parameters: task-arithmetic has no parameter",
        ),
        ("path: tuned3", "path: nowhere", "there is no folder nowhere"),
    ],
)
def test_a_last_merge_that_is_refused_leaves_nothing(
    old: str, new: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FedtuneError, match=sentence):
        written(STAGES.replace(old, new))
    assert not [path for path in Path.cwd().iterdir() if "out" in path.name]
