"""Blocks are found by what they run; what does not fit is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from fedtune import models
from fedtune.errors import ModelError
from fedtune.recipe.schema import ModelSettings
from fedtune.techniques.meft._blocks import find_block_list, record_block_inputs
from fedtune.techniques.meft._halves import BlockParts
from tests.meft_models import FAMILIES, a_batch, made, stack_of
from tests.technique_steps import IMAGES, LANGUAGE, TEXT, logits, shared
from tests.tiny import bert, llama

_SIZE: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
_WIDE = {**_SIZE, "intermediate_size": 32}


def parts(family: str) -> BlockParts:
    model, task = made(family)
    shared("meft", model, task)
    return stack_of(model).plan.parts[0]


def test_the_parts_of_known_blocks() -> None:
    assert parts("bert") == BlockParts(
        is_pre_norm=False,
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        attention=("attention.self", "attention.output.dense", "attention.output.dropout"),
        feed_forward=("intermediate", "output.dense", "output.dropout"),
    )
    assert parts("llama") == BlockParts(
        is_pre_norm=True,
        norms=("input_layernorm", "post_attention_layernorm"),
        attention=("self_attn",),
        feed_forward=("mlp",),
    )
    assert parts("opt") == BlockParts(
        is_pre_norm=True,
        norms=("self_attn_layer_norm", "final_layer_norm"),
        attention=("self_attn",),
        feed_forward=("fc1", "activation_fn", "fc2"),
        dropout=0.2,
    )
    assert not parts("opt-post-norm").is_pre_norm
    assert not parts("distilbert").is_pre_norm
    assert parts("vit").feed_forward == ("mlp", "dropout")


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_the_base_stay_and_probing_leaves_no_trace(family: str) -> None:
    model, task = made(family)
    names, before = [name for name, _ in model.named_parameters()], logits(model, a_batch(task))
    state, torch_state = {name: p.clone() for name, p in model.state_dict().items()}, torch.get_rng_state()
    record_block_inputs(model, find_block_list(model))
    assert not model.training
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(logits(model, a_batch(task)), before)
    shared("meft", model, task)
    assert [name for name, _ in model.named_parameters() if ".adapters." not in name] == names
    assert all(torch.equal(model.state_dict()[name], kept) for name, kept in state.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_each_block_is_given_its_own_mask() -> None:
    model, task = made("qwen2-sliding")
    shared("meft", model, task)
    _, calls = record_block_inputs(model, find_block_list(model))
    seen = [call["attention_mask"] for call in calls]
    assert seen[0] is not seen[1] or (seen[0] is None) != (seen[1] is None)
    ids = torch.randint(1, 40, (1, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 0] = ids[0, 0] % 39 + 1
    last = [logits(model, {"input_ids": one})[0, -1] for one in (ids, other)]
    assert not torch.equal(*last)  # the first block sees all tokens


def test_generation_with_and_without_a_cache_agrees() -> None:
    model = llama(num_hidden_layers=3)
    shared("meft", model, LANGUAGE)
    ids = torch.randint(1, 40, (1, 5), generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = [model.eval().generate(ids, use_cache=cached, **settings) for cached in (True, False)]
    assert torch.equal(*found)


def test_a_cache_is_not_filled_while_training() -> None:
    model = llama(num_hidden_layers=3, use_cache=True)
    shared("meft", model, LANGUAGE)
    batch = a_batch(LANGUAGE)
    out = model.train()(**batch)
    out.loss.backward()
    assert out.past_key_values.get_seq_length() == 0


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_WIDE)), r"gpt_neox.layers.0 \(GPTNeoXLayer\) combines attention"),
        (
            lambda: PhiForCausalLM(PhiConfig(**_WIDE)),
            r"model.layers.0 \(PhiDecoderLayer\) normalises its stream in 1 pl",
        ),
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(**_WIDE, head_dim=8, num_key_value_heads=1)),
            r"in 4 places, not in two",
        ),
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_ff=32, num_layers=2)),
            "cannot be tried",
        ),
        (lambda: OPTForCausalLM(OPTConfig(**_SIZE, ffn_dim=32, layerdrop=0.5)), r"OPTDecoder skips blocks at random"),
    ],
)
def test_unknown_structures_are_refused_and_named(build: Callable[[], PreTrainedModel], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        shared("meft", build(), LANGUAGE)


def test_the_first_block_that_differs_is_the_one_that_is_named() -> None:
    model = llama(num_hidden_layers=3)
    model.model.layers[1].register_forward_hook(_doubled)
    with pytest.raises(
        ModelError, match=r"^meft does not fit: model.layers.1 \(LlamaDecoderLayer\) combines attention and"
    ):
        shared("meft", model, LANGUAGE)


def test_a_model_that_changes_its_stream_between_blocks_is_refused() -> None:
    model = llama(num_hidden_layers=3)
    model.model.layers[1].register_forward_pre_hook(_shifted)
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM changes its stream between the blocks of model.layers; leave"
    ):
        shared("meft", model, LANGUAGE)


def _shifted(block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] + 1, *args[1:])


def _doubled(block: nn.Module, args: object, out: Tensor) -> Tensor:
    return 2 * out


def test_a_model_without_blocks_is_refused() -> None:
    for model in (
        models.load_model(ModelSettings(source="sample:logistic"), IMAGES, ("a", "b"), seed=0),
        nn.Linear(2, 2),
    ):
        with pytest.raises(ModelError, match="has no stack of like blocks to make reversible; leave meft out"):
            shared("meft", model, IMAGES)


def test_adapters_use_the_activation_of_their_block() -> None:
    model = bert(hidden_act="relu")
    shared("lora+meft", model, TEXT)
    stack = stack_of(model)
    block = stack.blocks[0]
    adapter = block.get_submodule("adapters.stream")
    x = torch.randn(3, 16)
    down, up = x @ adapter.get_parameter("down_weight").T, adapter.get_parameter("up_weight").T
    model.eval()
    torch.testing.assert_close(stack.run_chunk("stream", 0, 0, x, {}, None), down.relu() @ up)
    block.get_submodule("intermediate").add_module("intermediate_act_fn", nn.Tanh())
    torch.testing.assert_close(stack.run_chunk("stream", 0, 0, x, {}, None), down.tanh() @ up)
