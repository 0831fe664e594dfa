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

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.data import EncodedDataset, Table
from fedtune.data.encoded_texts import encode_texts
from fedtune.data.table import ClassLists
from fedtune.recipe.schema import Recipe
from fedtune.tasks._correlation import correlate
from fedtune.tasks._scores import ExampleScore, ScoreSums, score_classes
from fedtune.tasks._text_task import TextTask, draw_tokens

__all__ = ["TextClassification"]

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
_LABEL_COLUMNS = {
    "single_label_classification": "label",
    "multi_label_classification": "labels",
    "regression": "number",
}


class TextClassification(TextTask):
    """Predict what a text is labelled with."""

    name: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str | None] = "SEQ_CLS"

    problem_type: Problem = Field("single_label_classification", description="transformers' name for the kind of label")
    pair: bool = Field(False, description="an example has a second text, in the column text_pair")

    @property
    def columns(self) -> tuple[str, ...]:
        """The texts and their labels."""
        label = _LABEL_COLUMNS[self.problem_type]
        return ("text", "text_pair", label) if self.pair else ("text", label)

    @property
    def has_new_head(self) -> bool:
        """Return True."""
        return True

    @property
    def head_problem(self) -> str | None:
        """What the head predicts."""
        return self.problem_type

    @property
    def has_accuracy(self) -> bool:
        """Whether a prediction can be correct: a number is only near or far."""
        return self.problem_type != "regression"

    @property
    def main_metric(self) -> str:
        """The usual metric of the problem."""
        return {"multi_label_classification": "f1", "regression": "pearson"}.get(self.problem_type, "accuracy")

    @property
    def keeps_outputs(self) -> bool:
        """Whether metrics are no sums over examples."""
        return self.problem_type != "single_label_classification"

    def make_head_settings(self, labels: Sequence[str]) -> dict[str, Any]:
        """One output for each class, or one for a number."""
        if self.problem_type == "regression":
            return {"num_labels": 1, "problem_type": self.problem_type}
        return super().make_head_settings(labels)

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Token ids and labels: class numbers [n], 0 or 1 for each class [n, classes], or numbers [n]."""
        return encode_texts(examples, reader, recipe.train.max_length, self._encode_labels(examples))

    def _encode_labels(self, examples: Table) -> Tensor:
        values = examples[_LABEL_COLUMNS[self.problem_type]]
        if self.problem_type != "multi_label_classification":
            return torch.tensor(values, dtype=torch.float32 if self.problem_type == "regression" else torch.int64)
        kind = examples.kinds.get("labels")
        decisions = torch.zeros(len(values), len(kind.names) if isinstance(kind, ClassLists) else 1)
        for row, numbers in zip(decisions, values, strict=True):
            row[numbers] = 1.0
        return decisions

    def compute_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """See the card. Losses on real numbers are computed here, in float32 whatever the model computes in."""
        if self.problem_type == "single_label_classification":
            return super().compute_loss(model, batch)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: Tensor = model(**inputs).logits.float()
        if self.problem_type == "regression":
            return F.mse_loss(logits[:, 0], batch["labels"])
        return F.binary_cross_entropy_with_logits(logits, batch["labels"])

    def score_logits(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        """A score for each text; logits [n, classes], or [n, 1] for numbers."""
        if self.problem_type == "single_label_classification":
            return score_classes(logits, labels)
        if self.problem_type == "regression":
            return [_score_number(*pair) for pair in zip(logits[:, 0].tolist(), labels.tolist(), strict=True)]
        return [_score_decisions(*pair) for pair in zip(logits, labels, strict=True)]

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """See the card."""
        if self.problem_type == "single_label_classification":
            return super().compute_metrics(sums)
        if self.problem_type == "regression":
            return {**correlate(sums.outputs), "mse": sums.mean_loss, **self.compute_basic_metrics(sums)}
        return {**_compute_f1(sums.outputs), **super().compute_metrics(sums)}

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random tokens and labels."""
        size = recipe.train.batch_size
        labels = torch.randint(max(num_labels, 1), (size,), generator=generator)
        if self.problem_type == "regression":
            labels = torch.randn(size, generator=generator)
        elif self.problem_type == "multi_label_classification":
            labels = F.one_hot(labels, num_labels).float()
        ids = draw_tokens(model, recipe, generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _score_number(predicted: float, wanted: float) -> ExampleScore:
    """The squared error is the loss; no number is simply correct."""
    return ExampleScore(1, 0, (predicted - wanted) ** 2, (predicted, wanted))


def _score_decisions(logits: Tensor, labels: Tensor) -> ExampleScore:
    """A prediction for each class; logits and labels [classes]."""
    decided = (logits > 0).float()
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    return ExampleScore(len(labels), int((decided == labels).sum()), float(loss), (decided, labels))


def _compute_f1(decisions: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """F1 over all decisions, and its mean over the classes."""
    from sklearn.metrics import f1_score

    if not decisions:
        return {"f1": math.nan, "macro-f1": math.nan}
    decided, wanted = (torch.stack(side).numpy() for side in zip(*decisions, strict=True))
    return {
        "f1": float(f1_score(wanted, decided, average="micro", zero_division=0)),
        "macro-f1": float(f1_score(wanted, decided, average="macro", zero_division=0)),
    }
