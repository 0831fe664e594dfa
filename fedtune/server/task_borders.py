"""The end of a task on the server: each continual method may change the state, and keeps what it remembers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fedtune import continual, paths
from fedtune.server.round_commit import get_checkpoint_path
from fedtune.training import RunContext
from fedtune.training.stream_place import declare_task_uploads, list_uploading_methods
from fedtune.wire.client_update import ClientUpdate
from fedtune.wire.stored_state import StoredState

__all__ = ["TaskEnd", "end_task", "find_task_start", "start_task"]

State = Mapping[str, Tensor]


class TaskEnd(NamedTuple):
    """The state and the whole memory after a task; ``memory`` is None in rounds that end no task."""

    state: State
    memory: dict[str, Tensor] | None


def find_task_start(context: RunContext, round_number: int) -> int:
    """Return the round whose state the newest task began with."""
    plan = context.stream_plan
    assert plan is not None
    visit = plan.find_visit(max(1, round_number - plan.stream.longest_delay))
    return plan.find_border_round(visit - 1) if visit else 0


def start_task(
    context: RunContext, run_id: str, round_number: int, state: State, memory: Mapping[str, Tensor]
) -> State:
    """Return the state that a round starts from, which continual methods may change where a later task begins."""
    plan = context.stream_plan
    if plan is None or round_number == 1 or plan.find_border(round_number - 1) is None:
        return state
    start = _read_state(run_id, 0)
    for method in context.methods:
        state = method.start_task(start, state, continual.select_memory(method, memory))
    return state


def end_task(
    context: RunContext,
    run_id: str,
    round_number: int,
    state: State,
    memory: Mapping[str, Tensor],
    updates: Sequence[ClientUpdate],
) -> TaskEnd:
    """Apply the continual methods if the round ends a task. ``updates`` are those that were merged, maybe none.

    After the first of several rounds of a task, only methods that upload at its start are applied.
    """
    plan = context.stream_plan
    if plan is None or not context.methods:
        return TaskEnd(state, None)
    visit = plan.find_border(round_number)
    asked = list_uploading_methods(context, round_number) if visit is None else context.methods
    if not asked:
        return TaskEnd(state, None)
    start, before = (_read_state(run_id, number) for number in (0, find_task_start(context, round_number)))
    uploads = _read_uploads(context, round_number, updates)
    kept: dict[str, Tensor] = {}
    present = plan.find_visit(round_number) if visit is None else visit
    for method in asked:
        border = continual.Border(
            recipe=context.recipe,
            model=context.model,
            visit=present,
            task=plan.find_task(present),
            round_number=round_number,
            start=start,
            before=before,
            after=state,
            memory=continual.select_memory(method, memory),
            uploads=[one._replace(tensors=continual.select_memory(method, one.tensors)) for one in uploads],
            label_names=context.corpus.label_names,
        )
        if visit is None:
            state = method.after_first_round(border)
            continue
        result = method.after_task(border)
        state = result.state
        kept |= continual.name_memory(method, result.memory)
    return TaskEnd(state, None if visit is None else kept)


def _read_uploads(
    context: RunContext, round_number: int, updates: Sequence[ClientUpdate]
) -> list[continual.TaskUpload]:
    """Read what clients uploaded, with their shares of the examples, in client order."""
    names = list(declare_task_uploads(context, round_number, context.shared_names))
    total = sum(one.num_examples for one in updates)
    return [
        continual.TaskUpload(one.client, one.num_examples / total, one.read_tensors(names))
        for one in sorted(updates, key=lambda one: one.client)
    ]


def _read_state(run_id: str, round_number: int) -> State:
    return StoredState(paths.get_runs_folder() / get_checkpoint_path(run_id, round_number))
