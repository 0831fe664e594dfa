"""Refuses recipes with attacks wherever devices are real."""

from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe

__all__ = ["refuse_attacks"]


def refuse_attacks(recipe: Recipe) -> None:
    """Raise RecipeError if a device class of the recipe attacks."""
    for device in recipe.devices:
        if device.attack is not None:
            raise RecipeError(
                f"devices: {device.name} attacks by {device.attack.name}, which only simulated clients may; run the "
                "recipe with fedtune simulate, or remove the attack",
                code="attack-refused",
            )
