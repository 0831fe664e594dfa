"""Find out what a client trains on in a round of a stream, and what it uploads at the end of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedtune import continual
from fedtune.errors import NoTaskError
from fedtune.seeds import derive_seed
from fedtune.training.run_context import RunContext
from fedtune.training.stream_round import StreamRound
from fedtune.wire.client_update import TensorSpec

__all__ = ["count_round_examples", "declare_task_uploads", "find_task_rows", "make_stream_round"]

IntArray = NDArray[np.int64]
StoredTensors = Mapping[int, Mapping[str, Tensor]]


def make_stream_round(
    context: RunContext,
    rows: IntArray,
    number: int,
    client: int,
    stored: StoredTensors | None = None,
    received: Mapping[str, Tensor] | None = None,
) -> StreamRound | None:
    """Return a client's round in the stream, None without a stream.

    Raises NoTaskError if the client has no task in the round, or no example of its task.
    """
    plan = context.stream_plan
    if plan is None:
        return None
    place = plan.find_place(number, client)
    if place is None:
        raise NoTaskError("it has no task in this round, as stream.arrival says", code="no-task")
    joint = any(method.uses_all_tasks for method in context.methods)
    all_rows = rows[context.task_numbers[rows] >= 0]
    own = all_rows if joint else find_task_rows(context, rows, place, client)
    if not len(own):
        raise NoTaskError(f"it has no example of task {plan.task_names[place.task]}", code="no-task-examples")
    tasks = range(len(plan.task_names)) if joint else place.seen
    trained = tasks if plan.stream.setting != "task" and plan.stream.loss == "seen" else (place.task,)
    labels = context.corpus.label_names
    return StreamRound(
        place,
        own,
        context.methods,
        continual.list_classes(plan, labels, trained, neighbours=True),
        continual.list_classes(plan, labels, trained if plan.stream.setting == "task" else tasks, neighbours=True),
        len(labels),
        place.last and plan.stream.arrival == "together",
        stored or {},
        received or {},
        all_rows,
        partial(continual.list_classes, plan, labels),
        len(plan.task_names),
        {task: find_task_rows(context, rows, replace(place, task=task), client) for task in place.seen},
    )


def find_task_rows(context: RunContext, rows: IntArray, place: continual.Place, client: int) -> IntArray:
    """Return those of a client's rows that it trains on at a place."""
    plan = context.stream_plan
    assert plan is not None
    seed = context.recipe.seed
    return continual.select_place_rows(
        plan, place, context.task_numbers, rows, lambda task: derive_seed(seed, client, "blur", task)
    )


def count_round_examples(context: RunContext, number: int) -> list[int]:
    """Return the examples that each client of a simulation trains on in a round: those of its task in a stream."""
    plan = context.stream_plan
    if plan is None or any(method.uses_all_tasks for method in context.methods):
        return [len(rows) for rows in context.client_rows]
    places = [plan.find_place(number, client) for client in range(context.recipe.num_clients)]
    return [
        0 if place is None else len(find_task_rows(context, rows, place, client))
        for client, (rows, place) in enumerate(zip(context.client_rows, places, strict=True))
    ]


def declare_task_uploads(context: RunContext, round_number: int, names: Sequence[str]) -> dict[str, TensorSpec]:
    """Return what clients add to their updates in a round that ends a task; ``names`` are the trained tensors."""
    plan = context.stream_plan
    if plan is None or plan.stream.arrival != "together" or plan.find_border(round_number) is None:
        return {}
    return {
        f"{method.name}/{name}": form
        for method in context.methods
        for name, form in method.declare_upload(context.model, context.recipe, names).items()
    }
