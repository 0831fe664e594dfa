"""A model fitted to a task, and its tokenizer: one path from here on, whatever the source.

Models defined here load without transformers, whose import takes seconds and a hundred megabytes; a device that
classifies pictures needs neither.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fedtune.models import image_model_files
from fedtune.models.classifier import ImageClassifier
from fedtune.models.sources import resolve_model_source
from fedtune.recipe.preprocessor_settings import Preprocessor
from fedtune.recipe.schema import ModelSettings, Recipe, TaskName

__all__ = [
    "class_names",
    "load_model",
    "load_tokenizer",
    "preprocessor",
    "reader",
    "resolve_preprocessor",
    "save_config",
    "save_model",
]


def load_model(
    model: ModelSettings, task: TaskName, labels: Sequence[str], *, seed: int, quantisation: object | None = None
) -> nn.Module:
    """The model on the CPU in ``model.dtype``; a new head is drawn from ``seed`` alone, so two loads are bit-equal.

    ``quantisation`` is a transformers quantisation config. Raises SourceError when the source cannot be read and
    ModelError when it does not fit the task.
    """
    location = resolve_model_source(model.source)
    if image_model_files.is_fedtune_image_model(location):
        return image_model_files.load_image_model(
            model, Path(location), task, labels, seed=seed, quantised=quantisation is not None
        )
    from fedtune.models import pretrained

    return pretrained.load_pretrained_model(model, location, task, labels, seed=seed, quantisation=quantisation)


def class_names(model: ModelSettings, task: TaskName) -> tuple[str, ...]:
    """What a fine-tuned classifier calls its classes, in the order of its head; nothing where it does not say."""
    location = resolve_model_source(model.source)
    if task == "text-generation" or image_model_files.is_fedtune_image_model(location):
        return ()
    from fedtune.models import pretrained

    return pretrained.class_names(model, location)


def load_tokenizer(model: ModelSettings) -> Any:
    """The model's tokenizer, with a padding token: a transformers ``PreTrainedTokenizerBase``."""
    from fedtune.models import pretrained

    return pretrained.load_pretrained_tokenizer(model, resolve_model_source(model.source))


def preprocessor(model: ModelSettings) -> Preprocessor:
    """How the model reads pictures: as the recipe records it, else as its folder says."""
    if model.preprocessor is not None:
        return model.preprocessor
    location = resolve_model_source(model.source)
    if image_model_files.is_fedtune_image_model(location):
        return image_model_files.preprocessor(Path(location), model.source)
    from fedtune.models import pretrained

    return pretrained.preprocessor(model, location)


def reader(recipe: Recipe) -> Any:
    """What turns examples into inputs: a ``Preprocessor`` at ``train.image_size`` pixels, or a tokenizer."""
    if recipe.task != "image-classification":
        return load_tokenizer(recipe.model)
    return preprocessor(recipe.model).scaled_to(recipe.train.image_size)


def resolve_preprocessor(recipe: Recipe) -> Recipe:
    """The recipe with the model's way of reading pictures written out, so that all who get it read them alike."""
    if recipe.task != "image-classification":
        return recipe
    read: Preprocessor = reader(recipe)
    train = recipe.train.model_copy(update={"image_size": read.side})
    return recipe.model_copy(update={"train": train, "model": recipe.model.model_copy(update={"preprocessor": read})})


def save_model(model: nn.Module, labels: Sequence[str], folder: Path) -> None:
    """Write a model of plain layers for ``from_pretrained``; a model defined here takes its code with it."""
    from fedtune.models import pretrained

    pretrained.save_pretrained_model(
        image_model_files.wrap_for_transformers(model, labels) if isinstance(model, ImageClassifier) else model, folder
    )


def save_config(model: nn.Module, folder: Path) -> None:
    """Write the configuration of a model that transformers loaded: class names and padding id among the rest."""
    from fedtune.models import pretrained

    pretrained.save_config(model, folder)
