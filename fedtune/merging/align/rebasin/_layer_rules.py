"""One rule per layer type: how channels pass through the layer."""

from collections.abc import Callable
from typing import Any

from torch import nn

from fedtune.merging.align.rebasin._spec_builder import PermutationSpecBuilder, TracedChannels, make_unsupported_error
from fedtune.models.layers import GlobalAveragePool

__all__ = ["apply_layer_rule"]


def apply_layer_rule(
    reading: PermutationSpecBuilder, where: str, layer: nn.Module, wire: TracedChannels
) -> TracedChannels:
    """The wire after a layer, whose tensors are given their axes; ModelError when its kind is not known."""
    for kinds, rule in _RULES:
        if isinstance(layer, kinds):
            return rule(reading, where, layer, wire)
    if layer.state_dict() or not (isinstance(layer, _PER_CHANNEL) or reading.is_fixed(wire)):
        raise make_unsupported_error(where, f"is a {type(layer).__name__}, which rebasin does not know")
    return wire._replace(is_spatial=wire.is_spatial and not isinstance(layer, (nn.Flatten, GlobalAveragePool)))


def _linear(reading: PermutationSpecBuilder, where: str, layer: Any, wire: TracedChannels) -> TracedChannels:
    if wire.is_spatial:
        raise make_unsupported_error(where, "is a linear layer on the columns of maps")
    return _apply_new_channels(reading, where, layer, (layer.out_features, layer.in_features), wire, spatial=False)


def _convolution(reading: PermutationSpecBuilder, where: str, layer: Any, wire: TracedChannels) -> TracedChannels:
    if layer.groups > 1:
        return _depthwise(reading, where, layer, wire)
    if layer.transposed or wire.channels not in (0, layer.in_channels):
        raise make_unsupported_error(
            where, f"is a convolution that rebasin does not know where {wire.channels} channels arrive"
        )
    return _apply_new_channels(reading, where, layer, (layer.out_channels, layer.in_channels), wire, spatial=True)


def _depthwise(reading: PermutationSpecBuilder, where: str, layer: Any, wire: TracedChannels) -> TracedChannels:
    if not layer.groups == layer.in_channels == layer.out_channels:
        raise make_unsupported_error(where, "is a grouped convolution that is not depthwise")
    return _apply_per_channel(reading, where, layer, layer.in_channels, wire)


def _apply_new_channels(
    reading: PermutationSpecBuilder,
    where: str,
    layer: nn.Module,
    size: tuple[int, int],
    wire: TracedChannels,
    *,
    spatial: bool,
) -> TracedChannels:
    """A layer with channels of its own; ``size`` counts outputs and inputs."""
    out = reading.add_permutation(where, size[0], spatial=spatial)
    reading.set_tensor_axes(
        where, layer, reading.make_axis(out, size[0], where), reading.make_axis(wire, size[1], where)
    )
    return out


def _apply_per_channel(
    reading: PermutationSpecBuilder, where: str, layer: nn.Module, size: int, wire: TracedChannels
) -> TracedChannels:
    """A layer that treats each channel alone."""
    reading.set_tensor_axes(where, layer, reading.make_axis(wire, size, where))
    return wire


def _batch_norm(reading: PermutationSpecBuilder, where: str, layer: Any, wire: TracedChannels) -> TracedChannels:
    return _apply_per_channel(reading, where, layer, layer.num_features, wire)


def _group_norm(reading: PermutationSpecBuilder, where: str, layer: Any, wire: TracedChannels) -> TracedChannels:
    if layer.num_groups not in (1, layer.num_channels):
        reading.require_groups(wire, layer.num_groups, where)
    return _apply_per_channel(reading, where, layer, layer.num_channels, wire)


def _layer_norm(reading: PermutationSpecBuilder, where: str, layer: Any, wire: TracedChannels) -> TracedChannels:
    if wire.is_spatial and len(layer.normalized_shape) == 1:
        raise make_unsupported_error(where, "is a layer norm over the columns of maps")
    return _apply_per_channel(reading, where, layer, layer.normalized_shape[0], wire)


_RULES: list[tuple[Any, Callable[[PermutationSpecBuilder, str, Any, TracedChannels], TracedChannels]]] = [
    (nn.Linear, _linear),
    (nn.modules.conv._ConvNd, _convolution),
    ((nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm), _batch_norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
]
_PER_CHANNEL = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh, nn.Identity, nn.modules.dropout._DropoutNd),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Flatten, GlobalAveragePool),
)
