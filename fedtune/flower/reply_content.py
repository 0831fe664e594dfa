"""Build a device's reply from its stored objects (flwr 1.41 and 1.42). Its size is checked before it is expanded."""

import json
from collections.abc import Mapping

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_head_values_from_object_content
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry, inflate_object_from_contents

from fedtune.flower.reply_limit import OVERHEAD

__all__ = ["ReplyError", "inflate_reply"]


class ReplyError(Exception):
    """An invalid reply. The message is a sentence about the device."""


def inflate_reply(metadata: Metadata, contents: Mapping[str, bytes], most: int) -> Message:
    """Return the reply with this metadata.

    Raise ReplyError if its arrays expand to more than ``most`` bytes, or if the objects are not a reply. The metadata
    inside the objects comes from the device and is not used.
    """
    try:
        expanded = sum(_expanded(content, contents) for content in contents.values())
        if expanded > most + OVERHEAD:
            raise ReplyError(f"its reply expands to {expanded} bytes; the limit of this round is {most}")
        found = inflate_object_from_contents(metadata.message_id, dict(contents))
        return _with(metadata, found)
    except ReplyError:
        raise
    except Exception as error:  # Flower may raise anything for invalid objects
        raise ReplyError("its reply does not follow Flower's protocol; update the client") from error


def _expanded(content: bytes, contents: Mapping[str, bytes]) -> int:
    """Return the bytes of an array after its chunks are joined; 0 for other objects."""
    kind, children, _ = get_object_head_values_from_object_content(content)
    if kind != "Array":
        return 0
    listed = json.loads(get_object_body(content, inflatable_class_registry[kind]))["arraychunk_ids"]
    sizes = [len(contents[child]) - contents[child].index(HEAD_BODY_DIVIDER) - 1 for child in children]
    return sum(sizes[place] for place in listed)


def _with(metadata: Metadata, found: object) -> Message:
    if not isinstance(found, Message) or found.has_content() == found.has_error():
        raise ReplyError("its reply is not a message; update the client")
    if found.has_error():
        return make_message(metadata, None, Error(found.error.code, found.error.reason))
    return make_message(metadata, found.content, None)
