"""The methods of ``stream.consolidate``: merge steps join into one, and published ones stand for themselves."""

from collections.abc import Sequence

from fedtune.continual._consolidation_method import Consolidation
from fedtune.continual._method import ContinualMethod
from fedtune.errors import RecipeError
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit, list_unit_names

__all__ = ["build_border_methods", "write_out_border_methods"]

_PACKAGE, _KEY = "fedtune.continual", "stream.consolidate"


def build_border_methods(units: Sequence[Unit]) -> tuple[ContinualMethod, ...]:
    """Return the methods in the order in which they change the state; RecipeError for units that do not fit."""
    known = set(list_unit_names(_PACKAGE))
    steps = tuple(unit for unit in units if unit.name not in known)
    methods: list[ContinualMethod] = [build_unit(_PACKAGE, unit, _KEY) for unit in units if unit.name in known]
    for method in methods:
        if not method.consolidates:
            raise RecipeError(f"{_KEY}: {method.name} does not merge at the end of a task; list it in stream.memory")
    if any(method.name == "experts" for method in methods) and len(units) > 1:
        raise RecipeError(f"{_KEY}: experts replaces the state by a merge of all tasks; drop the other steps")
    names = [unit.name for unit in units]
    if len(set(names)) < len(names):
        raise RecipeError(f"{_KEY}: {', '.join(names)} names one step twice; drop one")
    joined = Consolidation(steps=steps) if steps else None
    if joined is not None:
        joined.build_pipeline()
    return (*([] if joined is None else [joined]), *methods)


def write_out_border_methods(units: Sequence[Unit]) -> list[Unit]:
    """Return the units with all of their settings."""
    written = []
    for method in build_border_methods(units):
        found = method.build_pipeline().steps if isinstance(method, Consolidation) else (method,)
        named = {unit.name for unit in units}
        written += [Unit(name=one.name, settings=one.model_dump(mode="json")) for one in found if one.name in named]
    return written
