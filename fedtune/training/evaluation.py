"""Scoring a model on held-out examples, over all of them and per domain."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.data import EncodedDataset
from fedtune.recipe.schema import Recipe, TaskName
from fedtune.techniques import Technique, begin_step, collect_metrics
from fedtune.training.metrics import measure
from fedtune.wire.client_update import HoldoutMetrics

__all__ = ["Metric", "evaluate_model", "score_held_out"]


class Metric(NamedTuple):
    """One figure: ``domain`` is a domain's name, ``all`` for every example, ``mean`` for the mean over domains."""

    domain: str
    name: str
    value: float


class _Row(NamedTuple):
    """Predictions, correct ones and summed loss of an example; probabilities [classes] and the label, if it has one."""

    predictions: int
    correct: int
    loss: float
    probabilities: Tensor | None = None
    label: int = -1


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

    def add(self, row: _Row) -> None:
        self.count += row.predictions
        self.correct += row.correct
        self.loss += row.loss
        if self.keeps and row.probabilities is not None:
            self.probabilities.append(row.probabilities)
            self.labels.append(row.label)

    def measure(self, metrics: Sequence[str]) -> dict[str, float]:
        """Further metrics by name."""
        if not (metrics and self.labels):
            return dict.fromkeys(metrics, math.nan)
        return measure(metrics, torch.stack(self.probabilities).double().numpy(), np.array(self.labels))


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    examples: EncodedDataset,
    batch_size: int,
    task: TaskName,
    techniques: Sequence[Technique] = (),
    rows: Sequence[int] | None = None,
    told: Callable[[int], None] = lambda _: None,
    *,
    metrics: Sequence[str] = (),
) -> list[Metric]:
    """Accuracy and loss (natural logarithm), and perplexity for language models, over all examples and per domain.

    ``rows`` are the examples to score, all by default. ``told`` is called with the number scored so far, after every
    batch. ``metrics`` are further ones by name. What techniques measure meanwhile is added for all examples together.
    """
    model.eval()
    tallies: dict[str, _MetricSums] = defaultdict(lambda: _MetricSums(keeps=bool(metrics)))
    order = _order_by_length(examples, rows)
    with collect_metrics(techniques, model) as figures:
        for done, (index, row) in enumerate(_predictions(model, examples, order, batch_size, task, techniques), 1):
            tallies["all"].add(row)
            if done % batch_size == 0 or done == len(order):
                told(done)
            if examples.domains is not None:
                tallies[examples.domains[index]].add(row)
        watched = [Metric("all", name, value) for name, value in figures().items()]
    return [*_compute_metrics(tallies, task, metrics), *watched]


@torch.no_grad()
def score_held_out(
    model: nn.Module,
    data: EncodedDataset,
    held: NDArray[np.int64],
    recipe: Recipe,
    techniques: Sequence[Technique] = (),
) -> HoldoutMetrics:
    """The score on the rows a client holds out, over all of them together; zeros, and nothing done, without any."""
    metrics, rows = recipe.evaluation.metrics, held.tolist()
    if not rows:
        return HoldoutMetrics()
    model.eval()
    tally = _MetricSums(keeps=bool(metrics))
    for _, row in _predictions(model, data, rows, recipe.train.batch_size, recipe.task, techniques):
        tally.add(row)
    predictions = max(1, tally.count)
    more = tuple(tally.measure(metrics).values())
    return HoldoutMetrics(tally.count, tally.loss / predictions, tally.correct / predictions, more)


def _predictions(
    model: nn.Module,
    data: EncodedDataset,
    rows: Sequence[int],
    batch: int,
    task: TaskName,
    techniques: Sequence[Technique],
) -> Iterator[tuple[int, _Row]]:
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        inputs = data.make_batch(chosen)
        begin_step(techniques, model, inputs, 1.0)
        yield from zip(chosen, _predict(model, inputs, task), strict=True)


def _order_by_length(data: EncodedDataset, rows: Sequence[int] | None) -> list[int]:
    """Short texts first, so that a batch holds little padding."""
    chosen = list(range(len(data)) if rows is None else rows)
    if data.lengths is None:
        return chosen
    return [chosen[place] for place in torch.argsort(data.lengths[chosen], stable=True).tolist()]


def _predict(model: nn.Module, batch: Mapping[str, Tensor], task: TaskName) -> list[_Row]:
    """A row for each example of a batch."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"]
    logits: Tensor = model(**inputs).logits.float()
    if task == "text-generation":
        logits, labels = logits[:, :-1], labels[:, 1:]
    else:
        logits, labels = logits[:, None], labels[:, None]
    counted = labels != -100
    classes = [None] * len(labels) if task == "text-generation" else logits[:, 0].softmax(-1)
    first = labels[:, 0].tolist()
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    correct = (logits.argmax(-1) == labels) & counted
    sums = counted.sum(1).tolist(), correct.sum(1).tolist(), (loss * counted).sum(1).tolist()
    return [_Row(*row) for row in zip(*sums, classes, first, strict=True)]


def _compute_metrics(tallies: dict[str, _MetricSums], task: TaskName, metrics: Sequence[str]) -> Iterator[Metric]:
    accuracies = []
    for domain, tally in sorted(tallies.items()):
        loss = tally.loss / max(1, tally.count)
        accuracy = tally.correct / max(1, tally.count)
        yield Metric(domain, "accuracy", accuracy)
        yield Metric(domain, "loss", loss)
        if task == "text-generation":
            yield Metric(domain, "perplexity", math.exp(min(loss, 700.0)))
        for name, value in tally.measure(metrics).items():
            yield Metric(domain, name, value)
        if domain != "all":
            accuracies.append(accuracy)
    if accuracies:
        yield Metric("mean", "accuracy", sum(accuracies) / len(accuracies))
