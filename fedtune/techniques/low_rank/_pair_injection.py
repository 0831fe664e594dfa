"""Adds one or several low-rank pairs to each layer through PEFT, all of them active."""

import warnings
from collections.abc import Sequence

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

__all__ = ["add_pairs"]


def add_pairs(model: nn.Module, config: LoraConfig, names: Sequence[str]) -> None:
    """Add a pair of each name. PEFT would use the last one alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for name in names:
            inject_adapter_in_model(config, model, adapter_name=name)
    if len(names) > 1:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.set_adapter(list(names))
