"""Check an adapter's configuration: it must be a LoRA that changes only products and whole modules."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from fedtune.errors import ModelError, SourceError

__all__ = ["check_adapter"]

_UNLIKE = (
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "kasa_config",
    "monteclora_config",
)
"""Settings under which an adapter is more than a product per module."""
_SOMETIMES = ("alora_invocation_tokens", "arrow_config")
"""Settings under which an adapter acts on some tokens and not on others."""
_KNOWN = frozenset(field.name for field in dataclasses.fields(LoraConfig))
_TOLD_ONLY = ("version", "unsloth", "merge_weights")
"""Parts of settings that other tools add and that change nothing."""


def check_adapter(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError for an adapter that changes more than products, SourceError for an invalid configuration."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{folder} is a {kind} adapter; only LoRA and DoRA adapters are merged by their products")
    for key in (key for key, value in config.items() if value):
        if key in _UNLIKE:
            raise ModelError(f"{folder} has {key}, which no product of two factors can carry; fold it with peft")
        if key in _SOMETIMES:
            raise ModelError(f"{folder} has {key}, so it acts on some tokens only and is no change of the weights")
        if key not in _KNOWN and not any(part in key for part in _TOLD_ONLY):
            raise ModelError(f"{folder} has {key}, which fedtune does not know; fold it with a peft that does")
    heads = config.get("modules_to_save") or []
    if not isinstance(heads, list) or not all(isinstance(name, str) for name in heads):
        raise SourceError(f"{folder} has modules_to_save {heads!r}, which is no list of names; fetch it again")
