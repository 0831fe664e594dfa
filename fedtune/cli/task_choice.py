"""The values of ``--task``: the names of tasks, and their old names in recipes of version 1."""

from typing import Any

import click

from fedtune.recipe.version_names import VALUES

__all__ = ["TaskChoice"]


class TaskChoice(click.Choice[str]):
    """A task name. An old name is replaced by the new one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the new name. Click prints a usage error for an unknown name."""
        return super().convert(VALUES["task"].get(value, value), param, ctx)
