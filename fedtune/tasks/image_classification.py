"""Image classification: one picture, one class.

What: the model gets a new head over the pretrained layers, with one output for each class of the data.
Columns: ``image`` and ``label``. The model's own preprocessor reads the pictures, at ``train.image_size`` pixels.
Loss: cross entropy over the classes, the mean over the pictures of a batch.
Metrics: accuracy (the main one) and loss, and those that ``evaluation.metrics`` names.
Models: fedtune's own, such as ``sample:mobilenet-v2``, and those of ``AutoModelForImageClassification``.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedtune import models
from fedtune.data import EncodedDataset, Table
from fedtune.data.pixels import encode_pictures
from fedtune.models.preprocessor import save
from fedtune.recipe.preprocessor_settings import Preprocessor
from fedtune.recipe.schema import Recipe, Train
from fedtune.tasks._scores import ExampleScore, score_classes
from fedtune.tasks._task import Task

__all__ = ["ImageClassification"]


class ImageClassification(Task):
    """Predict the class of a picture."""

    name: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    reads_text: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Pictures and their classes."""
        return ("image", "label")

    @property
    def head_problem(self) -> str | None:
        """One class per picture."""
        return "single_label_classification"

    def load_reader(self, recipe: Recipe) -> Preprocessor:
        """The model's preprocessor, at ``train.image_size`` pixels."""
        return models.preprocessor(recipe.model).scaled_to(recipe.train.image_size)

    def save_reader(self, reader: Any, folder: Path) -> None:
        """Write ``preprocessor_config.json``."""
        save(reader, folder)

    def resolve_reader(self, recipe: Recipe) -> Recipe:
        """The recipe with the preprocessor and the image size written out."""
        reader = self.load_reader(recipe)
        train = recipe.train.model_copy(update={"image_size": reader.side})
        model = recipe.model.model_copy(update={"preprocessor": reader})
        return recipe.model_copy(update={"train": train, "model": model})

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Pixels and a class number for each picture."""
        return encode_pictures(examples, reader)

    def score_logits(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        """One prediction for each picture; logits [n, classes], labels [n]."""
        return score_classes(logits, labels)

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random pixels and classes."""
        labels = torch.randint(max(num_labels, 1), (recipe.train.batch_size,), generator=generator)
        side = self.load_reader(recipe).side
        pixels = torch.randn(recipe.train.batch_size, 3, side, side, generator=generator)
        return {"pixel_values": pixels, "labels": labels}

    def describe_input_size(self, train: Train) -> str:
        """Pixels."""
        return f"{train.image_size} pixels"
