"""Recipes as Python gives them: a file, a mapping, or a recipe, with overrides."""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from fedtune.errors import RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe, read_recipe

__all__ = ["Overrides", "RecipeInput", "load_recipe", "make_recipe"]

Overrides = Mapping[str, Any] | Sequence[str]
"""``{"train.lr": 1e-3}``, or texts as after ``--set``: ``["train.lr=1e-3"]``."""
RecipeInput = Recipe | Mapping[str, Any] | str | PathLike[str]


def load_recipe(path: str | PathLike[str], overrides: Overrides = ()) -> Recipe:
    """The recipe in a YAML file, with overrides; RecipeError names file, line and key.

    >>> import fedtune, tempfile, pathlib
    >>> text = '''
    ... name: digits
    ... task: image-classification
    ... model: {source: "sample:logistic"}
    ... data: {source: "sample:digits"}
    ... devices: [{count: 4}]
    ... train: {lr: 0.03, local_steps: 2}
    ... federation: {rounds: 2}
    ... '''
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "digits.yaml"
    >>> _ = path.write_text("version: 2" + text)
    >>> fedtune.load_recipe(path, {"train.lr": 0.1, "federation.rounds": 3}).train.lr
    0.1
    """
    return read_recipe(Path(path), _write_overrides(overrides))


def make_recipe(given: RecipeInput, overrides: Overrides = ()) -> Recipe:
    """A recipe from a file, a mapping or a recipe, with overrides."""
    if isinstance(given, str | PathLike):
        return load_recipe(given, overrides)
    if isinstance(given, Recipe) and not overrides:
        return given
    value = given.model_dump(mode="json") if isinstance(given, Recipe) else {"version": 2, **given}
    try:
        text = yaml.safe_dump(value, sort_keys=False)
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe holds a value that YAML cannot write ({error}); use plain values") from error
    return parse_recipe(text, "the recipe", _write_overrides(overrides))


def _write_overrides(overrides: Overrides) -> list[str]:
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return [overrides] if isinstance(overrides, str) else list(overrides)
