"""Scores of single examples, and their sums over many examples."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fedtune.data.encoded_texts import IGNORED_LABEL

__all__ = ["ExampleScore", "ScoreSums", "score_classes", "score_places"]


class ExampleScore(NamedTuple):
    """Predictions, correct ones and summed loss (natural logarithm) of one example.

    ``output`` is what metrics need that are no sums over examples. A classifier gives the probabilities [classes] and
    the class number.
    """

    predictions: int
    correct: int
    loss: float
    output: Any = None


@dataclass
class ScoreSums:
    """Sums over examples; ``outputs`` only where they are kept."""

    count: int = 0
    correct: int = 0
    loss: float = 0.0
    outputs: list[Any] = field(default_factory=list)

    def add(self, score: ExampleScore, *, keep_output: bool) -> None:
        """Add an example."""
        self.count += score.predictions
        self.correct += score.correct
        self.loss += score.loss
        if keep_output and score.output is not None:
            self.outputs.append(score.output)

    @property
    def mean_loss(self) -> float:
        """Per prediction; 0 without any."""
        return self.loss / max(1, self.count)

    @property
    def accuracy(self) -> float:
        """The fraction of correct predictions; 0 without any."""
        return self.correct / max(1, self.count)


def score_classes(logits: Tensor, labels: Tensor) -> list[ExampleScore]:
    """One prediction for each example; logits [n, classes], labels [n]."""
    known = list(zip(logits.softmax(-1).cpu(), labels.tolist(), strict=True))
    return score_places(logits[:, None], labels[:, None], known)


def score_places(logits: Tensor, labels: Tensor, outputs: Sequence[Any] | None = None) -> list[ExampleScore]:
    """One prediction for each place with a label; logits [n, places, classes], labels [n, places].

    ``outputs`` are those of the rows.
    """
    counted = labels != IGNORED_LABEL
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    correct = (logits.argmax(-1) == labels) & counted
    sums = zip(counted.sum(1).tolist(), correct.sum(1).tolist(), (loss * counted).sum(1).tolist(), strict=True)
    kept: Sequence[Any] = [None] * len(labels) if outputs is None else outputs
    return [ExampleScore(*one, output) for one, output in zip(sums, kept, strict=True)]
