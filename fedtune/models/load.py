"""Loads the model of a recipe with the head of its task, its tokenizer and its preprocessor.

fedtune's own models load without transformers, whose import takes seconds and about 100 MB. A device that classifies
images with them does not need it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fedtune.errors import ModelError
from fedtune.models import image_model_files
from fedtune.models.blocks.choice import find_block_model
from fedtune.models.blocks.configuration import read_class_names
from fedtune.models.blocks.preference import avoids_transformers, prefers_plain_blocks
from fedtune.models.classifier import ImageClassifier
from fedtune.models.model_task import ModelTask
from fedtune.models.position_interpolation import refuse_interpolation
from fedtune.models.sources import locate_model
from fedtune.recipe.preprocessor_settings import Preprocessor
from fedtune.recipe.schema import ModelSettings

__all__ = [
    "class_names",
    "load_feature_extractor",
    "load_model",
    "load_tokenizer",
    "preprocessor",
    "save_config",
    "save_model",
]


def load_model(
    model: ModelSettings,
    task: ModelTask,
    labels: Sequence[str],
    *,
    seed: int,
    quantisation: object | None = None,
    blocks_problem: str | None = None,
) -> nn.Module:
    """Load the model on the CPU in ``model.dtype``.

    A new head is drawn from ``seed`` alone, so two loads are equal bit for bit. ``quantisation`` is a transformers
    quantisation config. A process that prefers plain blocks gets a model of them; ``blocks_problem`` says why it
    cannot be one. Raises SourceError when the source cannot be read, ModelError when the model does not fit the task.
    """
    location = locate_model(model)
    if image_model_files.is_fedtune_image_model(location):
        refuse_interpolation(model)
        _refuse_paging(model)
        if quantisation is not None:
            image_model_files.refuse_four_bits(model, Path(location))
        return image_model_files.load_image_model(model, Path(location), task, labels, seed=seed)
    if prefers_plain_blocks():
        found = find_block_model(model, location, task, labels, seed=seed, problem=blocks_problem)
        if found is not None:
            return found
    from fedtune.models import pretrained

    return pretrained.load_pretrained_model(model, location, task, labels, seed=seed, quantisation=quantisation)


def _refuse_paging(model: ModelSettings) -> None:
    if model.paged:
        raise ModelError(f"{model.source} is a model of images, which model.paged does not read; drop it")


def class_names(model: ModelSettings) -> tuple[str, ...]:
    """Return the class names of a fine-tuned classifier in the order of its head; empty if it has none."""
    location = locate_model(model)
    if image_model_files.is_fedtune_image_model(location):
        return ()
    if prefers_plain_blocks() and (names := read_class_names(Path(location))) is not None:
        return names
    from fedtune.models import pretrained

    return pretrained.class_names(model, location)


def load_tokenizer(model: ModelSettings) -> Any:
    """Load the model's tokenizer, a transformers ``PreTrainedTokenizerBase`` with a padding token.

    A process that prefers plain blocks, and has not imported transformers, gets a ``PlainTokenizer``.
    """
    location = locate_model(model)
    if avoids_transformers() and Path(location).is_dir():
        from fedtune.models.plain_tokenizer import find_plain_tokenizer

        if (found := find_plain_tokenizer(Path(location))) is not None:
            return found
    from fedtune.models import pretrained

    return pretrained.load_pretrained_tokenizer(model, location)


def load_feature_extractor(model: ModelSettings) -> Any:
    """Load the feature extractor of an audio model, a transformers ``SequenceFeatureExtractor``."""
    location = locate_model(model)
    if image_model_files.is_fedtune_image_model(location):
        raise ModelError(f"{model.source} is a model of images, which does not read audio; choose another")
    from fedtune.models import feature_extractor

    return feature_extractor.load_feature_extractor(model.source, location)


def preprocessor(model: ModelSettings) -> Preprocessor:
    """Return the image preprocessing, from the recipe if it is set there, else from the model's folder."""
    if model.preprocessor is not None:
        return model.preprocessor
    location = locate_model(model)
    if image_model_files.is_fedtune_image_model(location):
        return image_model_files.preprocessor(Path(location), model.source)
    from fedtune.models import pretrained

    return pretrained.preprocessor(model, location)


def save_model(model: nn.Module, labels: Sequence[str], folder: Path, problem: str | None = None) -> None:
    """Write a model of plain layers for ``from_pretrained``.

    The code of fedtune's own models is saved with them, and ``problem`` as the ``problem_type`` of their head.
    """
    from fedtune.models import pretrained
    from fedtune.models.paging.paged_layers import replace_paged_layers

    replace_paged_layers(model)
    wrapped = (
        image_model_files.wrap_for_transformers(model, labels, problem) if isinstance(model, ImageClassifier) else model
    )
    pretrained.save_pretrained_model(wrapped, folder)


def save_config(model: nn.Module, folder: Path) -> None:
    """Write the configuration of a transformers model, including class names and the padding id."""
    from fedtune.models import pretrained

    pretrained.save_config(model, folder)
