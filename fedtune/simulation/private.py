"""What makes no sense together with privacy, told before anything is built."""

from fedtune import merging
from fedtune.errors import RecipeError
from fedtune.recipe import Recipe

__all__ = ["check_private"]


def check_private(recipe: Recipe, pipeline: merging.Pipeline) -> None:
    """RecipeError for settings that would tell more than the noise covers, or that noise would make pointless."""
    if recipe.privacy is None:
        return
    if recipe.federation.max_norm is not None:
        raise RecipeError("federation.max_norm: privacy.clip bounds every contribution already; drop max_norm")
    if recipe.evaluation.own:
        raise RecipeError("evaluation.own: scores on what clients hold out are sent without noise; drop it or privacy")
    measured = merging.measurement(pipeline.steps)
    if measured is not None and measured.by == "clients":
        raise RecipeError(
            "merge: statistics: clients sends activations without noise; let the server measure, or drop privacy"
        )
    if recipe.privacy.where == "server":
        _check_sum(pipeline)


def _check_sum(pipeline: merging.Pipeline) -> None:
    """Noise on the merged weights covers a client that moves them by clip / n at most: a mean, or less."""
    unbounded = [step.name for step in (*pipeline.align, *pipeline.renormalise)]
    unbounded += [step.name for step in pipeline.relax if not isinstance(step, merging.ByActivity)]  # those only shrink
    if not pipeline.combine.averages:
        unbounded.append(pipeline.combine.name)
    if unbounded:
        raise RecipeError(
            f"merge: {unbounded[0]} is no mean of contributions, so one client could move the result by more than "
            "privacy's noise covers; merge by mean or linear, or let the clients add the noise: privacy.where=client"
        )
