"""The attacks of a recipe, and checks of them."""

from typing import Any

from fedtune.attacks._attack import Attack
from fedtune.errors import RecipeError
from fedtune.recipe.device_class import DeviceClass
from fedtune.recipe.schema import Recipe
from fedtune.recipe.train_settings import Unit
from fedtune.recipe.unit_registry import build_unit

__all__ = ["build_attack", "check_attacks", "write_out_attack"]

_CLASSIFYING = ("image-classification", "text-classification", "audio-classification")


def build_attack(device: DeviceClass) -> Attack | None:
    """Return the attack of a device class; None for an honest one. RecipeError for an unknown name or setting."""
    if device.attack is None:
        return None
    attack: Attack = build_unit("fedtune.attacks", device.attack, f"devices: {device.name}: attack")
    return attack


def write_out_attack(device: DeviceClass) -> DeviceClass:
    """Return the device class with every setting of its attack."""
    attack = build_attack(device)
    if attack is None:
        return device
    settings: dict[str, Any] = attack.model_dump(mode="json")
    return device.model_copy(update={"attack": Unit(name=attack.name, settings=settings)})


def check_attacks(recipe: Recipe) -> None:
    """Raise RecipeError for an attack that does not fit the recipe."""
    for device in recipe.devices:
        attack = build_attack(device)
        if attack is None or not attack.changes_labels:
            continue
        if recipe.task.name not in _CLASSIFYING:
            raise RecipeError(
                f"devices: {device.name}: {attack.name} changes classes, and {recipe.task.name} has none for each "
                "example; choose sign-flip, or a task that classifies"
            )
        if recipe.stream is not None:
            raise RecipeError(
                f"devices: {device.name}: {attack.name} changes classes, which a stream gives to its tasks; choose "
                "sign-flip, or drop the stream"
            )
