"""A model fitted to a task, and its tokenizer: one path from here on, whatever the source.

Models defined here load without transformers, whose import takes seconds and a hundred megabytes; a device that
classifies pictures needs neither.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fedtune.models import own
from fedtune.models.classifier import ImageClassifier
from fedtune.models.sources import resolve
from fedtune.pictures import Preprocessor
from fedtune.recipe import Model, Recipe, Task

__all__ = ["class_names", "load", "preprocessor", "reader", "save", "save_config", "settled", "tokenizer"]


def load(
    model: Model, task: Task, labels: Sequence[str], *, seed: int, quantisation: object | None = None
) -> nn.Module:
    """The model on the CPU in ``model.dtype``; a new head is drawn from ``seed`` alone, so two loads are bit-equal.

    ``quantisation`` is a transformers quantisation config. Raises SourceError when the source cannot be read and
    ModelError when it does not fit the task.
    """
    location = resolve(model.source)
    if own.is_own(location):
        return own.load(model, Path(location), task, labels, seed=seed, quantised=quantisation is not None)
    from fedtune.models import pretrained

    return pretrained.load(model, location, task, labels, seed=seed, quantisation=quantisation)


def class_names(model: Model, task: Task) -> tuple[str, ...]:
    """What a fine-tuned classifier calls its classes, in the order of its head; nothing where it does not say."""
    location = resolve(model.source)
    if task == "causal-language-modelling" or own.is_own(location):
        return ()
    from fedtune.models import pretrained

    return pretrained.class_names(model, location)


def tokenizer(model: Model) -> Any:
    """The model's tokenizer, with a padding token: a transformers ``PreTrainedTokenizerBase``."""
    from fedtune.models import pretrained

    return pretrained.tokenizer(model, resolve(model.source))


def preprocessor(model: Model) -> Preprocessor:
    """How the model reads pictures: as the recipe records it, else as its folder says."""
    if model.preprocessor is not None:
        return model.preprocessor
    location = resolve(model.source)
    if own.is_own(location):
        return own.preprocessor(Path(location), model.source)
    from fedtune.models import pretrained

    return pretrained.preprocessor(model, location)


def reader(recipe: Recipe) -> Any:
    """What turns examples into the model's inputs: its ``Preprocessor`` at ``train.image`` pixels, or its tokenizer."""
    if recipe.task != "image-classification":
        return tokenizer(recipe.model)
    return preprocessor(recipe.model).scaled_to(recipe.train.image)


def settled(recipe: Recipe) -> Recipe:
    """The recipe with the model's way of reading pictures written out, so that all who get it read them alike."""
    if recipe.task != "image-classification":
        return recipe
    read: Preprocessor = reader(recipe)
    train = recipe.train.model_copy(update={"image": read.side})
    return recipe.model_copy(update={"train": train, "model": recipe.model.model_copy(update={"preprocessor": read})})


def save(model: nn.Module, labels: Sequence[str], folder: Path) -> None:
    """Write a model of plain layers for ``from_pretrained``; a model defined here takes its code with it."""
    from fedtune.models import pretrained

    pretrained.save(own.for_transformers(model, labels) if isinstance(model, ImageClassifier) else model, folder)


def save_config(model: nn.Module, folder: Path) -> None:
    """Write the configuration of a model that transformers loaded: class names and padding id among the rest."""
    from fedtune.models import pretrained

    pretrained.save_config(model, folder)
