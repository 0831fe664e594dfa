"""Checks that a round's number of models fits the merge."""

from fedtune import merging
from fedtune.errors import RecipeError
from fedtune.recipe.round_schedule import list_cohort_sizes
from fedtune.recipe.schema import Recipe

__all__ = ["check_model_counts"]


def check_model_counts(recipe: Recipe, pipeline: merging.MergePipeline) -> None:
    """Raise RecipeError when a round has fewer models than the merge needs, or more than it accepts."""
    combine, late = pipeline.combine, recipe.federation.asynchronous
    sizes, key = list_cohort_sizes(recipe), "federation.clients_per_round"
    if recipe.federation.take_first is not None:
        sizes, key = [recipe.federation.take_first], "federation.take_first"
    if late is not None:
        sizes, key = [late.buffer_size], "federation.asynchronous.buffer_size"
    if min(sizes) < combine.required_models:
        raise RecipeError(
            f"merge: {combine.name} needs at least {combine.required_models} models, but a round brings {min(sizes)} "
            f"at most; raise {key}, add devices or choose mean"
        )
    if combine.max_models is not None and max(sizes) > combine.max_models:
        raise RecipeError(
            f"merge: {combine.name} takes {combine.max_models} models, but a round asks for {max(sizes)}; "
            f"lower {key} or choose mean"
        )
