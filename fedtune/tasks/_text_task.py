"""What tasks on texts share: the tokenizer, padding and random tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune import models
from fedtune.data.encoded_texts import IGNORED_LABEL
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe.evaluation_settings import Prompt
from fedtune.recipe.schema import Recipe, Train
from fedtune.tasks._task import Task

__all__ = ["TextTask", "draw_tokens", "require_texts"]


class TextTask(Task):
    """A task whose model reads the tokens of a text."""

    def load_reader(self, recipe: Recipe) -> Any:
        """The model's tokenizer."""
        return models.load_tokenizer(recipe.model)

    def save_reader(self, reader: Any, folder: Path) -> None:
        """Write the tokenizer's files."""
        reader.save_pretrained(folder)

    def pad_batch(self, batch: Mapping[str, Tensor], recipe: Recipe, reader: Any) -> dict[str, Tensor]:
        """Rows padded on the right to ``train.max_length`` tokens; a label per text stays as it is."""
        fill = {
            "token_type_ids": 0,
            "input_ids": int(reader.pad_token_id),
            "attention_mask": 0,
            "labels": IGNORED_LABEL,
        }
        length = recipe.train.max_length
        return {
            name: tensor
            if name not in fill or tensor.dim() < 2
            else F.pad(tensor, (0, length - tensor.shape[1]), value=fill[name])
            for name, tensor in batch.items()
        }

    def describe_input_size(self, train: Train) -> str:
        """Tokens."""
        return f"{train.max_length} tokens"


def require_texts(task: Task, prompts: Sequence[Prompt]) -> list[str]:
    """The prompts of a task that reads texts alone; RecipeError for a conversation."""
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise RecipeError(
                f"evaluation.prompts: {task.name} reads texts, not messages; write prompt {number} as text"
            )
    return [str(prompt) for prompt in prompts]


def draw_tokens(model: nn.Module, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Random token ids [train.batch_size, train.max_length]; ModelError when the model reads fewer tokens."""
    config: Any = model.config
    length = recipe.train.max_length
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ModelError(f"the model reads at most {longest} tokens; lower train.max_length, which is {length}")
    return torch.randint(config.vocab_size, (recipe.train.batch_size, length), generator=generator)
