"""The protocol version tells whether a server and a device understand each other's messages.

It rises with every change of what travels. Version 1 carried no number; its train request was called an order.
"""

from fedtune.errors import DeviceError
from fedtune.wire.protocol_codes import Problem

__all__ = ["PROTOCOL_VERSION", "check_protocol_version"]

PROTOCOL_VERSION = 2


def check_protocol_version(server: int) -> None:
    """Raise DeviceError, with a code for the server, unless the server speaks this device's version."""
    if server != PROTOCOL_VERSION:
        outdated = "device-outdated" if server > PROTOCOL_VERSION else "server-outdated"
        problem = Problem(outdated, {"device": PROTOCOL_VERSION, "server": server})
        raise DeviceError(problem.sentence, code=problem.code, counts=problem.counts)
