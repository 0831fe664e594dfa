"""A recipe made whole: every technique and merge step checked, with all its settings written out."""

from collections.abc import Sequence

from fedtune import merging, techniques
from fedtune.recipe import Recipe, Unit
from fedtune.registry import Named

__all__ = ["resolve"]


def resolve(recipe: Recipe) -> Recipe:
    """The recipe as it is stored with a run; RecipeError for techniques or merge steps that do not hold."""
    chosen = techniques.choose(recipe.train.techniques)
    train = recipe.train.model_copy(update={"techniques": _written_out(chosen)})
    merge = _written_out(merging.choose(recipe.merge).steps)
    return recipe.model_copy(update={"train": train, "merge": merge})


def _written_out(units: Sequence[Named]) -> list[Unit]:
    return [Unit(name=unit.name, settings=unit.model_dump(mode="json")) for unit in units]
