"""A recipe with the settings of a plan, as text."""

from typing import Any

import yaml

from fedtune.plan.plans import Plan
from fedtune.recipe.schema import Recipe

__all__ = ["apply_plan", "format_planned_recipe"]


def apply_plan(recipe: Recipe, plan: Plan) -> Recipe:
    """Return the recipe with the techniques, the precision and the batches of a plan.

    A smaller micro-batch becomes the batch size: fewer examples in each step.
    """
    return Recipe.model_validate(_write_settings(recipe, plan))


def format_planned_recipe(recipe: Recipe, plan: Plan, budget: int) -> str:
    """Return the recipe as YAML, with the prediction as a comment."""
    told = (
        f"# Planned for {budget / 1e6:.0f} MB: {plan.name}, predicted peak {plan.anonymous_bytes / 1e6:.0f} MB "
        f"anonymous and {plan.total_bytes / 1e6:.0f} MB in total.\n"
    )
    return told + yaml.safe_dump(_write_settings(recipe, plan), sort_keys=False, allow_unicode=True)


def _write_settings(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Return the settings that the recipe gives, with those of the plan."""
    settings: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True)
    train = settings.get("train", {}) | {"techniques": plan.techniques, "batch_size": plan.micro_batch}
    model = settings["model"] | {"dtype": plan.dtype}
    return settings | {"train": train, "model": model}
