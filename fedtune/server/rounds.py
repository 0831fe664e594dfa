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

from fedtune import checkpoint, home, merging, techniques
from fedtune.contribution import Contribution
from fedtune.errors import RoundError
from fedtune.server import scoring
from fedtune.server.asking import Asking
from fedtune.server.client_scoring import score_by_clients
from fedtune.server.crew import Crew
from fedtune.server.evidence import evidence
from fedtune.server.orders import make_messages
from fedtune.server.own_scores import client_scores, own_scores
from fedtune.server.parts import Parts, sent_names, widened
from fedtune.server.private import alike, norm_limit, with_noise
from fedtune.server.pruning import prune_checkpoints
from fedtune.server.receive import aged, missing, receive
from fedtune.server.roster import Roster
from fedtune.server.round_failures import MERGE_ERRORS, require_finite, shortage, unused, with_refusals
from fedtune.server.safeguards import Safeguards
from fedtune.server.spool import spooling, sweep
from fedtune.server.watch import Answered, RoundEnded, RoundStarted, RunStarted, tell
from fedtune.server.ways import way_of_asking
from fedtune.sparse import compact, masks, spread_out
from fedtune.stored_state import StoredState
from fedtune.tracking import CheckpointRecord, ClientScore, ContributionRecord, MetricRecord, RoundRecord, Store
from fedtune.tracking.pruning import remove_pruned, with_checkpoint
from fedtune.training import Workshop, read_state
from fedtune.training.model_counts import check_model_counts
from fedtune.untrusted import clean_text

__all__ = ["coordinate"]

State = Mapping[str, Tensor]
AskScores = Callable[[Crew, State, int, float], tuple[ClientScore, ...]]
"""Asks clients to score a state after a round that has taken so many seconds."""


def coordinate(grid: Grid, shop: Workshop, store: Store, run: str) -> None:
    """Carry a run from its last committed round to its end; RoundError when not one round could be completed."""
    recipe = shop.recipe
    done = store.rounds(run)
    first = done[-1].number + 1 if done else 1
    check_model_counts(recipe, merging.choose(recipe.merge))
    tell(RunStarted(run, first, recipe.federation.rounds, scoring.to_score(shop, first if done else 0)))
    sweep(run)
    remove_pruned(done)
    state = _resumed(run, done) if done else _start(shop, store, run)
    prune_checkpoints(store, run, recipe)
    roster = Roster(store, run, recipe, grid)
    crew = roster.assemble()
    asking = way_of_asking(grid, shop, crew, roster.seated, partial(store.last_asked, run))
    guards = Safeguards(shop, store, run, done)
    ask_scores = partial(score_by_clients, grid, shop, run)
    for number in range(first, recipe.federation.rounds + 1):
        ended: State | None = None
        while ended is None:
            crew = roster.refreshed(crew, asking)
            ended = _round(shop, store, run, crew, asking, guards, ask_scores, state, number)
        state = ended
        prune_checkpoints(store, run, recipe)
    if not any(record.status == "completed" and record.number for record in store.rounds(run)):
        raise RoundError("no round got enough usable contributions; see the reasons in: fedtune runs show " + run)


def _resumed(run: str, done: Sequence[RoundRecord]) -> State:
    """The state of the last checkpoint among the committed rounds, verified."""
    last = with_checkpoint(run, done).checkpoint
    assert last is not None
    checkpoint.load(home.runs() / last.path, last.sha256)
    return StoredState(home.runs() / last.path)


def _start(shop: Workshop, store: Store, run: str) -> State:
    """Commit the state before training as round 0."""
    started = time.perf_counter()
    state = read_state(shop.model, shop.shared)
    metrics = scoring.validation(shop, state, 0)
    return _commit(store, run, 0, state, started, (), metrics)


def _round(
    shop: Workshop,
    store: Store,
    run: str,
    crew: Crew,
    asking: Asking,
    guards: Safeguards,
    ask_scores: AskScores,
    state: State,
    number: int,
) -> State | None:
    """One round to its commit: the next state, the old one if it failed; None if a removal spoilt it: begin it anew."""
    started = time.perf_counter()
    with spooling(run, number) as spool:
        records, contributions = _gather(shop, run, crew, asking, guards, state, number, spool)
        short = shortage(records, shop.recipe)
        if short and {record.client for record in records} & set(crew.removed()):
            return None
        figures: tuple[MetricRecord, ...] = ()
        if not short:
            try:
                merged, figures = _merged(shop, state, run, number, contributions)
                state = require_finite(merged)
                figures += guards.bound.merged()
            except MERGE_ERRORS as error:
                short = with_refusals(f"the merge failed: {clean_text(error)}", records)
        if short:
            records = unused(records)
    metrics = figures + own_scores(contributions) + _evaluate(shop, state, run, number) + _simulated(asking)
    metrics += guards.spending.after(("failed" if short else "completed", records))
    told = client_scores(contributions, shop.recipe.evaluation.metrics)
    if scoring.scored_after(shop, number):
        told += ask_scores(crew, state, number, time.perf_counter() - started)
    state = _commit(store, run, number, state, started, records, metrics, short, told)
    guards.committed(records)
    return state


