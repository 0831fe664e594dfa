"""``techniques: auto`` of a recipe before its run exists, the same for ``fedtune simulate`` and for a server."""

from fedtune.plan.auto_techniques import has_auto_techniques, plan_auto_techniques
from fedtune.plan.corrections import learn_corrections
from fedtune.plan.runtimes import TRAINER_MODULES
from fedtune.recipe.schema import Recipe
from fedtune.tracking import Store

__all__ = ["plan_techniques"]


def plan_techniques(recipe: Recipe, store: str | None = None) -> Recipe:
    """Return the recipe with a plan for each device class if it leaves them to one; otherwise as it is.

    Plans are corrected by what earlier runs in the store taught about the memory of a class. The store is the default
    one without a URL.
    """
    if not has_auto_techniques(recipe):
        return recipe
    with Store.open(store) as opened:
        corrections = learn_corrections(opened.predictions.list_errors())
    planned, _ = plan_auto_techniques(recipe, TRAINER_MODULES, corrections)
    return planned
