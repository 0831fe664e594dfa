"""Scores a state on the tasks of a stream: their validation examples each round, their test examples at each border."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fedtune import continual
from fedtune.data import EncodedDataset
from fedtune.training import Metric, RunContext, evaluate_model

__all__ = ["list_border_tasks", "list_scored_tasks", "score_tasks", "select_task_rows"]


@dataclass(frozen=True)
class _ByTask:
    """Encoded examples whose domains are the names of their tasks."""

    examples: EncodedDataset
    domains: list[str]

    @property
    def lengths(self) -> Tensor | None:
        return self.examples.lengths

    def __len__(self) -> int:
        return len(self.examples)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self.examples.make_batch(indices)


def list_scored_tasks(context: RunContext, round_number: int) -> tuple[int, ...]:
    """Return the tasks that are scored after a round: those begun so far, or all in joint training."""
    plan = context.stream_plan
    assert plan is not None
    every = any(method.uses_all_tasks for method in context.methods)
    return tuple(range(len(plan.task_names))) if every else plan.list_seen(round_number)


def list_border_tasks(context: RunContext, round_number: int) -> tuple[int, ...]:
    """Return the tasks that are scored on the test split when a task ends.

    In a class stream these are the tasks begun so far: the model cannot predict the classes of the others.
    """
    plan = context.stream_plan
    assert plan is not None
    whole = plan.stream.setting != "class"
    return tuple(range(len(plan.task_names))) if whole else list_scored_tasks(context, round_number)


def select_task_rows(
    context: RunContext, part: str, tasks: Sequence[int], rows: Sequence[int] | None
) -> dict[int, list[int]]:
    """Return the rows of each task in a split, limited to ``rows`` if given. Tasks without examples are left out."""
    numbers = context.number_split_tasks(part)
    found: dict[int, list[int]] = defaultdict(list)
    for row in range(len(numbers)) if rows is None else rows:
        if numbers[row] in tasks:
            found[int(numbers[row])].append(row)
    return dict(sorted(found.items()))


def score_tasks(
    context: RunContext,
    part: str,
    rows: Mapping[int, Sequence[int]],
    report_progress: Callable[[int], None],
) -> list[Metric]:
    """Return the metrics of the model on each task, on all together, and their mean. Domains are names of tasks."""
    plan = context.stream_plan
    assert plan is not None
    if not rows:
        return []
    if plan.stream.setting == "task":
        return list(_score_one_by_one(context, part, rows, report_progress))
    with _mask(context, list(rows)):
        return _evaluate(context, part, rows, report_progress)


def _evaluate(
    context: RunContext, part: str, rows: Mapping[int, Sequence[int]], report_progress: Callable[[int], None]
) -> list[Metric]:
    plan, examples = context.stream_plan, getattr(context, part)
    assert plan is not None
    names = [""] * len(examples)
    for task, own in rows.items():
        for row in own:
            names[row] = plan.task_names[task]
    chosen = sorted(row for own in rows.values() for row in own)
    return evaluate_model(context.evaluated_model, _ByTask(examples, names), chosen, report_progress)


def _score_one_by_one(
    context: RunContext, part: str, rows: Mapping[int, Sequence[int]], report_progress: Callable[[int], None]
) -> Iterator[Metric]:
    """Score each task among its own classes. Over all examples there are only metrics that are means over examples."""
    done = 0
    found: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for task, own in rows.items():
        with _mask(context, [task]):
            scored = _evaluate(context, part, {task: own}, partial(_report_from, report_progress, done))
        done += len(own)
        for metric in scored:
            if metric.domain not in ("all", "mean"):
                yield metric
                found[metric.name].append((metric.value, len(own)))
    for name, values in found.items():
        if name in ("accuracy", "loss"):
            yield Metric("all", name, sum(value * count for value, count in values) / done)
    for name in ("accuracy",) if "accuracy" in found else (context.main_metric,):
        yield Metric("mean", name, sum(value for value, _ in found[name]) / len(found[name]))


def _report_from(report_progress: Callable[[int], None], before: int, done: int) -> None:
    report_progress(before + done)


def _mask(context: RunContext, tasks: Sequence[int]) -> AbstractContextManager[None]:
    plan, labels = context.stream_plan, context.corpus.label_names
    assert plan is not None
    classes = continual.list_classes(plan, labels, tasks, neighbours=plan.stream.setting == "class")
    return continual.mask_classes(context.model, classes, len(labels))
