"""Limit the size of a device's reply to that of its round, both as sent and after its arrays are joined.

Flower sends equal chunks of an array once and names them several times. A few megabytes may therefore expand to
hundreds, and the server would join them before it checks them. This module counts their bytes as they arrive.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import TypeVar

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from google.protobuf.message import DecodeError

from fedtune.server.gateway.refusal import RequestRefusedError

__all__ = ["Uploads"]

Request = TypeVar("Request", PushMessagesRequest, PushObjectRequest)
_ARRAY = b"Array "
_MOST_OBJECTS, _DEEPEST = 4096, 8
_SMALLEST_PIECE = 1 << 20
"""The smallest chunk that is expected. Flower's chunks have 5 MiB, except the last one of an array."""


@dataclass
class _Upload:
    """One reply: the sizes of its objects so far, and the chunks of its arrays. ``answers`` is the request's id."""

    answers: str
    limit: int
    names: frozenset[str]
    sizes: dict[str, int] = field(default_factory=dict)
    arrays: dict[str, list[str]] = field(default_factory=dict)

    def whole(self) -> int:
        """Return the bytes of all arrays after joining the chunks received so far."""
        return sum(self.sizes.get(piece, 0) for pieces in self.arrays.values() for piece in pieces)


class Uploads:
    """The current reply of each device. ``limit`` returns the largest reply in bytes, by Flower's run id."""

    def __init__(self, limit: Callable[[int], int]) -> None:
        self._limit = limit
        self._lock = Lock()
        self._under_way: dict[str, _Upload] = {}

    def begin(self, device: str, body: bytes) -> None:
        """Record the reply that a device announces with its objects; raise RequestRefusedError if it is not valid."""
        request = _parsed(PushMessagesRequest(), body, device)
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise RequestRefusedError(400, "a reply must be one message with its objects; update the device", device)
        told, names = request.messages_list[0].metadata, frozenset(_names(request.message_object_trees[0], device))
        with self._lock:
            before = self._under_way.get(device)
            if before is None or (before.answers, before.names) != (told.reply_to_message_id, names):
                limit = self._limit(told.run_id)
                self._under_way[device] = _Upload(told.reply_to_message_id, limit, names)

    def add(self, device: str, body: bytes) -> None:
        """Count an object of a reply; raise RequestRefusedError if it was not announced or the reply is too large."""
        request = _parsed(PushObjectRequest(), body, device)
        with self._lock:
            upload = self._under_way.get(device)
            if upload is None or request.object_id not in upload.names:
                raise RequestRefusedError(
                    409, "this object belongs to no announced reply; announce the reply again", device
                )
            content = request.object_content
            upload.sizes[request.object_id] = len(content)
            if content.startswith(_ARRAY):
                upload.arrays[request.object_id] = _pieces(content, upload.limit, device)
            came, whole = sum(upload.sizes.values()), upload.whole()
        if max(came, whole) > upload.limit:
            raise RequestRefusedError(
                413, f"its reply has {max(came, whole)} bytes; the limit of the round is {upload.limit}", device
            )


def _pieces(content: bytes, limit: int, device: str) -> list[str]:
    """Return the names of an array's chunks in order; a name may occur several times."""
    try:
        head, _, body = content.partition(b"\0")
        known = head.decode().split(" ")[1].split(",")
        numbers = json.loads(body)["arraychunk_ids"]
        if len(numbers) > 1 + limit // _SMALLEST_PIECE:
            raise RequestRefusedError(413, f"its array has {len(numbers)} chunks, too many for its round", device)
        return [known[number] for number in numbers]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise RequestRefusedError(400, "its array cannot be read; update the device", device) from error


def _names(tree: ObjectTree, device: str) -> list[str]:
    """Return the names of all objects in a tree; raise RequestRefusedError if it is too large or too deep."""
    level, found = [tree], [tree.object_id]
    for _ in range(_DEEPEST):
        level = [child for one in level for child in one.children]
        found += [one.object_id for one in level]
        if len(found) > _MOST_OBJECTS:
            break
    if level or len(found) > _MOST_OBJECTS:
        raise RequestRefusedError(413, "its reply has too many objects; update the device", device)
    return found


def _parsed(request: Request, body: bytes, device: str) -> Request:
    try:
        request.ParseFromString(body)
    except DecodeError as error:
        raise RequestRefusedError(400, "the request cannot be read; update the device", device) from error
    return request
