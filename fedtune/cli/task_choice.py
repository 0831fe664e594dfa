"""The option ``--task`` takes the tasks' names, and those of recipes of version 1."""

from typing import Any

import click

from fedtune.recipe.version_names import VALUES

__all__ = ["TaskChoice"]


class TaskChoice(click.Choice[str]):
    """A task by its name of today, whichever is given."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name of today; click refuses what is none."""
        return super().convert(VALUES["task"].get(value, value), param, ctx)
