"""The recipe of a run: what differs from the defaults, the whole text, and the command that runs it again."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from fedtune.errors import FedtuneError
from fedtune.recipe.schema import Recipe
from fedtune.recipe.versions import read_stored_recipe
from fedtune.tracking import RunRecord
from fedtune.untrusted import clean_text

__all__ = ["format_setting", "list_changed_settings", "make_command", "write_recipe"]

_LONGEST = 400


def list_changed_settings(run: RunRecord) -> list[tuple[str, str]] | None:
    """Return the dotted settings that differ from their defaults, with their values.

    None if the stored recipe is not understood, as one with a method of a package that is not installed here.
    """
    try:
        recipe = Recipe.model_validate(read_stored_recipe(run.recipe))
    except (ValidationError, FedtuneError, ValueError):
        return None
    return [
        (key, format_setting(value)) for key, value in _flatten(recipe.model_dump(mode="json", exclude_defaults=True))
    ]


def write_recipe(run: RunRecord) -> str:
    """Return the recipe as the text of a recipe file."""
    return yaml.safe_dump(read_stored_recipe(run.recipe), sort_keys=False, allow_unicode=True)


def make_command(run: RunRecord) -> str:
    """Return the command that runs the recipe again, once it is saved as a file."""
    file = f"{run.id}.yaml"
    if run.engine in ("in-process", "flower"):
        engine = "" if run.engine == "in-process" else f" --engine {run.engine}"
        return f"fedtune simulate {file}{engine}"
    return f"fedtune submit {file}"


def format_setting(value: Any) -> str:
    """Return a value as JSON on one line; None, which is no setting, as an empty text."""
    return "" if value is None else clean_text(json.dumps(value, ensure_ascii=False), _LONGEST)


def _flatten(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _flatten(child, f"{at}.{key}" if at else str(key))
    else:
        yield at, value
