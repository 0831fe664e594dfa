"""Refusals of methods that compare the model with the one of the last border."""

from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.techniques import build_techniques

__all__ = ["refuse_changing_tensors", "refuse_moving_base", "refuse_other_techniques"]


def refuse_moving_base(method: str, recipe: Recipe) -> None:
    """Raise RecipeError if the merge changes the base weights, beside which a pair begins anew each round."""
    for technique in build_techniques(recipe.train.techniques):
        if technique.get_update_kind() == "pairs and base":
            raise RecipeError(
                f"stream.memory: {method} holds trained tensors near those of the last border, but {technique.name} "
                "with trained_factors: both-and-base moves the base beside them; take trained_factors: b-only and "
                "merge: mean"
            )


def refuse_changing_tensors(method: str, recipe: Recipe) -> None:
    """Raise RecipeError if rounds differ in what is trained, so that the last one does not stand for the task."""
    for technique in build_techniques(recipe.train.techniques):
        if technique.changes_per_round():
            mend = (
                "set trained_factors: b-only"
                if technique.name in ("lora", "qlora")
                else f"drop one of them or {method}"
            )
            raise RecipeError(
                f"stream.memory: {method} measures the tensors of a task's last round, but {technique.name} trains "
                f"others in other rounds; {mend}"
            )


def refuse_other_techniques(method: str, recipe: Recipe) -> None:
    """Raise RecipeError if a device class trains other tensors than the model that the server remembers."""
    for device in recipe.devices:
        if device.techniques is not None:
            raise RecipeError(
                f"devices: {device.name} has techniques of its own, but what {method} remembers fits one model; let "
                f"all train alike, or drop {method}"
            )
