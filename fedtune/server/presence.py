"""Which devices are there: Flower believes so, and they have been heard of late.

A device tells Flower that it will be there for two minutes, so that a line that is cut for less costs nothing; a dead
one would be given a place in a new run for as long. Devices knock every few seconds while they wait and beat every 15 s
while they work: who has been silent for three beats is away until it is heard again.
"""

import math
import time
from collections.abc import Callable, Iterable

from fedtune.tracking import DeviceRecord

__all__ = ["Presence"]

_SILENT_SECONDS = 45.0


class Presence:
    """``online`` gives the nodes that are there in Flower's eyes; ``clock`` gives seconds."""

    def __init__(self, online: Callable[[], set[int]], clock: Callable[[], float] = time.monotonic) -> None:
        self._online, self._clock = online, clock
        self._heard: dict[str, float] = {}

    def record_contact(self, device: str) -> None:
        """The SuperLink has accepted a call of the device with this name."""
        self._heard[device] = self._clock()

    def list_connected_devices(self, devices: Iterable[DeviceRecord]) -> list[DeviceRecord]:
        """Those of the devices that are, in the same order."""
        online, now = self._online(), self._clock()
        return [
            device
            for device in devices
            if int(device.node_id) in online and now - self._heard.get(device.name, -math.inf) < _SILENT_SECONDS
        ]
