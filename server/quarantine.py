"""Devices whose updates are refused again and again are asked no more until an operator releases them.

What counts is a row of refusals within a run; an update that could be used ends the row. A device that was released is
on probation: until then one more refusal is enough. Errors, silence and declined
orders are no fault of this kind. A simulation has no devices, and so no quarantine.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from fedtune.tracking import Access, ContributionRecord, RoundRecord, Seat

__all__ = ["REFUSALS", "Quarantine"]

REFUSALS = 3
"""So many updates refused in a row, and a device is quarantined."""


class Quarantine:
    """The devices of one run; ``done`` are its committed rounds."""

    def __init__(self, access: Access, seats: Sequence[Seat], done: Sequence[RoundRecord]) -> None:
        self._access = access
        self._devices = {seat.client: seat.device for seat in seats}
        self._refused: Counter[int] = Counter()
        for record in done:
            self._count(record.contributions)

    def judge(self, records: Sequence[ContributionRecord]) -> None:
        """Quarantine the devices that a committed round made the last drop for."""
        for record in self._count(records):
            if record.client in self._devices and self._refused[record.client] >= REFUSALS:
                self._access.quarantine(self._devices[record.client], f"{REFUSALS} refused in a row: {record.reason}")

    def _count(self, records: Sequence[ContributionRecord]) -> list[ContributionRecord]:
        """Go on with the rows; the records that lengthen one."""
        for record in records:
            if record.status in ("merged", "unused"):
                self._refused[record.client] = 0
        refused = [record for record in records if record.status == "refused"]
        self._refused.update(record.client for record in refused)
        return refused

    def clients(self) -> set[int]:
        """The clients whose devices are quarantined now, by whichever run."""
        if not self._devices:
            return set()
        out = {device.name for device in self._access.devices() if device.quarantined}
        return {client for client, name in self._devices.items() if name in out}

    def names(self, clients: Collection[int]) -> list[str]:
        """What the devices of clients are called."""
        return sorted(self._devices[client] for client in clients)
