"""Who of a deployed run's devices is enrolled while it goes on: some are removed, and some are enrolled again.

A device that is enrolled again under its name takes the place it had. Rounds ask nobody who was removed; where too few
are enrolled or connected for a round's quorum, the run waits and says what to do, so that no round is spent on what
cannot succeed: Flower answers at once for a device that is away.
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
    """The places of ``run``; a simulation has none, and all its clients are there."""

    def __init__(self, store: Store, run: str, recipe: Recipe, grid: Grid) -> None:
        self._store, self._run, self._recipe, self._grid = store, run, recipe, grid
        self._quorum = recipe.federation.quorum
        self.seated = bool(store.access.list_assignments(run))

    def assemble(self) -> RunClients:
        """The crew, as soon as enough of it are enrolled and connected."""
        if self.seated:
            self.wait()
        return wait_for_clients(
            self._grid, self._recipe, self._seats(), removed=self.list_removed_clients if self.seated else tuple
        )

    def list_removed_clients(self) -> list[int]:
        """The clients whose device is not enrolled now."""
        there = {(device.name, device.node) for device in self._store.access.devices()}
        return [seat.client for seat in self._seats() if (seat.device, seat.node) not in there]

    def _quarantined(self) -> set[int]:
        """The clients whose device gets no orders until an operator releases it."""
        out = {device.name for device in self._store.access.devices() if device.quarantined}
        return {seat.client for seat in self._seats() if seat.device in out}

    def wait(self) -> list[Assignment]:
        """All seats whose device may be asked, as soon as enough of those are connected for a round."""
        said = ""
        while True:
            seats, removed, out = self._seats(), set(self.list_removed_clients()), self._quarantined()
            there = [seat for seat in seats if seat.client not in removed | out]
            gone = [seat for seat in seats if seat.client in removed]
            lacking = self._lacking(there, gone, [seat for seat in seats if seat.client in out - removed])
            if lacking != said:
                self._store.set_run_reason(self._run, lacking)
            if not lacking:
                return there
            said = lacking
            time.sleep(_LOOK_SECONDS)

    def refresh_devices(self, crew: RunClients, asking: RoundScheduler) -> RunClients:
        """The crew with the devices as they are enrolled now; ``asking`` hears whom the next round may ask."""
        if not self.seated:
            return crew
        there = self.wait()
        nodes = [int(seat.node) for seat in self._seats()]
        moved = {client for client, node in enumerate(nodes) if node != crew.node_ids[client]}
        eligible = [seat.client for seat in there]
        asking.admit(eligible, moved)
        return replace(crew, node_ids=nodes, eligible=eligible)

    def _seats(self) -> list[Assignment]:
        return self._store.access.list_assignments(self._run)

    def _lacking(
        self, there: Sequence[Assignment], gone: Sequence[Assignment], quarantined: Sequence[Assignment]
    ) -> str:
        """Why no round can succeed now, and the mend; nothing when one can."""
        if len(there) < self._quorum and quarantined:
            return (
                f"waits: {_names(quarantined, 'is', 'are')} quarantined, and too few devices are left for "
                f"federation.quorum {self._quorum}; see fedtune server devices, mend it, then fedtune server release "
                f"{quarantined[0].device}"
            )
        if len(there) < self._quorum:
            return (
                f"waits: {_names(gone, 'was', 'were')} removed, and too few devices are left for federation.quorum "
                f"{self._quorum}; enrol again under the same name (fedtune server create-token {gone[0].device}), or "
                "stop the run and submit it with a lower quorum"
            )
        connected = set(self._grid.get_node_ids())
        away = [seat for seat in there if int(seat.node) not in connected]
        if len(there) - len(away) < self._quorum:
            return f"waits for devices: {_names(away, 'is', 'are')} away, and federation.quorum is {self._quorum}"
        return ""


def _names(seats: Sequence[Assignment], one: str, many: str) -> str:
    """Some of the devices and the verb for one of them or for many."""
    names = ", ".join(seat.device for seat in seats[:_NAMED]) + (", ..." if len(seats) > _NAMED else "")
    return f"{names} {one if len(seats) == 1 else many}"
