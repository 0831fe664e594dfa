"""What a device may send as one answer: as much as its round asks for, on the wire and once it is put together.

Flower sends equal pieces of an array once and names them as often as they occur, so a few megabytes may stand for
hundreds. The server's process would put them together before it looks at them; here they are counted as they pass.
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
"""Flower cuts arrays into pieces of 5 MiB; only the last one of an array is smaller."""


@dataclass
class _Upload:
    """One answer: bytes of its objects as far as they have come, and what its arrays are put together from."""

    answers: str
    limit: int
    names: frozenset[str]
    sizes: dict[str, int] = field(default_factory=dict)
    arrays: dict[str, list[str]] = field(default_factory=dict)

    def whole(self) -> int:
        """Bytes of all arrays once they are put together, as far as pieces have come."""
        return sum(self.sizes.get(piece, 0) for pieces in self.arrays.values() for piece in pieces)


class Uploads:
    """Answers under way, one a device; ``limit`` gives the bytes of a reply in a run, by Flower's number of the run."""

    def __init__(self, limit: Callable[[int], int]) -> None:
        self._limit = limit
        self._lock = Lock()
        self._under_way: dict[str, _Upload] = {}

    def begin(self, device: str, body: bytes) -> None:
        """A device announces an answer and its objects; RefusedError when that is not one answer as devices send it."""
        request = _parsed(PushMessagesRequest(), body, device)
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise RequestRefusedError(400, "an answer is one message with its objects; update the device", device)
        told, names = request.messages_list[0].metadata, frozenset(_names(request.message_object_trees[0], device))
        with self._lock:
            before = self._under_way.get(device)
            if before is None or (before.answers, before.names) != (told.reply_to_message_id, names):
                limit = self._limit(told.run_id)
                self._under_way[device] = _Upload(told.reply_to_message_id, limit, names)

    def add(self, device: str, body: bytes) -> None:
        """A device sends an object of its answer; RefusedError when it is none of it, or makes it too large."""
        request = _parsed(PushObjectRequest(), body, device)
        with self._lock:
            upload = self._under_way.get(device)
            if upload is None or request.object_id not in upload.names:
                raise RequestRefusedError(
                    409, "this object is of no answer that was announced; announce it again", device
                )
            content = request.object_content
            upload.sizes[request.object_id] = len(content)
            if content.startswith(_ARRAY):
                upload.arrays[request.object_id] = _pieces(content, upload.limit, device)
            came, whole = sum(upload.sizes.values()), upload.whole()
        if max(came, whole) > upload.limit:
            raise RequestRefusedError(
                413, f"its answer has {max(came, whole)} bytes, and its round asks for {upload.limit} at most", device
            )


def _pieces(content: bytes, limit: int, device: str) -> list[str]:
    """The names of the pieces an array is put together from, each as often as it occurs."""
    try:
        head, _, body = content.partition(b"\0")
        known = head.decode().split(" ")[1].split(",")
        numbers = json.loads(body)["arraychunk_ids"]
        if len(numbers) > 1 + limit // _SMALLEST_PIECE:
            raise RequestRefusedError(
                413, f"its array is made of {len(numbers)} pieces, too many for its round", device
            )
        return [known[number] for number in numbers]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise RequestRefusedError(400, "its array cannot be read; update the device", device) from error


def _names(tree: ObjectTree, device: str) -> list[str]:
    """The names of all objects of a tree, which is small and shallow."""
    level, found = [tree], [tree.object_id]
    for _ in range(_DEEPEST):
        level = [child for one in level for child in one.children]
        found += [one.object_id for one in level]
        if len(found) > _MOST_OBJECTS:
            break
    if level or len(found) > _MOST_OBJECTS:
        raise RequestRefusedError(413, "its answer is made of too many objects; update the device", device)
    return found


def _parsed(request: Request, body: bytes, device: str) -> Request:
    try:
        request.ParseFromString(body)
    except DecodeError as error:
        raise RequestRefusedError(400, "the request cannot be read; update the device", device) from error
    return request
