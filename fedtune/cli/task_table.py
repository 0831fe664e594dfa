"""The table of a stream's tasks: when each comes, and how many examples it has."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from fedtune.data import DataSplits
    from fedtune.recipe.schema import Recipe

__all__ = ["make_task_table"]


def make_task_table(recipe: "Recipe", corpus: "DataSplits") -> "Table":
    """Return a row for each visit of a task; examples of a task are counted where it comes first."""
    import numpy as np
    from rich.table import Table

    from fedtune.continual import StreamPlan, number_tasks

    plan = StreamPlan(recipe)
    count = len(plan.task_names)
    splits = {part: getattr(corpus, part) for part in ("train", "validation", "test")}
    counts = {
        part: np.bincount(numbers[numbers >= 0], minlength=count)
        for part, table in splits.items()
        if (numbers := number_tasks(recipe, table, corpus.label_names)) is not None
    }
    table = Table(title="stream", box=None, header_style="bold", title_justify="left")
    for heading in ("task", "rounds", *splits):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    first = 1
    for visit, task in enumerate(plan.visits):
        last = first + task.rounds - 1
        again = any(other.name == task.name for other in plan.visits[:visit])
        sizes = ["again"] if again else [str(counts[part][plan.find_task(visit)]) for part in splits]
        table.add_row(task.name, str(first) if first == last else f"{first}-{last}", *sizes)
        first = last + 1
    return table
