"""Refusals of what a merge at a border cannot do with the tensors that are trained."""

from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.techniques import Technique, build_techniques

__all__ = ["refuse_masks", "refuse_moving_pairs", "refuse_one_factor", "refuse_uneven_uploads"]


def refuse_masks(name: str, recipe: Recipe) -> None:
    """Raise RecipeError if a technique prunes weights, because a mask is no task vector."""
    for technique in _list_techniques(recipe):
        if technique.name == "dynamic-pruning":
            raise RecipeError(
                f"stream.consolidate: {name} merges what tasks change, but {technique.name} also changes which weights "
                "there are; drop one of them"
            )


def refuse_moving_pairs(name: str, recipe: Recipe) -> None:
    """Raise RecipeError if both factors of a pair change over tasks.

    The change of the product is then B_t A_t - B_(t-1) A_(t-1), which no merge of the factors' changes scales.
    """
    for technique in _list_techniques(recipe):
        kind = technique.get_update_kind()
        if kind in ("pairs", "pairs and base") or (kind == "one factor" and technique.changes_per_round()):
            raise RecipeError(
                f"stream.consolidate: {name} merges changes of weights, but {technique.name} changes both factors of a "
                "product from task to task; set trained_factors: b-only, or train full or last-blocks"
            )


def refuse_one_factor(name: str, why: str, recipe: Recipe) -> None:
    """Raise RecipeError if one factor of a product is trained."""
    for technique in _list_techniques(recipe):
        if technique.get_update_kind() == "one factor":
            raise RecipeError(
                f"stream.consolidate: {name} {why}, but {technique.name} trains one factor of a product; choose "
                "shrink, average or experts with mean, or train full or last-blocks"
            )


def _list_techniques(recipe: Recipe) -> list[Technique]:
    chosen = [recipe.train.techniques, *(one.techniques for one in recipe.devices if one.techniques is not None)]
    return [technique for units in chosen for technique in build_techniques(units)]


def refuse_uneven_uploads(name: str, recipe: Recipe) -> None:
    """Raise RecipeError if clients or rounds differ in what is trained, so that their sums do not add up."""
    for device in recipe.devices:
        if device.techniques is not None:
            raise RecipeError(
                f"devices: {device.name} has techniques of its own, but the sums of {name} are those of one model; let "
                "all train alike, or choose shrink with a number, average or experts"
            )
    for technique in _list_techniques(recipe):
        if technique.changes_per_round():
            raise RecipeError(
                f"stream.consolidate: {name} measures what a task's last round trains, but {technique.name} trains "
                "other tensors in other rounds; choose shrink with a number, average or experts"
            )
