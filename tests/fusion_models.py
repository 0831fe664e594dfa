"""Tiny models on disk for merges: a base, fine-tunes near it, with a tokenizer of a few words."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fedtune.models.transformers_logging import silence_transformers
from tests.tiny import VOCABULARY, llama

__all__ = ["base_and_tuned", "change_json", "moved", "save", "save_tokenizer", "tensors", "words"]


def words(count: int = VOCABULARY) -> list[str]:
    return ["<pad>", *(f"word{number}" for number in range(1, count))]


def save_tokenizer(folder: Path, vocabulary: list[str], added: tuple[str, ...] = ()) -> None:
    """A tokenizer of whole words."""
    model = WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<pad>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="word1")
    fast.add_tokens(list(added), special_tokens=True)
    fast.save_pretrained(folder)


def save(model: PreTrainedModel, folder: Path, vocabulary: list[str] | None = None, **settings: Any) -> Path:
    with silence_transformers():
        model.save_pretrained(folder, **settings)
    save_tokenizer(folder, words() if vocabulary is None else vocabulary)
    return folder


@torch.no_grad()
def moved(model: PreTrainedModel, seed: int, by: float = 0.1) -> PreTrainedModel:
    """The model with every parameter moved at random, by a share of its own size."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        parameter.add_(noise * by * parameter.abs().mean())
    return model


def base_and_tuned(folder: Path, count: int = 3, dtype: torch.dtype = torch.float32, **settings: Any) -> list[Path]:
    """A tiny decoder and so many fine-tunes of it: the folders base, tuned1, tuned2 ..."""
    base = llama(**settings)
    base.to(dtype)  # type: ignore[arg-type]
    folders = [save(base, folder / "base")]
    for seed in range(1, count + 1):
        tuned = moved(llama(**settings), seed)
        tuned.to(dtype)  # type: ignore[arg-type]
        folders.append(save(tuned, folder / f"tuned{seed}"))
    return folders


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from all its shards."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def change_json(path: Path, change: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(change)))
