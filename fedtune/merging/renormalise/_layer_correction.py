"""Find the layers whose pre-activations can be corrected, in the order they run; the logits are never among them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, move_tensors
from fedtune.errors import ModelError
from fedtune.merging._layer_hooks import hook_layers

__all__ = ["ChannelAffine", "find_correctable_layers", "list_weight_layers", "merge_affine_into_layer"]

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


class ChannelAffine(NamedTuple):
    """z <- gain z + shift, per channel [c], in double precision."""

    gain: Tensor
    shift: Tensor


class _Run(NamedTuple):
    """One call of a layer."""

    layer: str
    inputs: Tensor
    output: Tensor


def list_weight_layers(net: nn.Module) -> list[str]:
    """Names of linear layers and convolutions, in the order they were registered."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return [name for name, layer in net.named_modules() if isinstance(layer, kinds)]


def find_correctable_layers(net: nn.Module, batch: Mapping[str, Tensor], *, shifts: bool) -> list[str]:
    """Convolutions and linear layers, or the batch norm right after one, in the order of a forward pass.

    ModelError if there are none, or if a layer cannot take the correction into its weights.
    """
    weighted = list_weight_layers(net)
    runs = _record_runs(net, batch, weighted)
    normed = {id(run.inputs) for run in runs if run.layer not in weighted}
    found = list(dict.fromkeys(run.layer for run in runs if id(run.output) not in normed))
    logits = [layer for layer in found if layer in weighted][-1:]
    mended = [layer for layer in found if layer not in logits]
    if not mended:
        raise ModelError(
            f"renormalise: {type(net).__name__} has no layer to mend before its logits; leave the step out"
        )
    for layer in mended:
        _check_layer(layer, net.get_submodule(layer), shifts=shifts)
    return mended


def _record_runs(net: nn.Module, batch: Mapping[str, Tensor], weighted: list[str]) -> list[_Run]:
    norms = [name for name, layer in net.named_modules() if isinstance(layer, _BATCH_NORM)]
    runs: list[_Run] = []

    def note(layer: str, inputs: Tensor, output: Tensor) -> None:
        runs.append(_Run(layer, inputs, output))

    with hook_layers(net, {*weighted, *norms}, note), torch.no_grad():
        net(**move_tensors(batch, find_device(net)))
    return runs


def _check_layer(name: str, layer: Any, *, shifts: bool) -> None:
    if layer.weight is None or getattr(layer, "transposed", False):
        raise ModelError(f"renormalise: nothing can be folded into {name!r}; leave the step out")
    if shifts and layer.bias is None:
        raise ModelError(f"renormalise: {name!r} has no bias to shift; take rescale")


@torch.no_grad()
def merge_affine_into_layer(name: str, layer: Any, change: ChannelAffine) -> dict[str, Tensor]:
    """Change a layer's output by its own weight and bias; the tensors that changed, by their names in the state."""
    gain = change.gain.reshape(-1, *[1] * (layer.weight.dim() - 1))
    changed = {f"{name}.weight": layer.weight.copy_(layer.weight.cpu().double() * gain)}
    if layer.bias is not None:
        changed[f"{name}.bias"] = layer.bias.copy_(layer.bias.cpu().double() * change.gain + change.shift)
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in changed.items()}
