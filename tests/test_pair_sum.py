"""The oracle is PEFT's own sum, which its layers go back to without the variant."""

from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from tests.technique_steps import TEXT, gradients, layers, logits, shake, shared
from tests.tiny import bert, texts

SCALES = {
    "a power of two": {"rank": 4, "alpha": 8.0},
    "a half": {"rank": 4, "alpha": 2.0},
    "three": {"rank": 4, "alpha": 12.0},
}


def _pairs(model: PreTrainedModel) -> list[Any]:
    return [model.get_submodule(name) for name in layers(model, LoraLayer)]


def _lora(**settings: Any) -> PreTrainedModel:
    model = bert()
    shake(model, shared("lora", model, TEXT, trained_factors="both", **settings))
    return model


def _as_peft_does(model: PreTrainedModel) -> PreTrainedModel:
    for layer in _pairs(model):
        del layer.lora_variant["default"]
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("settings", SCALES.values(), ids=SCALES)
def test_gradients_and_scores_have_the_bits_of_pefts(settings: dict[str, Any], dropout: float) -> None:
    ours, wanted = _lora(dropout=dropout, **settings), _as_peft_does(_lora(dropout=dropout, **settings))
    batch = texts(ours)
    ours_moved, kept = gradients(ours, batch)
    moved, most = gradients(wanted, batch)
    assert any(".lora_A." in name for name in moved)
    assert ours_moved.keys() == moved.keys()
    assert all(torch.equal(ours_moved[name], moved[name]) for name in moved)
    assert kept <= most
    assert torch.equal(logits(ours, batch), logits(wanted, batch))


def test_the_large_product_is_not_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled: list[int] = []
    times = Tensor.__mul__

    def noted(one: Tensor, by: float) -> Tensor:
        scaled.append(one.shape[-1])
        return times(one, by)

    monkeypatch.setattr(Tensor, "__mul__", noted)
    layer = _pairs(_lora(rank=4, alpha=8.0))[0]
    layer(torch.randn(2, layer.in_features))
    assert scaled == [4]


def test_who_watches_what_enters_b_sees_a_x() -> None:
    layer = _pairs(_lora(rank=4, alpha=8.0))[0]
    entered: list[Tensor] = []
    layer.lora_B["default"].register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    x = torch.randn(2, layer.in_features)
    layer(x)
    assert torch.equal(entered[0], layer.lora_A["default"](x))


def test_a_base_of_lower_precision_keeps_it() -> None:
    ours, wanted = _lora(rank=4, alpha=8.0), _as_peft_does(_lora(rank=4, alpha=8.0))
    for model in (ours, wanted):
        for layer in _pairs(model):
            layer.base_layer.bfloat16()
    x = torch.randn(2, 3, _pairs(ours)[0].in_features)
    with torch.no_grad():
        got, expected = (_pairs(model)[0](x.bfloat16()) for model in (ours, wanted))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)
