"""Models that other estimators are reported to get wrong, traced against the real step."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from fedtune.plan.candidates import Candidate
from fedtune.plan.trace_settings import trace_candidate
from fedtune.recipe.schema import Unit
from tests.profile_examples import a_recipe
from tests.test_plan_trace import compare, plan_one, with_techniques


def a_bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=5, n_head=2, pad_token_id=0))


def a_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=5, n_head=2, pad_token_id=0))


def a_mixtral() -> PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, pad_token_id=0))


def a_t5() -> PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
    config = T5Config(**sizes, num_layers=6, num_decoder_layers=2, pad_token_id=0)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def saved(make: Callable[[], PreTrainedModel], folder: Path, **how: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        make().save_pretrained(folder, **how)
    return folder


@pytest.mark.parametrize("make", [a_bloom, a_gpt2])
def test_tied_weights_are_counted_once(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    """pytorch/pytorch#106732: a model that cannot be loaded without data; pytorch/torchtitan#3225: ties miscounted."""
    recipe = a_recipe(saved(make, tmp_path), "task=text-generation")
    compare(with_techniques(recipe, "full"), ())
    found = plan_one(recipe, "full")
    assert found.weight_bytes + found.mapped_bytes >= 4 * found.trained_values
    assert found.trained_values == sum(one.numel() for one in make().parameters())


@pytest.mark.filterwarnings("ignore:lora puts no pair beside:fedtune.errors.FedtuneWarning")
def test_experts_in_single_precision_are_left_out_with_the_reason(tmp_path: Path) -> None:
    """NVIDIA/Megatron-LM#6782: estimates without the experts. torch knows their product's size in bfloat16 alone."""
    recipe = a_recipe(saved(a_mixtral, tmp_path), "task=text-generation")
    found = trace_candidate(recipe, (), Candidate((Unit(name="lora"),), "float32"))
    assert found.error is not None
    assert found.error.startswith("its step cannot be traced without data")
    assert found.error.endswith("measure it with fedtune profile")


def test_only_the_larger_of_two_stacks_is_shortened(tmp_path: Path) -> None:
    recipe = a_recipe(saved(a_t5, tmp_path), "task=text2text-generation")
    assert compare(with_techniques(recipe, "full"), ()).traced_blocks == 3


def test_a_folder_with_shards_is_planned(tmp_path: Path) -> None:
    folder = saved(a_gpt2, tmp_path, max_shard_size="20kB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = plan_one(a_recipe(folder, "task=text-generation"), "lora")
    assert sum(prod(shape) for shape in found.shapes.values()) * 4 == found.shared_bytes


def test_images_of_an_odd_size_are_planned() -> None:
    overrides = ("task=image-classification", "model.source=sample:resnet18-narrow", "train.image_size=33")
    compare(with_techniques(a_recipe(Path("unused"), *overrides), "full"), ("a", "b"))
