"""What cannot be merged is refused in one sentence, and nothing is left on disk."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from fedtune.errors import FedtuneError
from fedtune.offline_merge import (
    build_merge_config,
    compare_models,
    output_folder,
    parse_merge_config,
    prepare_merge,
    write_merged_model,
)
from fedtune.offline_merge.write_model import ignore_progress
from tests.fusion_models import base_and_tuned, change_json, moved, save, save_tokenizer, tensors, words
from tests.tiny import bert, llama

Spoil = Callable[[Path], object]


def run(folder: Path, models: list[str], method: str = "ties", base: str | None = "base", **keys: Any) -> None:
    """All of the command but the showing."""
    named = [str(folder / name) for name in models]
    settings = keys.pop("settings", [])
    weights = keys.pop("weights", [])
    based = None if base is None else str(folder / base)
    config, _ = build_merge_config(named, method, weights, settings, base_model=based, **keys)
    prepared = prepare_merge(config)
    output_folder.check_output_space(folder / "out", prepared.plan_shards(10**9))
    compare_models(prepared, ignore_progress)
    write_merged_model(prepared, folder / "out", "a card")


def replace(folder: Path, **changed: torch.Tensor | None) -> None:
    """Change or drop tensors of a folder; dots in names are written as __."""
    found = tensors(folder)
    for name, tensor in changed.items():
        found.pop(name.replace("__", "."))
        if tensor is not None:
            found[name.replace("__", ".")] = tensor
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def another(build: Callable[..., PreTrainedModel], **settings: Any) -> Spoil:
    return lambda folder: save(build(**settings), folder / "tuned2")


def nan(folder: Path) -> None:
    tensor = tensors(folder / "tuned2")["model.norm.weight"]
    tensor[3] = torch.nan
    replace(folder / "tuned2", model__norm__weight=tensor)


def pickled(folder: Path) -> None:
    (folder / "tuned2" / "model.safetensors").unlink()
    (folder / "tuned2" / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def cut(folder: Path) -> None:
    file = folder / "tuned2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def a_shard_away(folder: Path) -> None:
    path = save(moved(llama(), 2), folder / "tuned2", max_shard_size="4KB")
    (path / "model.safetensors").unlink()
    sorted(path.glob("*.safetensors"))[1].unlink()


def other_words(folder: Path) -> None:
    save_tokenizer(folder / "tuned2", [*words()[:-1], "other"])


def more_words(folder: Path) -> None:
    another(llama, vocab_size=50)(folder)
    for file in (folder / "tuned2").glob("tokenizer*"):
        file.unlink()


def labels(folder: Path) -> None:
    for name, first in (("tuned1", "good"), ("tuned2", "bad")):
        save(bert(1), folder / name)
        change_json(folder / name / "config.json", {"id2label": {"0": first, "1": "b", "2": "c"}})
    save(bert(), folder / "base")


def in_gptq(folder: Path) -> None:
    change_json(folder / "tuned2" / "config.json", {"quantization_config": {"quant_method": "gptq"}})


def in_half(folder: Path) -> None:
    shutil.rmtree(folder / "tuned2")
    base_and_tuned(folder / "half", 2, torch.bfloat16)[2].rename(folder / "tuned2")


def gone(folder: Path) -> None:
    shutil.rmtree(folder / "tuned2")


TABLE: dict[str, tuple[Spoil, str]] = {
    "another architecture": (another(bert), r"tuned2 is a bert model and .*tuned1 a llama; only models of one arch"),
    "another width": (another(llama, hidden_size=32), r"the first tensor that differs is .*weight: \[.*\] in .*tuned2"),
    "a layer fewer": (
        another(llama, num_hidden_layers=1),
        r"tuned2 has no tensor model\.layers\.1\..*, which .*tuned1",
    ),
    "more words": (more_words, r"the first tensor that differs is .*: \[50, 16\] in .*tuned2.*tokenizer_source: union"),
    "other words": (
        other_words,
        r"tuned2 has 1 tokens that .*tuned1 lacks, lacks 1 and numbers 0 differently; say whose",
    ),
    "another precision": (
        in_half,
        r"tuned2 is bfloat16 and .*tuned1 float32; say which the result has, e\.g\. dtype: float32",
    ),
    "a missing shard": (a_shard_away, r"names the shard model-00002-of-.*, which is missing; fetch it again"),
    "a file cut short": (cut, r"tuned2/model.safetensors is no whole safetensors file .*; fetch it again"),
    "a pickle": (pickled, r"pytorch_model.bin is a pickle, which can run any code; convert it to safetensors first"),
    "not a number": (nan, r"tuned2: model\.norm\.weight holds values that are not finite; take another release"),
    "another base": (
        lambda folder: save(llama(77), folder / "base"),
        r"base is not the base of .*tuned1: its matrices differ from it by 1\.\d\d times the base's own norm; name the",
    ),
    "other labels": (labels, r"tuned2 tells bad, b, c apart, but .*tuned1 good, b, c; only heads of the same labels"),
    "quantised otherwise": (in_gptq, r"tuned2 is quantised by gptq, which fedtune cannot undo; take the plain release"),
    "no such folder": (
        gone,
        r"there is no folder .*tuned2",
    ),
    "a folder that exists": (lambda folder: (folder / "out").mkdir(), r"out exists already; choose another folder"),
}


@pytest.fixture
def spoilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base_and_tuned(tmp_path, 2)
    return tmp_path


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name.startswith((".out", "out")))


@pytest.mark.parametrize("what", TABLE)
def test_bad_models_are_refused_in_one_sentence(spoilt: Path, what: str) -> None:
    spoil, message = TABLE[what]
    spoil(spoilt)
    before = left(spoilt)
    with pytest.raises(FedtuneError, match=message) as refused:
        run(spoilt, ["tuned1", "tuned2"])
    assert "\n" not in str(refused.value)
    assert left(spoilt) == before


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "weights that cancel": ({"method": "linear", "weights": [1, -1], "base": None}, "the weights sum to zero"),
    "too few weights": ({"weights": [1]}, r"--weights has 1 numbers for 2 models; give one for each"),
    "no base": ({"base": None}, r"ties merges what models differ from a base; name it with base_model or --base"),
    "no such method": ({"method": "tiess"}, r"merge_method: there is no 'tiess'; did you mean 'ties'\?"),
    "a step that does not combine": ({"method": "aim"}, r"merge_method: there is no 'aim'"),
    "a method for rounds": ({"method": "flora"}, r"merge_method: there is no 'flora'"),
    "no such parameter": (
        {"settings": ["densty=1"]},
        r"parameters: ties has no parameter 'densty'; did you mean 'dens",
    ),
    "a density above one": ({"settings": ["density=2"]}, r"parameters, ties: density is 2, but must be less than or"),
    "too many for an arc": ({"method": "slerp", "models": 3, "base": None}, r"slerp takes 2 models, but 3 came"),
    "no statistics": ({"method": "fisher"}, r"fisher needs statistics of every model, but model 1 has none"),
    "a step of another kind": ({"relax": ["mean"]}, r"merge: 2 steps combine, but exactly one must"),
    "relax without base": ({"method": "linear", "base": None, "relax": ["aim"]}, r"relax holds a merge near its base"),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_bad_settings_are_refused_in_one_sentence(spoilt: Path, what: str) -> None:
    keys, message = SETTINGS[what]
    names = ["tuned1", "tuned2", "tuned1"][: keys.get("models", 2)]
    if keys.get("models") == 3:
        save(moved(llama(), 3), spoilt / "tuned3")
        names[2] = "tuned3"
    with pytest.raises(FedtuneError, match=message) as refused:
        run(spoilt, names, **{key: value for key, value in keys.items() if key != "models"})
    assert "\n" not in str(refused.value)
    assert left(spoilt) == []


def test_a_full_disk_is_refused_before_anything_is_written(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("fedtune.offline_merge.output_folder.shutil.disk_usage", lambda place: usage)
    with pytest.raises(FedtuneError, match=r"out needs 0\.00 GB, but .* has 0\.00 GB free; free some or choose"):
        run(spoilt, ["tuned1", "tuned2"])
    assert left(spoilt) == []


def test_values_that_overflow_are_refused_and_leave_nothing(spoilt: Path) -> None:
    with pytest.raises(FedtuneError, match=r"comes out with values that are not finite; take smaller weights"):
        run(spoilt, ["tuned1", "tuned2"], "task-arithmetic", weights=[1e45, 1.0])
    assert left(spoilt) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [a]\nslices: []\n", r"merge.yaml, line 2: slices .*at least 1"),
        (
            "models: [a]\nmerge_methd: ties\n",
            r"merge.yaml, line 2: unknown key 'merge_methd'; did you mean 'merge_method'",
        ),
        (
            "models: [a]\nparameters:\n  weight: {a: 1}\n",
            r"merge.yaml, line 3: parameters.weight: write a value, a list",
        ),
        ("merge_method: ties\n", r"merge.yaml: say either models or slices, exactly one of them"),
        ("models: [a]\ndtype: int8\n", r"merge.yaml, line 2: dtype is 'int8'"),
        (
            "models:\n  - model: a\n    parameter: {}\n",
            r"merge.yaml, line 3: unknown key 'models.0.parameter'; did you mean",
        ),
        (
            "slices:\n  - sources:\n      - {model: a, layer_range: [3, 1]}\n",
            r"merge.yaml, line 3: slices.0.sources.0.layer_range: write it as \[first, end\]",
        ),
        ("- a\n", "merge.yaml holds no merge: it must be a mapping"),
        ("models: [a\n", "merge.yaml is not YAML"),
    ],
)
def test_a_bad_configuration_is_told_by_file_line_and_key(text: str, message: str) -> None:
    with pytest.raises(FedtuneError, match=message):
        parse_merge_config(text, "merge.yaml")


def test_slices_beyond_the_model_are_refused(spoilt: Path) -> None:
    text = f"merge_method: passthrough\nslices: [{{sources: [{{model: {spoilt / 'base'}, layer_range: [1, 4]}}]}}]\n"
    with pytest.raises(FedtuneError, match=r"layer_range \[1, 4\]: .*base has no layer 2"):
        prepare_merge(parse_merge_config(text, "merge.yaml"))


def test_a_healthy_merge_leaves_only_its_folder(spoilt: Path) -> None:
    run(spoilt, ["tuned1", "tuned2"])
    assert left(spoilt) == ["out"]
    assert json.loads((spoilt / "out" / "config.json").read_text())["model_type"] == "llama"
