"""One exchange with clients on a Flower grid: messages out, replies as they arrive, until all are in or time is up."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedtune.contribution import Order
from fedtune.errors import RoundError

__all__ = ["messages_for", "replies", "wait_for_nodes"]

_POLL_SECONDS = 0.01


def wait_for_nodes(grid: Grid, count: int, patience: float = 120.0) -> list[int]:
    """Node numbers, sorted, once ``count`` are connected; RoundError after ``patience`` seconds."""
    end = time.monotonic() + patience
    while len(nodes := sorted(grid.get_node_ids())) < count:
        if time.monotonic() > end:
            raise RoundError(
                f"only {len(nodes)} of {count} devices connected within {patience:.0f} s; start the others"
            )
        time.sleep(0.2)
    return nodes


def messages_for(
    clients: Sequence[int], nodes: Sequence[int], recipe: str, number: int, payload: bytes
) -> dict[int, Message]:
    """One training message per client; client i lives on the i-th node. All share one copy of the state."""
    state = ArrayRecord({"safetensors": Array("uint8", (len(payload),), "safetensors", payload)})
    return {
        client: Message(
            RecordDict({"state": state, "order": ConfigRecord(asdict(Order(recipe, number, client)))}),
            nodes[client],
            MessageType.TRAIN,
            group_id=str(number),
        )
        for client in clients
    }


def replies(grid: Grid, messages: Mapping[int, Message], deadline: float | None) -> Iterator[tuple[int, Message]]:
    """Send the messages and yield (client, reply) in order of arrival for at most ``deadline`` seconds."""
    end = float("inf") if deadline is None else time.monotonic() + deadline
    waiting = dict(zip(grid.push_messages(messages.values()), messages, strict=True))
    while waiting and time.monotonic() < end:
        arrived = list(grid.pull_messages(list(waiting)))
        for reply in arrived:
            yield waiting.pop(reply.metadata.reply_to_message_id), reply
        if not arrived:
            time.sleep(_POLL_SECONDS)
