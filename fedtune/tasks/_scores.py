"""Scores of single examples: how many predictions, how many of them are correct, and their loss."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fedtune.data.encoded_texts import IGNORED_LABEL

__all__ = ["ExampleScore", "score_classes", "score_next_tokens"]


class ExampleScore(NamedTuple):
    """Predictions, correct ones and summed loss (natural logarithm) of one example.

    A classifier also gives the probabilities [classes] and the class number of the example.
    """

    predictions: int
    correct: int
    loss: float
    probabilities: Tensor | None = None
    label: int = -1


def score_classes(logits: Tensor, labels: Tensor) -> list[ExampleScore]:
    """One prediction for each example; logits [n, classes], labels [n]."""
    scores = _score_places(logits[:, None], labels[:, None])
    known = zip(logits.softmax(-1), labels.tolist(), strict=True)
    return [ExampleScore(*score, *one) for score, one in zip(scores, known, strict=True)]


def score_next_tokens(logits: Tensor, labels: Tensor) -> list[ExampleScore]:
    """One prediction for each token but the first; logits [n, tokens, vocabulary], labels [n, tokens]."""
    return [ExampleScore(*score) for score in _score_places(logits[:, :-1], labels[:, 1:])]


def _score_places(logits: Tensor, labels: Tensor) -> list[tuple[int, int, float]]:
    """Predictions, correct ones and summed loss of each row; logits [n, places, classes], labels [n, places]."""
    counted = labels != IGNORED_LABEL
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    correct = (logits.argmax(-1) == labels) & counted
    sums = counted.sum(1).tolist(), correct.sum(1).tolist(), (loss * counted).sum(1).tolist()
    return list(zip(*sums, strict=True))
