"""Whether a recipe can be trained on a model of plain blocks."""

from collections.abc import Sequence

from fedtune.recipe.schema import Recipe
from fedtune.techniques import Technique

__all__ = ["find_blocks_problem"]


def find_blocks_problem(recipe: Recipe, chosen: Sequence[Technique]) -> str | None:
    """Return why a recipe needs transformers' classes, as the end of a sentence; None if it does not."""
    if recipe.stream is not None:
        return "the methods of a stream were not made for plain blocks"
    others = [technique.name for technique in chosen if not technique.fits_plain_blocks]
    return f"{others[0]} was not made for plain blocks" if others else None
