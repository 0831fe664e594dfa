"""A linear layer plus its low-rank pair, in fewer passes over the output; bit-equal to PEFT's result.

PEFT multiplies B A x, which is as large as the output, by alpha / rank, and its gradient too. If the scale is a power
of two, multiplying the ``rank`` numbers A x instead is exact in both directions. Without gradients, the sum is written
over the product.
"""

import math
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

__all__ = ["sum_in_fewer_passes"]


def sum_in_fewer_passes(layer: LoraLayer) -> None:
    """Let a plain layer of PEFT compute its sum this way; other layers stay as they are."""
    if type(layer) is Linear and not layer.lora_variant:
        layer.lora_variant = dict.fromkeys(layer.lora_A, _PairSum())


class _PairSum(LoraVariant):  # type: ignore[misc]
    """PEFT's hook for another way to compute W x + scale B A x."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """``result`` is W x, in the precision of the base."""
        up, scale = module.lora_B[active_adapter], module.scaling[active_adapter]
        inner = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        added: Tensor = up(inner * scale) if _commutes(up, scale) else up(inner) * scale
        if torch.is_grad_enabled() or added.dtype != result.dtype:
            return result + added
        return added.add_(result)


def _commutes(up: nn.Module, scale: float) -> bool:
    """Whether scaling the input of B is exact, and B has no hooks."""
    watched = up._forward_pre_hooks or up._forward_hooks
    return type(up) is nn.Linear and up.bias is None and not watched and math.frexp(scale)[0] == 0.5
