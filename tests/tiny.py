"""Transformers of a few thousand parameters, randomly initialised from a seed, and batches for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from fedtune.recipe.schema import Recipe

__all__ = ["VOCABULARY", "FewTexts", "a_training_recipe", "bert", "few_texts", "llama", "llama_classifier", "texts"]

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
    return LlamaForSequenceClassification(LlamaConfig(**{**_SIZE, "num_labels": 3}))


def texts(model: PreTrainedModel, rows: int = 4, length: int = 8, seed: int = 1) -> dict[str, Tensor]:
    """A batch [rows, length] with labels: classes, or for a language model the tokens themselves."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=random)
    language = isinstance(model, LlamaForCausalLM)
    labels = ids if language else torch.randint(0, 3, (rows,), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@dataclass(frozen=True)
class FewTexts:
    """Twelve texts of 2 to 9 tokens in two domains, without the encoder."""

    rows: list[list[int]]
    labels: Tensor | None
    domains: list[str] | None
    lengths: Tensor | None

    def __len__(self) -> int:
        return len(self.rows)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        chosen = [torch.tensor(self.rows[index]) for index in indices]
        ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        mask = (ids != 0).long()
        labels = ids.masked_fill(ids == 0, -100) if self.labels is None else self.labels[torch.tensor(indices)]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def few_texts(*, language: bool = False, domains: bool = True, lengths: bool = True) -> FewTexts:
    random = np.random.default_rng(4)
    rows = [random.integers(1, VOCABULARY, size=random.integers(2, 10)).tolist() for _ in range(12)]
    return FewTexts(
        rows=rows,
        labels=None if language else torch.tensor(random.integers(0, 3, size=12)),
        domains=["film" if row % 3 else "book" for row in range(12)] if domains else None,
        lengths=torch.tensor([len(row) for row in rows]) if lengths else None,
    )


def a_training_recipe(*, rounds: int = 2, **settings: Any) -> Recipe:
    """A recipe whose training section is given; no data or model stands behind it."""
    return Recipe.model_validate(
        {
            "version": 2,
            "name": "example",
            "task": "text-classification",
            "model": {"source": "path:nowhere"},
            "data": {"source": "sample:nothing"},
            "devices": [{"count": 2}],
            "train": {"batch_size": 4, **({"local_steps": 4} if "local_epochs" not in settings else {}), **settings},
            "federation": {"rounds": rounds},
        }
    )
