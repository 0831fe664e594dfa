"""The recipe that a run was recorded with."""

from pydantic import ValidationError

from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.recipe.validation_errors import explain_validation_error

__all__ = ["parse_recorded_recipe"]


def parse_recorded_recipe(text: str, run_id: str) -> Recipe:
    """Return the recipe from its JSON text; RecipeError if this version of fedtune does not understand it."""
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        sentence = explain_validation_error(error, Recipe, f"the recipe of run {run_id}")
        raise RecipeError(f"{sentence}; use the version of fedtune that recorded the run, or a later one") from error
