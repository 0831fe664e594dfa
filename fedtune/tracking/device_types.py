"""The types of devices that the figures of a run were measured on."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fedtune.tracking.records import RoundRecord

__all__ = ["group_client_types", "join_device_types", "list_device_types", "list_server_types"]

_BEFORE = "cpu"
"""What rounds and updates that say nothing were computed on: they were recorded when there was nothing else."""


def join_device_types(types: Iterable[str | None]) -> str | None:
    """Return the types behind a figure over several clients: ``cuda``, or several joined by a plus sign: ``cpu+cuda``.

    None if the type of any of them is not known, or if there are none.
    """
    found = [one or "" for one in types]
    return "+".join(sorted(set(found))) if found and all(found) else None


def list_device_types(rounds: Sequence[RoundRecord]) -> list[str]:
    """Return every type that the server or a client computed on, in alphabetical order."""
    own = {kind for _, kind in list_server_types(rounds)}
    return sorted(own.union(*group_client_types(rounds).values()))


def list_server_types(rounds: Sequence[RoundRecord]) -> list[tuple[int, str]]:
    """Return the type that the server computed on, with the round from which on it did; a change adds an item."""
    found: list[tuple[int, str]] = []
    for record in rounds:
        kind = record.device_type or _BEFORE
        if not found or found[-1][1] != kind:
            found.append((record.number, kind))
    return found


def group_client_types(rounds: Sequence[RoundRecord]) -> Mapping[str, set[str]]:
    """Return the types that clients trained and scored on, by device class; without a class by the device's name."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, kind in _iter_client_types(rounds):
        found[name].add(kind)
    return found


def _iter_client_types(rounds: Sequence[RoundRecord]) -> Iterator[tuple[str, str]]:
    records = [one for record in rounds for one in record.client_records]
    names = {one.client: one.device_class or one.device for one in records}
    for one in records:
        if one.status in ("merged", "unused"):
            yield names[one.client], one.device_type or _BEFORE
    for score in (score for record in rounds for score in record.client_scores):
        if score.device_type is not None:
            yield names.get(score.client, "no training"), score.device_type
