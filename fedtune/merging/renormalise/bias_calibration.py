"""Bias calibration: reduce biases with depth as merging reduces the signal. Needs no data.

What: the weights stay as merged, and the bias of layer h becomes sum_i w_i^h b_i. In a network of averaged weights,
every layer weakens the part of the signal that depends on the input, but not the biases. This step weakens the biases
by the same factor.
Memory: one bias.
Use when: deep nets without norms were merged and no data are available to renormalise with.
Avoid when: data are available; repair or rescale were better in every case measured here. A merge of equal models is no
longer equal to them, unless one weight is 1.
Source: Qu & Horvath (arXiv 2402.05966), in its later version "Vanishing Feature".
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.merging._step import MergeContext, RenormaliseStep
from fedtune.merging.renormalise._layer_correction import list_weight_layers

__all__ = ["BiasCalibration"]

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class BiasCalibration(RenormaliseStep):
    """Scales biases by powers of the weights, by depth."""

    name: ClassVar[str] = "bias-calibration"
    needs: ClassVar[frozenset[str]] = frozenset({"model"})

    def renormalise(
        self, merged: Mapping[str, Tensor], ends: Sequence[tuple[float, Mapping[str, Tensor]]], context: MergeContext
    ) -> dict[str, Tensor]:
        """The corrected biases of linear layers and convolutions."""
        if context.model is None:
            raise ModelError("bias-calibration: it needs the model for the order of its layers; provide it")
        norm = next((name for name, layer in context.model.named_modules() if isinstance(layer, _NORMS)), None)
        if norm is not None:
            raise ModelError(
                f"bias-calibration: {norm!r} normalises the values that it would shrink; use reset or repair"
            )
        biases = [f"{layer}.bias" for layer in list_weight_layers(context.model)]
        return {
            bias: _calibrate_bias(bias, depth, ends).to(merged[bias].dtype)
            for depth, bias in enumerate(biases, start=1)
            if bias in merged
        }


def _calibrate_bias(bias: str, depth: int, ends: Sequence[tuple[float, Mapping[str, Tensor]]]) -> Tensor:
    """sum_i w_i^h b_i."""
    return torch.stack([weight**depth * end[bias].double() for weight, end in ends]).sum(0)
