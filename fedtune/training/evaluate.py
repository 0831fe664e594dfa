"""Scoring a model on held-out examples, over all of them and per domain."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtune.contribution import OwnScore
from fedtune.data import Encoded
from fedtune.recipe import Task
from fedtune.techniques import Technique, begin_step, watch

__all__ = ["Score", "score", "score_own"]


class Score(NamedTuple):
    """One figure: ``domain`` is a domain's name, ``all`` for every example, ``mean`` for the mean over domains."""

    domain: str
    name: str
    value: float


@dataclass
class _Tally:
    """Sums over predictions: texts or images count once, language models count once per token."""

    count: int = 0
    correct: int = 0
    loss: float = 0.0

    def add(self, count: int, correct: int, loss: float) -> None:
        self.count += count
        self.correct += correct
        self.loss += loss


@torch.no_grad()
def score(
    model: nn.Module,
    data: Encoded,
    batch: int,
    task: Task,
    techniques: Sequence[Technique] = (),
    rows: Sequence[int] | None = None,
    told: Callable[[int], None] = lambda _: None,
) -> list[Score]:
    """Accuracy and loss (natural logarithm), and perplexity for language models, over all examples and per domain.

    ``rows`` are the examples to score, all by default. ``told`` is called with the number scored so far, after every
    batch. What techniques measure meanwhile is added for all examples together.
    """
    model.eval()
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    order = _order(data, rows)
    with watch(techniques, model) as figures:
        for done, (index, row) in enumerate(_predictions(model, data, order, batch, task, techniques), 1):
            tallies["all"].add(*row)
            if done % batch == 0 or done == len(order):
                told(done)
            if data.domains is not None:
                tallies[data.domains[index]].add(*row)
        watched = [Score("all", name, value) for name, value in figures().items()]
    return [*_figures(tallies, task), *watched]


@torch.no_grad()
def score_own(
    model: nn.Module, data: Encoded, rows: Sequence[int], batch: int, task: Task, techniques: Sequence[Technique] = ()
) -> OwnScore:
    """The score on some rows, over all of them together."""
    model.eval()
    tally = _Tally()
    for _, row in _predictions(model, data, rows, batch, task, techniques):
        tally.add(*row)
    predictions = max(1, tally.count)
    return OwnScore(tally.count, tally.loss / predictions, tally.correct / predictions)


_Row = tuple[int, int, float]
"""Predictions, correct ones and summed loss of an example."""


def _predictions(
    model: nn.Module, data: Encoded, rows: Sequence[int], batch: int, task: Task, techniques: Sequence[Technique]
) -> Iterator[tuple[int, _Row]]:
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        inputs = data.batch(chosen)
        begin_step(techniques, model, inputs, 1.0)
        yield from zip(chosen, _predict(model, inputs, task), strict=True)


def _order(data: Encoded, rows: Sequence[int] | None) -> list[int]:
    """Short texts first, so that a batch holds little padding."""
    chosen = list(range(len(data)) if rows is None else rows)
    if data.lengths is None:
        return chosen
    return [chosen[place] for place in torch.argsort(data.lengths[chosen], stable=True).tolist()]


def _predict(model: nn.Module, batch: Mapping[str, Tensor], task: Task) -> list[_Row]:
    """A row for each example of a batch."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"]
    logits: Tensor = model(**inputs).logits.float()
    if task == "causal-language-modelling":
        logits, labels = logits[:, :-1], labels[:, 1:]
    else:
        logits, labels = logits[:, None], labels[:, None]
    counted = labels != -100
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    correct = (logits.argmax(-1) == labels) & counted
    return list(zip(counted.sum(1).tolist(), correct.sum(1).tolist(), (loss * counted).sum(1).tolist(), strict=True))


def _figures(tallies: dict[str, _Tally], task: Task) -> Iterator[Score]:
    accuracies = []
    for domain, tally in sorted(tallies.items()):
        loss = tally.loss / max(1, tally.count)
        accuracy = tally.correct / max(1, tally.count)
        yield Score(domain, "accuracy", accuracy)
        yield Score(domain, "loss", loss)
        if task == "causal-language-modelling":
            yield Score(domain, "perplexity", math.exp(min(loss, 700.0)))
        if domain != "all":
            accuracies.append(accuracy)
    if accuracies:
        yield Score("mean", "accuracy", sum(accuracies) / len(accuracies))
