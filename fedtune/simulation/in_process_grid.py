"""A Flower Grid inside this process, without Ray, SuperLink or sockets."""

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
"""Flower's error code for an exception in a ClientApp."""


class InProcessGrid(Grid):
    """Nodes 2, 3, ... whose ClientApp is executed by ``workers``."""

    shares_disk = True
    """Clients can read the server's files, so the shared state need not be sent."""

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
        """Do nothing: there is only one run."""

    @property
    def run(self) -> Run:
        """Not available. The run store, not Flower, describes the run."""
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str = "", ttl: float | None = None
    ) -> Message:
        """Create a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Sequence[int]:
        """Return all nodes. They are always available."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages for the workers. Messages of an earlier exchange that have not started are dropped."""
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
        """Return the replies that have arrived, after waiting briefly for one."""
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
        """Push messages, then pull until all replies have arrived or ``timeout`` seconds have passed."""
        end = float("inf") if timeout is None else time.monotonic() + timeout
        waiting, arrived = set(self.push_messages(messages)), []
        while waiting and time.monotonic() < end:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                arrived.append(reply)
        return arrived
