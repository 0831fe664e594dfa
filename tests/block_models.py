"""Small models of plain blocks and their twins of transformers, loaded from the same files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fedtune.models.blocks.block_model import BlockModel
from fedtune.models.blocks.load import load_block_model
from fedtune.models.paging.source_tensors import list_safetensors
from fedtune.models.pretrained import load_pretrained_model
from fedtune.recipe.schema import ModelSettings
from fedtune.tasks import Task, get_task

__all__ = [
    "LABELS",
    "ask_for_step",
    "find_differences",
    "find_task",
    "load_blocks",
    "load_both",
    "make_batch",
    "save_model",
]

LABELS = ("a", "b", "c")
WORDS = 50
_SIZE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_KINDS: Mapping[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "bert": (BertConfig, BertForSequenceClassification),
}


def save_model(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Save a small model with random weights, biases and norms included."""
    config, made = _KINDS[kind]
    sizes = {**_SIZE, **({"num_key_value_heads": 2} if kind != "bert" else {"num_labels": len(LABELS)}), **settings}
    shard = sizes.pop("max_shard_size", "5GB")
    torch.manual_seed(0)
    model: PreTrainedModel = made(config(**sizes))
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.1 * torch.randn_like(parameter)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    words = {"[PAD]": 0, "[UNK]": 1, "[END]": 2, **{f"w{number}": number for number in range(3, WORDS)}}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[END]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


def find_task(folder: Path, kind: str, **settings: Any) -> Task:
    """The task of a kind of model."""
    if kind != "bert":
        return get_task("text-generation")
    return get_task("text-classification").model_copy(update=settings)


def load_blocks(folder: Path, task: Task, labels: Sequence[str] = LABELS, **settings: Any) -> BlockModel:
    """Load the model of plain blocks."""
    chosen = ModelSettings.model_validate({"source": f"path:{folder}", **settings})
    tensors = list_safetensors(sorted(folder.glob("*.safetensors")))
    return load_block_model(chosen, folder, tensors, task, labels if task.has_new_head else (), seed=3)


def load_both(
    folder: Path, kind: str, labels: Sequence[str] = LABELS, **settings: Any
) -> tuple[BlockModel, PreTrainedModel]:
    """Load the model of plain blocks and that of transformers."""
    task = find_task(folder, kind)
    chosen = ModelSettings.model_validate({"source": f"path:{folder}", **settings})
    names = labels if task.has_new_head else ()
    plain = load_pretrained_model(chosen, str(folder), task, names, seed=3, quantisation=None)
    return load_blocks(folder, task, labels, **settings), plain


def make_batch(model: nn.Module, form: str = "padded", length: int = 9) -> dict[str, Tensor]:
    """Texts with or without padding, packed, or in two segments."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, WORDS, (3, length), generator=random)
    mask = torch.ones_like(ids)
    if form == "padded":
        mask[1, length // 2 :] = 0
        ids[1, length // 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if form == "packed":
        del batch["attention_mask"]
        batch["position_ids"] = torch.cat([torch.arange(4), torch.arange(length - 4)]).expand(3, -1)
    if form == "segments":
        batch["token_type_ids"] = (torch.arange(length) > length // 2).long().expand(3, -1)
    is_decoder = hasattr(model, "lm_head")
    labels = ids.masked_fill(mask == 0, -100) if is_decoder else torch.tensor([0, 2, 1])
    return {**batch, "labels": labels}


def ask_for_step(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scores of a pass without labels, and the loss and the gradients of a step with dropout."""
    model.zero_grad()
    with torch.no_grad():
        scores = model.eval()(**{name: one for name, one in batch.items() if name != "labels"}).logits
    torch.manual_seed(5)
    out = model.train()(**batch)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    logits = {} if out.logits is None else {"logits": out.logits.detach()}
    return {"scores": scores, "loss": out.loss.detach(), **logits, **gradients}


def find_differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that are not the same bits, or are on one side only."""
    if list(found) != list(wanted):
        return sorted(set(found) ^ set(wanted)) or ["order"]
    return [name for name, value in wanted.items() if not torch.equal(found[name], value)]
