"""The clients of a run: all nodes of a simulation, or the devices that were assigned at its start."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from flwr.serverapp import Grid

from fedtune.errors import RunError
from fedtune.flower.guarded_grid import GuardedGrid
from fedtune.recipe.schema import Recipe
from fedtune.server.client_device import ClientDevice
from fedtune.server.scheduling.round_scheduler import DEVICE_REMOVED
from fedtune.server.selection import list_eligible_clients
from fedtune.tracking import Assignment

__all__ = ["RunClients", "wait_for_clients"]

_PATIENCE = 120.0
"""Seconds to wait for enough devices for a round."""
_PATIENCE_FOR_ALL = 30.0
"""Seconds after which a round may start without devices that are offline."""
_LOOK_SECONDS = 0.2
_REMOTE_POLL_SECONDS = 0.2


def _any_size(most: int) -> None:
    """Do nothing: a grid inside this process has replies in memory already, and their size is checked later."""


@dataclass(frozen=True)
class RunClients:
    """The node and the device of each client, by number. ``poll`` is the number of seconds between polls for replies.

    With ``shares_disk``, clients are processes of a simulation and read the server's files. With ``deployed``, they are
    devices. ``expect`` is called with the largest number of bytes of a reply.
    """

    node_ids: Sequence[int]
    devices: Sequence[ClientDevice]
    poll: float = 0.01
    shares_disk: bool = False
    removed: Callable[[], Collection[int]] = tuple
    """Returns the clients whose device is removed now. Called if replies are missing."""
    deployed: bool = False
    eligible: Sequence[int] = ()
    """The clients that may be selected. In a simulation, the recipe decides; devices must be neither removed nor
    quarantined.
    """
    expect: Callable[[int], None] = _any_size

    def explain_missing_clients(self, silent: Mapping[int, str]) -> dict[int, str]:
        """Return why clients are missing, by client. For a removed device, this is the reason."""
        gone = set(self.removed()) if silent else set()
        return {client: DEVICE_REMOVED if client in gone else reason for client, reason in silent.items()}


def wait_for_clients(
    grid: Grid,
    recipe: Recipe,
    assignments: Sequence[Assignment],
    patience: float = _PATIENCE,
    removed: Callable[[], Collection[int]] = tuple,
) -> RunClients:
    """Return the clients once they are connected; raise RunError if too few are after ``patience`` seconds.

    Without assignments, every node of the grid is a client. With them, offline devices join when they reconnect.
    Devices of the clients that ``removed`` returns are not waited for.
    """
    classes = [recipe.get_device_class(client).name for client in range(recipe.num_clients)]
    if not assignments:
        nodes = _wait(grid, None, recipe.num_clients, recipe.num_clients, patience)
        shares_disk = bool(getattr(grid, "shares_disk", False))
        return RunClients(
            nodes,
            [ClientDevice(name) for name in classes],
            shares_disk=shares_disk,
            eligible=list_eligible_clients(recipe),
        )
    gone = set(removed())
    wanted = {int(assignment.node_id) for assignment in assignments if assignment.client not in gone}
    _wait(grid, wanted, len(wanted), recipe.federation.quorum, patience)
    nodes = [int(assignment.node_id) for assignment in assignments]
    devices = [ClientDevice(classes[assignment.client], assignment.device_name) for assignment in assignments]
    expect = grid.expect if isinstance(grid, GuardedGrid) else _any_size
    return RunClients(nodes, devices, _REMOTE_POLL_SECONDS, removed=removed, deployed=True, expect=expect)


def _wait(grid: Grid, among: set[int] | None, wanted: int, enough: int, patience: float) -> list[int]:
    """Return sorted node ids: ``wanted`` of them, or ``enough`` after some time."""
    begun = time.monotonic()
    while True:
        found = sorted(node for node in grid.get_node_ids() if among is None or node in among)
        waited = time.monotonic() - begun
        if len(found) >= (enough if waited > min(_PATIENCE_FOR_ALL, patience) else wanted):
            return found
        if waited > patience:
            raise RunError(f"only {len(found)} of {enough} devices connected within {patience:.0f} s; start the others")
        time.sleep(_LOOK_SECONDS)
