"""The task of a recipe by name, with its settings: ``text-classification`` or ``text-classification: {...}``."""

from functools import cache
from typing import Any, Self

from pydantic import model_serializer, model_validator
from pydantic_core import PydanticCustomError

from fedtune.recipe.plug_ins import find_plug_ins
from fedtune.recipe.train_settings import Unit
from fedtune.recipe.unit_folders import find_unit_modules
from fedtune.recipe.validation_errors import UNIT_UNAVAILABLE, suggest_nearest

__all__ = ["TaskUnit", "list_task_names"]


def list_task_names() -> tuple[str, ...]:
    """Return the names of all tasks, sorted: the files of ``fedtune.tasks``, and plug-ins. None is imported."""
    return tuple(sorted({*_list_built_in_names(), *find_plug_ins("fedtune.tasks")}))


@cache
def _list_built_in_names() -> frozenset[str]:
    return frozenset(find_unit_modules("fedtune.tasks"))


class TaskUnit(Unit):
    """A task by name. Without settings it is serialised as the name alone."""

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.name not in list_task_names():
            problem = f"there is no {self.name!r}; {suggest_nearest(self.name, list_task_names())}"
            raise PydanticCustomError(UNIT_UNAVAILABLE, "{problem}", {"problem": problem})
        return self

    @model_serializer
    def _to_yaml(self) -> Any:
        return {self.name: self.settings} if self.settings else self.name
