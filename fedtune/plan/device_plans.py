"""The plan of one device: of those that its run allows, the best one that fits its own budget.

The choice depends on the recipe and the budget alone. A real device and a simulated one with the same budget therefore
train with the same settings. Nothing here imports torch.
"""

from collections.abc import Sequence
from typing import Any

from fedtune.errors import MemoryBudgetError
from fedtune.recipe.memory_plans import PlanOption
from fedtune.recipe.schema import Recipe

__all__ = ["apply_device_plan", "choose_device_plan", "find_plan_number", "limit_micro_batch"]


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
    return MemoryBudgetError(
        f"no plan of the run fits the {budget // 10**6} MB that this device allows; the smallest needs {needed} MB: "
        "allow that with fedtune device join --memory",
        code="memory-plan",
        counts={"needed_mb": needed, "allowed_mb": budget // 10**6},
    )


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
