"""Layers of a frozen net that keep nothing for the backward pass which no trained parameter needs."""

from collections.abc import Mapping

from torch import nn

from fedtune.techniques._lean_conv import lean
from fedtune.techniques._lean_dropout import lean_dropout
from fedtune.techniques._live_norm import LiveNorm
from fedtune.techniques._masked import EXACT, Rule, masked
from fedtune.techniques._recast import replace
from fedtune.techniques._shift_norm import shift_norm
from fedtune.techniques._tf_padding import pad_inside

__all__ = ["has_batch_norms", "live", "spare", "spare_all"]


def has_batch_norms(model: nn.Module) -> bool:
    """Whether it is a net of the kind this is for."""
    return any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def live(norm: nn.Module) -> nn.Module:
    """A batch norm whose statistics are trained."""
    return LiveNorm.of(norm) if isinstance(norm, nn.BatchNorm2d) else norm


def spare(layer: nn.Module, rules: Mapping[type[nn.Module], Rule] = EXACT) -> nn.Module:
    """A convolution, norm, activation or dropout that keeps less, once it is known what is trained; others as is."""
    return masked(lean_dropout(shift_norm(lean(layer))), rules)


def spare_all(model: nn.Module) -> None:
    """All layers of a net whose trained parameters have been chosen; gradients stay the same to the bit."""
    pad_inside(model)
    for name, layer in list(model.named_modules()):
        if not any(True for _ in layer.children()):
            replace(model, name, spare)
