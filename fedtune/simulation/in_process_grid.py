"""A Flower Grid inside this process: the unmodified apps, without Ray, SuperLink or sockets."""

import itertools
import time
from collections.abc import Iterable, Sequence

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedtune.flower.message_identity import set_message_id, set_node_identity
from fedtune.simulation.workers import ClientWorkers

__all__ = ["InProcessGrid"]

_SERVER = 1
_CLIENT_FAILED = 2
"""Flower's error code for a ClientApp that raised."""


class InProcessGrid(Grid):
    """Nodes 2, 3, ... whose ClientApp is run by ``workers``."""

    shares_disk = True
    """Clients see the server's files, so that the shared state need not travel."""

    def __init__(self, nodes: int, workers: ClientWorkers) -> None:
        set_node_identity(_SERVER)
        self._workers = workers
        self._contexts = {
            node: Context(1, node, {"partition-id": node - 2, "num-partitions": nodes}, RecordDict(), {})
            for node in range(2, nodes + 2)
        }
        self._sent: dict[str, Message] = {}
        self._arrived: dict[str, Message] = {}
        self._numbers = itertools.count(1)

    def set_run(self, run: Run) -> None:
        """There is one run."""

    @property
    def run(self) -> Run:
        """There is one run, and SQL, not Flower, describes it."""
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str = "", ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Sequence[int]:
        """All nodes; they are always there."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand messages to the workers; those of an earlier exchange that did not start are dropped."""
        self._workers.discard_pending()
        self._sent.clear()
        self._arrived.clear()
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        message_id = set_message_id(message, str(next(self._numbers)))
        self._sent[message_id] = message
        self._workers.submit(message_id, message, self._contexts[message.metadata.dst_node_id])
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that are there, after waiting a moment for one."""
        self._arrived |= {
            message_id: self._reply(message_id, result) for message_id, result in self._workers.collect_results()
        }
        return [self._arrived.pop(message_id) for message_id in message_ids if message_id in self._arrived]

    def _reply(self, message_id: str, result: tuple[Message, Context] | Exception) -> Message:
        message = self._sent.pop(message_id)
        if isinstance(result, Exception):
            return Message(Error(code=_CLIENT_FAILED, reason=repr(result)), reply_to=message)
        reply, self._contexts[message.metadata.dst_node_id] = result
        return reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull until every reply is in or ``timeout`` seconds are over."""
        end = float("inf") if timeout is None else time.monotonic() + timeout
        waiting, arrived = set(self.push_messages(messages)), []
        while waiting and time.monotonic() < end:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                arrived.append(reply)
        return arrived
