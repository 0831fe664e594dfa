"""Marks the trained tensors of a model that the recipe's algorithm keeps on the devices."""

from collections.abc import Sequence

from torch import nn

from fedtune import merging, techniques
from fedtune.algorithms import find_algorithm
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.techniques import Technique

__all__ = ["find_keeping_unit", "mark_kept_tensors"]


def find_keeping_unit(recipe: Recipe, chosen: Sequence[Technique]) -> str | None:
    """Return the name of a technique or algorithm that leaves the server no whole model; None if there is none."""
    algorithm = find_algorithm(recipe)
    if algorithm is not None and algorithm.keeps_tensors:
        return algorithm.name
    return next((technique.name for technique in chosen if technique.has_local_tensors()), None)


def mark_kept_tensors(
    recipe: Recipe, model: nn.Module, chosen: Sequence[Technique], shared: Sequence[str]
) -> list[str]:
    """Mark in the model what stays on the devices, and return the others of the ``shared`` tensors.

    Raise ModelError if what the algorithm keeps is nothing or everything, and RecipeError if the merge needs it.
    """
    algorithm = find_algorithm(recipe)
    if algorithm is None or not algorithm.keeps_tensors:
        return list(shared)
    pairs = techniques.list_low_rank_pairs(chosen, model)
    kept = algorithm.select_kept(model, shared, pairs)
    combine = merging.build_pipeline(recipe.merge).combine
    factors = {*kept} & {name for pair in pairs for name in (pair.left, pair.right)}
    if factors and combine.update_kind != "tensors":
        raise RecipeError(
            f"federation.algorithm: {algorithm.name} keeps {min(factors)}, but merge: {combine.name} wants whole "
            "pairs; train one factor per round and merge by mean"
        )
    techniques.keep_tensors(model, kept)
    _require_shared(algorithm.name, model, chosen)
    return [name for name in shared if name not in set(kept)]


def _require_shared(name: str, model: nn.Module, chosen: Sequence[Technique]) -> None:
    """Raise ModelError if clients would send nothing in a round. The model is then ready for round 1."""
    for number in (2, 1):
        techniques.begin_round(chosen, model, number)
        if not techniques.list_trainable_tensors(model):
            raise ModelError(
                f"federation.algorithm: {name} keeps all that a round such as round {number} trains, so that clients "
                "would send nothing in it; keep less, or train more in each round"
            )
