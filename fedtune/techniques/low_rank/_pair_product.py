"""A linear layer plus its low-rank pair, in fewer passes over the output; bit-equal to PEFT's result.

PEFT multiplies B A x, which is as large as the output, by alpha / rank, and its gradient too. If the scale is a power
of two, multiplying the ``rank`` numbers A x instead is exact in both directions. Without gradients, the sum is written
over the product.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["add_pair_product"]


def add_pair_product(layer: Any, name: str, x: Tensor, result: Tensor) -> Tensor:
    """Return ``result``, which is W x in the precision of the base, plus the scaled product of a layer's pair."""
    up, scale = layer.lora_B[name], layer.scaling[name]
    inner = layer.lora_A[name](layer.lora_dropout[name](x))
    added: Tensor = up(inner * scale) if _commutes(up, scale) else up(inner) * scale
    if torch.is_grad_enabled() or added.dtype != result.dtype:
        return result + added
    return added.add_(result)


def _commutes(up: nn.Module, scale: float) -> bool:
    """Whether scaling the input of B is exact, and B has no hooks."""
    watched = up._forward_pre_hooks or up._forward_hooks
    return type(up) is nn.Linear and up.bias is None and not watched and math.frexp(scale)[0] == 0.5
