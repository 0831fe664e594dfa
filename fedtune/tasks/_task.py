"""The base class of tasks: what the rest of fedtune asks a task, so that nobody asks for its name."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from fedtune import models
from fedtune.data import EncodedDataset, Table
from fedtune.data.encoded_prompts import EncodedPrompts
from fedtune.data.label_encoders import add_blank_labels, find_label_column
from fedtune.data.sampling import iter_inputs, sample_rows
from fedtune.errors import RecipeError
from fedtune.recipe.evaluation_settings import Prompt
from fedtune.recipe.schema import ModelSettings, Recipe, Train
from fedtune.recipe.unit_registry import NamedUnit
from fedtune.tasks._scores import ExampleScore, ScoreSums
from fedtune.tasks._segments import Segment, decode_example

__all__ = ["Task"]

_CALIBRATION_EXAMPLES, _CALIBRATION_SEED = 256, 42


class Task(NamedUnit):
    """What a model is trained to do."""

    auto_class: ClassVar[str]
    """The transformers class that loads a model with the task's head."""
    reads_text: ClassVar[bool] = True
    """Whether the model reads tokens, so that it needs a tokenizer and a padding id."""
    peft_type: ClassVar[str | None] = None
    """PEFT's ``task_type``; None where PEFT has none."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Canonical names of the columns that it takes; the model reads the first. See ``fedtune.data.columns``."""
        raise NotImplementedError

    @property
    def can_split_batch(self) -> bool:
        """Whether the loss of a batch is the mean over its predictions, so that it can be computed part by part."""
        return True

    @property
    def can_pack(self) -> bool:
        """Whether several examples can be packed into a row, each predicted as if it were alone."""
        return False

    @property
    def can_augment(self) -> bool:
        """Whether its examples are images, which ``train.augmentation`` changes."""
        return False

    @property
    def has_accuracy(self) -> bool:
        """Whether a prediction can be correct, so that accuracy is one of its metrics."""
        return True

    @property
    def needs_reference(self) -> bool:
        """Whether examples carry what the model that training starts from makes of them."""
        return False

    def add_reference(self, model: nn.Module, examples: EncodedDataset) -> EncodedDataset:
        """The examples with what the model, as it is now, makes of them."""
        return examples

    @property
    def keeps_outputs(self) -> bool:
        """Whether its metrics need the output of each example."""
        return False

    @property
    def compares_answers(self) -> bool:
        """Whether examples have a wanted answer, which ``exact_match`` and ``f1`` compare with a generated one."""
        return False

    def require_answers(self, examples: Table) -> None:
        """Raise RecipeError if answers are to be compared, but the examples have none."""

    def encode_prompts(self, prompts: Sequence[Prompt], examples: Table, recipe: Recipe, reader: Any) -> EncodedPrompts:
        """The prompts of a recipe, read as ``examples`` are; RecipeError for a task that generates no text."""
        raise RecipeError(f"evaluation.prompts: {self.name} generates no text; leave the prompts out")

    def split_answers(self, batch: Mapping[str, Tensor], reader: Any) -> tuple[EncodedPrompts, list[str]]:
        """A batch as prompts, and the answers that are wanted."""
        raise NotImplementedError

    @property
    def main_metric(self) -> str:
        """The metric that tables show."""
        return "accuracy"

    @property
    def input_column(self) -> str:
        """The column that the model reads."""
        return self.columns[0]

    @property
    def has_classes(self) -> bool:
        """Whether each example has one class, and the model gives probabilities of the classes."""
        return "label" in self.columns

    @property
    def head_problem(self) -> str | None:
        """The ``problem_type`` of the model's configuration; None where the head needs none."""
        return None

    @property
    def has_new_head(self) -> bool:
        """Whether the model gets a head for the labels of the data, which is drawn where the checkpoint has none."""
        return self.has_classes

    def make_head_settings(self, labels: Sequence[str]) -> dict[str, Any]:
        """Settings of the model's configuration that make the head for ``labels``."""
        if not self.has_new_head:
            return {}
        return {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "problem_type": self.head_problem,
        }

    def load_class_names(self, model: ModelSettings) -> tuple[str, ...]:
        """The class names of a model in the order of its head; empty where it has no names."""
        return models.class_names(model) if self.has_new_head else ()

    def load_reader(self, recipe: Recipe) -> Any:
        """What turns examples into inputs: a tokenizer or a preprocessor."""
        raise NotImplementedError

    def save_reader(self, reader: Any, folder: Path) -> None:
        """Write the reader beside an exported model."""
        raise NotImplementedError

    @property
    def changes_reader(self) -> bool:
        """Whether the settings change the model's own reader, so that an adapter needs it beside it."""
        return self.has_new_head

    def save_model_extras(self, model: nn.Module, recipe: Recipe, folder: Path) -> None:
        """Write what else a user of an exported model needs, beside the model and the reader."""

    def read_files(self) -> Self:
        """The task with the contents of files that its settings name, which other machines lack."""
        return self

    def resolve_reader(self, recipe: Recipe) -> Recipe:
        """The recipe with the reader's settings written out."""
        return recipe

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Examples as tensors; ModelError where the reader cannot be used for the task."""
        raise NotImplementedError

    def iter_encoded(self, examples: Table, recipe: Recipe, reader: Any, size: int) -> Iterator[EncodedDataset]:
        """Encode ``size`` examples at a time, as ``encode_examples`` does."""
        for start in range(0, len(examples), size):
            yield self.encode_examples(examples.select(range(start, min(start + size, len(examples)))), recipe, reader)

    def decode_example(self, batch: Mapping[str, Tensor], reader: Any, names: Sequence[str]) -> list[Segment]:
        """The text of the one example in a batch, and what of it is a target; nothing for a task without text."""
        return decode_example(batch, reader, names) if self.reads_text else []

    def compute_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch."""
        loss: Tensor = model(**batch).loss
        return loss

    def count_predictions(self, labels: Tensor) -> int:
        """The number of predictions that the loss of a batch is the mean over."""
        return len(labels)

    def score_batch(self, model: nn.Module, batch: Mapping[str, Tensor], reader: Any) -> list[ExampleScore]:
        """A score for each example of a batch; ``reader`` is what ``load_reader`` returned."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return self.score_logits(model(**inputs).logits.float(), batch["labels"])

    def score_logits(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        """A score for each example of a batch from the logits of the model."""
        raise NotImplementedError

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """All the task's metrics over some examples, by name."""
        return self.compute_basic_metrics(sums)

    def compute_basic_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """``loss``, and ``accuracy`` where the task has it: what a client reports, by what a minimal install has."""
        return {"accuracy": sums.accuracy, "loss": sums.mean_loss} if self.has_accuracy else {"loss": sums.mean_loss}

    def iter_calibration_inputs(self, examples: Table, recipe: Recipe, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Inputs of up to 256 examples, which need no labels; texts are cut to ``train.max_length`` tokens."""
        column = find_label_column(self.columns)
        blank = examples if column is None else add_blank_labels(examples, column)
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
