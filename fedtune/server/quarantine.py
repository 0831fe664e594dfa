"""Devices whose updates are refused again and again are asked no more until an operator releases them.

What counts is a row of refusals within a run; an update that could be used ends the row. A device that was released is
on probation: until then one more refusal is enough. Errors, silence and declined orders are no fault of this kind. A
simulation has no devices, and so no quarantine. Whom a round may ask is for the roster to say.
"""

from collections import Counter
from collections.abc import Sequence

from fedtune.tracking import Access, ClientRecord, RoundRecord

__all__ = ["REFUSALS", "Quarantine"]

REFUSALS = 3
"""So many updates rejected in a row, and a device is quarantined."""


class Quarantine:
    """The devices of one run; ``done`` are its committed rounds."""

    def __init__(self, access: Access, run: str, done: Sequence[RoundRecord]) -> None:
        self._access, self._run = access, run
        self._refused: Counter[int] = Counter()
        for record in done:
            self._count(record.client_records)

    def judge(self, records: Sequence[ClientRecord]) -> None:
        """Quarantine the devices for which a committed round made the last drop."""
        faulty = [record for record in self._count(records) if self._refused[record.client] >= REFUSALS]
        devices = (
            {assignment.client: assignment.device_name for assignment in self._access.list_assignments(self._run)}
            if faulty
            else {}
        )
        for record in faulty:
            if record.client in devices:
                self._access.quarantine_device(devices[record.client], f"{REFUSALS} rejected in a row: {record.reason}")

    def _count(self, records: Sequence[ClientRecord]) -> list[ClientRecord]:
        """Go on with the rows; the records that lengthen one."""
        for record in records:
            if record.status in ("merged", "unused"):
                self._refused[record.client] = 0
        refused = [record for record in records if record.status == "rejected"]
        self._refused.update(record.client for record in refused)
        return refused
