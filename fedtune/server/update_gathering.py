"""Sends the train requests of a round, receives the client updates, and records what became of each client."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from flwr.app import Message
from torch import Tensor

from fedtune import paths
from fedtune.server.attacked_updates import attack_updates, note_attackers
from fedtune.server.class_payloads import ClassPayload, RoundPayloads, pad_update_to_shared_rank
from fedtune.server.downloads import Downloads
from fedtune.server.events import ReplyReceived, RoundStarted, emit_event
from fedtune.server.private_aggregation import get_norm_limit, weight_clients_equally
from fedtune.server.replies import ExpectedReply, make_missing_record, receive_update, scale_by_staleness
from fedtune.server.round_commit import get_checkpoint_path
from fedtune.server.run_clients import RunClients
from fedtune.server.server_run import ServerRun
from fedtune.server.task_memory import list_sent_memory
from fedtune.server.update_decoding import UpdateDecoder
from fedtune.tracking import ClientRecord
from fedtune.wire.client_update import ClientUpdate
from fedtune.wire.recipe_codecs import MessagePlace, uses_feedback
from fedtune.wire.stored_state import StoredState

__all__ = ["gather_updates", "read_start_state"]

SharedState = Mapping[str, Tensor]


def gather_updates(
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
        sent = downloads if current else make_downloads(read_start_state(run.run_id, start_round), start_round)
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
            context.recipe.plans,
            _make_decoder(run, payload, client, round_number - (scheduler.get_staleness(client) or 0)),
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
    if not clients.deployed:
        records, updates = attack_updates(context.recipe, records, updates, parts)
    ordered = sorted(weight_clients_equally(context.recipe, updates), key=lambda one: one.client)
    in_order = [records[client] for client in sorted(records)]
    in_order, ordered = run.safeguards.bound.refuse_large_updates(
        in_order, ordered, lambda client: parts.get_for_client(client).values
    )
    return note_attackers(context.recipe, in_order), ordered


def _make_decoder(run: ServerRun, payload: ClassPayload, client: int, start_round: int) -> UpdateDecoder | None:
    """Return the decoder of a client's coded update, None without codecs."""
    if payload.layout is None:
        return None
    recipe = run.context.recipe
    place = MessagePlace(recipe.seed, start_round, client, run.sending.get_feedback_round(client))
    return UpdateDecoder(run.run_id, payload.layout, place, uses_feedback(recipe))


def read_start_state(run_id: str, round_number: int) -> SharedState:
    """Return the start state of a round."""
    return StoredState(paths.get_runs_folder() / get_checkpoint_path(run_id, round_number - 1))
