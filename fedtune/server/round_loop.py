"""The round loop: sample, exchange, check, merge, evaluate, checkpoint, commit, in this order.

A round is committed once, after its checkpoint is on disk. If the process dies before, the round is repeated with the
same result, because every random number is derived from the seed and its purpose.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fedtune import checkpoint, merging, paths, techniques
from fedtune.errors import RunError
from fedtune.server import scoring
from fedtune.server.bases import Bases
from fedtune.server.class_payloads import RoundPayloads, list_trainable_tensors, pad_update_to_shared_rank
from fedtune.server.client_scoring import ClientScoring
from fedtune.server.downloads import Downloads
from fedtune.server.drift_opening import list_opened_rounds, open_task, reopen_tasks
from fedtune.server.drift_reference import update_memory
from fedtune.server.drift_watch import DriftWatch
from fedtune.server.events import ReplyReceived, RoundStarted, RunStarted, emit_event
from fedtune.server.federated_evaluation import average_holdout_metrics, client_scores
from fedtune.server.merge_context import make_merge_context
from fedtune.server.private_aggregation import append_noise_step, get_norm_limit, weight_clients_equally
from fedtune.server.pruning import prune_checkpoints
from fedtune.server.replies import ExpectedReply, make_missing_record, receive_update, scale_by_staleness
from fedtune.server.roster import Roster
from fedtune.server.round_commit import RoundResult, commit_round, get_checkpoint_path
from fedtune.server.round_failures import (
    MERGE_ERRORS,
    explain_shortage,
    mark_updates_unused,
    require_finite,
    with_refusals,
)
from fedtune.server.run_clients import RunClients
from fedtune.server.safeguards import Safeguards
from fedtune.server.scheduling.factory import make_round_scheduler
from fedtune.server.sending import Sending
from fedtune.server.server_run import ServerRun
from fedtune.server.spool import open_spool, sweep
from fedtune.server.task_borders import end_task, start_task
from fedtune.server.task_ledger import list_received_task_scores, record_visits
from fedtune.server.task_memory import TaskMemory, list_sent_memory, read_newest_memory
from fedtune.tracking import ClientRecord, MetricRecord, RoundRecord, SampleRecord, Store
from fedtune.tracking.pruning import find_checkpointed_round, remove_pruned_checkpoints
from fedtune.training import RunContext, get_model_state
from fedtune.training.model_counts import check_model_counts
from fedtune.training.stream_place import trains_in_round
from fedtune.untrusted import clean_text
from fedtune.wire.client_update import ClientUpdate
from fedtune.wire.masked_weights import find_masks, restore_dense_tensors, select_active_values
from fedtune.wire.stored_state import StoredState

__all__ = ["run_rounds"]

SharedState = Mapping[str, Tensor]


def run_rounds(grid: Grid, context: RunContext, store: Store, run_id: str) -> None:
    """Execute a run from its last committed round to its end; raise RunError if no round was completed."""
    recipe = context.recipe
    done = store.rounds(run_id)
    first = done[-1].number + 1 if done else 1
    reopen_tasks(context, done)
    check_model_counts(recipe, merging.build_pipeline(recipe.merge))
    emit_event(RunStarted(run_id, first, recipe.federation.rounds, scoring.to_score(context, first if done else 0)))
    sweep(run_id)
    remove_pruned_checkpoints(done)
    state = _read_last_state(run_id, done) if done else _commit_start(context, store, run_id)
    prune_checkpoints(store, run_id, recipe)
    roster = Roster(store, run_id, recipe, grid)
    clients = roster.assemble()
    scheduler = make_round_scheduler(
        grid, context, clients, partial(store.get_last_requested_rounds, run_id), on_devices=roster.has_devices
    )
    sending = Sending(
        context, run_id, Bases(context, paths.get_runs_folder() / run_id, _read_start_state(run_id, 1), done)
    )
    guards, asked_scores = Safeguards(context, store, run_id, done), ClientScoring(grid, context, run_id, sending)
    memory = TaskMemory(read_newest_memory(done))
    watch = DriftWatch(context, done)
    run = ServerRun(run_id, context, store, scheduler, guards, sending, asked_scores, memory, watch)
    for round_number in range(first, recipe.federation.rounds + 1):
        ended: SharedState | None = None
        while ended is None:
            clients = roster.refresh_devices(clients, scheduler)
            scheduler.prefer_clients(watch.list_rising_clients())
            ended = _run_round(run, clients, state, round_number)
        state = ended
        prune_checkpoints(store, run_id, context.recipe)
    if not any(record.status == "completed" and record.number for record in store.rounds(run_id)):
        raise RunError("no round got enough usable client updates; see the reasons in: fedtune runs show " + run_id)


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


def _run_round(run: ServerRun, clients: RunClients, state: SharedState, round_number: int) -> SharedState | None:
    """Run a round to its commit and return the next state, which is the old one if the round failed.

    None means that the round must start again, since it failed because a device was removed.
    """
    started, context, run_id = time.perf_counter(), run.context, run.run_id
    state = start_task(context, run_id, round_number, state, run.memory.tensors)
    with open_spool(run_id, round_number) as spool:
        records, updates = _gather_updates(run, clients, state, round_number, spool)
        failure = explain_shortage(records, context.recipe)
        if failure and {record.client for record in records} & set(clients.removed()):
            return None
        figures: tuple[MetricRecord, ...] = ()
        if not failure:
            try:
                state, figures = _merge_finite(run, state, round_number, updates)
            except MERGE_ERRORS as error:
                failure = with_refusals(f"the merge failed: {clean_text(error)}", records)
        if failure:
            records = mark_updates_unused(records)
        used = [] if failure else updates
        ended = end_task(context, run_id, round_number, state, run.memory.tensors, used)
        state, memory = ended.state, update_memory(context, round_number, run.memory.tensors, ended.memory, used)
        drift = run.drift.judge_round(round_number, used)
    metrics = (
        figures
        + average_holdout_metrics(updates, context.task)
        + _evaluate(context, state, run_id, round_number)
        + _simulated_seconds(run.scheduler.seconds())
    )
    metrics += run.safeguards.spending.compute_epsilon_after_round(("failed" if failure else "completed", records))
    metrics += drift
    scores = client_scores(updates, context.recipe.evaluation.metrics, context.task)
    scores += run.drift.list_client_scores(used)
    task_scores = list_received_task_scores(context, clients, updates)
    samples: tuple[SampleRecord, ...] = ()
    if scoring.scored_after(context, round_number):
        samples = scoring.write_samples(context, state)
        shared = run.scoring.score_by_clients(clients, state, round_number, time.perf_counter() - started)
        scores, task_scores = scores + shared.clients, task_scores + shared.tasks
    result = RoundResult(
        state,
        started,
        tuple(records),
        metrics,
        failure,
        scores,
        context.main_metric,
        device_type=context.device.type,
        samples=samples,
        memory=memory,
        ledger=record_visits(context, round_number, task_scores),
    )
    state = commit_round(run.store, run_id, round_number, result)
    if memory is not None:
        run.memory.tensors = memory
    run.drift.record_commit(metrics, scores)
    for last_round in list_opened_rounds(drift):
        open_task(context, last_round)
        run.sending.change_recipe(context.recipe)
    run.safeguards.record_commit(records)
    run.sending.bases.record_commit(round_number, records)
    return state


def _merge_finite(
    run: ServerRun, state: SharedState, round_number: int, updates: Sequence[ClientUpdate]
) -> tuple[SharedState, tuple[MetricRecord, ...]]:
    """Return the merged state and the metrics of the merge; one of MERGE_ERRORS if it fails or is not finite."""
    merged, figures = _merged(run.context, state, run.run_id, round_number, updates)
    require_finite(merged.state)
    run.sending.bases.record_merge(round_number, state, *merged)
    return merged.state, figures + run.safeguards.bound.record_median_norm()


def _simulated_seconds(seconds: float | None) -> tuple[MetricRecord, ...]:
    return () if seconds is None else (MetricRecord(split="simulation", domain="all", name="seconds", value=seconds),)


def _merged(
    context: RunContext, state: SharedState, run_id: str, round_number: int, updates: Sequence[ClientUpdate]
) -> tuple[merging.Merged, tuple[MetricRecord, ...]]:
    """Merge a round's updates and apply the techniques' changes; return the next state and metrics of the merge.

    If no client trained, the state stays as it is, because a merge may change tensors without any delta.
    """
    if not trains_in_round(context, round_number):
        return merging.Merged(dict(state), {}), ()
    pipeline = append_noise_step(
        context.recipe, merging.build_pipeline(context.recipe.merge), run_id, round_number, updates
    )
    masks, names = find_masks(state), list_trainable_tensors(context, round_number)
    merge_context = make_merge_context(context, pipeline, state, round_number, names, updates)
    pairs = techniques.list_low_rank_pairs(context.techniques, context.model)
    merge_context = merge_context._replace(low_rank_pairs=pairs)
    active = select_active_values(state, masks)
    errors = merging.measure_averaging_errors(pipeline, active, names, updates, merge_context)
    figures = (MetricRecord(split="merge", domain="all", name=name, value=value) for name, value in errors.items())
    merged, increments = merging.merge_round(pipeline, active, names, updates, merge_context)
    extras = techniques.declare_extra_payload(context.techniques, context.model, round_number)
    weights = pipeline.combine.compute_client_weights([one.num_examples for one in updates])
    payloads = [
        techniques.ExtraPayload(weight, one.read_tensors(extras)) for weight, one in zip(weights, updates, strict=True)
    ]
    dense = restore_dense_tensors(merged, masks)
    revised = techniques.after_aggregation(context.techniques, dense, round_number, payloads)
    leads = all(revised[name] is merged[name] for name in increments)  # from the weights before to those after
    return merging.Merged(revised, increments if leads else {}), tuple(figures)


def _gather_updates(
    run: ServerRun, clients: RunClients, state: SharedState, round_number: int, spool: Path
) -> tuple[list[ClientRecord], list[ClientUpdate]]:
    """Send train requests and receive the updates; return all records, and what may be merged, in client order."""
    context, scheduler, federation = run.context, run.scheduler, run.context.recipe.federation
    folder = spool if clients.shares_disk else None

    def make_downloads(start: SharedState, start_round: int) -> Downloads:
        memory = list_sent_memory(context, run.memory.tensors, start_round)
        payloads = RoundPayloads(context, start, start_round, memory)
        return Downloads(payloads, run.sending.bases, folder, deployed=clients.deployed)

    parts = (downloads := make_downloads(state, round_number)).parts
    records: dict[int, ClientRecord] = {}
    updates: list[ClientUpdate] = []

    def send(chosen: Sequence[int], start_round: int) -> dict[int, Message]:
        current = start_round == round_number
        sent = downloads if current else make_downloads(_read_start_state(run.run_id, start_round), start_round)
        return run.sending.messages(chosen, clients, sent)

    emit_event(RoundStarted(round_number, scheduler.begin_round(round_number)))
    for client, reply in scheduler.stream_replies(send, partial(len, updates)):
        payload = parts.get_for_client(client)
        expected = ExpectedReply(
            client,
            clients.devices[client],
            payload,
            get_norm_limit(context.recipe, payload.expected_shapes.values()),
            run.safeguards.examples(client),
            run.sending.count_bytes_sent(client, downloads),
            run.sending.plug_ins,
            0 if context.stream_plan is None else len(context.stream_plan.task_names),
        )
        received = receive_update(reply, expected, spool)
        records[client], update = scale_by_staleness(
            *received, scheduler.get_staleness(client), federation.asynchronous
        )
        if update:
            pad_update_to_shared_rank(context, context.for_client(client), update)
            updates.append(update)
        emit_event(ReplyReceived(round_number, records[client]))
    for client, reason in clients.explain_missing_clients(scheduler.list_missing_clients(records)).items():
        sent_bytes = run.sending.count_bytes_sent(client, downloads)
        records[client] = make_missing_record(client, clients.devices[client], sent_bytes, reason)
        emit_event(ReplyReceived(round_number, records[client]))
    ordered = sorted(weight_clients_equally(context.recipe, updates), key=lambda one: one.client)
    in_order = [records[client] for client in sorted(records)]
    return run.safeguards.bound.refuse_large_updates(
        in_order, ordered, lambda client: parts.get_for_client(client).values
    )


def _read_start_state(run_id: str, round_number: int) -> SharedState:
    """Return the start state of a round."""
    return StoredState(paths.get_runs_folder() / get_checkpoint_path(run_id, round_number - 1))


def _evaluate(context: RunContext, state: SharedState, run_id: str, round_number: int) -> tuple[MetricRecord, ...]:
    """Return validation metrics of the rounds that are scored; after the last, also test metrics of start and end."""
    metrics = scoring.validation(context, state, round_number) if scoring.scored_after(context, round_number) else ()
    metrics += scoring.score_border(context, state, round_number)
    if round_number == context.recipe.federation.rounds:
        start = StoredState(paths.get_runs_folder() / get_checkpoint_path(run_id, 0))
        metrics += scoring.test(context, start, state)
    return metrics
