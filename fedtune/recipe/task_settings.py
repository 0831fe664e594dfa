"""The task of a recipe by name, with its settings: ``text-classification`` or ``text-classification: {...}``."""

from functools import cache
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any, Self

from pydantic import model_serializer, model_validator

from fedtune.recipe.train_settings import Unit
from fedtune.recipe.validation_errors import suggest_nearest

__all__ = ["TaskUnit", "list_task_names"]


@cache
def list_task_names() -> tuple[str, ...]:
    """The names of all tasks in alphabetical order: the files of ``fedtune.tasks``, none of which is imported."""
    found = find_spec("fedtune.tasks")
    assert found is not None
    assert found.submodule_search_locations is not None
    files = iter_modules(found.submodule_search_locations)
    return tuple(sorted(one.name.replace("_", "-") for one in files if not one.name.startswith("_")))


class TaskUnit(Unit):
    """A task by name. Without settings it is written as the name alone."""

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.name not in list_task_names():
            raise ValueError(f"there is no {self.name!r}; {suggest_nearest(self.name, list_task_names())}")
        return self

    @model_serializer
    def _to_yaml(self) -> Any:
        return {self.name: self.settings} if self.settings else self.name
