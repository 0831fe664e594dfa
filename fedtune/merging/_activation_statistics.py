"""Activation statistics of the input channels of a model's weights: sums of |x| over real tokens, measured by hooks."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, move_tensors
from fedtune.errors import RecipeError
from fedtune.merging._input_hooks import Batch, hook_layer_inputs
from fedtune.merging._step import ActivationStatistics
from fedtune.merging.relax._activation_step import ActivationRelaxStep
from fedtune.techniques import Technique, begin_step
from fedtune.wire.masked_weights import mask_name

__all__ = [
    "ActivationSums",
    "InputChannels",
    "average_activations",
    "check_merge_has_targets",
    "find_input_channels",
    "measure_activation_statistics",
    "sum_activations",
]


class InputChannels(NamedTuple):
    """The input channels of a weight.

    ``input_axis`` is their axis in the layer's input and ``weight_axis`` their axis in the weight.
    """

    layer: nn.Module
    input_axis: int
    weight_axis: int
    size: int
    groups: int = 1


@dataclass
class ActivationSums:
    """Sums of |x| [channels], fp64, over ``count`` tokens, pixels or examples. Sums can be added."""

    sums: Tensor
    count: int = 0


def find_input_channels(model: nn.Module, names: AbstractSet[str] | None = None) -> dict[str, InputChannels]:
    """Return the input channels of each weight that has any, by parameter name. ``names`` restricts the weights.

    Embeddings are left out, by name or because a weight is tied to one. So is B of a low-rank pair, whose inputs are
    ranks and not channels, and fused expert parameters, which have no layer of their own.
    """
    embeddings = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, InputChannels] = {}
    for path, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        if weight is None or id(weight) in embeddings or "embed" in path.lower() or ".lora_B." in path:
            continue
        place = _input_channels_of(layer, weight)
        if place is not None and (names is None or known[id(weight)] in names):
            found[known[id(weight)]] = place
    return found


def _input_channels_of(layer: nn.Module, weight: Tensor) -> InputChannels | None:
    if not weight.is_floating_point():  # the packed weight of a four-bit layer
        return None
    if isinstance(layer, nn.Linear):
        return InputChannels(layer, -1, 1, layer.in_features)
    if type(layer).__name__ == "Conv1D":  # from transformers, which image classification does not import
        return InputChannels(layer, -1, 0, len(weight))
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return InputChannels(layer, 1, 0, layer.in_channels)
    if isinstance(layer, nn.modules.conv._ConvNd):
        return InputChannels(layer, 1, 1, layer.in_channels, layer.groups)
    if weight.dim() == 1 and "norm" in type(layer).__name__.lower():
        by_channel = isinstance(layer, nn.modules.batchnorm._NormBase | nn.GroupNorm)
        return InputChannels(layer, 1 if by_channel else -1, 0, len(weight))
    return None


def check_merge_has_targets(steps: Sequence[object], model: nn.Module, shared: Collection[str]) -> None:
    """Raise RecipeError when a step that uses activation statistics has no shared tensor to scale."""
    for step in steps:
        if isinstance(step, ActivationRelaxStep) and step.needs:
            _require_scaled(step, model, shared)


def _require_scaled(step: ActivationRelaxStep, model: nn.Module, shared: Collection[str]) -> None:
    places = find_input_channels(model, set(shared))
    scaled = [name for name in places if step.include_norms or model.get_parameter(name).dim() > 1]
    if any(mask_name(name) in shared for name in scaled):
        raise RecipeError(f"merge: {step.name} scales whole columns, but masked weights are sent without; drop one")
    if not scaled:
        raise RecipeError(
            f"merge: {step.name} scales weights by the activity of their inputs, but train.techniques trains no such "
            f"weight; drop {step.name}, or train full or lora with trained_factors: alternate"
        )


def measure_activation_statistics(
    model: nn.Module, batches: Iterable[Batch], techniques: Sequence[Technique] = ()
) -> dict[str, ActivationStatistics]:
    """Return the mean |x| of every input channel over the batches, by parameter name. Labels are ignored.

    Layers that are never called are left out. The model is left in evaluation mode.
    """
    return average_activations(
        find_input_channels(model), sum_activations(model, find_input_channels(model), batches, techniques)
    )


@torch.no_grad()
def sum_activations(
    model: nn.Module,
    places: Mapping[str, InputChannels],
    batches: Iterable[Batch],
    techniques: Sequence[Technique] = (),
) -> dict[str, ActivationSums]:
    """Return the sums of |x| of the layers at ``places``, by parameter name.

    ``hook_layer_inputs`` leaves out padding.
    """
    found = {name: ActivationSums(torch.zeros(place.size, dtype=torch.float64)) for name, place in places.items()}
    model.eval()
    device = find_device(model)
    with hook_layer_inputs(
        {name: (place.layer, place.input_axis) for name, place in places.items()}, partial(_add, found)
    ) as begin:
        for batch in batches:
            inputs = move_tensors({name: tensor for name, tensor in batch.items() if name != "labels"}, device)
            begin_step(techniques, model, inputs, 1.0)
            begin(inputs)
            model(**inputs)
    return found


def _add(found: Mapping[str, ActivationSums], name: str, rows: Tensor) -> None:
    total = found[name]
    if rows.shape[1] != len(total.sums):  # a norm over another axis than the last
        return
    total.sums += sum_in_double(rows.abs()).cpu()
    total.count += len(rows)


def sum_in_double(rows: Tensor) -> Tensor:
    """Return the sum over rows in double precision. MPS has none, so such rows are summed on the CPU."""
    return (rows.cpu() if rows.device.type == "mps" else rows).sum(0, dtype=torch.float64)


def average_activations(
    places: Mapping[str, InputChannels], found: Mapping[str, ActivationSums]
) -> dict[str, ActivationStatistics]:
    """Return means from sums, in the shape that each weight needs. Sums with a count of zero are left out."""
    return {
        name: ActivationStatistics(_expand_groups(places[name], total.sums / total.count), places[name].weight_axis)
        for name, total in found.items()
        if total.count
    }


def _expand_groups(place: InputChannels, level: Tensor) -> Tensor:
    """Return [channels] unchanged, or for a grouped convolution [out, channels of the row's group]."""
    if place.groups == 1:
        return level
    rows = int(place.layer.out_channels) // place.groups  # type: ignore[arg-type]
    return level.reshape(place.groups, -1).repeat_interleave(rows, 0)
