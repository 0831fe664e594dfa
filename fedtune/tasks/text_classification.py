"""Text classification: one text, one class.

What: the model gets a new head over the pretrained encoder or decoder, with one output for each class of the data.
Columns: ``text`` and ``label``. A text is cut to ``train.max_length`` tokens.
Loss: cross entropy over the classes, the mean over the texts of a batch.
Metrics: accuracy (the main one) and loss, and those that ``evaluation.metrics`` names.
Models: those of transformers' ``AutoModelForSequenceClassification``.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedtune.data import EncodedDataset, Table
from fedtune.data.encoded_texts import encode_texts
from fedtune.recipe.schema import Recipe
from fedtune.tasks._scores import ExampleScore, score_classes
from fedtune.tasks._text_task import TextTask, draw_tokens

__all__ = ["TextClassification"]


class TextClassification(TextTask):
    """Predict the class of a text."""

    name: ClassVar[str] = "text-classification"
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str | None] = "SEQ_CLS"

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Token ids and a class number for each text."""
        return encode_texts(examples, reader, recipe.train.max_length)

    def score_batch(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        """One prediction for each text; logits [n, classes], labels [n]."""
        return score_classes(logits, labels)

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random tokens and classes."""
        labels = torch.randint(max(num_labels, 1), (recipe.train.batch_size,), generator=generator)
        ids = draw_tokens(model, recipe, generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
