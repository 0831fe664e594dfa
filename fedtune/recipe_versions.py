"""Recipes of version 1 are translated to version 2 when they are read: keys and values take the field's names.

A file or a stored run without ``version`` is of version 1. The tables below are all that differs; a key that they do
not name is the same in both. Old names of techniques, merge steps and their settings stay as aliases in version 2.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = [
    "KEYS",
    "UNIT_KEYS",
    "UNIT_NAMES",
    "VERSION",
    "needs_translation",
    "read_stored_recipe",
    "translate_path",
    "translate_recipe",
    "translate_unit",
]

VERSION = 2
Path = tuple[str | int, ...]

KEYS = {
    "data.limit": "max_train_examples",
    "data.parts": "splits",
    "data.split": "partition",
    "data.split.by": "column",
    "data.split.per_client": "shards_per_client",
    "devices.batch": "batch_size",
    "devices.speed": "examples_per_second",
    "evaluation.batch": "batch_size",
    "evaluation.every": "every_n_rounds",
    "evaluation.examples": "max_examples",
    "evaluation.own": "local_holdout",
    "federation.clients": "clients_per_round",
    "federation.fraction": "fraction_train",
    "federation.late": "asynchronous",
    "federation.late.buffer": "buffer_size",
    "federation.late.oldest": "max_staleness",
    "federation.late.staleness": "staleness_exponent",
    "federation.max_norm": "max_update_norm",
    "federation.select": "selection",
    "federation.select.devices": "device_names",
    "federation.select.memory": "min_memory",
    "federation.select.prefer": "sampling",
    "privacy.clip": "clipping_norm",
    "privacy.delta": "target_delta",
    "privacy.noise": "noise_multiplier",
    "privacy.where": "noise_added_by",
    "train.batch": "batch_size",
    "train.by_length": "group_by_length",
    "train.clip": "max_grad_norm",
    "train.epochs": "local_epochs",
    "train.image": "image_size",
    "train.length": "max_length",
    "train.schedule": "lr_schedule",
    "train.steps": "local_steps",
    "train.warmup": "warmup_ratio",
}
"""The last part of a key in version 2, by the whole key in version 1. Keys of a list's entries leave out the index."""

VALUES: dict[str, dict[Any, Any]] = {
    "data.split.kind": {"size": "power-law"},
    "federation.select.prefer": {"longest-ago": "least-recent"},
    "privacy.where": {"client": "clients"},
    "task": {
        "causal-language-modelling": "text-generation",
        "sequence-classification": "text-classification",
    },
    "train.optimiser": {
        "adamw8bit": "adamw_8bit",
        "lion8bit": "lion_8bit",
        "paged_adamw8bit": "paged_adamw_8bit",
    },
}
"""Values that have another name in version 2, by their key in version 1."""

UNIT_NAMES = {
    "checkpointing": "gradient-checkpointing",
    "classifier": "head-only",
    "fused-head": "fused-cross-entropy",
    "live-norm": "batch-norm-statistics",
    "norm": "batch-norm",
    "selective-recompute": "selective-checkpointing",
}
"""Names of techniques that changed; the old ones stay as aliases."""

_LOW_RANK = {"exact": "trained_factors", "targets": "target_modules"}
_MEASURED = {
    "examples": "max_examples",
    "norms": "include_norms",
    "quantile": "peak_quantile",
    "statistics": "measured_by",
}
_STORED = {"stored_activations": "store_activations"}
UNIT_KEYS: dict[str, dict[str, str]] = {
    "activation-pruning": {
        "centre": "centre_features",
        "normalise": "standardise_weights",
        "per": "granularity",
        "prune": "pruned_fraction",
        "values": "value_precision",
    },
    "aim": _MEASURED,
    "batch-norm": _STORED,
    "bias": _STORED,
    "deft": {
        "alpha": "density_weight",
        "relu": "replace_with_relu",
        "skip": "skip_mlps",
        "threshold": "inference_threshold",
    },
    "dynamic-pruning": {
        "by": "updated_by",
        "every": "update_every",
        "share": "drop_fraction",
        "start": "initial_mask",
        "until": "last_update_round",
    },
    "fused-cross-entropy": {"chunk": "chunk_size"},
    "geometric-median": {"distances": "granularity", "iterations": "max_iterations"},
    "karcher": {"iterations": "max_iterations"},
    "last-blocks": {
        "blocks": "num_blocks",
        "head": "head_convolution",
        "micro_batch": "micro_batch_size",
        "norms": "norm_statistics",
    },
    "lora": _LOW_RANK,
    "mean": {"weight": "weighting"},
    "meft": {
        "bits": "value_bits",
        "factor": "scaling_factor",
        "merge": "output_stream",
        "mode": "arithmetic",
        "pieces": "num_chunks",
        **_STORED,
    },
    "mobiletl": {
        "blocks": "num_blocks",
        "cache": "cache_outputs",
        "hard_swish": "hard_swish_gradient",
        "head": "head_convolution",
        "last_norm": "last_norm_statistics",
        "mask": "relu6_gradient",
        "micro_batch": "micro_batch_size",
        **_STORED,
    },
    "model-stock": {"over": "granularity"},
    "nuslerp": {"over": "granularity"},
    "qlora": _LOW_RANK,
    "rebasin": {"many": "reference", "sweeps": "max_sweeps", "visits": "restarts"},
    "regmean": {"shrink": "off_diagonal_scale"},
    "selective-checkpointing": {"terms": "max_recomputed_inner_dim"},
    "shrink": _MEASURED,
    "tinytl": {"biases": "train_biases", "kernel": "kernel_size", **_STORED},
    "trimmed-mean": {"share": "trim_fraction"},
}
"""Settings of techniques and merge steps that have another name in version 2, by the unit's name in version 2."""

