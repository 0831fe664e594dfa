"""Algorithms correct what clients train, or what their updates count in a merge. Each algorithm is one file.

A recipe names one as ``federation.algorithm``; without any, a federation is FedAvg with the recipe's merge.
"""

from collections.abc import Mapping

from torch import Tensor

from fedtune.algorithms._algorithm import (
    Algorithm,
    AlgorithmRound,
    AlgorithmSetup,
    MergedUpdates,
    RoundEnd,
    ServerResult,
    Weighing,
)
from fedtune.algorithms._checks import check_algorithm
from fedtune.algorithms._personal_model import PersonalModel
from fedtune.recipe.schema import Recipe
from fedtune.recipe.unit_registry import build_unit

__all__ = [
    "Algorithm",
    "AlgorithmRound",
    "AlgorithmSetup",
    "MergedUpdates",
    "PersonalModel",
    "RoundEnd",
    "ServerResult",
    "Weighing",
    "check_algorithm",
    "count_copies",
    "find_algorithm",
    "name_tensors",
    "select_tensors",
]


def find_algorithm(recipe: Recipe) -> Algorithm | None:
    """Return the algorithm of a recipe, None without one; RecipeError for an unknown name or wrong settings."""
    unit = recipe.federation.algorithm
    if unit is None:
        return None
    found: Algorithm = build_unit(__name__, unit, "federation.algorithm")
    return found


def name_tensors(algorithm: Algorithm, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an algorithm's tensors under names that belong to it."""
    return {f"{algorithm.name}/{name}": tensor for name, tensor in tensors.items()}


def select_tensors(algorithm: Algorithm, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``name_tensors``: return the algorithm's own tensors among others."""
    prefix = f"{algorithm.name}/"
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


def count_copies(recipe: Recipe) -> int:
    """Return how many copies of what is trained the recipe's algorithm holds while a client trains."""
    algorithm = find_algorithm(recipe)
    return 0 if algorithm is None else algorithm.copies
