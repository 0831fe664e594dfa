"""Text classification: one text or a pair of texts, and one class, several classes or a number.

What: the model gets a new head over the pretrained encoder or decoder, with one output for each class of the data.
Columns: ``text`` and ``label``, with ``pair`` also ``text_pair``. Texts are cut to ``train.max_length`` tokens, of a
pair the longer one first. For ``multi_label_classification`` the source's label column has a list of class names
(``labels``), or names between commas; for ``regression`` it has a number (``number``).
Loss: the mean over the texts of a batch of the cross entropy over the classes; of the binary cross entropies of all
classes; or of the squared error.
Metrics: accuracy (the main one), loss and those that ``evaluation.metrics`` names; with several classes f1 over all
decisions (the main one), macro-f1 and accuracy per decision; with numbers pearson (the main one), spearman and mse.
Models: those of transformers' ``AutoModelForSequenceClassification``.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedtune.data import EncodedDataset, Table
from fedtune.data.encoded_texts import encode_texts
from fedtune.recipe.schema import Recipe
from fedtune.tasks._classification import Classification
from fedtune.tasks._label_problems import ProblemType
from fedtune.tasks._text_task import TextTask, draw_tokens

__all__ = ["TextClassification"]


class TextClassification(Classification, TextTask):
    """Predict what a text is labelled with."""

    name: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str | None] = "SEQ_CLS"

    problem_type: ProblemType = Field(
        "single_label_classification", description="transformers' name for the kind of label"
    )
    pair: bool = Field(False, description="an example has a second text, in the column text_pair")

    @property
    def columns(self) -> tuple[str, ...]:
        """The texts and their labels."""
        texts = ("text", "text_pair") if self.pair else ("text",)
        return (*texts, self.problem.label_column)

    @property
    def head_problem(self) -> str | None:
        """What the head predicts."""
        return self.problem_type

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Token ids and labels."""
        return encode_texts(examples, reader, recipe.train.max_length, self.problem.encode_labels(examples))

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random tokens and labels."""
        labels = self.problem.draw_labels(recipe.train.batch_size, num_labels, generator)
        ids = draw_tokens(model, recipe, generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
