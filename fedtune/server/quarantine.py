"""Devices whose updates are refused several times in a row get no train requests until an operator releases them.

Only consecutive refusals within a run count, and a usable update resets the count. A released device is on probation:
one more refusal before a usable update quarantines it again. Errors, missing replies and declined requests do not
count. A simulation has no devices and no quarantine. The roster decides which clients a round may select.
"""

from collections import Counter
from collections.abc import Sequence

from fedtune.tracking import Access, ClientRecord, RoundRecord

__all__ = ["REFUSALS", "Quarantine"]

REFUSALS = 3
"""The number of consecutive rejected updates after which a device is quarantined."""


class Quarantine:
    """The quarantine of one run's devices. ``done`` are its committed rounds."""

    def __init__(self, access: Access, run: str, done: Sequence[RoundRecord]) -> None:
        self._access, self._run = access, run
        self._refused: Counter[int] = Counter()
        for record in done:
            self._count(record.client_records)

    def judge(self, records: Sequence[ClientRecord]) -> None:
        """Quarantine the devices that reached the limit in a committed round."""
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
        """Update the counts of consecutive refusals; return the records of refused updates."""
        for record in records:
            if record.status in ("merged", "unused"):
                self._refused[record.client] = 0
        refused = [record for record in records if record.status == "rejected"]
        self._refused.update(record.client for record in refused)
        return refused
