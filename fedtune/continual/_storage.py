"""How much a device may store of earlier tasks, by the recipe."""

from collections.abc import Sequence

from fedtune.continual._method import ContinualMethod
from fedtune.errors import RecipeError
from fedtune.recipe.schema import DeviceClass, Recipe

__all__ = ["HEADER_BYTES", "check_storage", "find_content_limit", "find_storage_budget"]

HEADER_BYTES = 2048
"""Room in a file for its header and, where it is encrypted, for nonce and tag."""


def find_storage_budget(recipe: Recipe, device: DeviceClass) -> int | None:
    """Return the bytes that a device may store for a run; None for no limit."""
    assert recipe.stream is not None
    budget = recipe.stream.own_memory.budget if device.storage is None else device.storage
    return None if budget is None else int(budget)


def find_content_limit(recipe: Recipe, client: int) -> int | None:
    """Return the most bytes of all tensors that a client stores of a task; None for no limit.

    The file of an earlier task and that of this one share the budget.
    """
    budget = find_storage_budget(recipe, recipe.get_device_class(client))
    return None if budget is None else max(0, budget // 2 - HEADER_BYTES)


def check_storage(recipe: Recipe, methods: Sequence[ContinualMethod]) -> None:
    """Raise RecipeError if the methods are set to store more than a device may."""
    wanted = sum(method.count_stored_bytes() for method in methods)
    for device in recipe.devices if wanted else []:
        budget = find_storage_budget(recipe, device)
        needed = 2 * (wanted + HEADER_BYTES)
        if budget is not None and needed > budget:
            names = "+".join(method.name for method in methods if method.count_stored_bytes())
            where = "stream.own_memory.budget" if device.storage is None else f"devices: the storage of {device.name}"
            raise RecipeError(
                f"{where} is {budget} bytes, but {names} stores {wanted} in each of two files, which take {needed}; "
                "raise it, or lower bytes"
            )