_FACTORS = {"freeze-a": "b-only", "none": "both", "remainder": "both-and-base"}
_UNIT_VALUES: dict[str, dict[str, dict[Any, Any]]] = {
    "last-blocks": {"norms": {"live": "update"}},
    "lora": {"exact": _FACTORS},
    "mobiletl": {"last_norm": {"live": "update"}},
    "qlora": {"exact": _FACTORS},
    "rebasin": {"many": {"cycle": "mean-of-others"}},
}
_NESTED = {("deft", "skip"): {"below": "skip_below", "gamma": "penalty"}}


def needs_translation(value: object) -> bool:
    """Whether a recipe, as it is written, is of version 1: no version is named, or 1."""
    return isinstance(value, Mapping) and value.get("version", 1) == 1


def translate_recipe(value: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of version 1 with the keys and values of version 2. What is not understood is left for the validation.

    A key that is given under both names stays under both, so that the validation refuses the old one.
    """
    translated: dict[str, Any] = _translate(value, "")
    return {"version": VERSION, **{key: found for key, found in translated.items() if key != "version"}}


def read_stored_recipe(text: str) -> dict[str, Any]:
    """A run's stored recipe as a mapping with the keys of version 2."""
    value: dict[str, Any] = json.loads(text)
    return translate_recipe(value) if needs_translation(value) else value


def _translate(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return dict(_translated_entries(value, key))
    if isinstance(value, list):
        return [_translate(entry, key) for entry in value]
    return VALUES[key].get(value, value) if key in VALUES and isinstance(value, str) else value


def _translated_entries(value: Mapping[Any, Any], key: str) -> Iterator[tuple[Any, Any]]:
    for name, entry in value.items():
        whole = f"{key}.{name}" if key else str(name)
        new = KEYS.get(whole, name)
        yield (name if new != name and new in value else new), _translate(entry, whole)


def translate_unit(unit: Any) -> Any:
    """A technique or a merge step under its present name, with the present names and values of its settings."""
    if isinstance(unit, str):
        return UNIT_NAMES.get(unit, unit)
    if not isinstance(unit, Mapping):
        return unit
    if "name" in unit:
        name = UNIT_NAMES.get(unit["name"], unit["name"])
        return {**unit, "name": name, **_settings_entry(name, unit.get("settings"))}
    return {
        UNIT_NAMES.get(name, name): _unit_settings(UNIT_NAMES.get(name, name), entry) for name, entry in unit.items()
    }


def _settings_entry(name: Any, settings: Any) -> dict[str, Any]:
    return {} if settings is None else {"settings": _unit_settings(name, settings)}


def _unit_settings(unit: Any, settings: Any) -> Any:
    if not isinstance(settings, Mapping):
        return settings
    names, values = UNIT_KEYS.get(unit, {}), _UNIT_VALUES.get(unit, {})
    found = {}
    for key, entry in settings.items():
        nested = _NESTED.get((unit, key), {})
        if nested and isinstance(entry, Mapping):
            entry = {nested.get(inner, inner): each for inner, each in entry.items()}
        elif key in values and isinstance(entry, str):
            entry = values[key].get(entry, entry)
        new = names.get(key, key)
        found[key if new in settings else new] = entry
    return found


def translate_path(path: Path) -> Path:
    """Where a key of version 1 stands in a recipe of version 2; indices of lists stay."""
    whole = ""
    found: list[str | int] = []
    for part in path:
        if isinstance(part, int):
            found.append(part)
            continue
        whole = f"{whole}.{part}" if whole else part
        found.append(KEYS.get(whole, part))
    return tuple(found)
