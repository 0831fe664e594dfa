"""REPAIR, RESCALE and RESHIFT: correct the pre-activations of a merged network.

z <- sigma* (z - mu) / sigma + mu*, where mu* = sum_i w_i mu_i and sigma* = sum_i w_i sigma_i are weighted averages over
the aligned input models in evaluation mode. Each published name says which of the two is matched. The correction is
merged into weights and biases. Layers are corrected in order, and each one is measured after all earlier layers are
corrected. Otherwise deep layers would be corrected for errors that no longer exist. If a batch norm follows directly,
its output is the pre-activation, and its weight and bias take the correction. Means and deviations are pooled over all
calibration data in double precision; the authors use those of each batch, with eps inside the root. A channel that does
not vary keeps a gain of 1.
Costs: one forward pass over the data per input model, and one up to each layer for the merged network.
Source: Jordan et al. (arXiv 2211.08403), section 4.
"""

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.merging._layer_hooks import use_state_dict
from fedtune.merging._step import MergeContext, RenormaliseStep
from fedtune.merging.renormalise._channel_moments import Batches, ChannelMoments, measure_channel_moments
from fedtune.merging.renormalise._layer_correction import (
    ChannelAffine,
    find_correctable_layers,
    merge_affine_into_layer,
)

__all__ = ["MomentRenormaliseStep", "require_model_and_batches"]

_MIN_STD = 1e-8
Tensors = Mapping[str, Tensor]


class MomentRenormaliseStep(RenormaliseStep, ABC):
    """Corrects one layer after the other; a subclass chooses which moments are matched."""

    matches_std: ClassVar[bool]
    """Whether deviations are matched."""
    matches_mean: ClassVar[bool]
    """Whether means are matched."""

    def renormalise(
        self, merged: Tensors, ends: Sequence[tuple[float, Tensors]], context: MergeContext
    ) -> dict[str, Tensor]:
        """The weights and biases of all layers but that of the logits."""
        net, batches = require_model_and_batches(self.name, context)
        with use_state_dict(net, merged):
            layers = find_correctable_layers(net, batches[0], shifts=self.matches_mean)
        goals = _compute_target_moments(net, batches, layers, ends)
        changed: dict[str, Tensor] = {}
        with use_state_dict(net, merged):
            for layer in layers:
                now = measure_channel_moments(net, batches, {layer})[layer]
                changed |= merge_affine_into_layer(layer, net.get_submodule(layer), self._change(now, goals[layer]))
        return changed

    def _change(self, now: ChannelMoments, goal: ChannelMoments) -> ChannelAffine:
        """Of z: sigma*/sigma and what brings the mean to the goal; without shifts the mean is scaled along."""
        alive = now.std >= _MIN_STD
        ratio = torch.where(alive, goal.std / torch.where(alive, now.std, 1.0), 1.0)
        gain = ratio if self.matches_std else torch.ones_like(ratio)
        return ChannelAffine(gain, goal.mean - gain * now.mean if self.matches_mean else torch.zeros_like(gain))


def require_model_and_batches(step: str, context: MergeContext) -> tuple[nn.Module, Batches]:
    """The architecture and the data, or ModelError."""
    if context.model is None or not context.calibration_batches:
        raise ModelError(f"{step}: it needs the model and calibration data; give some, or leave {step} out")
    return context.model, context.calibration_batches


def _compute_target_moments(
    net: nn.Module, batches: Batches, layers: Sequence[str], ends: Sequence[tuple[float, Tensors]]
) -> dict[str, ChannelMoments]:
    """Weighted means of the input models' means and deviations."""
    zero = torch.zeros((), dtype=torch.float64)
    goals = dict.fromkeys(layers, ChannelMoments(zero, zero))
    for weight, end in ends:
        with use_state_dict(net, end):
            found = measure_channel_moments(net, batches, set(layers))
        for layer, (mean, deviation) in found.items():
            goals[layer] = ChannelMoments(goals[layer].mean + weight * mean, goals[layer].std + weight * deviation)
    return goals
