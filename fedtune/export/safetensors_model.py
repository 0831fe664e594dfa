"""A whole model in safetensors, with the techniques merged into its weights."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from fedtune import models, tasks, techniques
from fedtune.recipe.schema import Recipe
from fedtune.techniques import Technique

__all__ = ["save_preprocessing", "save_whole_model"]


def save_whole_model(
    model: nn.Module, chosen: tuple[Technique, ...], recipe: Recipe, labels: Sequence[str], folder: Path
) -> None:
    """Merge the techniques into the weights, and write the model with its preprocessing."""
    techniques.merge_into_weights(chosen, model)
    task = tasks.get_task(recipe.task)
    models.save_model(model, labels, folder, task.head_problem)
    task.save_model_extras(model, recipe, folder)
    save_preprocessing(recipe, folder)


def save_preprocessing(recipe: Recipe, folder: Path) -> None:
    """Write the tokenizer or the image preprocessor, with the recipe's settings."""
    task = tasks.get_task(recipe.task)
    task.save_reader(task.load_reader(recipe), folder)
