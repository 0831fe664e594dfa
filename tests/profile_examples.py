"""Cases small enough to be measured in the process of a test."""

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from fedtune.profiling import ProfileCase
from fedtune.recipe.schema import Recipe, Unit
from fedtune.recipe.yaml_file import parse_recipe

__all__ = ["TEXT", "a_case", "a_recipe", "tiny_bert"]

TEXT = """
version: 2
name: tiny
task: text-classification
model: {{source: "path:{folder}"}}
data: {{source: random}}
devices: [{{count: 1}}]
train: {{local_steps: 1, batch_size: 3, max_length: 8}}
federation: {{rounds: 1}}
"""


def tiny_bert(folder: Path) -> Path:
    """A BERT body with dropout, without a head and without a tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        BertModel(BertConfig(**shape, num_attention_heads=2, max_position_embeddings=32)).save_pretrained(folder)
    return folder


def a_recipe(folder: Path, *overrides: str) -> Recipe:
    return parse_recipe(TEXT.format(folder=folder), "tiny", overrides)


def a_case(recipe: Recipe, joined: str, check: bool = False, **settings: Any) -> ProfileCase:
    """A case with random inputs and three labels; the settings are those of the first technique."""
    first, *others = joined.split("+")
    units = [Unit(name=first, settings=settings), *(Unit(name=name) for name in others)]
    train = recipe.train.model_copy(update={"techniques": units})
    text = recipe.model_copy(update={"train": train}).model_dump_json()
    return ProfileCase(joined, text, ("a", "b", "c"), None, check)
