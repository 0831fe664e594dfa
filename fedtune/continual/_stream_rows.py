"""Which examples belong to which task of a stream."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune.continual._plan import Place, StreamPlan
from fedtune.data import Table, partition_examples, partition_task
from fedtune.data.columns import get_canonical_column_name
from fedtune.errors import DataError
from fedtune.recipe.schema import Recipe
from fedtune.recipe.stream_settings import StreamTask

__all__ = ["list_tasks", "number_tasks", "partition_stream", "read_stream_values", "select_place_rows"]

IntArray = NDArray[np.int64]


def read_stream_values(recipe: Recipe, table: Table, label_names: Sequence[str]) -> list[str]:
    """Return each example's value in the column that tells the tasks apart, as text.

    Raises DataError if the examples have no such column.
    """
    assert recipe.stream is not None
    assert recipe.stream.by is not None
    column = "label" if recipe.stream.by == "label" else get_canonical_column_name(recipe, recipe.stream.by)
    if column not in table.column_names:
        mend = "set data.columns.domain" if recipe.stream.by == "domain" else "name another column in stream.by"
        raise DataError(
            f"stream.by: the examples have no {recipe.stream.by!r}; {mend}", code="data-columns", counts={"columns": 1}
        )
    values = table[column]
    return [label_names[value] for value in values] if column == "label" else [str(value) for value in values]


def number_tasks(recipe: Recipe, table: Table, label_names: Sequence[str]) -> IntArray:
    """Return the task [n] of each example, -1 for an example of no task."""
    plan = StreamPlan(recipe)
    values = read_stream_values(recipe, table, label_names)
    if plan.stream.setting == "time":
        return _number_times(plan, values)
    owner = {value: number for number, visit in enumerate(list_tasks(plan)) for value in visit.where or [visit.name]}
    return np.array([owner.get(value, -1) for value in values], np.int64)


def list_tasks(plan: StreamPlan) -> list[StreamTask]:
    """Return the first visit of each distinct task, which describes its examples."""
    first = {visit.name: visit for visit in reversed(plan.visits)}
    return [first[name] for name in plan.task_names]


def _number_times(plan: StreamPlan, values: Sequence[str]) -> IntArray:
    tasks = list_tasks(plan)
    read = _choose_order([*values, *(cut for task in tasks for cut in (task.since, task.until) if cut is not None)])
    return np.array([_find_time(read, tasks, value) for value in values], np.int64)


def _find_time(read: Callable[[str], str | float], tasks: Sequence[StreamTask], value: str) -> int:
    """Return the first task whose time includes the value, -1 if none does."""
    for number, task in enumerate(tasks):
        begun = task.since is None or not _is_before(read, value, task.since)
        if begun and (task.until is None or _is_before(read, value, task.until)):
            return number
    return -1


def _is_before(read: Callable[[str], str | float], one: str, other: str) -> bool:
    left, right = read(one), read(other)
    return left < right  # type: ignore[operator]  # both are numbers, or both are texts


def _choose_order(values: Sequence[str]) -> Callable[[str], str | float]:
    """Compare as numbers if all values are numbers, else as text."""
    try:
        for value in values:
            float(value)
    except ValueError:
        return str
    return float


def partition_stream(recipe: Recipe, train: Table, label_names: Sequence[str]) -> list[IntArray]:
    """Return the sorted row numbers of each client. The examples of each task are partitioned by themselves.

    A client may have no example of a task. Without a stream, this is ``partition_examples``.
    """
    if recipe.stream is None:
        return partition_examples(recipe, train)
    tasks = number_tasks(recipe, train, label_names)
    found: list[list[IntArray]] = [[] for _ in range(recipe.num_clients)]
    for task, name in enumerate(StreamPlan(recipe).task_names):
        rows = np.flatnonzero(tasks == task)
        if not len(rows):
            raise DataError(f"stream.tasks: no training example belongs to {name}; correct its values or leave it out")
        for own, part in zip(found, partition_task(recipe, train.select(rows)), strict=True):
            own.append(rows[part])
    return [np.sort(np.concatenate(own)) for own in found]


def select_place_rows(
    plan: StreamPlan, place: Place, tasks: IntArray, rows: IntArray, seed: Callable[[int], int]
) -> IntArray:
    """Return those of a client's ``rows`` that it trains on at a place, sorted.

    ``tasks`` are the tasks of all examples. With a blur, a share of each task's examples comes with the tasks before
    and after it instead; ``seed`` is that of a task.
    """
    if not plan.stream.blur:
        kept: IntArray = rows[tasks[rows] == place.task]
        return kept
    last = len(plan.task_names) - 1
    found = []
    for task in range(max(0, place.task - 1), min(last, place.task + 1) + 1):
        own = rows[tasks[rows] == task]
        found.append(own[_move_rows(len(own), task, last, plan.stream.blur, seed(task)) == place.task])
    return np.sort(np.concatenate(found))


def _move_rows(count: int, task: int, last: int, blur: float, seed: int) -> IntArray:
    """Return the task [count] that each of a task's examples comes with: half of the share with either neighbour."""
    moved = np.full(count, task, np.int64)
    order = np.random.default_rng(seed).permutation(count)
    half = round(count * blur / 2)
    moved[order[:half]] = task - 1 if task else min(last, task + 1)
    moved[order[half : 2 * half]] = task + 1 if task < last else max(0, task - 1)
    return moved
