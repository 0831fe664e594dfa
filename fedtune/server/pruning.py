"""Delete checkpoints that a run no longer needs after its newest round is committed."""

from fedtune.continual import StreamPlan
from fedtune.recipe.schema import Recipe
from fedtune.server.drift_reference import list_reference_rounds
from fedtune.tracking import Store
from fedtune.tracking.pruning import prune_run_checkpoints

__all__ = ["prune_checkpoints"]


def prune_checkpoints(store: Store, run: str, recipe: Recipe) -> None:
    """Delete the checkpoints that are not needed. Start states of updates that may still arrive are kept.

    In a stream, the states at the begin of the newest tasks are kept, with what the server remembers there.
    """
    keep, late = recipe.checkpoints.keep, recipe.federation.asynchronous
    if keep == "all":
        return
    last = keep.last if late is None else max(keep.last, late.max_staleness + 2)
    wanted = keep.model_copy(update={"last": last})
    prune_run_checkpoints(store, run, wanted, recipe.model_dump(mode="json"), _list_borders(recipe))


def _list_borders(recipe: Recipe) -> list[int]:
    """Return the rounds that end the tasks of a stream, and those after which the server has a new drift reference."""
    if recipe.stream is None:
        return []
    plan = StreamPlan(recipe)
    borders = [plan.find_border_round(visit) for visit in range(len(plan.visits))]
    return sorted({*borders, *list_reference_rounds(plan)})
