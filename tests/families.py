"""One small model of each family the techniques claim to fit, randomly initialised, and a batch for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
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

from fedtune.tasks import Task, get_task

__all__ = ["FAMILIES", "LANGUAGE_FAMILIES", "Family"]

_WORDS = 50
_SIZE: dict[str, Any] = {
    "vocab_size": _WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "use_cache": False,
}
_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "num_labels": 3}


class Family(NamedTuple):
    """How a model is built, and what it is for."""

    build: Callable[[], PreTrainedModel]
    task: Task

    def model(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        return self.build()

    def make_batch(self, rows: int = 3, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
        """Texts [rows, length] or pictures [rows, 3, 16, 16], with labels."""
        random = torch.Generator().manual_seed(seed)
        classes = torch.randint(0, 3, (rows,), generator=random)
        if not self.task.reads_text:
            return {"pixel_values": torch.rand(rows, 3, 16, 16, generator=random), "labels": classes}
        ids = torch.randint(1, _WORDS, (rows, length), generator=random)
        labels = classes if self.task.has_classes else ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**_SIZE, **_DROPOUT))


def _roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**_SIZE, **_DROPOUT))


def _gpt2() -> PreTrainedModel:
    size: dict[str, Any] = {
        "vocab_size": _WORDS,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 40,
        "use_cache": False,
    }
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**_SIZE, ffn_dim=64, word_embed_proj_dim=32))


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SIZE))


def _qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_SIZE, num_key_value_heads=1, tie_word_embeddings=True))


def _vit() -> PreTrainedModel:
    size: dict[str, Any] = {name: _SIZE[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    return ViTForImageClassification(ViTConfig(**size, **_DROPOUT, num_hidden_layers=2, image_size=16, patch_size=4))


FAMILIES: dict[str, Family] = {
    "bert": Family(_bert, get_task("text-classification")),
    "roberta": Family(_roberta, get_task("text-classification")),
    "gpt2": Family(_gpt2, get_task("text-generation")),
    "opt": Family(_opt, get_task("text-generation")),
    "llama": Family(_llama, get_task("text-generation")),
    "qwen2": Family(_qwen2, get_task("text-generation")),
    "vit": Family(_vit, get_task("image-classification")),
}
LANGUAGE_FAMILIES = [name for name, family in FAMILIES.items() if not family.task.has_classes]
