"""The protocol version, by which server and device check that they understand each other's messages.

It increases with every change of the messages. Version 1 sent no number, and its train request was called an order.
"""

from fedtune.errors import DeviceError
from fedtune.wire.protocol_codes import Problem

__all__ = ["PROTOCOL_VERSION", "check_protocol_version"]

PROTOCOL_VERSION = 2


def check_protocol_version(server: int) -> None:
    """Raise DeviceError, with a code for the server, unless the server has this device's protocol version."""
    if server != PROTOCOL_VERSION:
        outdated = "device-outdated" if server > PROTOCOL_VERSION else "server-outdated"
        problem = Problem(outdated, {"device": PROTOCOL_VERSION, "server": server})
        raise DeviceError(problem.sentence, code=problem.code, counts=problem.counts)
