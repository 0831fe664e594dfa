"""The hostile clients of a run in words."""

from fedtune.recipe.versions import read_stored_recipe
from fedtune.tracking import ClientRecord, RunRecord

__all__ = ["describe_attackers", "is_mere_attack"]


def describe_attackers(run: RunRecord) -> str:
    """Return how many clients of which device class attack, and how; empty if none does."""
    devices = read_stored_recipe(run.recipe).get("devices") or []
    found = [(one.get("count"), one.get("name"), *list(one["attack"])[:1]) for one in devices if one.get("attack")]
    return ", ".join(f"{count} of {name} by {attack}" for count, name, attack in found)


def is_mere_attack(record: ClientRecord) -> bool:
    """Whether an attack is all that is to say of a client in a round: its update was merged as it came."""
    return record.status == "merged" and record.reason.startswith("attack: ") and ";" not in record.reason
