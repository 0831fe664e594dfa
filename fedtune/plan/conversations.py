"""Whether a chat template writes the texts of a recipe, as far as its task says."""

from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task

__all__ = ["names_conversations"]


def names_conversations(recipe: Recipe) -> bool:
    """Whether the task names a chat template or a form of conversations. By default, the data decide."""
    task = get_task(recipe.task)
    form = getattr(task, "format", "auto")
    return getattr(task, "chat_template", None) is not None or form not in ("auto", "text")
