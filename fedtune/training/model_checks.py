"""Checks that a recipe's settings and its model are compatible with privacy."""

from collections.abc import Sequence

from torch import nn

from fedtune import merging, techniques
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.techniques import Technique

__all__ = ["check_model_privacy", "check_privacy_settings"]


def check_privacy_settings(recipe: Recipe, pipeline: merging.MergePipeline) -> None:
    """Raise RecipeError for settings that reveal more than the noise covers, or that noise would make useless."""
    if recipe.privacy is None:
        return
    if recipe.federation.max_update_norm is not None:
        raise RecipeError(
            "federation.max_update_norm: privacy.clipping_norm bounds every client update already; drop max_update_norm"
        )
    if recipe.federation.asynchronous is not None:
        raise RecipeError(
            "federation.asynchronous: an answer counts in rounds its client was not asked in, which the accounting "
            "does not follow; drop it or privacy"
        )
    if recipe.evaluation.local_holdout:
        raise RecipeError(
            "evaluation.local_holdout: scores on what clients hold out are sent without noise; drop it or privacy"
        )
    mixed = next((device.name for device in recipe.devices if device.techniques is not None), None)
    if mixed is not None:
        raise RecipeError(
            f"devices: {mixed} has techniques of its own, so that fewer clients share the noise of some tensors; "
            "let all train alike, or drop privacy"
        )
    measured = merging.build_calibration_request(pipeline.steps)
    if measured is not None and measured.calibrate_on == "clients":
        raise RecipeError(
            "merge: statistics: clients sends activations without noise; let the server measure, or drop privacy"
        )
    if recipe.privacy.noise_added_by == "server":
        _check_sum(pipeline)


def _check_sum(pipeline: merging.MergePipeline) -> None:
    """Raise RecipeError unless one client changes the merged weights by at most clip / n, as in a mean."""
    unbounded = [step.name for step in (*pipeline.align, *pipeline.renormalise)]
    unbounded += [
        step.name for step in pipeline.relax if not isinstance(step, merging.ActivationRelaxStep)
    ]  # activation steps can only shrink a tensor
    if not pipeline.combine.averages:
        unbounded.append(pipeline.combine.name)
    if unbounded:
        raise RecipeError(
            f"merge: {unbounded[0]} is not a mean of client updates, so one client could move the result by more than "
            "privacy's noise covers; merge by mean or linear, or let the clients add the noise: "
            "privacy.noise_added_by=clients"
        )


def check_model_privacy(recipe: Recipe, model: nn.Module, chosen: Sequence[Technique], shared: Sequence[str]) -> None:
    """Raise RecipeError when a private recipe would make clients send more than deltas of weights."""
    if recipe.privacy is None:
        return
    check_privacy_settings(
        recipe, merging.build_pipeline(recipe.merge)
    )  # checked again where it runs, because a recipe may not have been resolved
    statistics = [name for name in shared if name.endswith((".running_mean", ".running_var"))]
    if statistics:
        raise RecipeError(
            f"privacy: {'+'.join(one.name for one in chosen)} trains {statistics[0]}, a batch norm's statistic, which "
            "noise could make negative and whose pooling has no bound; train bias, norm or an adapter instead"
        )
    for technique in chosen:
        if any(
            techniques.declare_extra_payload([technique], model, number)
            for number in range(1, recipe.federation.rounds + 1)
        ):
            raise RecipeError(
                f"privacy: with {technique.name} clients send more than deltas, which neither clip nor noise covers; "
                "drop one of the two"
            )
