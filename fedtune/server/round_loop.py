"""The round loop: sample, exchange, check, merge, evaluate, checkpoint, commit. No step looks back.

A round is committed once, after its checkpoint is on disk; what came before can be lost without harm, because every
random number is derived from the seed and the place it is used.
"""

import time
from collections.abc import Callable, Mapping, Sequence
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
from fedtune.server.client_scoring import score_by_clients
from fedtune.server.downloads import Downloads
from fedtune.server.events import ReplyReceived, RoundEnded, RoundStarted, RunStarted, emit_event
from fedtune.server.federated_evaluation import average_holdout_metrics, client_scores
from fedtune.server.merge_context import make_merge_context
from fedtune.server.private_aggregation import append_noise_step, get_norm_limit, weight_clients_equally
from fedtune.server.pruning import prune_checkpoints
from fedtune.server.replies import make_missing_record, receive_update, scale_by_staleness
from fedtune.server.roster import Roster
from fedtune.server.round_failures import MERGE_ERRORS, mark_updates_unused, require_finite, shortage, with_refusals
from fedtune.server.run_clients import RunClients
from fedtune.server.safeguards import Safeguards
from fedtune.server.scheduling.factory import make_round_scheduler
from fedtune.server.scheduling.round_scheduler import RoundScheduler
from fedtune.server.sending import Sending
from fedtune.server.spool import open_spool, sweep
from fedtune.tracking import CheckpointRecord, ClientRecord, ClientScore, MetricRecord, RoundRecord, Store
from fedtune.tracking.pruning import find_checkpointed_round, remove_pruned_checkpoints
from fedtune.training import RunContext, get_model_state
from fedtune.training.model_counts import check_model_counts
from fedtune.untrusted import clean_text
from fedtune.wire.client_update import ClientUpdate
from fedtune.wire.masked_weights import find_masks, restore_dense_tensors, select_active_values
from fedtune.wire.stored_state import StoredState

__all__ = ["run_rounds"]

SharedState = Mapping[str, Tensor]
AskScores = Callable[[RunClients, SharedState, int, float], tuple[ClientScore, ...]]
"""Asks clients to score a state after a round that has taken so many seconds."""


def run_rounds(grid: Grid, shop: RunContext, store: Store, run: str) -> None:
    """Carry a run from its last committed round to its end; RoundError when not one round could be completed."""
    recipe = shop.recipe
    done = store.rounds(run)
    first = done[-1].number + 1 if done else 1
    check_model_counts(recipe, merging.build_pipeline(recipe.merge))
    emit_event(RunStarted(run, first, recipe.federation.rounds, scoring.to_score(shop, first if done else 0)))
    sweep(run)
    remove_pruned_checkpoints(done)
    state = _resumed(run, done) if done else _start(shop, store, run)
    prune_checkpoints(store, run, recipe)
    roster = Roster(store, run, recipe, grid)
    crew = roster.assemble()
    asking = make_round_scheduler(grid, shop, crew, roster.seated, partial(store.get_last_requested_rounds, run))
    guards = Safeguards(shop, store, run, done)
    sending = Sending(shop, run, Bases(shop, paths.get_runs_folder() / run, _earlier(run, 1), done))
    ask_scores = partial(score_by_clients, grid, shop, run, sending)
    for number in range(first, recipe.federation.rounds + 1):
        ended: SharedState | None = None
        while ended is None:
            crew = roster.refresh_devices(crew, asking)
            ended = _round(shop, store, run, crew, asking, guards, sending, ask_scores, state, number)
        state = ended
        prune_checkpoints(store, run, recipe)
    if not any(record.status == "completed" and record.number for record in store.rounds(run)):
        raise RunError("no round got enough usable contributions; see the reasons in: fedtune runs show " + run)


def _resumed(run: str, done: Sequence[RoundRecord]) -> SharedState:
    """The state of the last checkpoint among the committed rounds, verified."""
    last = find_checkpointed_round(run, done).checkpoint
    assert last is not None
    checkpoint.read_checkpoint(paths.get_runs_folder() / last.path, last.sha256)
    return StoredState(paths.get_runs_folder() / last.path)


