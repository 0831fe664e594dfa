"""The families deft has to know, tiny and with random weights, beside those of ``tiny``."""

from typing import Any

import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForSequenceClassification,
)

from tests.families import FAMILIES
from tests.tiny import bert, llama

__all__ = ["gated_t5", "gpt2", "mistral", "opt", "qwen2", "qwen3", "relu_bert", "relu_llama", "roberta", "t5", "vit"]

_SIZE: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_GATED: dict[str, Any] = {**_SIZE, "intermediate_size": 32, "num_key_value_heads": 1}

gpt2 = FAMILIES["gpt2"].model
qwen2 = FAMILIES["qwen2"].model
roberta = FAMILIES["roberta"].model
vit = FAMILIES["vit"].model


def opt(seed: int = 0, **settings: Any) -> OPTForCausalLM:
    """A decoder with ReLU, which flattens batch and length before its MLPs."""
    torch.manual_seed(seed)
    fixed = {"ffn_dim": 32, "max_position_embeddings": 32, "word_embed_proj_dim": 16, "pad_token_id": 0}
    return OPTForCausalLM(OPTConfig(**{**_SIZE, **fixed, "use_cache": False, **settings}))


def qwen3() -> PreTrainedModel:
    """Its attention widens and narrows as well."""
    return Qwen3ForCausalLM(Qwen3Config(**{**_GATED, "head_dim": 16}))


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_GATED))


def t5(**settings: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    return T5ForSequenceClassification(T5Config(**sizes, **settings))


def gated_t5() -> PreTrainedModel:
    return t5(feed_forward_proj="gated-gelu")


def relu_bert() -> PreTrainedModel:
    return bert(hidden_act="relu")


def relu_llama() -> PreTrainedModel:
    return llama(hidden_act="relu")
