"""The plan of one device: of those that its run allows, the best one that fits its own budget.

The choice depends on the recipe and the budget alone. A real device and a simulated one with the same budget therefore
train with the same settings. Nothing here imports torch.
"""

from collections.abc import Sequence
from typing import Any

from fedtune.errors import MemoryBudgetError
from fedtune.recipe.memory_plans import PlanOption
from fedtune.recipe.schema import Recipe
from fedtune.wire.protocol_codes import Problem

__all__ = [
    "apply_device_plan",
    "choose_device_plan",
    "describe_device_plan",
    "describe_plans",
    "find_plan_number",
    "limit_micro_batch",
]


def choose_device_plan(recipe: Recipe, client: int, budget: int) -> PlanOption | None:
    """Return the plan of a client's device with ``budget`` bytes; None if the recipe has no plans.

    Raise MemoryBudgetError if no plan fits.
    """
    if recipe.plans is None:
        return None
    device_class = recipe.get_device_class(client)
    factor = recipe.plans.get_correction(device_class.name)
    batch = recipe.apply_device_class(device_class).train.batch_size
    options = [option for option in recipe.plans.options if option.micro_batch <= batch] or recipe.plans.options
    fitting = [option for option in options if option.correct_bytes(factor) <= budget]
    if not fitting:
        raise _explain_shortage(options, factor, budget)
    return min(fitting, key=lambda option: _rank(option, factor))


def _rank(option: PlanOption, factor: float) -> tuple[Any, ...]:
    return not option.exact_gradients, option.relative_time, option.correct_bytes(factor)


def _explain_shortage(options: Sequence[PlanOption], factor: float, budget: int) -> MemoryBudgetError:
    needed = -(-min(option.correct_bytes(factor) for option in options) // 10**6)
    problem = Problem("memory-plan", {"needed_mb": needed, "allowed_mb": budget // 10**6})
    return MemoryBudgetError(problem.sentence, code=problem.code, counts=problem.counts)


def apply_device_plan(recipe: Recipe, client: int, budget: int) -> Recipe:
    """Return the recipe of a client's device, with the techniques of its plan. The batch size is that of its class."""
    plan, own = choose_device_plan(recipe, client, budget), recipe.get_client_recipe(client)
    if plan is None:
        return own
    return own.model_copy(update={"train": own.train.model_copy(update={"techniques": plan.techniques})})


def limit_micro_batch(recipe: Recipe, client: int, budget: int, micro: int | None) -> int | None:
    """Return the size of micro-batches for ``micro`` that was estimated: at most that of the device's plan.

    None stands for whole batches.
    """
    plan, batch = choose_device_plan(recipe, client, budget), recipe.get_client_recipe(client).train.batch_size
    if plan is None or plan.micro_batch >= batch:
        return micro
    return min(plan.micro_batch, micro or batch)


def find_plan_number(recipe: Recipe, micro: int | None) -> int | None:
    """Return the place of the plan that a client trained with, None if the recipe has none of these settings.

    ``recipe`` is the client's; ``micro`` is None if whole batches fitted.
    """
    if recipe.plans is None:
        return None
    wanted = recipe.train.techniques, micro or recipe.train.batch_size
    found = (
        number
        for number, option in enumerate(recipe.plans.options)
        if (option.techniques, option.micro_batch) == wanted
    )
    return next(found, None)


def describe_plans(recipe: Recipe) -> list[str]:
    """Return a sentence about the plan of each device class; none if the recipe has no plans."""
    first, found = 0, []
    for device in recipe.devices:
        if (sentence := describe_device_plan(recipe, first, int(device.memory))) is not None:
            found.append(f"techniques of {device.name}: {sentence}")
        first += device.count
    return found


def describe_device_plan(recipe: Recipe, client: int, budget: int) -> str | None:
    """Name the settings and the predicted memory of a device's plan; None if the recipe has no plans."""
    plan = choose_device_plan(recipe, client, budget)
    if plan is None or recipe.plans is None:
        return None
    factor = recipe.plans.get_correction(recipe.get_device_class(client).name)
    learned = f", {factor - 1:.0%} more than predicted as in earlier runs" if factor != 1 else ""
    return (
        f"{'+'.join(unit.name for unit in plan.techniques)} with micro-batches of {plan.micro_batch}, predicted peak "
        f"{plan.anonymous_bytes * factor / 1e6:.0f} MB anonymous{learned}"
    )
