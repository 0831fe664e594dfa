"""The round loop: sample, exchange, check, merge, evaluate, checkpoint, commit, in this order.

A round is committed once, after its checkpoint is on disk. If the process dies before, the round is repeated with the
same result, because every random number is derived from the seed and its purpose.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from flwr.serverapp import Grid
from torch import Tensor

from fedtune import checkpoint, merging, paths
from fedtune.errors import RunError
from fedtune.recipe.refused_attacks import refuse_attacks
from fedtune.server import scoring
from fedtune.server.algorithm_merge import check_algorithm_model
from fedtune.server.bases import Bases
from fedtune.server.client_scoring import ClientScoring
from fedtune.server.drift_opening import list_opened_rounds, open_task, reopen_tasks
from fedtune.server.drift_reference import update_memory
from fedtune.server.drift_watch import DriftWatch
from fedtune.server.early_stopping import EarlyEnd
from fedtune.server.events import RunStarted, emit_event
from fedtune.server.federated_evaluation import average_holdout_metrics, client_scores
from fedtune.server.pruning import prune_checkpoints
from fedtune.server.root_data import make_root_data
from fedtune.server.roster import Roster
from fedtune.server.round_commit import RoundResult, commit_round
from fedtune.server.round_evaluation import end_early, evaluate_round
from fedtune.server.round_failures import (
    MERGE_ERRORS,
    explain_shortage,
    mark_updates_unused,
    with_refusals,
)
from fedtune.server.round_merge import MergedRound, merge_updates
from fedtune.server.run_clients import RunClients
from fedtune.server.run_state import join_memory, select_task_memory
from fedtune.server.safeguards import Safeguards
from fedtune.server.scheduling.factory import make_round_scheduler
from fedtune.server.sending import Sending
from fedtune.server.server_run import ServerRun
from fedtune.server.spool import open_spool, sweep
from fedtune.server.task_borders import end_task, start_task
from fedtune.server.task_ledger import list_received_task_scores, record_visits
from fedtune.server.task_memory import TaskMemory, read_newest_memory
from fedtune.server.update_gathering import gather_updates, read_start_state
from fedtune.tracking import ClientRecord, MetricRecord, RoundRecord, SampleRecord, Store
from fedtune.tracking.pruning import find_checkpointed_round, remove_pruned_checkpoints
from fedtune.training import RunContext, get_model_state
from fedtune.training.model_counts import check_model_counts
from fedtune.training.wire_checks import check_wire_model
from fedtune.untrusted import clean_text
from fedtune.wire.client_update import ClientUpdate
from fedtune.wire.stored_state import StoredState

__all__ = ["run_rounds"]

SharedState = Mapping[str, Tensor]


def run_rounds(grid: Grid, context: RunContext, store: Store, run_id: str) -> str:
    """Execute a run from its last committed round to its end; raise RunError if no round was completed.

    Return why it ended before its last round; an empty text if it did not.
    """
    recipe = context.recipe
    done = store.rounds(run_id)
    first = done[-1].number + 1 if done else 1
    reopen_tasks(context, done)
    pipeline = merging.build_pipeline(recipe.merge)
    check_model_counts(recipe, pipeline)
    check_algorithm_model(context)
    check_wire_model(context)
    emit_event(RunStarted(run_id, first, recipe.federation.rounds, scoring.to_score(context, first if done else 0)))
    sweep(run_id)
    remove_pruned_checkpoints(done)
    state = _read_last_state(run_id, done) if done else _commit_start(context, store, run_id)
    prune_checkpoints(store, run_id, recipe)
    roster = Roster(store, run_id, recipe, grid)
    if roster.has_devices:
        refuse_attacks(recipe)
    clients = roster.assemble()
    scheduler = make_round_scheduler(
        grid, context, clients, partial(store.get_last_requested_rounds, run_id), on_devices=roster.has_devices
    )
    sending = Sending(
        context, run_id, Bases(context, paths.get_runs_folder() / run_id, read_start_state(run_id, 1), done)
    )
    guards, asked_scores = Safeguards(context, store, run_id, done), ClientScoring(grid, context, run_id, sending)
    memory = TaskMemory(read_newest_memory(done))
    watch, early_end = DriftWatch(context, done), EarlyEnd(context, store.rounds(run_id))
    root_data = make_root_data(context, pipeline.combine)
    run = ServerRun(
        run_id, context, store, scheduler, guards, sending, asked_scores, memory, watch, early_end, root_data
    )
    for round_number in range(first, recipe.federation.rounds + 1):
        if early_end.reason:
            break
        ended: SharedState | None = None
        while ended is None:
            clients = roster.refresh_devices(clients, scheduler)
            scheduler.prefer_clients(watch.list_rising_clients())
            ended = _run_round(run, clients, state, round_number)
        state = ended
        prune_checkpoints(store, run_id, context.recipe)
    if not any(record.status == "completed" and record.number for record in store.rounds(run_id)):
        raise RunError("no round got enough usable client updates; see the reasons in: fedtune runs show " + run_id)
    return early_end.reason


def _read_last_state(run_id: str, done: Sequence[RoundRecord]) -> SharedState:
    """Return the state of the last checkpoint of the committed rounds, and verify its digest."""
    last = find_checkpointed_round(run_id, done).checkpoint
    assert last is not None
    checkpoint.read_checkpoint(paths.get_runs_folder() / last.path, last.sha256)
    return StoredState(paths.get_runs_folder() / last.path)


def _commit_start(context: RunContext, store: Store, run_id: str) -> SharedState:
    """Commit the state before training as round 0."""
    started = time.perf_counter()
    state = get_model_state(context.model, context.shared_names)
    metrics = scoring.validation(context, state, 0) + scoring.score_border(context, state, 0)
    result = RoundResult(
        state,
        started,
        metrics=metrics,
        main_metric=context.main_metric,
        device_type=context.device.type,
        samples=scoring.write_samples(context, state),
    )
    return commit_round(store, run_id, 0, result)


class _Ending(NamedTuple):
    """What the updates of a round led to: the records of all clients, the updates that were used, and the next state.

    ``memory`` is the server's whole memory, None if it is not to be written. ``failure`` says why the
    round failed.
    """

    records: Sequence[ClientRecord]
    used: Sequence[ClientUpdate]
    state: SharedState
    memory: dict[str, Tensor] | None
    figures: tuple[MetricRecord, ...]
    failure: str | None


def _run_round(run: ServerRun, clients: RunClients, state: SharedState, round_number: int) -> SharedState | None:
    """Run a round to its commit and return the next state, which is the old one if the round failed.

    None means that the round must start again, since it failed because a device was removed.
    """
    started, context = time.perf_counter(), run.context
    state = start_task(context, run.run_id, round_number, state, run.memory.tensors)
    with open_spool(run.run_id, round_number) as spool:
        records, updates = gather_updates(run, clients, state, round_number, spool)
        failure = explain_shortage(records, context.recipe)
        if failure and {record.client for record in records} & set(clients.removed()):
            return None
        ending = _end_round(run, state, round_number, records, updates, failure)
        drift = run.drift.judge_round(round_number, ending.used)
    result = _score_round(run, clients, ending, updates, round_number, started)
    result = result._replace(metrics=(*result.metrics, *drift))
    state = commit_round(run.store, run.run_id, round_number, result)
    _record_commit(run, round_number, result, drift)
    return state


def _end_round(
    run: ServerRun,
    state: SharedState,
    round_number: int,
    records: Sequence[ClientRecord],
    updates: Sequence[ClientUpdate],
    failure: str | None,
) -> _Ending:
    """Merge the updates unless the round has failed, and end the task if it ends with the round."""
    context, remembered = run.context, select_task_memory(run.memory.tensors)
    merged = MergedRound(state)
    if not failure:
        try:
            merged = merge_updates(run, state, round_number, updates)
        except MERGE_ERRORS as error:
            failure = with_refusals(f"the merge failed: {clean_text(error)}", records)
    if failure:
        records, updates = mark_updates_unused(records), []
    ended = end_task(context, run.run_id, round_number, merged.state, remembered, updates)
    after_task = update_memory(context, round_number, remembered, ended.memory, updates)
    memory = join_memory(run.memory.tensors, after_task, merged.run_state)
    return _Ending(records, updates, ended.state, memory, merged.figures, failure)


def _score_round(
    run: ServerRun,
    clients: RunClients,
    ending: _Ending,
    updates: Sequence[ClientUpdate],
    round_number: int,
    started: float,
) -> RoundResult:
    """Score the next state and return the round for its commit."""
    context, state = run.context, ending.state
    metrics = (
        ending.figures
        + average_holdout_metrics(updates, context.task)
        + evaluate_round(run, state, round_number)
        + _simulated_seconds(run.scheduler.seconds())
        + run.safeguards.spending.compute_epsilon_after_round(
            ("failed" if ending.failure else "completed", ending.records)
        )
    )
    metrics = end_early(run, state, round_number, metrics)
    scores = client_scores(updates, context.recipe.evaluation.metrics, context.task)
    scores += run.drift.list_client_scores(ending.used)
    task_scores = list_received_task_scores(context, clients, updates)
    samples: tuple[SampleRecord, ...] = ()
    if scoring.scored_after(context, round_number):
        samples = scoring.write_samples(context, state)
        shared = run.scoring.score_by_clients(clients, state, round_number, time.perf_counter() - started)
        scores, task_scores = scores + shared.clients, task_scores + shared.tasks
    return RoundResult(
        state,
        started,
        tuple(ending.records),
        metrics,
        ending.failure,
        scores,
        context.main_metric,
        device_type=context.device.type,
        samples=samples,
        memory=ending.memory,
        ledger=record_visits(context, round_number, task_scores),
    )


def _record_commit(run: ServerRun, round_number: int, result: RoundResult, drift: Sequence[MetricRecord]) -> None:
    """Record a committed round in the objects that rounds share, and open a task if drift asks for it."""
    if result.memory is not None:
        run.memory.tensors = result.memory
    run.drift.record_commit(result.metrics, result.client_scores)
    run.early_end.record_commit(round_number, result.metrics)
    for last_round in list_opened_rounds(drift):
        open_task(run.context, last_round)
        run.sending.change_recipe(run.context.recipe)
    run.safeguards.record_commit(result.records)
    run.sending.bases.record_commit(round_number, result.records)


def _simulated_seconds(seconds: float | None) -> tuple[MetricRecord, ...]:
    return () if seconds is None else (MetricRecord(split="simulation", domain="all", name="seconds", value=seconds),)
