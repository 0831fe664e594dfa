"""Messages a device was handed but is not known to hold: it gets them again, since Flower hands out each one once.

Without this, a device that is killed, or a line that is cut, between the SuperLink's answer and the device's disk would
cost the round its deadline. Kept in memory: when this process dies, the run's round is begun anew anyhow.
"""

from flwr.proto.fleet_pb2 import PullMessagesResponse

__all__ = ["RedeliveryBuffer"]


class RedeliveryBuffer:
    """The last message each device was handed, until it has answered it."""

    def __init__(self) -> None:
        self._handed: dict[str, tuple[str, bytes]] = {}

    def remember_message(self, device: str, body: bytes) -> None:
        """Remember the SuperLink's answer to a device that asked for messages."""
        if number := _message(body):
            self._handed[device] = number, body

    def get_unconfirmed_message(self, device: str, held: str | None) -> bytes | None:
        """What a device has to be handed again; nothing for one that does not tell which message it holds."""
        number, body = self._handed.get(device, (held, b""))
        return body if held is not None and held != number else None

    def remove_message(self, device: str, held: str | None) -> None:
        """A device has answered the message it holds."""
        if device in self._handed and self._handed[device][0] == held:
            del self._handed[device]


def _message(body: bytes) -> str:
    """The identifier of the message in an answer, if there is one."""
    messages = PullMessagesResponse.FromString(body).messages_list
    return str(messages[0].metadata.message_id) if messages else ""
