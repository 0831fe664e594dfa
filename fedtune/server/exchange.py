"""One exchange with clients on a Flower grid: messages out, replies as they arrive, until all are in or time is up."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedtune.contribution import Order

__all__ = ["messages_for", "replies"]


def messages_for(
    clients: Sequence[int], nodes: Sequence[int], order: Order, payload: bytes | Path
) -> dict[int, Message]:
    """The order to each client; client i lives on the i-th node. All share one copy of the state."""
    state = _state(payload)
    return {
        client: Message(
            RecordDict({**state, "order": ConfigRecord(_fields(replace(order, client=client)))}),
            nodes[client],
            MessageType.TRAIN,
            group_id=str(order.round),
        )
        for client in clients
    }


def _fields(order: Order) -> dict[str, Any]:
    """What travels of an order. ``scoring`` only where it is wanted: a device that knows no such field trains still."""
    return {name: value for name, value in asdict(order).items() if name != "scoring" or value}


def _state(payload: bytes | Path) -> dict[str, ArrayRecord | ConfigRecord]:
    if isinstance(payload, Path):
        return {"state_file": ConfigRecord({"path": str(payload)})}
    return {"state": ArrayRecord({"safetensors": Array("uint8", (len(payload),), "safetensors", payload)})}


def replies(
    grid: Grid,
    messages: Mapping[int, Message],
    deadline: float | None,
    poll: float,
    removed: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[int, Message]]:
    """Send the messages and yield (client, reply) in order of arrival for at most ``deadline`` seconds.

    What is not here by then is late, also where waiting for it is what took the time: clients in turn in this process.
    Nothing comes from a client whose message could not be sent, since its device has been removed; ``removed`` is told
    of it. A reply to nothing that was sent is passed over.
    """
    end = float("inf") if deadline is None else time.monotonic() + deadline
    sent = list(zip(grid.push_messages(messages.values()), messages, strict=True))
    waiting = {number: client for number, client in sent if number}
    for client in (client for number, client in sent if not number):
        removed(client)
    while waiting and time.monotonic() < end:
        arrived = list(grid.pull_messages(list(waiting)))
        if time.monotonic() >= end:
            return
        for reply in arrived:
            if (client := waiting.pop(reply.metadata.reply_to_message_id, -1)) >= 0:
                yield client, reply
        if not arrived:
            time.sleep(poll)
