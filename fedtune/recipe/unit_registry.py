"""Published units by name. Units are found by listing folders, so that only the unit that is asked for is imported.

Each file of a package, or of a folder inside it, publishes one unit under its own name. Names of files and folders with
a leading underscore do not count: they help units.
"""

import importlib
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fedtune.errors import RecipeError
from fedtune.recipe.schema import SettingsModel, Unit
from fedtune.recipe.unit_folders import find_unit_modules
from fedtune.recipe.validation_errors import explain_validation_error, suggest_nearest

__all__ = [
    "NamedUnit",
    "build_unit",
    "describe_unit_settings",
    "list_unit_names",
    "read_unit_card",
]


class NamedUnit(SettingsModel):
    """A unit that is its own settings; ``name`` is what recipes call it."""

    name: ClassVar[str]


def list_unit_names(package: str) -> list[str]:
    """The names of all units that a package publishes, sorted."""
    return sorted(find_unit_modules(package))


def build_unit(package: str, unit: Unit, where: str) -> Any:
    """The unit a recipe names, validated; RecipeError names what is near or allowed. ``where`` is the recipe's key."""
    chosen = _import_unit_class(package, unit.name, where)
    try:
        return chosen.model_validate(unit.settings)
    except ValidationError as error:
        raise RecipeError(explain_validation_error(error, chosen, f"{where}, {unit.name}")) from error


def read_unit_card(package: str, name: str) -> str:
    """The docstring of the module that publishes a unit."""
    unit_class = _import_unit_class(package, name, package.rpartition(".")[2])
    return importlib.import_module(unit_class.__module__).__doc__ or ""


def describe_unit_settings(package: str, name: str) -> list[str]:
    """Describe the settings of a unit, one line each: name, type or choices, default and meaning."""
    fields = _import_unit_class(package, name, package.rpartition(".")[2]).model_fields
    return [_describe_setting(key, field) for key, field in fields.items()]


def _import_unit_class(package: str, name: str, where: str) -> type[NamedUnit]:
    modules = find_unit_modules(package)
    if name not in modules:
        raise RecipeError(f"{where}: there is no {name!r}; {suggest_nearest(name, sorted(modules))}")
    module = importlib.import_module(modules[name])
    [found] = [item for item in vars(module).values() if _is_unit_of(item, module.__name__)]
    return found  # type: ignore[no-any-return]


def _is_unit_of(item: object, module: str) -> bool:
    return isinstance(item, type) and issubclass(item, NamedUnit) and item.__module__ == module


def _describe_setting(key: str, field: FieldInfo) -> str:
    meaning = f"   {field.description}" if field.description else ""
    default = "null" if field.default is None else field.default
    return f"{key}: {_describe_type(field.annotation)} = {default}{meaning}"


def _describe_type(annotation: Any) -> str:
    """Return the choices, or the name of the type."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(_describe_type, get_args(annotation)))
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")
