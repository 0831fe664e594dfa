"""Reads a ``config.json`` so that no key is passed over: one that is not known may change what a model computes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["ConfigurationReader", "UnknownBlocksError", "read_class_names", "read_configuration"]

Kind = TypeVar("Kind", bool, int, float, str)

_UNUSED = frozenset(
    (
        "_model_name_or_path", "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label",
        "initializer_range", "is_llama_config", "label2id", "model_type", "num_labels", "pretraining_tp",
        "problem_type", "rope_interleaved", "sep_token_id", "tokenizer_class", "torch_dtype", "transformers.js_config",
        "transformers_version", "unk_token_id", "use_cache",
    )
)  # fmt: skip
"""Keys that change nothing in the blocks."""
_FIXED: Mapping[str, Any] = {
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "gradient_checkpointing": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "position_embedding_type": "absolute",
    "return_dict": True,
}
"""Keys that change nothing as long as they have these values."""


class UnknownBlocksError(Exception):
    """Says why a model is not one of those whose blocks are built here: the end of a sentence."""


def read_configuration(folder: Path) -> dict[str, Any]:
    """Return the settings in a folder's ``config.json``."""
    try:
        found: Any = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UnknownBlocksError("its config.json cannot be read") from error
    if not isinstance(found, dict):
        raise UnknownBlocksError("its config.json has no settings")
    return found


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """Return the names of a trained head's classes, empty if it has none; None if only transformers can tell."""
    try:
        settings = read_configuration(folder)
    except UnknownBlocksError:
        return None
    if settings.get("model_type") not in _WITH_PLAIN_NAMES:
        return None
    named = {int(number): str(name) for number, name in (settings.get("id2label") or {}).items()}
    names = tuple(named[number] for number in sorted(named))
    return () if all(name == f"LABEL_{number}" for number, name in named.items()) else names


_WITH_PLAIN_NAMES = ("bert", "llama", "mistral", "qwen2")


class ConfigurationReader:
    """Takes settings one by one. What is left over at the end must be known to change nothing."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._left = dict(settings)

    def take_value(self, name: str, default: Kind) -> Kind:
        """Return a setting, or the default of transformers if it is absent."""
        value: Any = self._left.pop(name, default)
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(default):
            raise UnknownBlocksError(f"its config.json says {name}: {json.dumps(value)}")
        found: Kind = value
        return found

    def take_optional(self, name: str, default: int | None = None) -> int | None:
        """Return a whole number, or None."""
        return (
            None if self._left.get(name, default) is None and self._drop(name) else self.take_value(name, default or 0)
        )

    def take_list(self, name: str) -> list[Any]:
        """Return a list; an empty one if there is none."""
        value = self._left.pop(name, None) or []
        self.require_value(name, isinstance(value, list), value)
        return list(value)

    def take_settings(self, name: str) -> "ConfigurationReader | None":
        """Return the reader of settings within a setting; None if there are none."""
        value = self._left.pop(name, None) or {}
        self.require_value(name, isinstance(value, dict), value)
        return ConfigurationReader(value) if value else None

    def require_value(self, name: str, fits: bool, value: object) -> None:
        """Raise UnknownBlocksError unless a value fits."""
        if not fits:
            raise UnknownBlocksError(f"its config.json says {name}: {json.dumps(value)}")

    def refuse_unread_keys(self, unused: frozenset[str] = _UNUSED, fixed: Mapping[str, Any] = _FIXED) -> None:
        """Raise UnknownBlocksError if a setting was not taken that may change what the model computes."""
        for name, value in sorted(self._left.items()):
            if name not in unused and not (name in fixed and value == fixed[name]):
                raise UnknownBlocksError(f"its config.json says {name}: {json.dumps(value)}")

    def _drop(self, name: str) -> bool:
        self._left.pop(name, None)
        return True
