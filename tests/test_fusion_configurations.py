"""Models whose config.json make different functions of the same tensors."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fedtune.errors import ModelError
from fedtune.models.transformers_logging import silence_transformers
from fedtune.offline_merge import build_merge_config, prepare_merge, write_merged_model
from tests.fusion_models import base_and_tuned, change_json, save
from tests.tiny import llama


def prepared(folders: list[Path], base: Path | None = None) -> Any:
    config, _ = build_merge_config(
        [str(folder) for folder in folders], "linear", [], [], base_model=None if base is None else str(base)
    )
    return prepare_merge(config)


REFUSED: dict[str, dict[str, Any]] = {
    "heads": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4},
    "groups of heads": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4},
    "activation": {"hidden_act": "relu"},
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_turn_the_same_tensors_into_another_function_are_refused(tmp_path: Path, what: str) -> None:
    _, one, two = base_and_tuned(tmp_path, 2)
    change_json(two / "config.json", REFUSED[what])
    key = next(iter(REFUSED[what]))
    if what == "groups of heads":
        key = "head_dim"
    with pytest.raises(
        ModelError, match=rf"tuned2 has {key} \w+ in config.json, but .*tuned1 \w+, so that the same we"
    ):
        prepared([one, two])


WARNED: dict[str, tuple[dict[str, Any], str]] = {
    "rope theta as version 5 writes it": (
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        r"rope_parameters.rope_theta \(500000.0, not 10000.0\)",
    ),
    "rope theta as version 4 wrote it": (
        {"rope_parameters": None, "rope_theta": 5e5},
        r"rope_parameters.rope_theta \(500000.0, not 10000.0\)",
    ),
    "epsilon": ({"rms_norm_eps": 1e-3}, r"rms_norm_eps \(0.001, not 1e-06\)"),
    "two": (
        {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        r"rope_theta .*, rms_norm_eps|rms_norm_eps .*, rope_parameters.rope_theta",
    ),
}


@pytest.mark.parametrize("what", WARNED)
@pytest.mark.parametrize("based", [False, True])
def test_settings_that_change_the_function_a_little_are_told(tmp_path: Path, what: str, based: bool) -> None:
    base, one, two = base_and_tuned(tmp_path, 2)
    changed, told = WARNED[what]
    change_json(two / "config.json", changed)
    owner = "base" if based else "tuned1"
    [warning] = prepared([one, two], base if based else None).warnings
    assert re.search(told, warning)
    assert warning.startswith(f"config.json of {two} differs from that of {tmp_path / owner} in ")
    assert warning.endswith("; the result has the latter's")


HARMLESS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "another release": {"transformers_version": "4.40.0", "_name_or_path": "x", "torch_dtype": "float32"},
    "training": {"attention_dropout": 0.3, "use_cache": True, "initializer_range": 0.1},
    "lengths and tokens": {"max_position_embeddings": 64, "eos_token_id": 7, "pad_token_id": 3},
    "the default left out": {"rope_parameters": None},
}


@pytest.mark.parametrize("what", HARMLESS)
def test_settings_that_change_nothing_are_not_told(tmp_path: Path, what: str) -> None:
    _, one, two = base_and_tuned(tmp_path, 2)
    change_json(two / "config.json", HARMLESS[what])
    assert prepared([one, two]).warnings == []


def test_the_same_activation_under_two_names_is_no_refusal(tmp_path: Path) -> None:
    size: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    for name, function in (("one", "gelu_new"), ("two", "gelu_pytorch_tanh")):
        torch.manual_seed(0)
        save(GPT2LMHeadModel(GPT2Config(**size, activation_function=function)), tmp_path / name)
    [warning] = prepared([tmp_path / "one", tmp_path / "two"]).warnings
    assert "activation_function (gelu_pytorch_tanh, not gelu_new)" in warning


def test_a_model_that_transformers_does_not_know_is_compared_by_what_both_say(tmp_path: Path) -> None:
    _, one, two = base_and_tuned(tmp_path, 2)
    for folder, eps in ((one, 1e-6), (two, 1e-5)):
        change_json(folder / "config.json", {"model_type": "of-my-own", "norm_eps": eps})
    change_json(two / "config.json", {"only_here": 1})
    [warning] = prepared([one, two]).warnings
    assert "norm_eps (1e-05, not 1e-06)" in warning
    assert "only_here" not in warning


def test_values_over_the_depth_tell_what_mergekit_does_otherwise(tmp_path: Path) -> None:
    """mergekit 0.1.5 gives what is behind the layers the first value: measured with its command."""
    base, one, two = base_and_tuned(tmp_path, 2)
    text = ["weight=[1, 0]"]
    config, _ = build_merge_config([str(one), str(two)], "task_arithmetic", [], text, base_model=str(base))
    [warning] = prepare_merge(config).warnings
    assert warning == (
        "of values over the depth, lm_head.weight, model.norm.weight take the last, as behind all layers; mergekit "
        "gives them the first"
    )
    plain, _ = build_merge_config([str(one), str(two)], "task_arithmetic", [], ["weight=1"], base_model=str(base))
    assert prepare_merge(plain).warnings == []


@pytest.mark.parametrize("large", [7e4, -7e4, 65520.0])
@pytest.mark.parametrize("said", ["dtype", "out_dtype", "own"])
def test_a_cast_that_would_write_infinity_is_refused(tmp_path: Path, large: float, said: str) -> None:
    dtype = torch.float16 if said == "own" else torch.float32
    folders = []
    for seed in (1, 2):
        net = llama(seed).to(dtype)  # type: ignore[arg-type]
        with torch.no_grad():
            net.model.norm.weight[3] = large if said != "own" else large / 2
        folders.append(save(net, tmp_path / str(seed)))
    keys = {} if said == "own" else {said: "float16"}
    normal = [] if said != "own" else ["normalise=false"]
    config, _ = build_merge_config([str(folder) for folder in folders], "linear", [], normal, **keys)
    with pytest.raises(ModelError, match=r"model.norm.weight reaches \d+, but float16 ends at 65504; choose dtype: bf"):
        write_merged_model(prepare_merge(config), tmp_path / "out", "a card")
    assert not (tmp_path / "out").exists()


def test_what_rounds_to_the_largest_number_is_written(tmp_path: Path) -> None:
    net = llama(1)
    with torch.no_grad():
        net.model.norm.weight[3] = 65519.0
    folder = save(net, tmp_path / "one")
    config, _ = build_merge_config([str(folder)], "linear", [], [], dtype="float16")
    write_merged_model(prepare_merge(config), tmp_path / "out", "a card")
    with silence_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.model.norm.weight[3] == 65504
