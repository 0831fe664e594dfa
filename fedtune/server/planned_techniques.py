"""``techniques: auto`` of a recipe before its run exists, the same for ``fedtune simulate`` and for a server."""

from fedtune.plan.auto_techniques import plan_auto_techniques
from fedtune.plan.corrections import learn_corrections
from fedtune.plan.device_plans import choose_device_plan
from fedtune.recipe.memory_plans import PlanOption
from fedtune.recipe.schema import Recipe
from fedtune.tracking import Store

__all__ = ["describe_plans", "plan_techniques"]

_TRAINER = ("fedtune.device.trainer",)
"""What a device's training process imports."""


def plan_techniques(recipe: Recipe, store: Store) -> Recipe:
    """Return the recipe with a plan for each device class, corrected by what earlier runs in the store taught."""
    planned, _ = plan_auto_techniques(recipe, _TRAINER, learn_corrections(store.predictions.list_errors()))
    return planned


def describe_plans(recipe: Recipe) -> list[str]:
    """Return a sentence about the plan of each device class; none if the recipe has no plans."""
    found: list[str] = []
    first = 0
    for device in recipe.devices:
        plan = choose_device_plan(recipe, first, int(device.memory))
        if plan is not None and recipe.plans is not None:
            found.append(_describe_plan(device.name, plan, recipe.plans.get_correction(device.name)))
        first += device.count
    return found


def _describe_plan(name: str, plan: PlanOption, correction: float) -> str:
    techniques = "+".join(unit.name for unit in plan.techniques)
    learned = f", {correction - 1:.0%} more than predicted as in earlier runs" if correction != 1 else ""
    return (
        f"techniques of {name}: {techniques} with micro-batches of {plan.micro_batch}, predicted peak "
        f"{plan.anonymous_bytes * correction / 1e6:.0f} MB anonymous{learned}"
    )
