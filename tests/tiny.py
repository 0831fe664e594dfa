"""Transformers of a few thousand parameters, randomly initialised from a seed, and batches for them."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

__all__ = ["VOCABULARY", "bert", "llama", "llama_classifier", "texts"]

VOCABULARY = 40
_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "use_cache": False,
}


def bert(seed: int = 0, **settings: Any) -> BertForSequenceClassification:
    """An encoder with a head for three labels, and dropout."""
    torch.manual_seed(seed)
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**{**_SIZE, **dropout, **settings}))


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A decoder, which has no biases."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**_SIZE, **settings}))


def llama_classifier(seed: int = 0) -> LlamaForSequenceClassification:
    """A decoder with a head for three labels."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**_SIZE, num_labels=3))


def texts(model: PreTrainedModel, rows: int = 4, length: int = 8, seed: int = 1) -> dict[str, Tensor]:
    """A batch [rows, length] with labels: classes, or for a language model the tokens themselves."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=random)
    language = isinstance(model, LlamaForCausalLM)
    labels = ids if language else torch.randint(0, 3, (rows,), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
