"""Checks that a recipe leaves a technique that estimates gradients the steps that it takes, and what it sends."""

from collections.abc import Sequence

from fedtune import continual, merging
from fedtune.algorithms import Algorithm
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.techniques import Technique

__all__ = ["check_zeroth_order"]


def check_zeroth_order(
    recipe: Recipe, chosen: Sequence[Technique], pipeline: merging.MergePipeline, algorithm: Algorithm | None
) -> None:
    """Raise RecipeError if a recipe needs gradients that no technique computes, or weights that no client sends."""
    name = next((one.name for one in chosen if one.estimates_gradients), None)
    if name is not None:
        _check_optimiser(recipe, name)
        _check_corrections(recipe, name, algorithm)
    sending = next((one.name for one in chosen if one.replaces_update), None)
    if sending is not None:
        _check_merge(pipeline, sending)
        _check_federation(recipe, sending, algorithm)


def _check_optimiser(recipe: Recipe, name: str) -> None:
    train = recipe.train
    if train.optimiser != "sgd":
        raise RecipeError(
            f"train.optimiser: {name} takes the steps of plain SGD along random directions, and {train.optimiser} "
            "needs gradients; set train.optimiser: sgd"
        )
    unfit = {
        "momentum": train.momentum > 0,
        "weight_decay": train.weight_decay > 0,
        "max_grad_norm": train.max_grad_norm is not None,
    }
    if setting := next((key for key, used in unfit.items() if used), None):
        raise RecipeError(
            f"train.{setting}: {name} moves weights along random directions alone and holds no gradients; leave it out"
        )


def _check_corrections(recipe: Recipe, name: str, algorithm: Algorithm | None) -> None:
    if algorithm is not None and algorithm.changes_gradients:
        raise RecipeError(
            f"federation.algorithm: {algorithm.name} corrects gradients, and {name} computes none; take fednova, moon "
            "or fedlc, or drop one"
        )
    methods = continual.list_methods(recipe)
    if methods:
        raise RecipeError(
            f"stream: {methods[0].name} may work with gradients, and {name} computes none; drop one, or train a stream "
            "without memory and consolidation"
        )


def _check_merge(pipeline: merging.MergePipeline, name: str) -> None:
    """Raise RecipeError unless the merge combines whole updates.

    A step works on scalars of directions, most of which a client leaves at zero, and on no weights.
    """
    combine = pipeline.combine
    unfit = [step.name for step in (*pipeline.align, *pipeline.relax, *pipeline.renormalise)]
    unfit += [] if combine.averages or combine.weighs_whole_updates else [combine.name]
    if unfit:
        raise RecipeError(
            f"merge: {unfit[0]} works on the entries of weights, but with {name} clients send scalars of directions "
            "and leave most of them at zero; merge by mean, geometric-median, krum or centred-clipping"
        )


def _check_federation(recipe: Recipe, name: str, algorithm: Algorithm | None) -> None:
    """Raise RecipeError where not all clients would have the same directions, or something corrects weights."""
    apart = [device.name for device in recipe.devices if device.techniques is not None]
    if apart:
        raise RecipeError(
            f"devices: {name} gives all clients the directions of one model, but {apart[0]} has techniques of its own; "
            "let all devices train alike, or take mezo"
        )
    if algorithm is not None:
        raise RecipeError(
            f"federation.algorithm: {algorithm.name} works on the weights of clients, and with {name} they send "
            "scalars; take mezo, or drop one"
        )
    if recipe.stream is not None:
        raise RecipeError(
            f"stream: {name} adds the scalars of all rounds to the weights before the first task, which a stream does "
            "not follow; take mezo, or drop one"
        )
