"""Flower's grid on a SuperLink, one device's messages kept from harming others (private parts of flwr 1.41 and 1.42).

Flower's own grid ends the ServerApp when a device confirms an order before its objects are there, when a reply is
malformed, or answers a message that was never sent; it waits for a reply's objects while others are ready; and it puts
a reply together however large that makes it, since an array may list one chunk many times. Here each of these costs
its device the round: in place of the reply comes an error with the code ``REFUSED`` and a sentence.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.run import Run

from fedtune.flower.reply_content import ReplyError, inflate_reply
from fedtune.flower.reply_limit import OVERHEAD
from fedtune.wire.error_codes import REFUSED

if TYPE_CHECKING:
    from flwr.superlink.grid import HttpGrid

__all__ = ["GuardedGrid", "guard_grid"]

_MOST_OBJECTS = 64
_PER_CHUNK = 1 << 16
"""Flower cuts arrays into much larger chunks: so many bytes at least are one object."""


def guard_grid(grid: Grid) -> Grid:
    """The grid, guarded where it reaches devices; one inside this process is as it was."""
    if not type(grid).__module__.startswith("flwr."):
        return grid
    from flwr.superlink.grid import HttpGrid  # Flower's web server comes with it

    return GuardedGrid(grid) if isinstance(grid, HttpGrid) else grid


@dataclass
class _Arriving:
    """A reply whose objects are not all there yet: what the SuperLink vouches for, what is missing, what came."""

    metadata: Metadata
    wanted: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)
    held: int = 0


class GuardedGrid(Grid):
    """Replies of at most as many bytes as ``expect`` was told."""

    def __init__(self, grid: "HttpGrid") -> None:
        self._grid = grid
        self._most = 0
        self._arriving: dict[str, _Arriving] = {}
        self._lost: dict[str, Metadata] = {}

    def expect(self, most: int) -> None:
        """Take payloads of up to ``most`` bytes from now on; never fewer than before, since replies may be late."""
        self._most = max(self._most, most)

    def set_run(self, run: Run) -> None:
        """Tell which run this is."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str = "", ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are connected."""
        return self._grid.get_node_ids()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """As Flower does it; fedtune's rounds push and pull themselves."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; their numbers, empty where there is no such device any more.

        Of a message whose objects are gone before they were all stored, ``pull_messages`` gives an error: its device
        confirmed it before it can have fetched it.
        """
        sent = list(messages)
        if not sent:
            return []
        with no_object_id_recompute():
            for message in sent:
                message.metadata.__dict__["_message_id"] = message.object_id
            nested = [get_all_nested_objects(message) for message in sent]
            request = PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(message)) for message in sent],
                message_object_trees=[get_object_tree(message) for message in sent],
            )
            response = self._grid._runtime_client.PushMessages(request)
            objects = {name: found for one in nested for name, found in one.items()}
            lost = self._push_objects(objects, set(response.objects_to_push), response.session_id)
        for message, own, message_id in zip(sent, nested, response.message_ids, strict=True):
            if message_id and lost & own.keys():
                self._lost[message_id] = message.metadata
        return list(response.message_ids)

    def _push_objects(self, objects: Mapping[str, InflatableObject], wanted: set[str], session: str) -> set[str]:
        """Store objects; the identifiers of those that the SuperLink did not take."""
        lost: set[str] = set()
        for name in wanted:
            request = PushObjectRequest(
                node=self._grid.node,
                run_id=self.run.run_id,
                object_id=name,
                object_content=objects[name].deflate(),
                session_id=session,
            )
            if not self._grid._runtime_client.PushObject(request).stored:
                lost.add(name)
        return lost

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that are here whole; whatever is wrong with one is an error in its place."""
        asked = set(message_ids)
        self._forget_all_but(asked)
        early = asked & self._lost.keys()
        replies = [self._early(message_id) for message_id in sorted(early)]
        response = self._grid._runtime_client.PullMessages(
            PullAppMessagesRequest(message_ids=sorted(asked - early - self._arriving.keys()))
        )
        for proto, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            metadata = message_from_proto(proto).metadata
            self._arriving[metadata.reply_to_message_id] = _Arriving(metadata, _ordered(tree))
        found = [(message_id, self._reply(self._arriving[message_id])) for message_id in list(self._arriving)]
        for message_id, reply in found:
            if reply is not None:
                self._confirm(self._arriving.pop(message_id))
                replies.append(reply)
        return replies

    def _forget_all_but(self, asked: set[str]) -> None:
        """Nobody waits for other replies any more."""
        for message_id in self._arriving.keys() - asked:
            self._confirm(self._arriving.pop(message_id))
        for message_id in self._lost.keys() - asked:
            del self._lost[message_id]

    def _early(self, message_id: str) -> Message:
        metadata = self._lost.pop(message_id)
        return _refusal(
            Metadata(
                run_id=metadata.run_id,
                message_id="",
                src_node_id=metadata.dst_node_id,
                dst_node_id=metadata.src_node_id,
                reply_to_message_id=message_id,
                group_id=metadata.group_id,
                created_at=metadata.created_at,
                ttl=metadata.ttl,
                message_type=metadata.message_type,
            ),
            "it confirmed its order before it had fetched it; restart the device",
        )

    def _reply(self, reply: _Arriving) -> Message | None:
        """The reply, or an error in its place; None while objects of it are on their way."""
        try:
            if not self._fetch(reply):
                return None
            return inflate_reply(reply.metadata, reply.contents, self._most)
        except ReplyError as error:
            return _refusal(reply.metadata, str(error))

    def _fetch(self, reply: _Arriving) -> bool:
        """Fetch what is there of a reply; whether that is all. ReplyError when it is more than the round expects."""
        if len(reply.wanted) > _MOST_OBJECTS + self._most // _PER_CHUNK:
            raise ReplyError(f"its reply is in {len(reply.wanted)} objects, more than this round expects")
        while reply.wanted:
            content = self._object(reply.wanted[0])
            if not content:
                return False
            reply.held += len(content)
            if reply.held > self._most + OVERHEAD:
                raise ReplyError(f"its reply has more than the {self._most} bytes this round expects at most")
            reply.contents[reply.wanted.pop(0)] = content
        return True

    def _object(self, name: str) -> bytes:
        """An object's content, empty while it is not there."""
        request = PullObjectRequest(node=self._grid.node, run_id=self.run.run_id, object_id=name)
        try:
            response = self._grid._runtime_client.PullObject(request)
        except httpx.HTTPStatusError as error:
            raise ReplyError("a part of its reply cannot be read") from error
        if not response.object_found:
            raise ReplyError("a part of its reply is missing: it did not send it to the end")
        return response.object_content if response.object_available else b""

    def _confirm(self, reply: _Arriving) -> None:
        """Let the SuperLink delete a reply."""
        request = ConfirmMessageReceivedRequest(
            node=self._grid.node, run_id=self.run.run_id, message_object_id=reply.metadata.message_id
        )
        self._grid._runtime_client.ConfirmMessageReceived(request)


def _ordered(tree: ObjectTree) -> list[str]:
    """The objects of a reply, each once."""
    return list(dict.fromkeys(one.object_id for one in iterate_object_tree(tree)))


def _refusal(metadata: Metadata, reason: str) -> Message:
    return make_message(metadata, None, Error(REFUSED, reason))
