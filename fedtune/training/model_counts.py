"""Checks that a round's number of models fits the merge."""

from fedtune import merging
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe

__all__ = ["check_model_counts"]


def check_model_counts(recipe: Recipe, pipeline: merging.MergePipeline) -> None:
    """Raise RecipeError when a round has fewer models than the merge needs, or more than it accepts."""
    combine, late = pipeline.combine, recipe.federation.asynchronous
    coming, key = recipe.cohort_size, "federation.clients_per_round"
    if recipe.federation.take_first is not None:
        coming, key = recipe.federation.take_first, "federation.take_first"
    if late is not None:
        coming, key = late.buffer_size, "federation.asynchronous.buffer_size"
    if coming < combine.required_models:
        raise RecipeError(
            f"merge: {combine.name} needs at least {combine.required_models} models, but a round brings {coming} at "
            f"most; raise {key}, add devices or choose mean"
        )
    if combine.max_models is not None and coming > combine.max_models:
        raise RecipeError(
            f"merge: {combine.name} takes {combine.max_models} models, but a round asks for {coming}; "
            f"lower {key} or choose mean"
        )
