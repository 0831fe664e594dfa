"""Delete checkpoints that a run no longer needs after its newest round is committed."""

from fedtune.recipe.schema import Recipe
from fedtune.tracking import Store
from fedtune.tracking.pruning import prune_run_checkpoints

__all__ = ["prune_checkpoints"]


def prune_checkpoints(store: Store, run: str, recipe: Recipe) -> None:
    """Delete the checkpoints that are not needed. Start states of updates that may still arrive are kept."""
    keep, late = recipe.checkpoints.keep, recipe.federation.asynchronous
    if keep == "all":
        return
    last = keep.last if late is None else max(keep.last, late.max_staleness + 2)
    prune_run_checkpoints(store, run, keep.model_copy(update={"last": last}), recipe.model_dump(mode="json"))
