"""Whether any plan of a run fits a device, asked before a trainer starts.

This module imports neither torch nor pydantic.
"""

import json
from typing import Any

from fedtune.wire.protocol_codes import Problem

__all__ = ["find_plan_shortage"]


def find_plan_shortage(recipe: object, client: object, budget: int) -> Problem | None:
    """Return what the smallest plan of the recipe needs if the device allows less; None if one fits.

    Also None for a recipe without plans, and for one that cannot be read here: the trainer says why.
    """
    try:
        settings = json.loads(str(recipe))
        plans = settings.get("plans") or {"options": []}
        factor = float(plans.get("corrections", {}).get(_find_class(settings["devices"], client), 1.0))
        needed = [_correct_bytes(option, factor) for option in plans["options"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not needed or min(needed) <= budget:
        return None
    return Problem("memory-plan", {"needed_mb": -(-min(needed) // 10**6), "allowed_mb": budget // 10**6})


def _find_class(devices: list[dict[str, Any]], client: object) -> str | None:
    """Return the name of a client's device class, as ``Recipe.get_device_class`` does."""
    left = int(str(client))
    for device in devices:
        if left < device["count"]:
            return str(device["name"])
        left -= device["count"]
    return None


def _correct_bytes(option: dict[str, Any], factor: float) -> int:
    """Return the bytes that a budget must allow, as ``PlanOption.correct_bytes`` does."""
    anonymous = int(option["anonymous_bytes"])
    return round(anonymous * factor) + int(option["needed_bytes"]) - anonymous
