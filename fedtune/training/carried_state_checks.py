"""Checks that what is carried from round to round belongs to the same entries of the same tensors."""

from collections.abc import Sequence

from fedtune import merging
from fedtune.errors import RecipeError
from fedtune.techniques import Technique

__all__ = ["check_server_optimiser"]


def check_server_optimiser(chosen: Sequence[Technique], pipeline: merging.MergePipeline) -> None:
    """Raise RecipeError if a technique's trained tensors are others in each round, so that moments fit none of them."""
    step = pipeline.server_optimiser
    renewing = [one for one in chosen if one.renewed_tensors is not None]
    if step is not None and renewing:
        raise RecipeError(
            f"merge: {step.name} carries moments from round to round, which do not fit {renewing[0].name}, "
            f"{renewing[0].renewed_tensors}; drop one"
        )
