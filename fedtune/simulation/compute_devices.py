"""Check and describe the devices that the models of a simulation compute on."""

from collections.abc import Sequence

from fedtune.accelerator import choose_device, require_device
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.tracking import RoundRecord

__all__ = ["describe_device_change", "require_devices", "suggest_accelerator", "uses_accelerator"]


def require_devices(recipe: Recipe, workers: int | None = None) -> None:
    """Raise RecipeError if a device that the recipe names is missing here, or if workers would share an accelerator."""
    for key, setting in _list_settings(recipe):
        require_device(setting, key)
    if workers is not None and workers > 1 and uses_accelerator(recipe):
        raise RecipeError(
            f"workers: {workers} processes cannot share one accelerator, where clients take turns; leave workers out, "
            "or set train.device to cpu"
        )


def uses_accelerator(recipe: Recipe) -> bool:
    """Return whether any client's model computes on an accelerator here."""
    return any(choose_device(setting).type != "cpu" for _, setting in _list_settings(recipe))


def _list_settings(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the recipe's key and value for each device that models compute on."""
    own = [(f"devices: {one.name}: device", one.device) for one in recipe.devices]
    return [("train.device", recipe.train.device), *((key, setting) for key, setting in own if setting is not None)]


def suggest_accelerator(recipe: Recipe) -> str | None:
    """Return a sentence for a machine with an accelerator that the recipe leaves idle; None otherwise."""
    found = choose_device("auto").type
    if found == "cpu" or uses_accelerator(recipe):
        return None
    return f"this machine has a {found} device, and the recipe computes on the CPU; --set train.device=auto uses it"


def describe_device_change(rounds: Sequence[RoundRecord], recipe: Recipe) -> str | None:
    """Return a sentence if a run continues on another type of device than its last round; None otherwise.

    Rounds that were recorded before the type was are of the CPU.
    """
    now = choose_device(recipe.train.device).type
    before = (rounds[-1].device_type or "cpu") if rounds else now
    if before == now:
        return None
    return (
        f"round {rounds[-1].number} was computed on {before}, and the run continues on {now}, so its bits are no "
        "longer those of a run that was left alone"
    )