def _start(shop: RunContext, store: Store, run: str) -> SharedState:
    """Commit the state before training as round 0."""
    started = time.perf_counter()
    state = get_model_state(shop.model, shop.shared_names)
    metrics = scoring.validation(shop, state, 0)
    return _commit(store, run, 0, state, started, (), metrics)


def _round(
    shop: RunContext,
    store: Store,
    run: str,
    crew: RunClients,
    asking: RoundScheduler,
    guards: Safeguards,
    sending: Sending,
    ask_scores: AskScores,
    state: SharedState,
    number: int,
) -> SharedState | None:
    """One round to its commit: the next state, the old one if it failed; None if a removal spoilt it: begin it anew."""
    started = time.perf_counter()
    with open_spool(run, number) as spool:
        records, contributions = _gather(shop, run, crew, asking, guards, sending, state, number, spool)
        short = shortage(records, shop.recipe)
        if short and {record.client for record in records} & set(crew.removed()):
            return None
        figures: tuple[MetricRecord, ...] = ()
        if not short:
            try:
                merged, figures = _merged(shop, state, run, number, contributions)
                require_finite(merged.state)
                sending.bases.record_merge(number, state, *merged)
                state = merged.state
                figures += guards.bound.record_median_norm()
            except MERGE_ERRORS as error:
                short = with_refusals(f"the merge failed: {clean_text(error)}", records)
        if short:
            records = mark_updates_unused(records)
    metrics = (
        figures
        + average_holdout_metrics(contributions)
        + _evaluate(shop, state, run, number)
        + _simulated(asking.seconds())
    )
    metrics += guards.spending.compute_epsilon_after_round(("failed" if short else "completed", records))
    told = client_scores(contributions, shop.recipe.evaluation.metrics)
    if scoring.scored_after(shop, number):
        told += ask_scores(crew, state, number, time.perf_counter() - started)
    state = _commit(store, run, number, state, started, records, metrics, short, told)
    guards.record_commit(records)
    sending.bases.record_commit(number, records)
    return state


def _simulated(seconds: float | None) -> tuple[MetricRecord, ...]:
    return () if seconds is None else (MetricRecord(split="simulation", domain="all", name="seconds", value=seconds),)


def _merged(
    shop: RunContext, state: SharedState, run: str, number: int, contributions: Sequence[ClientUpdate]
) -> tuple[merging.Merged, tuple[MetricRecord, ...]]:
    """The state after a round's contributions, as techniques revise it by what else was sent; figures of the merge."""
    pipeline = append_noise_step(shop.recipe, merging.build_pipeline(shop.recipe.merge), run, number, contributions)
    found, names = find_masks(state), list_trainable_tensors(shop, number)
    told = make_merge_context(shop, pipeline, state, number, names, contributions)
    told = told._replace(low_rank_pairs=techniques.list_low_rank_pairs(shop.techniques, shop.model))
    errors = merging.measure_averaging_errors(pipeline, select_active_values(state, found), names, contributions, told)
    figures = (MetricRecord(split="merge", domain="all", name=name, value=value) for name, value in errors.items())
    merged, increments = merging.merge_round(pipeline, select_active_values(state, found), names, contributions, told)
    extras = techniques.declare_extra_payload(shop.techniques, shop.model, number)
    weights = pipeline.combine.weights([one.num_examples for one in contributions])
    answers = [
        techniques.ExtraPayload(weight, one.read_tensors(extras))
        for weight, one in zip(weights, contributions, strict=True)
    ]
    revised = techniques.after_aggregation(shop.techniques, restore_dense_tensors(merged, found), number, answers)
    leads = all(revised[name] is merged[name] for name in increments)  # from the weights before to those after
    return merging.Merged(revised, increments if leads else {}), tuple(figures)


