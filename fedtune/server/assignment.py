"""Devices are assigned to the clients of a run."""

import json
from collections.abc import Sequence

from fedtune.recipe.schema import Recipe
from fedtune.tracking import Assignment, DeviceRecord

__all__ = ["assign_devices"]


def assign_devices(recipe: Recipe, devices: Sequence[DeviceRecord]) -> list[Assignment]:
    """Return an assignment for each client, in the order of the devices as they are given.

    Where device classes have settings of their own, devices that allow the most memory take the places of the classes
    that do, and those with as much go by name.
    """
    clients, chosen = list(range(recipe.num_clients)), list(devices[: recipe.num_clients])
    if any(device.overridden_settings for device in recipe.devices):
        clients.sort(key=lambda client: -recipe.get_device_class(client).memory)
        chosen.sort(key=lambda device: -_memory(device))
    assignments = [
        Assignment(client=client, device_name=one.name, node_id=one.node_id)
        for client, one in zip(clients, chosen, strict=True)
    ]
    return sorted(assignments, key=lambda assignment: assignment.client)


def _memory(device: DeviceRecord) -> int:
    """Bytes it allows its trainer, by its own word."""
    memory = json.loads(device.profile).get("memory")
    return memory if isinstance(memory, int) else 0
