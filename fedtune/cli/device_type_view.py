"""The types of devices that runs were computed on, where they differ, in a terminal."""

from collections.abc import Sequence

from fedtune.tracking import RoundRecord
from fedtune.tracking.device_types import group_client_types, list_device_types, list_server_types
from fedtune.untrusted import clean_text

__all__ = ["describe_device_types", "list_compared_types"]

Rounds = Sequence[RoundRecord]


def describe_device_types(rounds: Rounds) -> str | None:
    """Return who computed on which type of device; None if all of a run was computed on one type."""
    if len(list_device_types(rounds)) < 2:
        return None
    (_, first), *changes = list_server_types(rounds)
    server = ", ".join([f"server {first}", *(f"from round {number} on {kind}" for number, kind in changes)])
    clients = [
        f"clients ({clean_text(name)}) {'+'.join(sorted(own))}" for name, own in group_client_types(rounds).items()
    ]
    return "; ".join([server, *clients])


def list_compared_types(compared: Sequence[Rounds]) -> list[str]:
    """Return the types of each run, as in ``cpu+cuda``; none if all runs were computed on one type."""
    found = ["+".join(list_device_types(rounds)) for rounds in compared]
    return found if len(set(found)) > 1 or any("+" in one for one in found) else []
