"""Find out what a client trains on in a round of a stream, and what it uploads at the end of a task."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedtune import continual
from fedtune.continual._drift_phases import find_phase
from fedtune.errors import NoTaskError
from fedtune.recipe.round_schedule import list_cohort_sizes
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.training.holdout_split import split_holdout
from fedtune.training.run_context import RunContext
from fedtune.training.stream_round import StreamRound, TaskHoldout
from fedtune.wire.client_update import FEWEST, TensorSpec

__all__ = [
    "count_round_examples",
    "declare_task_uploads",
    "find_task_rows",
    "list_uploading_methods",
    "make_stream_round",
]

IntArray = NDArray[np.int64]


def make_stream_round(
    context: RunContext,
    rows: IntArray,
    number: int,
    client: int,
    received: Mapping[str, Tensor] | None = None,
    *,
    scoring: bool = False,
) -> StreamRound | None:
    """Return a client's round in the stream, None without a stream.

    A client that only scores, with ``scoring``, may have ended its last task, or have no example of its task.

    Raises NoTaskError if the client has no task in the round, or no example of its task.
    """
    plan = context.stream_plan
    if plan is None:
        return None
    place = find_last_place(plan, number, client) if scoring else plan.find_place(number, client)
    if place is None:
        raise NoTaskError("it has no task in this round, as stream.arrival says", code="no-task")
    joint = any(method.uses_all_tasks for method in context.methods)
    all_rows = rows[context.task_numbers[rows] >= 0]
    own = all_rows if joint else find_task_rows(context, rows, place, client)
    if not len(own) and not scoring:
        raise NoTaskError(f"it has no example of task {plan.task_names[place.task]}", code="no-task-examples")
    tasks = range(len(plan.task_names)) if joint else place.seen
    compares_all = joint or (plan.stream.setting != "task" and plan.stream.loss == "seen")
    trained = tasks if compares_all else (place.task,)
    labels = context.corpus.label_names
    return StreamRound(
        place=place,
        rows=own,
        methods=context.methods,
        classes=continual.list_classes(plan, labels, trained, neighbours=True),
        seen_classes=continual.list_classes(
            plan, labels, trained if plan.stream.setting == "task" else tasks, neighbours=True
        ),
        num_labels=len(labels),
        uploading=list_uploading_methods(context, number),
        received=received or {},
        all_rows=all_rows,
        list_classes=partial(continual.list_classes, plan, labels),
        num_tasks=len(plan.task_names),
        held_rows={task: find_task_rows(context, rows, replace(place, task=task), client) for task in place.seen},
        holdouts=_list_holdouts(context, rows, place, client)
        if scoring or place.first or not _asks_every_client(context.recipe)
        else (),
        drift=plan.stream.drift,
        drift_phase=find_phase(plan, number) if plan.stream.drift else None,
    )


def _asks_every_client(recipe: Recipe) -> bool:
    """Whether the first round of a visit asks all clients, so that one score at its begin tells of its border.

    Otherwise a client scores whenever it trains.
    """
    federation = recipe.federation
    sampled = any(size < recipe.num_clients for size in list_cohort_sizes(recipe)) or federation.fraction_train < 1
    return not sampled and federation.take_first is None and not any(one.dropout for one in recipe.devices)


def find_last_place(plan: continual.StreamPlan, number: int, client: int) -> continual.Place | None:
    """Return the place of a client in a round, or the last one before it; None before its first task."""
    return next((place for one in range(number, 0, -1) if (place := plan.find_place(one, client))), None)


def _list_holdouts(context: RunContext, rows: IntArray, place: continual.Place, client: int) -> tuple[TaskHoldout, ...]:
    """Return the held-out rows of the tasks that the client has begun, or of all in joint training."""
    plan, share = context.stream_plan, context.recipe.evaluation.local_holdout
    assert plan is not None
    if not share:
        return ()
    seed, labels = derive_seed(context.recipe.seed, client, "own"), context.corpus.label_names
    joint = any(method.uses_all_tasks for method in context.methods)
    tasks = tuple(range(len(plan.task_names))) if joint else place.seen
    told_apart = plan.stream.setting == "task"
    if joint:
        _, held_out = split_holdout(rows[context.task_numbers[rows] >= 0], share, seed)
        own = {task: held_out[context.task_numbers[held_out] == task] for task in tasks}
    else:
        places = {task: replace(place, task=task) for task in tasks}
        own = {
            task: split_holdout(find_task_rows(context, rows, one, client), share, seed)[1]
            for task, one in places.items()
        }
    classes = {
        task: continual.list_classes(plan, labels, (task,) if told_apart else tasks, neighbours=True) for task in tasks
    }
    return tuple(TaskHoldout(task, own[task], classes[task]) for task in tasks if len(own[task]) >= FEWEST)


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


def list_uploading_methods(context: RunContext, round_number: int) -> list[continual.ContinualMethod]:
    """Return the methods that clients upload tensors of: all at the end of a task, and some in its first round."""
    plan = context.stream_plan
    place = None if plan is None or plan.stream.arrival != "together" else plan.find_place(round_number, 0)
    if place is None:
        return []
    return [method for method in context.methods if place.last or (place.first and method.uploads_at_start)]


def declare_task_uploads(context: RunContext, round_number: int, names: Sequence[str]) -> dict[str, TensorSpec]:
    """Return what clients add to their updates in a round that ends or begins a task; ``names`` are trained tensors."""
    return {
        f"{method.name}/{name}": form
        for method in list_uploading_methods(context, round_number)
        for name, form in method.declare_upload(context.model, context.recipe, names).items()
    }


def trains_in_round(context: RunContext, round_number: int) -> bool:
    """Whether clients train in a round. Methods that let them rest have one plan for all clients."""
    plan = context.stream_plan
    place = None if plan is None else plan.find_place(round_number, 0)
    return place is None or all(method.trains(place) for method in context.methods)
