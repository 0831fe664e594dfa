"""What a model and its techniques would send that clipping and noise do not cover."""

from collections.abc import Sequence

from torch import nn

from fedtune import techniques
from fedtune.errors import RecipeError
from fedtune.recipe import Recipe
from fedtune.techniques import Technique

__all__ = ["require_private"]


def require_private(recipe: Recipe, model: nn.Module, chosen: Sequence[Technique], shared: Sequence[str]) -> None:
    """RecipeError when a recipe asks for privacy and clients would send more than deltas of weights."""
    if recipe.privacy is None:
        return
    statistics = [name for name in shared if name.endswith((".running_mean", ".running_var"))]
    if statistics:
        raise RecipeError(
            f"privacy: {'+'.join(one.name for one in chosen)} trains {statistics[0]}, a batch norm's statistic, which "
            "noise could make negative and whose pooling has no bound; train bias, norm or an adapter instead"
        )
    for technique in chosen:
        if any(techniques.asked([technique], model, number) for number in range(1, recipe.federation.rounds + 1)):
            raise RecipeError(
                f"privacy: with {technique.name} clients send more than deltas, which neither clip nor noise covers; "
                "drop one of the two"
            )
