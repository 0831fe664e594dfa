"""The config.json of a merged model: number of layers, number of tokens, and special tokens."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedtune.errors import ModelError
from fedtune.offline_merge.json_file import read_json
from fedtune.offline_merge.merge_config import OutputSlice
from fedtune.offline_merge.model_set import ModelSet, read_model_config

__all__ = ["apply_slices", "with_token_ids", "with_vocabulary"]

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_ENDINGS = ("_token_id", "_token_index", "_token_ids")
_INDICES = ("_layers", "_idxs", "_indices")
_NOT_BY_LAYER = ("architectures", "bad_words_ids")


def apply_slices(settings: Mapping[str, Any], slices: Sequence[OutputSlice], models: ModelSet) -> dict[str, Any]:
    """Return the settings with the number of layers that the slices have, and per-layer settings in the new order.

    Raises ModelError if the settings do not count layers, if none are left, or if a per-layer setting is too short.
    """
    firsts = [part.sources[0] for part in slices]
    taken = [(source.model, number) for source in firsts for number in range(*source.layer_range)]
    keys = [key for key in _LAYERS if isinstance(settings.get(key), int)]
    origin = firsts[0].model
    if not keys:
        raise ModelError(f"{origin} does not say in config.json how many layers it has; give models in place of slices")
    if not taken:
        raise ModelError("the slices have no layer at all; take some")
    changed = {**settings, **dict.fromkeys(keys, len(taken))}
    own = {model: read_model_config(models.by_name[model]) for model, _ in taken}
    for key, value in settings.items():
        if not isinstance(value, list) or not value or key in _NOT_BY_LAYER or key.endswith(_ENDINGS):
            continue
        if len(value) == settings[keys[0]]:
            changed[key] = [_of_layer(own[model], key, number, model) for model, number in taken]
        elif key.endswith(_INDICES) and all(isinstance(at, int) for at in value):
            changed[key] = [
                place for place, (model, number) in enumerate(taken) if number in (own[model].get(key) or ())
            ]
    return changed


def _of_layer(settings: Mapping[str, Any], key: str, number: int, model: str) -> Any:
    values = settings.get(key)
    if not isinstance(values, list) or number >= len(values):
        raise ModelError(f"{model} says nothing of layer {number} under {key} in config.json; take another model")
    return values[number]


def with_vocabulary(settings: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return the settings with another number of tokens, also for a language model inside."""
    before = next(_sizes(settings), None)
    return {key: _with_rows(key, value, before, rows) for key, value in settings.items()}


def _sizes(settings: Mapping[str, Any]) -> Iterator[int]:
    """Return the numbers of tokens; those of a language model inside come first."""
    for key, value in settings.items():
        if isinstance(value, dict) and ("text" in key or "language" in key or key in ("decoder", "llm_config")):
            yield from _sizes(value)
    if isinstance(settings.get("vocab_size"), int):
        yield settings["vocab_size"]


def _with_rows(key: str, value: Any, before: int | None, rows: int) -> Any:
    if isinstance(value, dict):
        return {inner: _with_rows(inner, found, before, rows) for inner, found in value.items()}
    return rows if key == "vocab_size" and value == before else value


def with_token_ids(settings: Mapping[str, Any], models: ModelSet, file: str) -> dict[str, Any]:
    """Return the settings with the special token ids in ``file`` of the model whose tokenizer the result has."""
    path = models.numbered / file
    return _with_ids(settings, read_json(path)) if path.is_file() else dict(settings)


def _with_ids(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(settings)
    for key, value in own.items():
        inner = settings.get(key)
        if isinstance(value, dict) and isinstance(inner, dict):
            changed[key] = _with_ids(inner, value)
        elif key.endswith(_ENDINGS):
            changed[key] = value
    return changed
