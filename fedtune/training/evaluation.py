"""Evaluates a model on held-out examples, in total and per domain."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fedtune.accelerator import find_device, is_out_of_memory, move_tensors, release_memory, use_autocast
from fedtune.data import EncodedDataset
from fedtune.recipe.evaluation_settings import GenerationSettings
from fedtune.tasks import ExampleScore, ScoreSums, Task
from fedtune.techniques import Technique, begin_step, collect_metrics
from fedtune.training.answer_metrics import compare_answers
from fedtune.training.client_round import ClientRound
from fedtune.training.generation import TextGenerator
from fedtune.training.metrics import list_client_metrics, measure
from fedtune.wire.client_update import HoldoutMetrics

__all__ = ["EvaluatedModel", "Metric", "evaluate_model", "score_held_out"]


class Metric(NamedTuple):
    """One metric. ``domain`` is a domain's name, ``all`` for all examples, or ``mean`` for the mean over domains."""

    domain: str
    name: str
    value: float


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its techniques and the settings of its evaluation. ``metrics`` are names of further metrics.

    ``reader`` is the tokenizer or preprocessor. Only tasks that generate text need it.
    """

    model: nn.Module
    task: Task
    batch_size: int
    techniques: Sequence[Technique] = ()
    metrics: Sequence[str] = ()
    reader: Any = None
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    @property
    def keeps_outputs(self) -> bool:
        """Whether the metrics need the output of each example."""
        return bool(self.metrics) or self.task.keeps_outputs

    @property
    def must_generate(self) -> bool:
        """Whether answers are generated for the metrics, besides those that the task's own metrics need."""
        return bool(self.metrics) and not self.task.has_classes and not self.task.keeps_outputs

    def compute_further_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """Return the metrics besides the task's own: from probabilities and labels, or from answers."""
        if not (self.metrics and sums.outputs):
            return dict.fromkeys(self.metrics, math.nan)
        if not self.task.has_classes:
            return compare_answers(self.metrics, sums.outputs)
        probabilities, labels = zip(*sums.outputs, strict=True)
        return measure(self.metrics, torch.stack(probabilities).double().numpy(), np.array(labels))


def _say_nothing(done: int) -> None:
    """Ignore the progress."""


@torch.no_grad()
def evaluate_model(
    evaluated: EvaluatedModel,
    examples: EncodedDataset,
    rows: Sequence[int] | None = None,
    report_progress: Callable[[int], None] = _say_nothing,
) -> list[Metric]:
    """Return the task's metrics over all examples and per domain. Losses use natural logarithms.

    ``rows`` are the examples to evaluate, all by default. ``report_progress`` is called after every batch with the
    number of evaluated examples. Metrics of techniques are added for all examples together.
    """
    evaluated.model.eval()
    sums: dict[str, ScoreSums] = defaultdict(ScoreSums)
    order = _order_by_length(examples, rows)
    with collect_metrics(evaluated.techniques, evaluated.model) as figures:
        for done, (index, score) in enumerate(_iter_scores(evaluated, examples, order), 1):
            sums["all"].add(score, keep_output=evaluated.keeps_outputs)
            if done % evaluated.batch_size == 0 or done == len(order):
                report_progress(done)
            if examples.domains is not None:
                sums[examples.domains[index]].add(score, keep_output=evaluated.keeps_outputs)
        watched = [Metric("all", name, value) for name, value in figures().items()]
    if evaluated.must_generate:
        for index, pair in _iter_answers(evaluated, examples, order):
            for domain in ("all", *(() if examples.domains is None else (examples.domains[index],))):
                sums[domain].outputs.append(pair)
    return [*_compute_metrics(sums, evaluated), *watched]


@torch.no_grad()
def score_held_out(client: ClientRound, held_out: Sequence[int]) -> HoldoutMetrics:
    """Return the metrics on a client's held-out rows, over all of them together; zeros without any."""
    recipe = client.recipe
    if not held_out:
        return HoldoutMetrics()
    client.model.eval()
    metrics, size = list_client_metrics(recipe), recipe.train.batch_size
    evaluated = EvaluatedModel(client.model, client.task, size, client.techniques, metrics)
    sums = ScoreSums()
    for _, score in _iter_scores(evaluated, client.examples, held_out):
        sums.add(score, keep_output=evaluated.keeps_outputs)
    found = evaluated.task.compute_basic_metrics(sums)
    more = tuple(evaluated.compute_further_metrics(sums).values())
    return HoldoutMetrics(sums.count, found["loss"], found.get("accuracy", 0.0), more)


def _iter_scores(
    evaluated: EvaluatedModel, examples: EncodedDataset, rows: Sequence[int]
) -> Iterator[tuple[int, ExampleScore]]:
    """Yield the row and the score of each example."""
    for start in range(0, len(rows), evaluated.batch_size):
        chosen = rows[start : start + evaluated.batch_size]
        yield from zip(chosen, _score_rows(evaluated, examples, chosen), strict=True)


def _score_rows(evaluated: EvaluatedModel, examples: EncodedDataset, rows: Sequence[int]) -> list[ExampleScore]:
    """Return the score of each example. Where memory is too small for them, they are halved."""
    device = find_device(evaluated.model)
    batch = move_tensors(examples.make_batch(rows), device)
    try:
        begin_step(evaluated.techniques, evaluated.model, batch, 1.0)
        with use_autocast(evaluated.model):
            return evaluated.task.score_batch(evaluated.model, batch, evaluated.reader)
    except (RuntimeError, MemoryError) as error:
        if len(rows) == 1 or not is_out_of_memory(error):
            raise
    del batch
    release_memory(device)
    half = len(rows) // 2
    return [score for part in (rows[:half], rows[half:]) for score in _score_rows(evaluated, examples, part)]


def _iter_answers(
    evaluated: EvaluatedModel, examples: EncodedDataset, rows: Sequence[int]
) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield the row of each example, and its generated and its wanted answer. Generation is greedy."""
    settings = evaluated.generation.model_copy(update={"temperature": 0.0, "top_p": 1.0})
    generator = TextGenerator(evaluated.model, evaluated.techniques, evaluated.reader, settings, evaluated.batch_size)
    for start in range(0, len(rows), evaluated.batch_size):
        chosen = rows[start : start + evaluated.batch_size]
        prompts, wanted = evaluated.task.split_answers(examples.make_batch(chosen), evaluated.reader)
        written = generator.generate_texts(prompts)
        pairs = [(one.text, answer) for one, answer in zip(written, wanted, strict=True)]
        yield from zip(chosen, pairs, strict=True)


def _order_by_length(examples: EncodedDataset, rows: Sequence[int] | None) -> list[int]:
    """Sort examples by length, so that batches contain little padding."""
    chosen = list(range(len(examples)) if rows is None else rows)
    if examples.lengths is None:
        return chosen
    return [chosen[place] for place in torch.argsort(examples.lengths[chosen], stable=True).tolist()]


def _compute_metrics(sums: Mapping[str, ScoreSums], evaluated: EvaluatedModel) -> Iterator[Metric]:
    """Yield the metrics of each domain, and the mean over domains of accuracy or else of the task's main metric."""
    means: dict[str, list[float]] = defaultdict(list)
    for domain, one in sorted(sums.items()):
        found = evaluated.task.compute_metrics(one)
        compared = "accuracy" if "accuracy" in found else evaluated.task.main_metric
        found |= evaluated.compute_further_metrics(one)
        yield from (Metric(domain, name, value) for name, value in found.items())
        if domain != "all":
            means[compared].append(found[compared])
    for name, values in means.items():
        yield Metric("mean", name, sum(values) / len(values))
