"""What a classifier predicts: one class, several classes or a number. Tasks on texts and on images share these."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.data import Table
from fedtune.data.table import ClassLists
from fedtune.tasks._correlation import correlate
from fedtune.tasks._scores import ExampleScore, ScoreSums, score_classes

__all__ = ["LABEL_PROBLEMS", "LabelProblem", "ProblemType"]

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
"""transformers' names."""


class LabelProblem(ABC):
    """One kind of label, with its loss and its metrics."""

    label_column: str
    main_metric: str
    has_accuracy = True
    keeps_outputs = True

    @abstractmethod
    def encode_labels(self, examples: Table) -> Tensor:
        """The labels of examples as a tensor whose first axis is the examples."""

    @abstractmethod
    def compute_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of a batch."""

    @abstractmethod
    def score_logits(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        """A score for each example; logits [n, outputs]."""

    @abstractmethod
    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """Metrics beyond accuracy and loss."""

    @abstractmethod
    def draw_labels(self, count: int, num_labels: int, generator: torch.Generator) -> Tensor:
        """Random labels of so many examples."""


class _SingleLabel(LabelProblem):
    """One class; labels [n] are class numbers."""

    label_column, main_metric, keeps_outputs = "label", "accuracy", False

    def encode_labels(self, examples: Table) -> Tensor:
        return torch.tensor(examples["label"], dtype=torch.int64)

    def compute_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    def score_logits(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        return score_classes(logits, labels)

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        return {}

    def draw_labels(self, count: int, num_labels: int, generator: torch.Generator) -> Tensor:
        return torch.randint(max(num_labels, 1), (count,), generator=generator)


class _MultiLabel(LabelProblem):
    """Several classes; labels [n, classes] are 1 for those of an example and 0 for the others."""

    label_column, main_metric = "labels", "f1"

    def encode_labels(self, examples: Table) -> Tensor:
        values, kind = examples["labels"], examples.kinds.get("labels")
        decisions = torch.zeros(len(values), len(kind.names) if isinstance(kind, ClassLists) else 1)
        for row, numbers in zip(decisions, values, strict=True):
            row[numbers] = 1.0
        return decisions

    def compute_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(_compute_logits(model, batch), batch["labels"])

    def score_logits(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        return [_score_decisions(*pair) for pair in zip(logits.cpu(), labels.cpu(), strict=True)]

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        return _compute_f1(sums.outputs)

    def draw_labels(self, count: int, num_labels: int, generator: torch.Generator) -> Tensor:
        return torch.randint(2, (count, max(num_labels, 1)), generator=generator).float()


class _Regression(LabelProblem):
    """A number; labels [n] are float32."""

    label_column, main_metric, has_accuracy = "number", "pearson", False

    def encode_labels(self, examples: Table) -> Tensor:
        return torch.tensor(examples["number"], dtype=torch.float32)

    def compute_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.mse_loss(_compute_logits(model, batch)[:, 0], batch["labels"])

    def score_logits(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        return [_score_number(*pair) for pair in zip(logits[:, 0].tolist(), labels.tolist(), strict=True)]

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        return {**correlate(sums.outputs), "mse": sums.mean_loss}

    def draw_labels(self, count: int, num_labels: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, generator=generator)


LABEL_PROBLEMS: Mapping[str, LabelProblem] = {
    "single_label_classification": _SingleLabel(),
    "multi_label_classification": _MultiLabel(),
    "regression": _Regression(),
}


def _compute_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """In float32, whatever the model computes in: losses on real numbers need labels of the same type."""
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits.float()


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
