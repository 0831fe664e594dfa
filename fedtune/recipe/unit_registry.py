"""Units by name. They are found by listing folders, so that only the requested unit is imported.

Each file of a package, or of a folder inside it, publishes one unit under its own name. Files and folders with a
leading underscore are helpers and are left out. Other installed packages publish units by entry points, in the group
that has the name of the package here.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fedtune.errors import RecipeError
from fedtune.recipe.plug_ins import PlugIn, find_plug_in, find_plug_ins
from fedtune.recipe.schema import SettingsModel, Unit
from fedtune.recipe.unit_folders import find_unit_modules
from fedtune.recipe.validation_errors import explain_validation_error, suggest_nearest

__all__ = [
    "NamedUnit",
    "build_unit",
    "describe_unit_settings",
    "find_unit_package",
    "import_unit_class",
    "list_unit_names",
    "read_unit_card",
]

_KINDS: Mapping[str, tuple[str, ...]] = {
    "fedtune.techniques": ("Technique",),
    "fedtune.merging": ("AlignStep", "CombineStep", "RelaxStep", "RenormaliseStep", "ServerOptimiserStep"),
    "fedtune.tasks": ("Task",),
    "fedtune.continual": ("ContinualMethod",),
    "fedtune.algorithms": ("Algorithm",),
    "fedtune.attacks": ("Attack",),
    "fedtune.wire.codecs": ("Codec", "EntropyCoder"),
}
"""The base classes of the units that other packages may publish."""


class NamedUnit(SettingsModel):
    """A unit that consists of its own settings. ``name`` is its name in recipes."""

    name: ClassVar[str]


def list_unit_names(package: str) -> list[str]:
    """Return the names of all units of a package and of its plug-ins, sorted."""
    return sorted({*find_unit_modules(package), *find_plug_ins(package)})


def find_unit_package(package: str, name: str) -> str:
    """The installed package that publishes a unit; ``fedtune`` for those here."""
    built_in = find_unit_modules(package).get(name)
    plug_in = find_plug_in(package, name, _get_room(package), built_in)
    return "fedtune" if plug_in is None else plug_in.package


def build_unit(package: str, unit: Unit, where: str) -> Any:
    """Return the validated unit that a recipe names at the key ``where``.

    Raises RecipeError with the nearest name or key, or with the allowed ones.
    """
    chosen = import_unit_class(package, unit.name, where)
    try:
        return chosen.model_validate(unit.settings)
    except ValidationError as error:
        raise RecipeError(explain_validation_error(error, chosen, f"{where}, {unit.name}")) from error


def read_unit_card(package: str, name: str) -> str:
    """Return the card of a unit: the docstring of its module."""
    unit_class = import_unit_class(package, name, _get_room(package))
    return importlib.import_module(unit_class.__module__).__doc__ or ""


def describe_unit_settings(package: str, name: str) -> list[str]:
    """Describe the settings of a unit, one line each: name, type or choices, default and meaning."""
    fields = import_unit_class(package, name, _get_room(package)).model_fields
    return [_describe_setting(key, field) for key, field in fields.items()]


def import_unit_class(package: str, name: str, where: str) -> type[NamedUnit]:
    """The class of a unit; RecipeError if nobody publishes it, or if its package cannot be imported."""
    built_in = find_unit_modules(package).get(name)
    plug_in = find_plug_in(package, name, where, built_in)
    if plug_in is not None:
        return _load_plug_in(plug_in, package, where)
    if built_in is None:
        hint = suggest_nearest(name, list_unit_names(package))
        raise RecipeError(f"{where}: there is no {name!r}; {hint}", code="unit-unavailable")
    [found] = _list_units_in(importlib.import_module(built_in))
    return found


def _load_plug_in(plug_in: PlugIn, package: str, where: str) -> type[NamedUnit]:
    """The unit that an entry point names: a class, or a module with one unit."""
    loaded = plug_in.load(where)
    found = _list_units_in(loaded) if isinstance(loaded, ModuleType) else [loaded]
    kinds = tuple(pkgutil.resolve_name(f"{package}:{kind}") for kind in _KINDS.get(package, ()))
    if len(found) != 1 or not isinstance(found[0], type) or not issubclass(found[0], kinds or NamedUnit):
        kind = " or ".join(_KINDS.get(package, ("NamedUnit",)))
        raise _make_misfit(plug_in, where, f"its entry point must name one {kind}")
    if getattr(found[0], "name", None) != plug_in.name:
        raise _make_misfit(plug_in, where, f"the class calls itself {getattr(found[0], 'name', None)!r}")
    return found[0]


def _make_misfit(plug_in: PlugIn, where: str, why: str) -> RecipeError:
    return RecipeError(
        f"{where}: {plug_in.name} of the package {plug_in.package} is no unit that fits: {why}; update or uninstall "
        f"{plug_in.package}",
        code="unit-unavailable",
    )


def _get_room(package: str) -> str:
    return package.rpartition(".")[2]


def _list_units_in(module: ModuleType) -> list[type[NamedUnit]]:
    return [item for item in vars(module).values() if _is_unit_of(item, module.__name__)]


def _is_unit_of(item: object, module: str) -> bool:
    return isinstance(item, type) and issubclass(item, NamedUnit) and item.__module__ == module


def _describe_setting(key: str, field: FieldInfo) -> str:
    meaning = f"   {field.description}" if field.description else ""
    default = "null" if field.default is None else field.default
    return f"{key}: {_describe_type(field.annotation)} = {default}{meaning}"


def _describe_type(annotation: Any) -> str:
    """Return the choices, or the name of the type without what limits its values."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_describe_type, arguments))
    if origin is Annotated:
        return _describe_type(arguments[0])
    if annotation is type(None):
        return "null"
    if isinstance(origin, type):
        return f"{origin.__name__}[{', '.join(map(_describe_type, arguments))}]"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
