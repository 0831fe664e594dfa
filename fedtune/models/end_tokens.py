"""End tokens in the generation settings of an exported model."""

from collections.abc import Set
from copy import copy
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["save_end_tokens"]


def save_end_tokens(model: nn.Module, ends: Set[int], folder: Path) -> None:
    """Write a transformers model's generation settings with the token ids ``ends`` added to its own end tokens."""
    config: Any = copy(model.generation_config)
    own = config.eos_token_id
    named = list(own) if isinstance(own, list) else [own] if own is not None else []
    config.eos_token_id = [*named, *sorted(ends - set(named))]
    config.save_pretrained(folder)
