"""Several merges in one file, as for mergekit-multi: documents with names, and one that may use their results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedtune.errors import RecipeError
from fedtune.offline_merge.merge_config import MergeConfig
from fedtune.offline_merge.model_inputs import build_steps
from fedtune.offline_merge.output_plan import check_parameters
from fedtune.recipe.yaml_file import parse_settings
from fedtune.recipe.yaml_text import YamlError, documents

__all__ = ["Stage", "check_stages", "replace_stage_names", "stages_of"]

_REFERENCES = ("model", "base_model", "tokenizer_source", "source")


class Stage(NamedTuple):
    """One merge of a file. ``needs`` are the names of the merges whose results it reads."""

    config: MergeConfig
    text: str
    needs: frozenset[str]


def stages_of(text: str, origin: str, overrides: Sequence[str] = ()) -> list[Stage]:
    """Return the merges of a text in an order in which each can be made. The overrides apply to the last one.

    The last one is the merge without a name; if all have names, the last in the file. Raises RecipeError if merges need
    each other, if two have the same name, or if the result is ambiguous.
    """
    try:
        texts = documents(text)
    except YamlError as error:
        raise RecipeError(f"{origin} {error}") from error
    if len(texts) == 1:
        return [Stage(parse_settings(MergeConfig, texts[0], origin, "merge", overrides), text, frozenset())]
    configs = [parse_settings(MergeConfig, one, origin, "merge") for one in texts]
    last = _last([config.name for config in configs], origin)
    configs[last] = parse_settings(MergeConfig, texts[last], origin, "merge", overrides)
    names = frozenset(config.name for place, config in enumerate(configs) if config.name and place != last)
    stages = [Stage(config, one.strip(), _needs(config, names)) for config, one in zip(configs, texts, strict=True)]
    return _in_order([*stages[:last], *stages[last + 1 :], stages[last]], origin)


def _last(names: Sequence[str | None], origin: str) -> int:
    known = [name for name in names if name is not None]
    if len(set(known)) < len(known):
        raise RecipeError(f"{origin}: two documents have one name; give each its own")
    if len(names) - len(known) > 1:
        raise RecipeError(f"{origin}: several documents have no name; give all but that of the result one")
    return names.index(None) if None in names else len(names) - 1


def _needs(config: MergeConfig, names: frozenset[str]) -> frozenset[str]:
    said = [
        config.base_model,
        config.tokenizer_source,
        config.tokenizer_rule and config.tokenizer_rule.source,
        *config.model_names,
    ]
    return frozenset(part for one in said if one for part in one.split("+")) & names


def _in_order(stages: Sequence[Stage], origin: str) -> list[Stage]:
    """Keep the order of the file, but put each merge after those it needs."""
    ordered: list[Stage] = []
    left = list(stages)
    while left:
        made = {stage.config.name for stage in ordered}
        ready = next((stage for stage in left if stage.needs <= made), None)
        if ready is None:
            names = ", ".join(str(stage.config.name) for stage in left if stage.config.name)
            raise RecipeError(f"{origin}: {names} need each other; begin with models that are there")
        ordered.append(ready)
        left.remove(ready)
    if ordered[-1] is not stages[-1]:
        raise RecipeError(
            f"{origin}: {stages[-1].config.name} is last but others need it; put what makes the result last"
        )
    return ordered


def check_stages(stages: Sequence[Stage]) -> None:
    """Raise RecipeError for an unknown method, step or parameter, before the first merge is made."""
    for stage in stages:
        check_parameters(stage.config, build_steps(stage.config).combine)


def replace_stage_names(config: MergeConfig, folders: Mapping[str, Path]) -> MergeConfig:
    """Replace the names of merges by their folders."""
    return MergeConfig.model_validate(_renamed(config.model_dump(), "", folders))


def _renamed(value: Any, key: str, folders: Mapping[str, Path]) -> Any:
    if isinstance(value, dict):
        return {inner: _renamed(found, inner, folders) for inner, found in value.items()}
    if isinstance(value, list | tuple):
        return [_renamed(found, key, folders) for found in value]
    if isinstance(value, str) and key in _REFERENCES:
        return "+".join(str(folders.get(part, part)) for part in value.split("+"))
    return value
