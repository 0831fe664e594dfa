"""Scoring a model on held-out examples, over all of them and per domain."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.data import EncodedDataset
from fedtune.tasks import ExampleScore, Task, get_task
from fedtune.techniques import Technique, begin_step, collect_metrics
from fedtune.training.client_round import ClientRound
from fedtune.training.metrics import measure
from fedtune.wire.client_update import HoldoutMetrics

__all__ = ["EvaluatedModel", "Metric", "evaluate_model", "score_held_out"]


class Metric(NamedTuple):
    """One figure: ``domain`` is a domain's name, ``all`` for every example, ``mean`` for the mean over domains."""

    domain: str
    name: str
    value: float


@dataclass
class _MetricSums:
    """Sums over predictions: texts or images count once, language models count once per token.

    Where it ``keeps`` them, probabilities and labels too, for metrics that are no sums.
    """

    count: int = 0
    correct: int = 0
    loss: float = 0.0
    keeps: bool = False
    probabilities: list[Tensor] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, score: ExampleScore) -> None:
        self.count += score.predictions
        self.correct += score.correct
        self.loss += score.loss
        if self.keeps and score.probabilities is not None:
            self.probabilities.append(score.probabilities)
            self.labels.append(score.label)

    @property
    def mean_loss(self) -> float:
        """Per prediction; 0 without any."""
        return self.loss / max(1, self.count)

    @property
    def accuracy(self) -> float:
        """The fraction of correct predictions; 0 without any."""
        return self.correct / max(1, self.count)

    def measure(self, metrics: Sequence[str]) -> dict[str, float]:
        """Further metrics by name."""
        if not (metrics and self.labels):
            return dict.fromkeys(metrics, math.nan)
        return measure(metrics, torch.stack(self.probabilities).double().numpy(), np.array(self.labels))


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its techniques, and how it is scored: ``metrics`` are further ones by name."""

    model: nn.Module
    task: Task
    batch_size: int
    techniques: Sequence[Technique] = ()
    metrics: Sequence[str] = ()


def _say_nothing(done: int) -> None:
    """Report no progress."""


@torch.no_grad()
def evaluate_model(
    evaluated: EvaluatedModel,
    examples: EncodedDataset,
    rows: Sequence[int] | None = None,
    report_progress: Callable[[int], None] = _say_nothing,
) -> list[Metric]:
    """The task's metrics over all examples and per domain; losses are in natural logarithms.

    ``rows`` are the examples to score, all by default. ``report_progress`` is called with the number scored so far,
    after every batch. What techniques measure meanwhile is added for all examples together.
    """
    evaluated.model.eval()
    sums: dict[str, _MetricSums] = defaultdict(lambda: _MetricSums(keeps=bool(evaluated.metrics)))
    order = _order_by_length(examples, rows)
    with collect_metrics(evaluated.techniques, evaluated.model) as figures:
        for done, (index, score) in enumerate(_iter_scores(evaluated, examples, order), 1):
            sums["all"].add(score)
            if done % evaluated.batch_size == 0 or done == len(order):
                report_progress(done)
            if examples.domains is not None:
                sums[examples.domains[index]].add(score)
        watched = [Metric("all", name, value) for name, value in figures().items()]
    return [*_compute_metrics(sums, evaluated), *watched]


@torch.no_grad()
def score_held_out(client: ClientRound, held_out: Sequence[int]) -> HoldoutMetrics:
    """The score on rows that a client holds out, over all of them together; zeros without any."""
    recipe = client.recipe
    if not held_out:
        return HoldoutMetrics()
    client.model.eval()
    metrics, size = recipe.evaluation.metrics, recipe.train.batch_size
    evaluated = EvaluatedModel(client.model, get_task(recipe.task), size, client.techniques, metrics)
    sums = _MetricSums(keeps=bool(metrics))
    for _, score in _iter_scores(evaluated, client.examples, held_out):
        sums.add(score)
    return HoldoutMetrics(sums.count, sums.mean_loss, sums.accuracy, tuple(sums.measure(metrics).values()))


def _iter_scores(
    evaluated: EvaluatedModel, examples: EncodedDataset, rows: Sequence[int]
) -> Iterator[tuple[int, ExampleScore]]:
    """The row and the score of each example."""
    for start in range(0, len(rows), evaluated.batch_size):
        chosen = rows[start : start + evaluated.batch_size]
        batch = examples.make_batch(chosen)
        begin_step(evaluated.techniques, evaluated.model, batch, 1.0)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: Tensor = evaluated.model(**inputs).logits.float()
        yield from zip(chosen, evaluated.task.score_batch(logits, batch["labels"]), strict=True)


def _order_by_length(examples: EncodedDataset, rows: Sequence[int] | None) -> list[int]:
    """Short texts first, so that a batch holds little padding."""
    chosen = list(range(len(examples)) if rows is None else rows)
    if examples.lengths is None:
        return chosen
    return [chosen[place] for place in torch.argsort(examples.lengths[chosen], stable=True).tolist()]


def _compute_metrics(sums: dict[str, _MetricSums], evaluated: EvaluatedModel) -> Iterator[Metric]:
    accuracies = []
    for domain, one in sorted(sums.items()):
        found = evaluated.task.compute_metrics(one.accuracy, one.mean_loss) | one.measure(evaluated.metrics)
        yield from (Metric(domain, name, value) for name, value in found.items())
        if domain != "all":
            accuracies.append(one.accuracy)
    if accuracies:
        yield Metric("mean", "accuracy", sum(accuracies) / len(accuracies))
