"""Shifted attention: groups are those of a mask written out, no token sees a later one, scoring is full attention."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from fedtune import techniques
from fedtune.errors import ModelError
from fedtune.memory import StorageMeter
from fedtune.techniques.shifted_attention import attend_in_groups
from tests.families import FAMILIES
from tests.technique_steps import LANGUAGE, TEXT, chosen


def a_model(family: str, **settings: Any) -> tuple[PreTrainedModel, Any]:
    model = FAMILIES[family].model()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
        if isinstance(getattr(layer, "dropout", None), float):
            vars(layer)["dropout"] = 0.0
    units = chosen("shifted-attention+full", **settings)
    techniques.apply_techniques(units, model, LANGUAGE, 0)
    return model.train(), units


def gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(**batch).loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("length", [1, 3, 8, 13])
@pytest.mark.parametrize("padded", [False, True])
def test_groups_are_those_of_a_mask_over_all_tokens(shift: int, length: int, padded: bool) -> None:
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 4, generator=random, dtype=torch.float64) for _ in range(3))
    place = torch.arange(length)
    group = (place + shift) // 4
    seen = (group[:, None] == group[None]) & (place[:, None] >= place[None])
    given = None
    if padded:
        real = place < torch.tensor([length, max(1, length - 2)])[:, None]
        given = (place[:, None] >= place[None]) & real[:, None, None, :]
        seen = seen & given | torch.eye(length, dtype=torch.bool)
    found = attend_in_groups((query, key, value), given, 4, shift, scaling=0.3)
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_a_group_as_long_as_twice_the_text_is_full_attention(family: str) -> None:
    batch = FAMILIES[family].make_batch(rows=3, length=11)
    batch["attention_mask"][0, 7:] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    model, _ = a_model(family, group_size=22)
    found = gradients(model, batch)
    model.set_attn_implementation("sdpa")
    for name, one in gradients(model, batch).items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_no_token_sees_a_later_one_and_training_differs_from_scoring(family: str) -> None:
    model, _ = a_model(family, group_size=4)
    ids = FAMILIES[family].make_batch(rows=2, length=14)["input_ids"]
    other = ids.clone()
    other[:, -1] = ids[:, -1] % 40 + 1
    one, two = (model(input_ids=made).logits[:, :-1] for made in (ids, other))
    assert torch.equal(one, two)
    plain = FAMILIES[family].model().eval()
    assert torch.equal(model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not torch.allclose(model.train()(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4)


def test_a_token_far_behind_is_reached_through_the_shifted_heads_alone() -> None:
    """With groups of 4, token 5 sees token 3 only where groups begin at 2."""
    query, key, value = (torch.eye(8)[None, None] for _ in range(3))
    plain = attend_in_groups((query, key, value), None, 4, 0)[0, 0]
    shifted = attend_in_groups((query, key, value), None, 4, 2)[0, 0]
    assert plain[5, 3] == 0
    assert shifted[5, 3] > 0
    assert shifted[6, 5] == 0
    assert shifted[1, 0] > 0


def test_attention_keeps_less_for_the_backward_pass() -> None:
    kept = {}
    batch = FAMILIES["llama"].make_batch(rows=1, length=40)
    batch["attention_mask"][0, 38:] = 0
    for size in (4, 80):
        model, _ = a_model("llama", group_size=size)
        with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
            model(**batch)
            kept[size] = meter.peak_bytes
    assert kept[4] < kept[80]


def test_merging_restores_the_attention() -> None:
    model, units = a_model("llama")
    techniques.merge_into_weights(units, model)
    assert model.config._attn_implementation == "sdpa"
    assert not any("shifted_attention_group" in vars(layer) for layer in model.modules())


def test_other_models_are_refused() -> None:
    with pytest.raises(ModelError, match="BertForSequenceClassification is no causal language model; remove shifted-"):
        techniques.apply_techniques(chosen("shifted-attention+full"), FAMILIES["bert"].model(), TEXT, 0)
