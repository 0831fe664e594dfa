from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from fedtune import models
from fedtune.errors import ModelError
from fedtune.recipe.schema import ModelSettings
from fedtune.techniques.deft._mlps import find_mlps
from tests.deft_models import gated_t5, gpt2, mistral, opt, qwen2, qwen3, roberta, t5, vit
from tests.technique_steps import IMAGES, LANGUAGE, TEXT, shared
from tests.tiny import bert, llama, llama_classifier

PLAIN: dict[Any, tuple[str, str, str]] = {
    bert: ("bert.encoder.layer", "intermediate.dense", "output.dense"),
    roberta: ("roberta.encoder.layer", "intermediate.dense", "output.dense"),
    opt: ("model.decoder.layers", "fc1", "fc2"),
    gpt2: ("transformer.h", "mlp.c_fc", "mlp.c_proj"),
    vit: ("vit.layers", "mlp.fc1", "mlp.fc2"),
}


@pytest.mark.parametrize("build", PLAIN)
def test_the_mlp_of_every_block_is_found(build: Callable[[], PreTrainedModel]) -> None:
    stack, first, second = PLAIN[build]
    found = find_mlps(build())
    assert [mlp.down_projection for mlp in found] == [f"{stack}.{index}.{second}" for index in range(2)]
    assert [mlp.up_projections for mlp in found] == [(f"{stack}.{index}.{first}",) for index in range(2)]
    assert {mlp.block_list for mlp in found} == {stack}
    assert not any(mlp.is_gated for mlp in found)


@pytest.mark.parametrize("build", [llama, llama_classifier, qwen2, qwen3, mistral])
def test_a_gated_mlp_is_found_with_both_its_widening_layers(build: Callable[[], PreTrainedModel]) -> None:
    found = find_mlps(build())
    assert [mlp.down_projection for mlp in found] == [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    assert found[1].up_projections == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    assert found[1].parent == "model.layers.1.mlp"
    assert all(mlp.is_gated for mlp in found)


@pytest.mark.parametrize(("build", "gated"), [(t5, False), (gated_t5, True)])
def test_encoder_and_decoder_are_two_stacks(build: Callable[[], PreTrainedModel], gated: bool) -> None:
    found = find_mlps(build())
    assert [mlp.block_list for mlp in found] == ["transformer.encoder.block"] * 2 + ["transformer.decoder.block"] * 2
    assert {mlp.is_gated for mlp in found} == {gated}


@pytest.mark.parametrize("build", [bert, llama, gpt2])
def test_low_rank_pairs_change_nothing(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    before = find_mlps(model)
    shared("lora", model, TEXT if build is bert else LANGUAGE, rank=20)
    assert find_mlps(model) == before


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.act, self.up = nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16)


@pytest.mark.parametrize("build", [bert, opt, llama])
def test_an_adapters_own_activation_is_not_an_mlps(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    before = find_mlps(model)
    for index in range(2):
        block = model.get_submodule(f"{before[0].block_list}.{index}")
        block.add_module("adapter", Adapter())
        model.get_submodule(before[index].parent).add_module("inner", Adapter())
    assert find_mlps(model) == before


def test_the_first_block_that_does_not_fit_is_named() -> None:
    model = llama()
    model.set_submodule("model.layers.1.mlp.down_proj", nn.Linear(31, 16))
    with pytest.raises(
        ModelError, match=r"^model\.layers\.1 \(LlamaDecoderLayer\) has no activation between one or two"
    ):
        shared("full+deft", model, LANGUAGE)


def test_experts_are_refused() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    with pytest.raises(ModelError, match=r"^model\.layers\.0 \(MixtralDecoderLayer\) has no activation between"):
        find_mlps(MixtralForCausalLM(MixtralConfig(**sizes, **heads)))


def test_a_model_without_blocks_is_refused() -> None:
    for model in (
        models.load_model(ModelSettings(source="sample:logistic"), IMAGES, ("a", "b"), seed=0),
        nn.Linear(2, 2),
    ):
        with pytest.raises(ModelError, match="has no transformer blocks whose MLPs deft could follow; leave it out"):
            find_mlps(model)
