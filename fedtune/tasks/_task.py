"""The base class of tasks: what the rest of fedtune asks a task, so that nobody asks for its name."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedtune import models
from fedtune.data import EncodedDataset, Table, Values
from fedtune.data.sampling import iter_inputs, sample_rows
from fedtune.recipe.schema import ModelSettings, Recipe, Train
from fedtune.recipe.unit_registry import NamedUnit
from fedtune.tasks._scores import ExampleScore

__all__ = ["Task"]

_CALIBRATION_EXAMPLES, _CALIBRATION_SEED = 256, 42


class Task(NamedUnit):
    """What a model is trained to do."""

    columns: ClassVar[tuple[str, ...]]
    """Canonical names of the columns that it takes. The model reads the first; ``label`` is a class."""
    auto_class: ClassVar[str]
    """The transformers class that loads a model with the task's head."""
    reads_text: ClassVar[bool] = True
    """Whether the model reads tokens, so that it needs a tokenizer and a padding id."""
    peft_type: ClassVar[str | None] = None
    """PEFT's ``task_type``; None where PEFT has none."""
    main_metric: ClassVar[str] = "accuracy"
    """The metric that tables show."""

    @property
    def input_column(self) -> str:
        """The column that the model reads."""
        return self.columns[0]

    @property
    def has_classes(self) -> bool:
        """Whether an example has one class, for which the model gets a head of its own."""
        return "label" in self.columns

    def load_class_names(self, model: ModelSettings) -> tuple[str, ...]:
        """The class names of a model in the order of its head; empty where it has no names."""
        return models.class_names(model) if self.has_classes else ()

    def load_reader(self, recipe: Recipe) -> Any:
        """What turns examples into inputs: a tokenizer or a preprocessor."""
        raise NotImplementedError

    def save_reader(self, reader: Any, folder: Path) -> None:
        """Write the reader beside an exported model."""
        raise NotImplementedError

    def resolve_reader(self, recipe: Recipe) -> Recipe:
        """The recipe with the reader's settings written out."""
        return recipe

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Examples as tensors; ModelError where the reader cannot be used for the task."""
        raise NotImplementedError

    def score_batch(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        """A score for each example of a batch."""
        raise NotImplementedError

    def compute_metrics(self, accuracy: float, loss: float) -> dict[str, float]:
        """The metrics that the mean accuracy and loss of some predictions make, by name."""
        return {"accuracy": accuracy, "loss": loss}

    def iter_calibration_inputs(self, examples: Table, recipe: Recipe, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Inputs of up to 256 examples, which need no labels; texts are cut to ``train.max_length`` tokens."""
        blank = examples.with_column("label", Values(np.zeros(len(examples), np.int64)))
        encoded = self.encode_examples(blank, recipe, self.load_reader(recipe))
        chosen = sample_rows(np.arange(len(encoded)), _CALIBRATION_EXAMPLES, _CALIBRATION_SEED)
        return iter_inputs(encoded, chosen, batch_size)

    def pad_batch(self, batch: Mapping[str, Tensor], recipe: Recipe, reader: Any) -> dict[str, Tensor]:
        """A batch at the largest size that the recipe allows."""
        return dict(batch)

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """A batch of random inputs at the largest size that the recipe allows, and random labels."""
        raise NotImplementedError

    def describe_input_size(self, train: Train) -> str:
        """The size of one example in words, e.g. ``128 tokens``."""
        raise NotImplementedError
