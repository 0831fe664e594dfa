"""A Flower grid on which one device's replies cannot harm a run (private parts of flwr 1.41 and 1.42).

Flower's own grid ends the ServerApp if a device confirms a message before its objects are stored, if a reply is
malformed, or if it replies to a message that was never sent. It waits for the objects of one reply while others are
complete. It also builds a reply of any size, because an array may name the same chunk many times. Here, each of these
replies is replaced by an error with the code ``REFUSED`` and a sentence, so only its device misses the round.
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
"""The smallest number of bytes per object that is expected. Flower's chunks are much larger."""


def guard_grid(grid: Grid) -> Grid:
    """Return a guarded grid if the grid connects to devices. A grid inside this process is returned unchanged."""
    if not type(grid).__module__.startswith("flwr."):
        return grid
    from flwr.superlink.grid import HttpGrid  # imports Flower's web server

    return GuardedGrid(grid) if isinstance(grid, HttpGrid) else grid


@dataclass
class _Arriving:
    """A reply that is not complete yet: its metadata from the SuperLink, its missing objects and its contents."""

    metadata: Metadata
    wanted: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)
    held: int = 0


class GuardedGrid(Grid):
    """A grid that accepts replies up to the number of bytes given to ``expect``."""

    def __init__(self, grid: "HttpGrid") -> None:
        self._grid = grid
        self._most = 0
        self._arriving: dict[str, _Arriving] = {}
        self._lost: dict[str, Metadata] = {}

    def expect(self, most: int) -> None:
        """Accept payloads of up to ``most`` bytes. The limit never falls, because late replies may be larger."""
        self._most = max(self._most, most)

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str = "", ttl: float | None = None
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes."""
        return self._grid.get_node_ids()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Call Flower's method. fedtune itself pushes and pulls messages instead."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; return their ids, empty for a device that was removed.

        If objects of a message were deleted before all were stored, its device confirmed the message without fetching
        it. ``pull_messages`` then returns an error for it.
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
        """Store objects; return the ids of those that the SuperLink did not accept."""
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
        """Return the complete replies. An invalid reply is replaced by an error."""
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
        """Delete all replies except those to the messages ``asked``."""
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
            "it confirmed its train request before it fetched it; restart the device",
        )

    def _reply(self, reply: _Arriving) -> Message | None:
        """Return the reply, or an error instead of it; None while objects are missing."""
        try:
            if not self._fetch(reply):
                return None
            return inflate_reply(reply.metadata, reply.contents, self._most)
        except ReplyError as error:
            return _refusal(reply.metadata, str(error))

    def _fetch(self, reply: _Arriving) -> bool:
        """Fetch the available objects; return whether the reply is complete. Raise ReplyError if it is too large."""
        if len(reply.wanted) > _MOST_OBJECTS + self._most // _PER_CHUNK:
            raise ReplyError(f"its reply has {len(reply.wanted)} objects, more than this round expects")
        while reply.wanted:
            content = self._object(reply.wanted[0])
            if not content:
                return False
            reply.held += len(content)
            if reply.held > self._most + OVERHEAD:
                raise ReplyError(f"its reply is larger than the limit of this round, {self._most} bytes")
            reply.contents[reply.wanted.pop(0)] = content
        return True

    def _object(self, name: str) -> bytes:
        """Return the content of an object; empty while it is missing."""
        request = PullObjectRequest(node=self._grid.node, run_id=self.run.run_id, object_id=name)
        try:
            response = self._grid._runtime_client.PullObject(request)
        except httpx.HTTPStatusError as error:
            raise ReplyError("an object of its reply cannot be read") from error
        if not response.object_found:
            raise ReplyError("its reply is incomplete: an object was never sent")
        return response.object_content if response.object_available else b""

    def _confirm(self, reply: _Arriving) -> None:
        """Let the SuperLink delete a reply."""
        request = ConfirmMessageReceivedRequest(
            node=self._grid.node, run_id=self.run.run_id, message_object_id=reply.metadata.message_id
        )
        self._grid._runtime_client.ConfirmMessageReceived(request)


def _ordered(tree: ObjectTree) -> list[str]:
    """Return the object ids of a reply, each once."""
    return list(dict.fromkeys(one.object_id for one in iterate_object_tree(tree)))


def _refusal(metadata: Metadata, reason: str) -> Message:
    return make_message(metadata, None, Error(REFUSED, reason))
