import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from fedtune import models
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe.schema import ModelSettings
from fedtune.techniques import begin_round
from tests.families import FAMILIES
from tests.technique_steps import IMAGES, LANGUAGE, chosen, gradients, logits, shake, shared
from tests.tiny import llama, texts

TERMS = 16
"""Below the width of all models here and above the rank of a pair."""


class Counted(TorchDispatchMode):
    """How often each operation runs inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def calls(model: PreTrainedModel, batch: dict[str, Tensor]) -> Counter[str]:
    """Operations of a whole step."""
    counted = Counted()
    with counted:
        model.train()(**batch).loss.backward()
    return counted.calls


def prepared(family: str, joined: str, technique: str | None = None, **settings: Any) -> PreTrainedModel:
    """A model that trains ``joined`` in round 1, moved away from its start; ``technique`` beside it has settings."""
    model = FAMILIES[family].model()
    whole = joined if technique is None else f"{technique}+{joined}"
    shake(model, shared(whole, model, FAMILIES[family].task, **settings))
    begin_round(chosen(joined), model, 1)
    return model


def selective(family: str, joined: str, terms: int = TERMS) -> PreTrainedModel:
    return prepared(family, joined, "selective-checkpointing", terms=terms)


@pytest.mark.parametrize("joined", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_bit_equal_with_dropout_on_and_fewer_bytes_are_kept(family: str, joined: str) -> None:
    batch = FAMILIES[family].make_batch(rows=4, length=32)
    wanted, plain_bytes = gradients(prepared(family, joined), batch)
    found, kept = gradients(selective(family, joined), batch)
    _, least = gradients(prepared(family, joined, "gradient-checkpointing"), batch)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(gradient.any() for gradient in wanted.values())
    assert least < kept < plain_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_no_product_of_a_linear_layer_runs_twice(family: str) -> None:
    batch = FAMILIES[family].make_batch()
    plain, found = (calls(model, batch) for model in (prepared(family, "full"), selective(family, "full")))
    again = calls(prepared(family, "full", "gradient-checkpointing"), batch)
    for product in ("aten::mm", "aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu"):
        assert found[product] == plain[product]
    assert again["aten::mm"] + again["aten::addmm"] > plain["aten::mm"] + plain["aten::addmm"]


@pytest.mark.parametrize(
    ("family", "cheap"),
    [
        ("llama", ["aten::rsqrt", "aten::silu"]),
        (
            "bert",
            ["aten::native_layer_norm", "aten::gelu", "aten::bernoulli_.float", "aten::bmm", "aten::_safe_softmax"],
        ),
    ],
)
def test_what_lies_between_products_runs_twice(family: str, cheap: list[str]) -> None:
    batch = FAMILIES[family].make_batch()
    plain, found = (calls(model, batch) for model in (prepared(family, "full"), selective(family, "full")))
    assert all(found[name] > plain[name] > 0 for name in cheap)


def kept_per_token(*, joined: str = "full", terms: int = TERMS) -> float:
    """Bytes that one more Llama block keeps for each token."""
    kept = []
    for depth in (1, 2):
        model = llama(num_hidden_layers=depth, hidden_size=32, intermediate_size=80, num_key_value_heads=1)
        shared(f"selective-checkpointing+{joined}", model, LANGUAGE, terms=terms)
        begin_round(chosen(joined), model, 1)
        kept.append(gradients(model, texts(model, rows=4, length=30))[1])
    return (kept[1] - kept[0]) / 120


INPUT, CORE = 4 * 32, 4 * (32 + 2)
"""What comes into a block; what the fused attention kernel returns: values, and a logarithm per head."""
LINEAR = 4 * (32 + 16 + 16 + 32 + 80 + 80 + 32)
"""Outputs of query, key, value, output, gate, up and down."""


def test_bytes_kept_are_those_of_the_closed_form() -> None:
    assert kept_per_token() == INPUT + CORE + LINEAR


def test_low_rank_products_are_not_kept() -> None:
    """Of a pair only the narrow product is, which sums many terms and is eight numbers wide."""
    assert kept_per_token(joined="lora") == INPUT + CORE + LINEAR + 7 * 4 * 8


def test_products_over_few_terms_are_recomputed() -> None:
    assert kept_per_token(terms=32) == INPUT + CORE + 4 * 32
    assert kept_per_token(terms=80) == INPUT + CORE


def test_four_bit_products_are_kept_and_no_weight_is(tmp_path: Path) -> None:
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    [qlora] = chosen("qlora")
    steps, kept = [], []
    for joined, settings in (
        ("qlora", {}),
        ("selective-checkpointing+qlora", {"terms": 63}),
        ("gradient-checkpointing+qlora", {}),
    ):
        model = models.load_model(
            ModelSettings(source=f"path:{tmp_path}"),
            LANGUAGE,
            (),
            seed=0,
            quantisation=qlora.make_quantisation_config(),
        )
        assert isinstance(model, PreTrainedModel)
        shake(model, shared(joined, model, LANGUAGE, **settings))
        batch = texts(model)
        found, bytes_kept = gradients(model, batch)
        kept.append(bytes_kept)
        steps.append((calls(model, batch), found))
    (plain, wanted), (counted, found), (again, _) = steps
    assert counted["bitsandbytes::gemm_4bit"] == plain["bitsandbytes::gemm_4bit"] == 14
    assert again["bitsandbytes::gemm_4bit"] > 14
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert kept[2] < kept[1]
    weights = sum(layer.out_features * layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear))
    assert kept[1] < 4 * weights


def test_a_pickled_model_takes_the_same_step() -> None:
    model = selective("bert", "lora")
    other = pickle.loads(pickle.dumps(model))
    batch = FAMILIES["bert"].make_batch()
    wanted, kept = gradients(model, batch)
    found, kept_too = gradients(other, batch)
    assert kept == kept_too
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_scoring_is_left_alone() -> None:
    batch = FAMILIES["gpt2"].make_batch()
    assert torch.equal(logits(selective("gpt2", "full"), batch), logits(prepared("gpt2", "full"), batch))


def test_a_model_without_blocks_is_refused() -> None:
    for model in (
        models.load_model(ModelSettings(source="sample:logistic"), IMAGES, ("a", "b"), seed=0),
        nn.Linear(2, 2),
    ):
        with pytest.raises(ModelError, match="has no blocks to recompute; remove selective-checkpointing"):
            shared("full+selective-checkpointing", model, IMAGES)


def test_it_does_not_go_with_full_checkpointing() -> None:
    with pytest.raises(
        RecipeError, match="with gradient-checkpointing: both decide which activations the same blocks store; drop one"
    ):
        chosen("lora+gradient-checkpointing+selective-checkpointing")
