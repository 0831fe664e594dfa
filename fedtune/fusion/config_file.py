"""A merge configuration read from YAML, or put together from the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fedtune.errors import RecipeError
from fedtune.explain import explain
from fedtune.fusion.config import MergeConfig
from fedtune.recipe_file import NOT_YAML, lines, override

__all__ = ["parse", "quick", "read"]


def read(path: Path, overrides: Sequence[str] = ()) -> tuple[MergeConfig, str]:
    """The configuration in a file, with ``key.key=value`` overrides, and its text; RecipeError names line and key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"cannot read the configuration {path}: {reason}; check the path") from error
    return parse(text, str(path), overrides), text


def parse(text: str, origin: str, overrides: Sequence[str] = ()) -> MergeConfig:
    """The configuration in a YAML text; ``origin`` is what messages call it."""
    try:
        value = yaml.safe_load(text)
        numbers = lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except NOT_YAML as error:
        raise RecipeError(f"{origin} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{origin} holds no merge: it must be a mapping with keys such as merge_method and models")
    overridden = {override(value, item): item for item in overrides}
    try:
        return MergeConfig.model_validate(value)
    except ValidationError as error:
        raise RecipeError(explain(error, MergeConfig, origin, numbers, overridden)) from error


def quick(
    models: Sequence[str], method: str, weights: Sequence[float], settings: Sequence[str], **keys: Any
) -> tuple[MergeConfig, str]:
    """The configuration that command-line options stand for, and its text; ``settings`` are parameters as key=value."""
    if weights and len(weights) != len(models):
        raise RecipeError(f"--weights has {len(weights)} numbers for {len(models)} models; give one for each")
    entries: list[Any] = list(models)
    if weights:
        pairs = zip(models, weights, strict=True)
        entries = [{"model": model, "parameters": {"weight": weight}} for model, weight in pairs]
    value = {"merge_method": method, "models": entries, **{key: found for key, found in keys.items() if found}}
    for item in settings:
        override(value, f"parameters.{item}")
    text = yaml.safe_dump(value, sort_keys=False)
    return parse(text, "the command line"), text
