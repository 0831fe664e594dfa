"""Refuse recipes in which a drift signal cannot be computed, or would reveal what privacy covers."""

from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task

__all__ = ["check_drift"]


def check_drift(recipe: Recipe) -> None:
    """Raise RecipeError if the drift signal of a stream does not fit the rest of the recipe."""
    drift = None if recipe.stream is None else recipe.stream.drift
    if recipe.stream is None or drift is None:
        return
    if recipe.privacy is not None:
        raise RecipeError(
            "stream.drift: clients send sums of features and a signal, which privacy neither clips nor noises; drop "
            "one of them"
        )
    task = get_task(recipe.task)
    if drift.signal != "plain" and task.head_problem != "single_label_classification":
        raise RecipeError(
            f"stream.drift: {drift.signal} needs one class per example, and {task.name} has none; set signal: plain"
        )
    if drift.opens and recipe.stream.arrival != "together":
        raise RecipeError(
            "stream.drift: a new task opens for all clients at once; set arrival: together, or drop opens"
        )
