"""Checks that the rest of a recipe leaves an algorithm what it computes with."""

from collections.abc import Sequence

from fedtune.algorithms._algorithm import Algorithm
from fedtune.algorithms._personal_checks import find_personal_problem
from fedtune.errors import RecipeError
from fedtune.merging import MergePipeline
from fedtune.recipe.schema import Recipe
from fedtune.techniques import Technique

__all__ = ["check_algorithm"]


def check_algorithm(algorithm: Algorithm, recipe: Recipe, chosen: Sequence[Technique], pipeline: MergePipeline) -> None:
    """Raise RecipeError if the algorithm does not hold with the recipe's other settings."""
    problem = (
        _find_optimiser_problem(algorithm, recipe)
        or _find_federation_problem(algorithm, recipe)
        or (_find_loss_problem(recipe, chosen, pipeline) if algorithm.fits_one_loss else None)
        or find_personal_problem(algorithm, recipe, chosen, pipeline)
    )
    if problem is not None:
        raise RecipeError(f"federation.algorithm: {algorithm.name} {problem}")
    algorithm.check(recipe, pipeline)


def _find_optimiser_problem(algorithm: Algorithm, recipe: Recipe) -> str | None:
    optimiser = recipe.train.optimiser
    if algorithm.needs_sgd and optimiser not in ("sgd", "lomo"):
        return f"computes with the steps of SGD, but train.optimiser is {optimiser}; set train.optimiser: sgd"
    if algorithm.changes_gradients and optimiser == "lomo":
        return "corrects gradients, which lomo applies before they are all known; set train.optimiser: sgd"
    return None


def _find_federation_problem(algorithm: Algorithm, recipe: Recipe) -> str | None:
    if algorithm.sends_more and recipe.privacy is not None:
        return "uses more of clients than the deltas that privacy clips and noises; take fedprox, or drop one"
    if algorithm.needs_one_start and recipe.federation.asynchronous is not None:
        return (
            "needs updates that all began with one state, but federation.asynchronous merges late ones; drop one, or "
            "take fedprox"
        )
    return None


def _find_loss_problem(recipe: Recipe, chosen: Sequence[Technique], pipeline: MergePipeline) -> str | None:
    apart = [device.name for device in recipe.devices if device.techniques is not None]
    if apart:
        return (
            f"adds up gradients of all clients, but {apart[0]} has techniques of its own and trains other tensors; let "
            "all devices train alike, or take fedprox"
        )
    renewing = [one for one in chosen if one.renewed_tensors is not None]
    if renewing:
        return f"carries gradients from round to round past {renewing[0].name}, {renewing[0].renewed_tensors}; drop one"
    if recipe.stream is not None:
        return "carries gradients of one loss, and each task of a stream has another; drop one, or take fedprox"
    if not pipeline.keeps_entries:
        return (
            f"carries gradients, but {pipeline.combine.name} makes other factors each round; merge by fedit, "
            "or train one factor and merge by mean"
        )
    return None
