"""How much more a process that imports transformers holds than the trainer of the device that it stands for.

Plans are of a device's trainer, which builds plain blocks where it can. The workers of a simulation share a model that
transformers has built.
"""

from collections.abc import Sequence

from fedtune.models.blocks.choice import explain_blocks_misfit
from fedtune.models.image_model_files import is_fedtune_image_model
from fedtune.models.sources import locate_model
from fedtune.plan.conversations import names_conversations
from fedtune.plan.runtimes import measure_runtimes
from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task
from fedtune.techniques import build_techniques
from fedtune.training.plain_blocks import find_blocks_problem

__all__ = ["measure_runtime_surplus"]


def measure_runtime_surplus(recipe: Recipe, modules: Sequence[str]) -> int:
    """Return the anonymous bytes by which the runtime with transformers is larger than the device's.

    ``recipe`` is that of a client, and ``modules`` are what a trainer imports. 0 without plans, whose budgets are those
    of the process itself, and where a device imports transformers too.
    """
    if recipe.plans is None or not _uses_plain_blocks(recipe):
        return 0
    kind = "chat" if names_conversations(recipe) else "blocks"
    own, worker = f"{kind} {recipe.model.source}", f"transformers {recipe.model.source}"
    found = measure_runtimes([own, worker], modules)
    return max(0, found[worker].anonymous_bytes - found[own].anonymous_bytes)


def _uses_plain_blocks(recipe: Recipe) -> bool:
    """Whether a device's trainer would build the recipe's model of plain blocks."""
    location, task = locate_model(recipe.model), get_task(recipe.task)
    if is_fedtune_image_model(location):
        return False
    problem = find_blocks_problem(recipe, build_techniques(recipe.train.techniques))
    labels = ("no", "yes") if task.has_new_head else ()
    return explain_blocks_misfit(recipe.model, location, task, labels, problem=problem) is None
