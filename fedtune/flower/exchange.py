"""One exchange with clients on a Flower grid: send messages, and yield replies until all arrived or time is up."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedtune.flower.train_messages import TRAIN_REQUEST, make_request_record
from fedtune.wire.client_update import TrainRequest
from fedtune.wire.protocol_codes import LACKS_BASE

__all__ = ["lacks_base", "make_train_messages", "stream_replies"]


def make_train_messages(
    clients: Sequence[int],
    nodes: Sequence[int],
    request: TrainRequest,
    payload: bytes | Path,
    own_fields: Mapping[int, Mapping[str, Any]] | None = None,
) -> dict[int, Message]:
    """Make a message with the train request for each client; client i is on node ``nodes[i]``. All share one state.

    ``own_fields`` are fields of the request that differ by client.
    """
    state, own = _state(payload), own_fields or {}

    def fill_in(client: int) -> TrainRequest:
        return replace(request, client=client, **own.get(client, {}))

    return {
        client: Message(
            RecordDict({**state, TRAIN_REQUEST: make_request_record(_list_fields(fill_in(client)))}),
            nodes[client],
            MessageType.TRAIN,
            group_id=str(request.round),
        )
        for client in clients
    }


def _list_fields(request: TrainRequest) -> dict[str, str | int]:
    """Return the fields of a request without those that are None or False, which are not sent."""
    return {name: value for name, value in asdict(request).items() if value is not None and value is not False}


def lacks_base(reply: Message) -> bool:
    """Whether a device replied that it does not hold the base weights that its train request is based on."""
    return reply.has_error() and reply.error.reason == LACKS_BASE


def _state(payload: bytes | Path) -> dict[str, ArrayRecord | ConfigRecord]:
    if isinstance(payload, Path):
        return {"state_file": ConfigRecord({"path": str(payload)})}
    return {"state": ArrayRecord({"safetensors": Array("uint8", (len(payload),), "safetensors", payload)})}


def stream_replies(
    grid: Grid,
    messages: Mapping[int, Message],
    deadline: float | None,
    poll: float,
    removed: Callable[[int], None] = lambda _: None,
    again: Callable[[int], Mapping[int, Message]] = lambda _: {},
) -> Iterator[tuple[int, Message]]:
    """Send the messages and yield (client, reply) in order of arrival for at most ``deadline`` seconds.

    Replies after the deadline are not yielded, even if the call that returned them started before it. If a message
    cannot be sent because the device was removed, ``removed`` is called with the client. A reply to no sent message is
    ignored. A device that lacks the base weights of its request gets the messages that ``again`` returns.
    """
    end = float("inf") if deadline is None else time.monotonic() + deadline
    again_asked: set[int] = set()
    waiting = _push(grid, messages, removed)
    while waiting and time.monotonic() < end:
        arrived = list(grid.pull_messages(list(waiting)))
        if time.monotonic() >= end:
            return
        for reply in arrived:
            if (client := waiting.pop(reply.metadata.reply_to_message_id, -1)) < 0:
                continue
            if lacks_base(reply) and client not in again_asked:
                again_asked.add(client)  # its next reply is yielded, whatever it contains
                waiting |= _push(grid, again(client), removed)
            else:
                yield client, reply
        if not arrived:
            time.sleep(poll)


def _push(grid: Grid, messages: Mapping[int, Message], removed: Callable[[int], None]) -> dict[str, int]:
    """Send messages; return the client of each sent message, by message id."""
    sent = list(zip(grid.push_messages(messages.values()), messages, strict=True))
    for client in (client for message_id, client in sent if not message_id):
        removed(client)
    return {message_id: client for message_id, client in sent if message_id}
