"""Read a merge configuration from YAML, or build it from the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fedtune.errors import RecipeError
from fedtune.offline_merge.merge_config import MergeConfig
from fedtune.offline_merge.merge_stages import Stage, stages_of
from fedtune.recipe.yaml_file import apply_override, read_text_file

__all__ = ["build_merge_config", "parse_merge_config", "read_merge_config"]


def read_merge_config(path: Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """Return the merges in a file. ``key.key=value`` overrides change the last. RecipeError names line and key."""
    return stages_of(read_text_file(path, "the configuration"), str(path), overrides)


def parse_merge_config(text: str, origin: str, overrides: Sequence[str] = ()) -> MergeConfig:
    """Return the configuration in a YAML text with one merge; ``origin`` is its name in messages."""
    stages = stages_of(text, origin, overrides)
    if len(stages) > 1:
        raise RecipeError(f"{origin} holds {len(stages)} merges; give one")
    return stages[0].config


def build_merge_config(
    models: Sequence[str], method: str, weights: Sequence[float], settings: Sequence[str], **keys: Any
) -> tuple[MergeConfig, str]:
    """Build the configuration of command-line options, and its text. ``settings`` are parameters as key=value."""
    if weights and len(weights) != len(models):
        raise RecipeError(f"--weights has {len(weights)} numbers for {len(models)} models; give one for each")
    entries: list[Any] = list(models)
    if weights:
        pairs = zip(models, weights, strict=True)
        entries = [{"model": model, "parameters": {"weight": weight}} for model, weight in pairs]
    value = {"merge_method": method, "models": entries, **{key: found for key, found in keys.items() if found}}
    for item in settings:
        apply_override(value, f"parameters.{item}")
    text = yaml.safe_dump(value, sort_keys=False)
    return parse_merge_config(text, "the command line"), text
