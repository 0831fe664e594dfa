"""What a round adds to the ledger of a stream: the visits that it begins and ends, and scores by client and class."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from fedtune.continual import StreamPlan, list_classes
from fedtune.server.run_clients import RunClients
from fedtune.server.stream_scoring import select_task_rows
from fedtune.tracking import TaskRecord, TaskScore
from fedtune.tracking.device_types import join_device_types
from fedtune.training import RunContext
from fedtune.wire.client_update import ClientUpdate
from fedtune.wire.task_figures import TaskFigures

__all__ = ["ClientFigures", "RoundLedger", "list_received_task_scores", "list_task_scores", "record_visits"]


class ClientFigures(NamedTuple):
    """What a client of a device class told of each task, and the type of the device that it scored on, if known."""

    client: int
    device_class: str | None
    figures: TaskFigures
    device_type: str | None = None


class _Figure(NamedTuple):
    """A client's score of one task."""

    num_predictions: int
    accuracy: float
    loss: float
    device_type: str | None


class RoundLedger(NamedTuple):
    """The rows of one round."""

    tasks: tuple[TaskRecord, ...] = ()
    ends_visit: int | None = None
    task_scores: tuple[TaskScore, ...] = ()


def record_visits(context: RunContext, round_number: int, task_scores: Sequence[TaskScore] = ()) -> RoundLedger:
    """Return the rows of a round; none without a stream."""
    plan = context.stream_plan
    if plan is None or not round_number:
        return RoundLedger()
    begun = plan.find_visit(round_number)
    is_new = round_number == 1 or plan.find_visit(round_number - 1) != begun
    ended = plan.find_border(round_number)
    return RoundLedger(
        (_describe_visit(context, plan, begun, round_number),) if is_new else (),
        None if ended is None else ended + 1,
        tuple(task_scores),
    )


def list_received_task_scores(
    context: RunContext, clients: RunClients, updates: Sequence[ClientUpdate]
) -> tuple[TaskScore, ...]:
    """Return the scores of the model that a round began with, by the clients that trained in it."""
    told = [
        ClientFigures(one.client, clients.devices[one.client].device_class, one.task_figures, one.device_type)
        for one in updates
        if one.task_figures is not None
    ]
    return list_task_scores(context, "before", told)


def list_task_scores(context: RunContext, moment: str, told: Sequence[ClientFigures]) -> tuple[TaskScore, ...]:
    """Return the scores of each client, and their means over each device class, weighted by predictions."""
    plan = context.stream_plan
    if plan is None:
        return ()
    found: dict[tuple[str, int], list[_Figure]] = defaultdict(list)
    for one in told:
        scopes = [f"client:{one.client}", *([f"class:{one.device_class}"] if one.device_class else [])]
        for task, *figures in one.figures.list_reported():
            for scope in scopes:
                found[scope, task].append(_Figure(int(figures[0]), figures[1], figures[2], one.device_type))
    return tuple(_average(scope, moment, plan.task_names[task], found[scope, task]) for scope, task in sorted(found))


def _average(scope: str, moment: str, task: str, figures: Sequence[_Figure]) -> TaskScore:
    total = sum(one.num_predictions for one in figures)
    return TaskScore(
        scope=scope,
        moment=moment,
        task=task,
        num_predictions=total,
        accuracy=sum(one.num_predictions * one.accuracy for one in figures) / total,
        loss=sum(one.num_predictions * one.loss for one in figures) / total,
        device_type=join_device_types(one.device_type for one in figures),
    )


def _describe_visit(context: RunContext, plan: StreamPlan, visit: int, round_number: int) -> TaskRecord:
    task = plan.find_task(visit)
    names = context.corpus.label_names
    labels = list_classes(plan, names, (task,)) or ()
    return TaskRecord(
        visit=visit + 1,
        name=plan.task_names[task],
        first_round=round_number,
        opened_by="drift" if round_number - 1 in context.opened_after else "recipe",
        labels=tuple(names[number] for number in labels),
        test_examples=len(select_task_rows(context, "test", (task,), None).get(task, ())),
    )
