"""A recipe read from YAML, with dotted overrides; what does not hold is told by file, line and key."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fedtune.errors import RecipeError
from fedtune.explain import Location, explain_validation_error
from fedtune.recipe import Recipe
from fedtune.yaml_text import YamlError, load, load_with_lines

__all__ = ["apply_override", "parse_recipe", "parse_settings", "read_recipe", "read_text_file"]


Settings = TypeVar("Settings", bound=BaseModel)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with ``key.key=value`` overrides applied; RecipeError names file, line and key."""
    return parse_recipe(read_text_file(path, "the recipe"), str(path), overrides)


def parse_recipe(text: str, origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML text; ``origin`` is what messages call it."""
    return parse_settings(Recipe, text, origin, "recipe", overrides)


def read_text_file(path: Path, what: str) -> str:
    """A text file; RecipeError calls it ``what`` when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {what} {path}: {_reason(error)}; check the path") from error


def parse_settings(kind: type[Settings], text: str, origin: str, what: str, overrides: Sequence[str] = ()) -> Settings:
    """A YAML text as settings, with overrides applied; RecipeError names ``origin``, line and key."""
    try:
        value, numbers = load_with_lines(text)
    except YamlError as error:
        raise RecipeError(f"{origin} {error}") from error
    if not isinstance(value, dict):
        shown = ", ".join(list(kind.model_fields)[:4])
        raise RecipeError(f"{origin} holds no {what}: it must be a mapping with keys such as {shown}")
    overridden = {apply_override(value, item): item for item in overrides}
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise RecipeError(explain_validation_error(error, kind, origin, numbers, overridden)) from error


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"


def apply_override(value: dict[str, Any], item: str) -> Location:
    """Put one ``key.key=value`` into the nested mapping and return where it went."""
    dotted, equals, text = item.partition("=")
    path = tuple(dotted.split("."))
    if not equals or not all(path):
        raise RecipeError(f"--set {item}: write it as key.key=value, e.g. train.lr=1e-3")
    try:
        setting = load(text)
    except YamlError as error:
        raise RecipeError(f"--set {item}: the value {error}") from error
    here: Any = value
    for position, key in enumerate(path[:-1]):
        here = here.setdefault(key, {}) if isinstance(here, dict) else None
        if not isinstance(here, dict):
            raise RecipeError(f"--set {item}: {'.'.join(path[: position + 1])} has no keys below it")
    here[path[-1]] = setting
    return path
