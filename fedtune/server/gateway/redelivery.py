"""Deliver a message again until its device has confirmed it, because Flower delivers each message only once.

Without this, a round would wait until its deadline if a device is killed, or its connection breaks, before the message
is on the device's disk. The messages are kept in memory: if this process dies, the round starts again anyway.
"""

from flwr.proto.fleet_pb2 import PullMessagesResponse

__all__ = ["RedeliveryBuffer"]


class RedeliveryBuffer:
    """The last message delivered to each device, until the device has replied to it."""

    def __init__(self) -> None:
        self._handed: dict[str, tuple[str, bytes]] = {}

    def remember_message(self, device: str, body: bytes) -> None:
        """Remember the SuperLink's response to a device's request for messages."""
        if number := _message(body):
            self._handed[device] = number, body

    def get_unconfirmed_message(self, device: str, held: str | None) -> bytes | None:
        """Return the response to send again, or None. ``held`` is the stored message's id; None if it is not sent."""
        number, body = self._handed.get(device, (held, b""))
        return body if held is not None and held != number else None

    def remove_message(self, device: str, held: str | None) -> None:
        """Forget the message that a device has replied to."""
        if device in self._handed and self._handed[device][0] == held:
            del self._handed[device]


def _message(body: bytes) -> str:
    """Return the id of the message in a response; empty if there is none."""
    messages = PullMessagesResponse.FromString(body).messages_list
    return str(messages[0].metadata.message_id) if messages else ""
