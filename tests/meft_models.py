"""Tiny models of every family meft knows, batches with padding, and what its tests do with them."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fedtune.tasks import Task
from fedtune.techniques import apply_techniques
from fedtune.techniques.meft._two_streams import ReversibleStack
from tests.technique_steps import IMAGES, LANGUAGE, TEXT, chosen, shake
from tests.tiny import VOCABULARY, bert, llama

__all__ = ["FAMILIES", "VARIANTS", "a_batch", "equal", "made", "stack_of", "twins"]

VARIANTS = ["diff", "meft1", "meft2", "meft3"]
_BLOCKS = 3
_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": _BLOCKS,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "use_cache": False,
}
_LABELS: dict[str, Any] = {"num_labels": 3}
_WIDE: dict[str, Any] = {**_SIZE, "intermediate_size": 32}
_DECODER: dict[str, Any] = {**_WIDE, "num_key_value_heads": 1}
_OPT: dict[str, Any] = {**_SIZE, "ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.2, "attention_dropout": 0.2}
_VIT = ViTConfig(**{**_WIDE, "image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.2, "num_labels": 3})


def _distilbert() -> PreTrainedModel:
    size: dict[str, Any] = {
        "dim": 16,
        "hidden_dim": 32,
        "n_heads": 2,
        "n_layers": _BLOCKS,
        "max_position_embeddings": 40,
    }
    return DistilBertForSequenceClassification(DistilBertConfig(vocab_size=VOCABULARY, **_LABELS, **size))


def _gpt2() -> PreTrainedModel:
    size: dict[str, Any] = {"n_embd": 16, "n_head": 2, "n_layer": _BLOCKS, "n_positions": 40, "use_cache": False}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **size))


def _sliding() -> PreTrainedModel:
    """One block sees all tokens, the others the last three."""
    sliding: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**_DECODER, **sliding))


def made(family: str) -> tuple[PreTrainedModel, Task]:
    """A model drawn from a seed, and its task."""
    build, task = {**FAMILIES, "deep-bert": (lambda: bert(num_hidden_layers=12), TEXT)}[family]
    torch.manual_seed(0)
    model = build()
    if task == LANGUAGE:
        model.generation_config = GenerationConfig()
    return model, task


FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], Task]] = {
    "bert": (lambda: bert(num_hidden_layers=_BLOCKS), TEXT),
    "roberta": (lambda: RobertaForSequenceClassification(RobertaConfig(**_WIDE, **_LABELS)), TEXT),
    "distilbert": (_distilbert, TEXT),
    "llama": (lambda: llama(num_hidden_layers=_BLOCKS), LANGUAGE),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)), LANGUAGE),
    "qwen2-sliding": (_sliding, LANGUAGE),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**_DECODER, sliding_window=4)), LANGUAGE),
    "opt": (lambda: OPTForCausalLM(OPTConfig(**_OPT)), LANGUAGE),
    "opt-post-norm": (lambda: OPTForCausalLM(OPTConfig(**_OPT, do_layer_norm_before=False)), LANGUAGE),
    "gpt2": (_gpt2, LANGUAGE),
    "vit": (lambda: ViTForImageClassification(_VIT), IMAGES),
}


def a_batch(task: Task, rows: int = 4, length: int = 8) -> dict[str, Tensor]:
    """Texts of several lengths, or images, with labels."""
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(rows) % 3
    if task == IMAGES:
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=random), "labels": labels}
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=random)
    mask = (torch.arange(length) < length - 2 * torch.arange(rows)[:, None] % (length - 1)).long()
    ids = ids * mask
    labels = ids.masked_fill(mask == 0, -100) if task == LANGUAGE else labels
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


Twins = tuple[PreTrainedModel, PreTrainedModel]


def twins(family: str, joined: str = "meft", **settings: Any) -> Twins:
    """A model with techniques, and what trains the same with every activation stored; both moved a little.

    ``settings`` are those of the first technique.
    """
    model, task = made(family)
    other = deepcopy(model)
    techniques = chosen(joined, **settings)
    stored = [twin for one in techniques if (twin := one.make_reference()) is not None]
    for one, applied in ((model, techniques), (other, stored)):
        shake(
            one, [name for name in apply_techniques(applied, one, task, 0) if ".adapters." in name or ".lora_" in name]
        )
    return model, other


def stack_of(model: nn.Module) -> ReversibleStack:
    """What meft made of the model's blocks."""
    stack = vars(model)["meft"]
    assert isinstance(stack, ReversibleStack)
    return stack


def equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether two sets of gradients are the same to the bit."""
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
