"""Reads a recipe from YAML with dotted overrides. Errors give file, line and key."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.recipe.validation_errors import Location, explain_validation_error
from fedtune.recipe.versions import VERSION, needs_translation, translate_path, translate_recipe, translate_setting
from fedtune.recipe.yaml_text import YamlError, load, load_with_lines

__all__ = ["apply_override", "parse_recipe", "parse_settings", "read_recipe", "read_text_file"]

Settings = TypeVar("Settings", bound=BaseModel)
Translate = Callable[[Location, Any], tuple[Location, Any]]


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe in a YAML file and apply ``key.key=value`` overrides; RecipeError gives file, line and key.

    If a file of version 1 would be written differently in version 2, a line is printed on standard error.
    """
    text = read_text_file(path, "the recipe")
    recipe = parse_recipe(text, str(path), overrides)
    if _is_translated(load(text)):
        mend = f"fedtune recipe upgrade {path} writes version {VERSION}"
        print(f"fedtune: {path} is a recipe of version 1; {mend}", file=sys.stderr, flush=True)
    return recipe


def parse_recipe(text: str, origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """Parse the recipe in a YAML text. Messages call it ``origin``.

    A text of version 1 is translated before overrides are applied. Overrides may use keys of either version.
    """
    value, lines = _load_mapping(Recipe, text, origin, "recipe")
    if value.get("version", 1) not in (1, VERSION):
        known = f"the newest that is known here is {VERSION}; update fedtune"
        where = f"{origin}, line {lines.get(('version',), 1)}"
        raise RecipeError(f"{where}: version is {value['version']!r}, but {known}")
    if needs_translation(value):
        lines = {translate_path(path): line for path, line in lines.items()} | lines
        value = translate_recipe(value)
    overridden = {apply_override(value, item, translate_setting): item for item in overrides}
    return _validate(Recipe, value, origin, lines, overridden)


def _is_translated(value: Mapping[str, Any]) -> bool:
    """Return whether a text has version 1 and differs from the same recipe in the newest version."""
    return needs_translation(value) and translate_recipe(value) != {**value, "version": VERSION}


def read_text_file(path: Path, what: str) -> str:
    """Return the content of a text file; RecipeError calls it ``what`` when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {what} {path}: {_reason(error)}; check the path") from error


def parse_settings(kind: type[Settings], text: str, origin: str, what: str, overrides: Sequence[str] = ()) -> Settings:
    """Parse a YAML text as settings and apply overrides; RecipeError gives ``origin``, line and key."""
    value, lines = _load_mapping(kind, text, origin, what)
    overridden = {apply_override(value, item): item for item in overrides}
    return _validate(kind, value, origin, lines, overridden)


def _load_mapping(
    kind: type[BaseModel], text: str, origin: str, what: str
) -> tuple[dict[str, Any], dict[Location, int]]:
    try:
        value, lines = load_with_lines(text)
    except YamlError as error:
        raise RecipeError(f"{origin} {error}") from error
    if not isinstance(value, dict):
        shown = ", ".join([name for name in kind.model_fields if name != "version"][:4])
        raise RecipeError(f"{origin} holds no {what}: it must be a mapping with keys such as {shown}")
    return value, lines


def _validate(
    kind: type[Settings],
    value: Mapping[str, Any],
    origin: str,
    lines: Mapping[Location, int],
    overridden: Mapping[Location, str],
) -> Settings:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise RecipeError(explain_validation_error(error, kind, origin, lines, overridden)) from error


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"


def apply_override(value: dict[str, Any], item: str, translate: Translate | None = None) -> Location:
    """Set one ``key.key=value`` in the nested mapping and return its path.

    ``translate`` converts the written path and value to the current ones.
    """
    dotted, equals, text = item.partition("=")
    path: Location = tuple(dotted.split("."))
    if not equals or not all(path):
        raise RecipeError(f"--set {item}: write it as key.key=value, e.g. train.lr=1e-3")
    try:
        setting = load(text)
    except YamlError as error:
        raise RecipeError(f"--set {item}: the value {error}") from error
    if translate is not None:
        path, setting = translate(path, setting)
    here: Any = value
    for position, key in enumerate(path[:-1]):
        here = here.setdefault(key, {}) if isinstance(here, dict) else None
        if not isinstance(here, dict):
            raise RecipeError(f"--set {item}: {'.'.join(map(str, path[: position + 1]))} has no keys below it")
    here[path[-1]] = setting
    return path
