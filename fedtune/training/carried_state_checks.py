"""Checks that what is carried from round to round belongs to the same entries of the same tensors."""

from collections.abc import Sequence

from fedtune import merging
from fedtune.errors import RecipeError
from fedtune.techniques import Technique

__all__ = ["check_server_optimiser"]


def check_server_optimiser(chosen: Sequence[Technique], pipeline: merging.MergePipeline) -> None:
    """Raise RecipeError if a technique's trained tensors are others in each round, so that moments fit none of them, or
    if the merge compares updates with the last merge, which the optimiser would have changed.
    """
    step = pipeline.server_optimiser
    if step is not None and pipeline.combine.reference == "last merge":
        raise RecipeError(
            f"merge: {pipeline.combine.name} compares updates with what the last merge gave, and {step.name} makes "
            "another step of it; drop one"
        )
    renewing = [one for one in chosen if one.renewed_tensors is not None]
    if step is not None and renewing:
        raise RecipeError(
            f"merge: {step.name} carries moments from round to round, which do not fit {renewing[0].name}, "
            f"{renewing[0].renewed_tensors}; drop one"
        )
