"""Choose the memory-efficient replacement of each layer in a partly frozen network."""

from collections.abc import Mapping

from torch import nn

from fedtune.techniques._layers.conv2d import make_efficient_conv2d
from fedtune.techniques._layers.dropout import make_efficient_dropout
from fedtune.techniques._layers.frozen_batch_norm import make_frozen_batch_norm
from fedtune.techniques._layers.layer_replacement import replace_layer
from fedtune.techniques._layers.one_bit_activation import EXACT_GRADIENTS, GradientRule, make_one_bit_activation
from fedtune.techniques._layers.tensorflow_padding import move_padding_into_conv2d
from fedtune.techniques._layers.unfrozen_batch_norm import UnfrozenBatchNorm2d

__all__ = ["has_batch_norms", "make_layer_efficient", "make_model_efficient", "unfreeze_batch_norm"]


def has_batch_norms(model: nn.Module) -> bool:
    """Whether the network has batch norms, as mobile networks do."""
    return any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def unfreeze_batch_norm(norm: nn.Module) -> nn.Module:
    """A batch norm whose statistics are trained."""
    return UnfrozenBatchNorm2d.from_batch_norm(norm) if isinstance(norm, nn.BatchNorm2d) else norm


def make_layer_efficient(
    layer: nn.Module, rules: Mapping[type[nn.Module], GradientRule] = EXACT_GRADIENTS
) -> nn.Module:
    """The replacement of a convolution, norm, activation or dropout; call it after trained parameters are chosen."""
    return make_one_bit_activation(make_efficient_dropout(make_frozen_batch_norm(make_efficient_conv2d(layer))), rules)


def make_model_efficient(model: nn.Module) -> None:
    """Replace all layers, after trained parameters are chosen; gradients stay bit-equal."""
    move_padding_into_conv2d(model)
    for name, layer in list(model.named_modules()):
        if not any(True for _ in layer.children()):
            replace_layer(model, name, make_layer_efficient)
