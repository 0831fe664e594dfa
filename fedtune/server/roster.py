"""Track which devices of a run are enrolled, because devices may be removed and enrolled again while it is running.

A device that enrols again under its name continues as the same client. Rounds never select removed devices. If too few
devices are enrolled or connected for the quorum, the run waits and explains what to do. Otherwise rounds would fail
immediately, because Flower replies with an error at once for an offline device.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from flwr.serverapp import Grid

from fedtune.recipe.schema import Recipe
from fedtune.server.run_clients import RunClients, wait_for_clients
from fedtune.server.scheduling.round_scheduler import RoundScheduler
from fedtune.tracking import Assignment, Store

__all__ = ["Roster"]

_LOOK_SECONDS = 1.0
_NAMED = 5


class Roster:
    """The devices of ``run``. A simulation has none, and all of its clients are available."""

    def __init__(self, store: Store, run: str, recipe: Recipe, grid: Grid) -> None:
        self._store, self._run, self._recipe, self._grid = store, run, recipe, grid
        self._quorum = recipe.federation.quorum
        self.has_devices = bool(store.access.list_assignments(run))

    def assemble(self) -> RunClients:
        """Return the clients as soon as enough of their devices are enrolled and connected."""
        if self.has_devices:
            self.wait()
        return wait_for_clients(
            self._grid,
            self._recipe,
            self._list_assignments(),
            removed=self.list_removed_clients if self.has_devices else tuple,
        )

    def list_removed_clients(self) -> list[int]:
        """Return the clients whose device is not enrolled now."""
        there = {(device.name, device.node_id) for device in self._store.access.list_devices()}
        return [
            assignment.client
            for assignment in self._list_assignments()
            if (assignment.device_name, assignment.node_id) not in there
        ]

    def _quarantined(self) -> set[int]:
        """Return the clients whose device gets no train requests until an operator releases it."""
        out = {device.name for device in self._store.access.list_devices() if device.quarantine_reason}
        return {assignment.client for assignment in self._list_assignments() if assignment.device_name in out}

    def wait(self) -> list[Assignment]:
        """Return the assignments of eligible devices, as soon as enough are connected for a round."""
        said: str | None = None
        while True:
            assignments, removed, out = self._list_assignments(), set(self.list_removed_clients()), self._quarantined()
            there = [assignment for assignment in assignments if assignment.client not in removed | out]
            gone = [assignment for assignment in assignments if assignment.client in removed]
            lacking = self._lacking(
                there, gone, [assignment for assignment in assignments if assignment.client in out - removed]
            )
            if lacking != said:
                self._store.set_run_reason(self._run, lacking or "")
            if lacking is None:
                return there
            said = lacking
            time.sleep(_LOOK_SECONDS)

    def refresh_devices(self, clients: RunClients, scheduler: RoundScheduler) -> RunClients:
        """Return the clients with their current devices, and pass the eligible clients to the scheduler."""
        if not self.has_devices:
            return clients
        there = self.wait()
        nodes = [int(assignment.node_id) for assignment in self._list_assignments()]
        moved = {client for client, node in enumerate(nodes) if node != clients.node_ids[client]}
        eligible = [assignment.client for assignment in there]
        scheduler.admit(eligible, moved)
        return replace(clients, node_ids=nodes, eligible=eligible)

    def _list_assignments(self) -> list[Assignment]:
        return self._store.access.list_assignments(self._run)

    def _lacking(
        self, there: Sequence[Assignment], gone: Sequence[Assignment], quarantined: Sequence[Assignment]
    ) -> str | None:
        """Return why no round can succeed now, and how to fix it; None if a round can succeed."""
        if len(there) < self._quorum and quarantined:
            return (
                f"waits: {_names(quarantined, 'is', 'are')} quarantined, and too few devices are left for "
                f"federation.quorum {self._quorum}; see fedtune server devices, fix the cause, then run fedtune server "
                f"release {quarantined[0].device_name}"
            )
        if len(there) < self._quorum:
            return (
                f"waits: {_names(gone, 'was', 'were')} removed, and too few devices are left for federation.quorum "
                f"{self._quorum}; enrol again under the same name (fedtune server create-token {gone[0].device_name}), "
                "or stop the run and submit it with a lower quorum"
            )
        connected = set(self._grid.get_node_ids())
        away = [assignment for assignment in there if int(assignment.node_id) not in connected]
        if len(there) - len(away) < self._quorum:
            return f"waits for devices: {_names(away, 'is', 'are')} away, and federation.quorum is {self._quorum}"
        return None


def _names(assignments: Sequence[Assignment], one: str, many: str) -> str:
    """Return the names of some devices, followed by the verb in singular or plural."""
    names = ", ".join(assignment.device_name for assignment in assignments[:_NAMED]) + (
        ", ..." if len(assignments) > _NAMED else ""
    )
    return f"{names} {one if len(assignments) == 1 else many}"