def _simulated(asking: Asking) -> tuple[MetricRecord, ...]:
    seconds = asking.seconds()
    return () if seconds is None else (MetricRecord(part="simulation", domain="all", name="seconds", value=seconds),)


def _merged(
    shop: Workshop, state: State, run: str, number: int, contributions: Sequence[Contribution]
) -> tuple[State, tuple[MetricRecord, ...]]:
    """The state after a round's contributions, as techniques revise it by what else was sent; figures of the merge."""
    pipeline = with_noise(shop.recipe, merging.choose(shop.recipe.merge), run, number, contributions)
    found = masks(state)
    names = sent_names(shop, number)
    told = evidence(shop, pipeline, state, number, names, contributions)
    told = told._replace(pairs=techniques.pairs(shop.techniques, shop.model))
    errors = merging.errors(pipeline, compact(state, found), names, contributions, told)
    figures = (MetricRecord(part="merge", domain="all", name=name, value=value) for name, value in errors.items())
    merged = merging.merge(pipeline, compact(state, found), names, contributions, told)
    extras = techniques.asked(shop.techniques, shop.model, number)
    weights = pipeline.combine.weights([one.examples for one in contributions])
    answers = [techniques.Answer(weight, one.read(extras)) for weight, one in zip(weights, contributions, strict=True)]
    return techniques.revise(shop.techniques, spread_out(merged, found), number, answers), tuple(figures)


def _gather(
    shop: Workshop,
    run: str,
    crew: Crew,
    asking: Asking,
    guards: Safeguards,
    state: State,
    number: int,
    spool: Path,
) -> tuple[list[ContributionRecord], list[Contribution]]:
    """Ask clients; what each of them sent, and what of it may be merged, in client order."""
    folder = spool if crew.shares_disk else None
    parts, federation = Parts(shop, state, number, folder), shop.recipe.federation
    records: dict[int, ContributionRecord] = {}
    contributions: list[Contribution] = []

    def send(clients: Sequence[int], begun: int) -> dict[int, Message]:
        sent = parts if begun == number else Parts(shop, _earlier(run, begun), begun, folder)
        return make_messages(shop, run, crew, clients, sent)

    tell(RoundStarted(number, asking.begin(number)))
    for client, reply in asking.replies(send, partial(len, contributions)):
        device, part = crew.names[client], parts.of(client)
        most, limit = norm_limit(shop.recipe, part.expected.values())
        received = receive(reply, client, device, part, most, spool, limit, guards.examples(client))
        records[client], sent = aged(*received, asking.staleness(client), federation.late)
        if sent:
            widened(shop, shop.of(client), sent)
            contributions.append(sent)
        tell(Answered(number, records[client]))
    for client, reason in crew.explained(asking.silent(records)).items():
        records[client] = missing(client, crew.names[client], parts.of(client).size, reason)
        tell(Answered(number, records[client]))
    ordered = sorted(alike(shop.recipe, contributions), key=lambda sent: sent.client)
    told = [records[client] for client in sorted(records)]
    return guards.bound.kept(told, ordered, lambda client: parts.of(client).values)


def _earlier(run: str, number: int) -> State:
    """The state that an earlier round began with."""
    return StoredState(home.runs() / _checkpoint_path(run, number - 1))


def _evaluate(shop: Workshop, state: State, run: str, number: int) -> tuple[MetricRecord, ...]:
    """Validation every so many rounds; after the last one the test part too, for the start and for the end."""
    metrics = scoring.validation(shop, state, number) if scoring.scored_after(shop, number) else ()
    if number == shop.recipe.federation.rounds:
        start = StoredState(home.runs() / _checkpoint_path(run, 0))
        metrics += scoring.test(shop, start, state)
    return metrics


def _checkpoint_path(run: str, number: int) -> str:
    return f"{run}/round-{number:04d}.safetensors"


def _commit(
    store: Store,
    run: str,
    number: int,
    state: State,
    started: float,
    records: Sequence[ContributionRecord],
    metrics: tuple[MetricRecord, ...],
    failure: str = "",
    told: tuple[ClientScore, ...] = (),
) -> State:
    """Put the checkpoint on disk, then the whole round into the store in one transaction; the state as it is there."""
    path = _checkpoint_path(run, number)
    sha256 = checkpoint.save(home.runs() / path, state)
    saved = CheckpointRecord(path=path, sha256=sha256, bytes=(home.runs() / path).stat().st_size)
    record = RoundRecord(
        number=number,
        status="failed" if failure else "completed",
        reason=failure,
        seconds=time.perf_counter() - started,
        contributions=tuple(records),
        metrics=metrics,
        checkpoint=saved,
        client_scores=told,
    )
    store.commit_round(run, record)
    tell(RoundEnded(record))
    return StoredState(home.runs() / path)
