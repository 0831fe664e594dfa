from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    PreTrainedModel,
)

from fedtune import techniques
from fedtune.recipe.schema import Unit
from fedtune.training.optimisers import make_optimiser
from tests.deft_models import gpt2, opt
from tests.deft_twin import deft, folded, step_gradients, task_of, unlabelled
from tests.technique_steps import LANGUAGE, TEXT, logits, shake
from tests.tiny import a_training_recipe, bert, llama, texts

_SKIP = {"gamma": 0.1, "below": 0.1}


@pytest.mark.parametrize("order", [("full",), ("lora",), ("bias",)])
def test_weights_of_mlps_are_trained_shared_and_start_near_one(order: tuple[str, ...]) -> None:
    model = bert()
    applied = deft(*order, skip=_SKIP)
    names = techniques.apply_techniques(applied, model, TEXT, 0)
    assert [name for name in names if "theta" in name] == [f"bert.encoder.layer.{n}.deft_theta" for n in range(2)]
    _, found = step_gradients(model, applied, texts(model))
    assert all(float(found[name].abs()) > 0 for name in names if "theta" in name)
    with techniques.collect_metrics(applied, model.eval()) as figures, torch.no_grad():
        techniques.begin_step(applied, model, texts(model), 1.0)
        model(**texts(model))
        assert figures()["mlps_skipped"] == 0
        assert figures()["mlp_weight"] == pytest.approx(0.982, abs=1e-3)


def test_the_terms_of_the_weights_have_the_value_and_the_gradients_of_the_formula() -> None:
    alpha, gamma, eps = 2.0, 0.3, 1e-2
    model = opt(dropout=0.0)
    applied = deft("full", alpha=alpha, eps=eps, skip={"gamma": gamma, "below": 0.1})
    names = techniques.apply_techniques(applied, model, LANGUAGE, 0)
    thetas = [name for name in names if "theta" in name]
    for name, value in zip(thetas, (0.01, -0.005), strict=True):
        model.get_parameter(name).data.fill_(value)
    batch = {**unlabelled(), "labels": unlabelled()["input_ids"]}
    loss, found = step_gradients(model, applied, batch)
    twin = _weighted_twin(batch, alpha, gamma, eps)
    assert loss == pytest.approx(twin[0], rel=1e-5)
    for name in names:
        torch.testing.assert_close(found[name], twin[1][name], rtol=1e-4, atol=1e-6)


def _weighted_twin(
    batch: dict[str, torch.Tensor], alpha: float, gamma: float, eps: float
) -> tuple[float, dict[str, torch.Tensor]]:
    model = opt(dropout=0.0)
    layers: Any = model.get_submodule("model.decoder.layers")
    thetas = [nn.Parameter(torch.tensor([value])) for value in (0.01, -0.005)]
    seen: list[torch.Tensor] = []
    for layer, theta in zip(layers, thetas, strict=True):
        layer.fc2.register_forward_hook(lambda module, args, out, theta=theta: out * torch.sigmoid(100 * theta))
        layer.fc2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss = model.train()(**batch).loss
    density = torch.stack([(a**2 / (a**2 + eps)).mean() for a in seen])
    w = torch.sigmoid(100 * torch.cat([*thetas]))
    total = loss + alpha * (w * density).sum() / w.sum() + gamma * w.mean()
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    named = {f"model.decoder.layers.{n}.deft_theta": theta.grad for n, theta in enumerate(thetas)}
    return float(total.detach()), {**gradients, **{name: one for name, one in named.items() if one is not None}}


_SKIPPED: dict[Callable[[], PreTrainedModel], list[str]] = {
    bert: ["layer.1.intermediate.dense", "layer.1.output.dense"],
    opt: ["layers.1.fc1", "layers.1.fc2"],
    llama: ["layers.1.mlp.gate_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"],
    gpt2: ["h.1.mlp.c_fc", "h.1.mlp.c_proj"],
}


@pytest.mark.parametrize("build", _SKIPPED)
@pytest.mark.parametrize("joined", ["deft+lora", "lora+deft", "full+deft"])
def test_a_dropped_mlp_is_one_of_weight_zero_and_the_exported_model_is_smaller(
    build: Callable[[], PreTrainedModel], joined: str, tmp_path: Path
) -> None:
    model = build()
    size = sum(p.numel() for p in model.parameters())
    units = [Unit(name=name, settings={"skip": _SKIP} if name == "deft" else {}) for name in joined.split("+")]
    applied = techniques.build_techniques(units)
    names = techniques.apply_techniques(applied, model, task_of(model), 0)
    shake(model, [name for name in names if "theta" not in name])
    first, second = (name for name in names if "theta" in name)
    model.get_parameter(first).data.fill_(-0.005)
    model.get_parameter(second).data.fill_(-0.03)
    scored = logits(model, unlabelled())
    zero = deepcopy(model)
    zero.get_parameter(second).data.fill_(-1e9)
    assert torch.equal(logits(zero, unlabelled()), scored)
    loaded = folded(model, applied, tmp_path, trust_remote_code=True)
    torch.testing.assert_close(logits(loaded, unlabelled()), scored, rtol=1e-4, atol=1e-5)
    gone = sum(build().get_parameter(f"{name}.{part}").numel() for name in _dropped(build) for part in _parts(build))
    assert sum(p.numel() for p in loaded.parameters()) == size - gone
    assert (tmp_path / "_skipping.py").is_file()


def _dropped(build: Callable[[], PreTrainedModel]) -> list[str]:
    named = [name for name, _ in build().named_modules()]
    return [name for name in named if name.endswith(tuple(_SKIPPED[build]))]


def _parts(build: Callable[[], PreTrainedModel]) -> tuple[str, ...]:
    return ("weight",) if build is llama else ("weight", "bias")


def test_a_model_with_dropped_mlps_is_not_loaded_as_something_else(tmp_path: Path) -> None:
    model = llama()
    applied = deft("full", skip=_SKIP)
    names = techniques.apply_techniques(applied, model, LANGUAGE, 0)
    model.get_parameter(next(name for name in names if "theta" in name)).data.fill_(-0.03)
    with pytest.raises(ValueError, match="trust_remote_code"):
        folded(model, applied, tmp_path, trust_remote_code=False)


def test_with_no_mlp_dropped_the_export_is_a_plain_model(tmp_path: Path) -> None:
    model = llama()
    applied = deft("full", skip=_SKIP)
    techniques.apply_techniques(applied, model, LANGUAGE, 0)
    scored = logits(model, unlabelled())
    loaded = folded(model, applied, tmp_path)
    assert type(loaded) is type(llama())
    torch.testing.assert_close(logits(loaded, unlabelled()), scored, rtol=1e-4, atol=1e-5)


def test_a_weight_under_pressure_falls_below_the_bound_and_its_mlp_is_skipped() -> None:
    model = llama()
    applied = deft("full", alpha=0.0, skip={"gamma": 1.0, "below": 0.1})
    names = techniques.apply_techniques(applied, model, LANGUAGE, 0)
    thetas = [model.get_parameter(name) for name in names if "theta" in name]
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data.mul_(1e-3)
    optimiser = make_optimiser(a_training_recipe(lr=3e-3).train, thetas)
    batch = texts(model)
    for _ in range(40):
        step_gradients(model, applied, batch)
        optimiser.step(3e-3)
    assert float(torch.sigmoid(100 * thetas[1].detach())) < 0.1
    with techniques.collect_metrics(applied, model) as figures:
        assert figures()["mlps_skipped"] >= 1
