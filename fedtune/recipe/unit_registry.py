"""Units by name. They are found by listing folders, so that only the requested unit is imported.

Each file of a package, or of a folder inside it, publishes one unit under its own name. Files and folders with a
leading underscore are helpers and are left out.
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
    """A unit that consists of its own settings. ``name`` is its name in recipes."""

    name: ClassVar[str]


def list_unit_names(package: str) -> list[str]:
    """Return the names of all units of a package, sorted."""
    return sorted(find_unit_modules(package))


def build_unit(package: str, unit: Unit, where: str) -> Any:
    """Return the validated unit that a recipe names at the key ``where``.

    Raises RecipeError with the nearest name or key, or with the allowed ones.
    """
    chosen = _import_unit_class(package, unit.name, where)
    try:
        return chosen.model_validate(unit.settings)
    except ValidationError as error:
        raise RecipeError(explain_validation_error(error, chosen, f"{where}, {unit.name}")) from error


def read_unit_card(package: str, name: str) -> str:
    """Return the card of a unit: the docstring of its module."""
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
