"""The names of version 1 of the recipe: tables of renamed keys, values, units and unit settings."""

from typing import Any

__all__ = ["KEYS", "NESTED_UNIT_KEYS", "UNIT_KEYS", "UNIT_LISTS", "UNIT_NAMES", "UNIT_VALUES", "VALUES"]

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
"""The last part of a key in version 2, by the full key in version 1. List indices are left out of keys."""

UNIT_LISTS = frozenset({"devices.techniques", "merge", "train.techniques"})
"""Keys whose values are lists of techniques or merge steps, or names joined by ``+``."""

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
"""Values that were renamed in version 2, by their key in version 1."""

UNIT_NAMES = {
    "checkpointing": "gradient-checkpointing",
    "classifier": "head-only",
    "fused-head": "fused-cross-entropy",
    "live-norm": "batch-norm-statistics",
    "norm": "batch-norm",
    "selective-recompute": "selective-checkpointing",
}
"""Techniques that were renamed. The old names stay as aliases."""

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
"""Settings of techniques and merge steps that were renamed in version 2, by the unit's name in version 2."""

_FACTORS = {"freeze-a": "b-only", "none": "both", "remainder": "both-and-base"}
UNIT_VALUES: dict[str, dict[str, dict[Any, Any]]] = {
    "last-blocks": {"norms": {"live": "update"}},
    "lora": {"exact": _FACTORS},
    "mobiletl": {"last_norm": {"live": "update"}},
    "qlora": {"exact": _FACTORS},
    "rebasin": {"many": {"cycle": "mean-of-others"}},
}
"""Values of such settings that were renamed in version 2, by the setting's old name."""

NESTED_UNIT_KEYS = {("deft", "skip"): {"below": "skip_below", "gamma": "penalty"}}
"""Keys below a setting that were renamed in version 2, by the unit and the setting's old name."""
