from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    T5ForSequenceClassification,
)

from fedtune import techniques
from fedtune.errors import ModelError
from fedtune.export import export_model
from fedtune.techniques.deft._mlps import find_mlps
from tests.deft_models import gated_t5, gpt2, opt
from tests.deft_twin import folded, task_of, unlabelled
from tests.federations import execute, words
from tests.technique_steps import TEXT, chosen, logits, shake, shared
from tests.test_export import assert_same_logits, own_logits, state
from tests.tiny import bert, llama


@pytest.mark.parametrize("build", [bert, llama, opt, gpt2])
@pytest.mark.parametrize("joined", ["deft+lora", "deft+full"])
def test_a_relu_swap_survives_folding_saving_and_loading(
    build: Callable[[], PreTrainedModel], joined: str, tmp_path: Path
) -> None:
    model = build()
    before = logits(model, unlabelled())
    applied = chosen(joined, relu=True)
    shake(model, techniques.apply_techniques(applied, model, task_of(model), 0))
    after = logits(model, unlabelled())
    loaded = folded(model, applied, tmp_path)
    assert all(isinstance(loaded.get_submodule(mlp.activation), nn.ReLU) for mlp in find_mlps(loaded))
    torch.testing.assert_close(logits(loaded, unlabelled()), after, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_gated_t5_says_relu_too(tmp_path: Path) -> None:
    model = gated_t5()
    shared("deft+full", model, TEXT, relu=True)
    model.save_pretrained(tmp_path)
    loaded = T5ForSequenceClassification.from_pretrained(tmp_path)
    assert all(isinstance(loaded.get_submodule(mlp.activation), nn.ReLU) for mlp in find_mlps(loaded))


def test_a_swap_the_configuration_cannot_say_is_refused() -> None:
    model = bert()
    for mlp in find_mlps(model):
        model.set_submodule(mlp.activation, nn.Tanh())
    with pytest.raises(
        ModelError, match="the configuration of BertForSequenceClassification cannot describe ReLU; unset"
    ):
        shared("deft+full", model, TEXT, relu=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft itself
@pytest.mark.parametrize(
    ("units", "form"),
    [
        ("lora, deft", "adapter"),
        ("lora, deft: {relu: true}", "model"),
        ("lora, deft: {skip: {}}", "model"),
        ("qlora, deft: {relu: true, skip: {}}", "model"),
        ("deft: {relu: true, skip: {}}, qlora", "model"),
    ],
)
def test_a_run_is_exported_as_an_adapter_only_where_the_base_stays(
    units: str, form: str, home: Path, tmp_path: Path
) -> None:
    recipe = words(tmp_path, f"train.techniques=[{units}]", "federation.rounds=1")
    tensors = state(execute(recipe))
    assert export_model(recipe, tensors, tmp_path / "out", None, "") == form
    inputs, expected = own_logits(recipe, tensors)
    if form == "model":
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    else:
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=2)
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert_same_logits(loaded, inputs, expected)


def test_a_federation_reports_densities(home: Path, tmp_path: Path) -> None:
    recipe = words(tmp_path, "train.techniques=[lora, deft: {relu: true}]", "federation.rounds=1")
    ended = execute(recipe)
    densities = {metric.name: metric.value for metric in ended.rounds[-1].metrics if metric.name.startswith("density")}
    assert densities.keys() == {"density", "density_padded"}
    assert all(0 < value < 1 for value in densities.values())
