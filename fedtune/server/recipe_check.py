"""The check of a recipe before its run exists, the same for ``fedtune simulate`` and for a server that is sent one.

Two questions concern only one of them and are asked there. Whether the data can be partitioned and enough device
classes qualify matters to a simulation; devices bring their own examples, and a server counts the enrolled ones.
"""

from fedtune.recipe.schema import Recipe
from fedtune.server.planned_techniques import plan_techniques
from fedtune.server.privacy_accounting import require_privacy_accountant
from fedtune.training import RunContext, clear_run_context, get_run_context
from fedtune.training.generation import require_answer_room
from fedtune.training.resolve import resolve_recipe

__all__ = ["build_run_context", "check_recipe", "check_recipe_settings"]


def check_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with every setting written out; raise FedtuneError if the server could not run it.

    ``techniques: auto`` becomes plans. Model and data are loaded for the check and released after it.
    """
    checked = check_recipe_settings(plan_techniques(recipe))
    try:
        build_run_context(checked)
    finally:
        clear_run_context()
    return checked


def check_recipe_settings(recipe: Recipe) -> Recipe:
    """Return the recipe with every setting written out; raise RecipeError if settings contradict each other."""
    checked = resolve_recipe(recipe)
    require_privacy_accountant(checked)
    return checked


def build_run_context(recipe: Recipe) -> RunContext:
    """Load the model and the data that the server scores; raise FedtuneError if they do not fit the recipe."""
    context = get_run_context(recipe.model_dump_json())
    _ = context.validation, context.test, context.prompts
    if context.evaluated_model.must_generate:
        context.task.require_answers(context.corpus.train)
        require_answer_room(context.model, (context.validation, context.test), context.recipe.evaluation.generation)
    return context
