"""Compute weight masks (uint8, 1 where active) from the largest entries, and update them."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedtune.techniques.pruning._packed_positions import scatter_positions

__all__ = ["average_gradients", "mask_largest", "mask_smallest_active", "update_mask"]


def mask_largest(scores: Tensor, count: int) -> Tensor:
    """uint8 like ``scores``: 1 at its ``count`` largest entries, of equal ones the first."""
    mask = torch.zeros(scores.numel(), dtype=torch.uint8, device=scores.device)
    mask[scores.flatten().sort(descending=True, stable=True).indices[:count]] = 1
    return mask.view(scores.shape)


def mask_smallest_active(weight: Tensor, mask: Tensor, count: int) -> Tensor:
    """uint8 like ``mask``: 1 at the ``count`` active entries of least magnitude, of equal ones the first."""
    return mask_largest(-weight.abs().masked_fill(mask == 0, math.inf), count)


def update_mask(weight: Tensor, mask: Tensor, gradient: Tensor, count: int) -> Tensor:
    """The next mask: the smallest active weights are dropped, as many with the largest gradients are activated.

    Only weights that were inactive before are activated, so that no weight is dropped and activated at once.
    """
    dropped = mask_smallest_active(weight, mask, count)
    activated = mask_largest(gradient.abs().masked_fill(mask == 1, -1.0), count)
    return mask - dropped + activated


def average_gradients(mask: Tensor, extra_payloads: Iterable[tuple[float, Mapping[str, Tensor]]], owner: str) -> Tensor:
    """The weighted mean of the clients' gradients, zero where none was sent; like ``mask``, double."""
    total = torch.zeros(mask.numel(), dtype=torch.float64)
    for weight, tensors in extra_payloads:
        total += weight * scatter_positions(f"{owner}.wake", tensors, tensors[f"{owner}.wake_gradient"], mask.numel())
    return total.view(mask.shape)
