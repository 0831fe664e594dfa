"""Checkpoints of a run that need not stay once its newest round is committed."""

from fedtune.recipe.schema import Recipe
from fedtune.tracking import Store
from fedtune.tracking.pruning import prune_run_checkpoints

__all__ = ["prune_checkpoints"]


def prune_checkpoints(store: Store, run: str, recipe: Recipe) -> None:
    """Remove checkpoints that need not stay; those that late answers may still begin with must."""
    keep, late = recipe.checkpoints.keep, recipe.federation.asynchronous
    if keep == "all":
        return
    last = keep.last if late is None else max(keep.last, late.max_staleness + 2)
    prune_run_checkpoints(store, run, keep.model_copy(update={"last": last}), recipe.model_dump(mode="json"))
