"""Assign devices to the clients of a run."""

import json
from collections.abc import Sequence

from fedtune.recipe.schema import Recipe
from fedtune.tracking import Assignment, DeviceRecord

__all__ = ["assign_devices"]


def assign_devices(recipe: Recipe, devices: Sequence[DeviceRecord]) -> list[Assignment]:
    """Return an assignment for each client, in the given order of the devices.

    If device classes have different settings, or settings were planned for their memory, the devices with the most
    memory are assigned to the classes with the most memory. Devices with equal memory are ordered by name.
    """
    clients, chosen = list(range(recipe.num_clients)), list(devices[: recipe.num_clients])
    if recipe.plans is not None or any(device.overridden_settings for device in recipe.devices):
        clients.sort(key=lambda client: -recipe.get_device_class(client).memory)
        chosen.sort(key=lambda device: -_memory(device))
    assignments = [
        Assignment(client=client, device_name=one.name, node_id=one.node_id)
        for client, one in zip(clients, chosen, strict=True)
    ]
    return sorted(assignments, key=lambda assignment: assignment.client)


def _memory(device: DeviceRecord) -> int:
    """Return the bytes that the device reports as allowed for its trainer."""
    memory = json.loads(device.profile).get("memory")
    return memory if isinstance(memory, int) else 0
