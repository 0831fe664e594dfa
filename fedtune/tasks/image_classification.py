"""Image classification: one image, and one class or several.

What: the model gets a new head over the pretrained layers, with one output for each class of the data.
Columns: ``image`` and ``label``. The model's own preprocessor reads the images, at ``train.image_size`` pixels. For
``multi_label_classification`` the source's label column has a list of class names, or names between commas
(``labels``).
Loss: the mean over the images of a batch of the cross entropy over the classes, or of the binary cross entropies of all
classes.
Metrics: accuracy (the main one), loss and those that ``evaluation.metrics`` names; with several classes f1 over all
decisions (the main one), macro-f1 and accuracy per decision.
Models: fedtune's own, such as ``sample:mobilenet-v2``, and those of ``AutoModelForImageClassification``.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedtune import models
from fedtune.data import EncodedDataset, Table
from fedtune.data.pixels import encode_pictures
from fedtune.models.preprocessor import save
from fedtune.recipe.preprocessor_settings import Preprocessor
from fedtune.recipe.schema import Recipe, Train
from fedtune.tasks._classification import Classification

__all__ = ["ImageClassification"]


class ImageClassification(Classification):
    """Predict what an image is labelled with."""

    name: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    reads_text: ClassVar[bool] = False

    problem_type: Literal["single_label_classification", "multi_label_classification"] = Field(
        "single_label_classification", description="transformers' name for the kind of label"
    )

    @property
    def columns(self) -> tuple[str, ...]:
        """Images and their labels."""
        return ("image", self.problem.label_column)

    @property
    def can_augment(self) -> bool:
        """Return True."""
        return True

    @property
    def head_problem(self) -> str | None:
        """What the head predicts."""
        return self.problem_type

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
        """Pixels and labels."""
        return encode_pictures(examples, reader, self.problem.encode_labels(examples))

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random pixels and labels."""
        labels = self.problem.draw_labels(recipe.train.batch_size, num_labels, generator)
        side = self.load_reader(recipe).side
        pixels = torch.randn(recipe.train.batch_size, 3, side, side, generator=generator)
        return {"pixel_values": pixels, "labels": labels}

    def describe_input_size(self, train: Train) -> str:
        """Pixels."""
        return f"{train.image_size} pixels" if train.image_size else "images of the model's size"
