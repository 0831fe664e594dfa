"""One sentence about the hostile clients of a run."""

from fedtune.recipe.versions import read_stored_recipe
from fedtune.tracking import RunRecord

__all__ = ["describe_attackers"]


def describe_attackers(run: RunRecord) -> str:
    """Return how many clients of which device class attack, and how; empty if none does."""
    devices = read_stored_recipe(run.recipe).get("devices") or []
    found = [(one.get("count"), one.get("name"), *list(one["attack"])[:1]) for one in devices if one.get("attack")]
    return ", ".join(f"{count} of {name} by {attack}" for count, name, attack in found)
