"""The names of tasks, which are the files of ``fedtune.tasks``; none of them is imported for it."""

from functools import cache
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Annotated

from pydantic import AfterValidator

from fedtune.recipe.validation_errors import suggest_nearest

__all__ = ["TaskName", "list_task_names"]


@cache
def list_task_names() -> tuple[str, ...]:
    """The names in alphabetical order, written with dashes."""
    found = find_spec("fedtune.tasks")
    assert found is not None
    assert found.submodule_search_locations is not None
    files = iter_modules(found.submodule_search_locations)
    return tuple(sorted(one.name.replace("_", "-") for one in files if not one.name.startswith("_")))


def _check_task_name(name: str) -> str:
    if name not in list_task_names():
        raise ValueError(f"there is no {name!r}; {suggest_nearest(name, list_task_names())}")
    return name


TaskName = Annotated[str, AfterValidator(_check_task_name)]
"""The name of a task."""
