"""Find out which devices are connected: those that are online on the SuperLink and have called recently.

A heartbeat counts for two minutes on the SuperLink, so that a short network failure has no effect. A device that died
would therefore still be assigned to new runs. Devices poll every few seconds while they wait, and send a heartbeat
every 15 s while they train. A device without a call for three heartbeats counts as offline until its next call.
"""

import math
import time
from collections.abc import Callable, Iterable

from fedtune.tracking import DeviceRecord

__all__ = ["Presence"]

_SILENT_SECONDS = 45.0


class Presence:
    """``online`` returns the node ids that are online on the SuperLink; ``clock`` returns seconds."""

    def __init__(self, online: Callable[[], set[int]], clock: Callable[[], float] = time.monotonic) -> None:
        self._online, self._clock = online, clock
        self._heard: dict[str, float] = {}

    def record_contact(self, device: str) -> None:
        """Record that the SuperLink accepted a call of this device."""
        self._heard[device] = self._clock()

    def list_connected_devices(self, devices: Iterable[DeviceRecord]) -> list[DeviceRecord]:
        """Return the connected ones of these devices, in the same order."""
        online, now = self._online(), self._clock()
        return [
            device
            for device in devices
            if int(device.node_id) in online and now - self._heard.get(device.name, -math.inf) < _SILENT_SECONDS
        ]
