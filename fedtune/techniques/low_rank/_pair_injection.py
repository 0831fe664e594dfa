"""Adds one or several low-rank pairs to each layer through PEFT, all of them active."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.techniques.low_rank._pair_sum import sum_in_fewer_passes
from fedtune.techniques.low_rank._paired_linear import PairSettings

__all__ = ["inject_pairs"]


def inject_pairs(model: nn.Module, targets: list[str], names: Sequence[str], settings: PairSettings, seed: int) -> None:
    """Add pairs of these names beside layers, drawn from ``seed``."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
    )
    with _keep_gradients_on(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _add_pairs(model, config, names)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            _copy_conv_shape(layer)
            sum_in_fewer_passes(layer)


def _add_pairs(model: nn.Module, config: LoraConfig, names: Sequence[str]) -> None:
    """Add a pair of each name. PEFT would use the last one alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for name in names:
            inject_adapter_in_model(config, model, adapter_name=name)
    if len(names) > 1:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.set_adapter(list(names))


@contextmanager
def _keep_gradients_on(model: nn.Module) -> Iterator[None]:
    """PEFT switches off every gradient but its own; what other techniques switched on before, stays on."""
    on = [parameter for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter in on:
        parameter.requires_grad_(True)


def _copy_conv_shape(layer: LoraLayer) -> None:
    """Some models ask a convolution for its shape before they run it, to pad its input."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        for name in ("kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(layer, name, getattr(base, name))