def _gather(
    shop: RunContext,
    run: str,
    crew: RunClients,
    asking: RoundScheduler,
    guards: Safeguards,
    sending: Sending,
    state: SharedState,
    number: int,
    spool: Path,
) -> tuple[list[ClientRecord], list[ClientUpdate]]:
    """Ask clients; what each of them sent, and what of it may be merged, in client order."""
    folder, federation = spool if crew.shares_disk else None, shop.recipe.federation

    def of(began_with: SharedState, begun: int) -> Downloads:
        return Downloads(RoundPayloads(shop, began_with, begun), sending.bases, folder, crew.deployed)

    parts = (downloads := of(state, number)).parts
    records: dict[int, ClientRecord] = {}
    contributions: list[ClientUpdate] = []

    def send(clients: Sequence[int], begun: int) -> dict[int, Message]:
        return sending.messages(clients, crew, downloads if begun == number else of(_earlier(run, begun), begun))

    emit_event(RoundStarted(number, asking.begin_round(number)))
    for client, reply in asking.stream_replies(send, partial(len, contributions)):
        device, part = crew.devices[client], parts.get_for_client(client)
        most, limit = get_norm_limit(shop.recipe, part.expected_shapes.values())
        examples, down = guards.examples(client), sending.count_bytes_sent(client, downloads)
        received = receive_update(reply, client, device, part, most, spool, limit, examples, down)
        records[client], sent = scale_by_staleness(*received, asking.get_staleness(client), federation.asynchronous)
        if sent:
            pad_update_to_shared_rank(shop, shop.for_client(client), sent)
            contributions.append(sent)
        emit_event(ReplyReceived(number, records[client]))
    for client, reason in crew.explain_missing_clients(asking.list_missing_clients(records)).items():
        records[client] = make_missing_record(
            client, crew.devices[client], sending.count_bytes_sent(client, downloads), reason
        )
        emit_event(ReplyReceived(number, records[client]))
    ordered = sorted(weight_clients_equally(shop.recipe, contributions), key=lambda sent: sent.client)
    told = [records[client] for client in sorted(records)]
    return guards.bound.refuse_large_updates(told, ordered, lambda client: parts.get_for_client(client).values)


def _earlier(run: str, number: int) -> SharedState:
    """The state that an earlier round began with."""
    return StoredState(paths.get_runs_folder() / _checkpoint_path(run, number - 1))


def _evaluate(shop: RunContext, state: SharedState, run: str, number: int) -> tuple[MetricRecord, ...]:
    """Validation every so many rounds; after the last one the test part too, for the start and for the end."""
    metrics = scoring.validation(shop, state, number) if scoring.scored_after(shop, number) else ()
    if number == shop.recipe.federation.rounds:
        start = StoredState(paths.get_runs_folder() / _checkpoint_path(run, 0))
        metrics += scoring.test(shop, start, state)
    return metrics


def _checkpoint_path(run: str, number: int) -> str:
    return f"{run}/round-{number:04d}.safetensors"


def _commit(
    store: Store,
    run: str,
    number: int,
    state: SharedState,
    started: float,
    records: Sequence[ClientRecord],
    metrics: tuple[MetricRecord, ...],
    failure: str = "",
    told: tuple[ClientScore, ...] = (),
) -> SharedState:
    """Put the checkpoint on disk, then the whole round into the store in one transaction; the state as it is there."""
    path = _checkpoint_path(run, number)
    sha256 = checkpoint.write_checkpoint(paths.get_runs_folder() / path, state)
    saved = CheckpointRecord(path=path, sha256=sha256, bytes=(paths.get_runs_folder() / path).stat().st_size)
    record = RoundRecord(
        number=number,
        status="failed" if failure else "completed",
        reason=failure,
        seconds=time.perf_counter() - started,
        client_records=tuple(records),
        metrics=metrics,
        checkpoint=saved,
        client_scores=told,
    )
    store.commit_round(run, record)
    emit_event(RoundEnded(record))
    return StoredState(paths.get_runs_folder() / path)
