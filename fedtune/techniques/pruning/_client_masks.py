"""FedDST: each client updates its mask midway through a round; the server averages weights and keeps the largest.

Bibikar et al., "Federated Dynamic Sparse Training" (arXiv 2112.09824), Algorithm 1: magnitude out, gradient in, an
average over the clients that hold a weight, magnitude again.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune.techniques._technique import ExtraPayload
from fedtune.techniques.pruning._mask_updates import mask_largest, update_mask
from fedtune.techniques.pruning._packed_positions import declare_positions, pack_positions, scatter_positions
from fedtune.wire.client_update import TensorSpec

__all__ = ["average_over_holders", "declare_mask_update", "pack_mask_update", "update_client_mask"]


def update_client_mask(weight: Tensor, gradient: Tensor, mask: Tensor, count: int) -> Tensor:
    """Update the mask and set dropped weights to zero, both in place; returns the mask that was received."""
    received = mask.clone()
    mask.copy_(update_mask(weight, mask, gradient, count))
    weight *= mask
    return received


def declare_mask_update(name: str, numel: int, count: int) -> dict[str, TensorSpec]:
    """The tensors by which a client reports a mask update of a layer."""
    places = declare_positions(f"{name}.left", count, numel) | declare_positions(f"{name}.wake", count, numel)
    return places | {f"{name}.wake_value": TensorSpec((count,))}


def pack_mask_update(name: str, weight: Tensor, received: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The positions of weights dropped and activated since the mask was received, and the values of the latter."""
    left, woke = ((one == 1).logical_and(other == 0) for one, other in ((received, mask), (mask, received)))
    found = {f"{name}.wake_value": weight[woke].float()}
    for what, places in (("left", left), ("wake", woke)):
        found |= pack_positions(f"{name}.{what}", places.flatten().nonzero().flatten(), mask.numel())
    return found


def average_over_holders(
    name: str, weight: Tensor, mask: Tensor, extra_payloads: Sequence[ExtraPayload]
) -> tuple[Tensor, Tensor]:
    """The mean of each weight over the clients that have it, and the mask of as many largest weights as before.

    ``weight`` is the weighted sum over clients at the positions of the received mask; dropped positions are zero.
    """
    total = weight.double().flatten()
    holders = mask.double().flatten()
    for sent in extra_payloads:
        left, woke, values = _unpack_mask_update(name, sent.tensors, mask.numel())
        holders += sent.weight * (woke - left)
        total += sent.weight * values
    held = holders > 1e-9
    mean = torch.where(held, total / holders, 0.0)
    after = mask_largest(mean.abs().masked_fill(~held, -1.0), int(mask.sum())).view(mask.shape)
    return mean.view(weight.shape).float() * after, after


def _unpack_mask_update(name: str, tensors: Mapping[str, Tensor], entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """1 where a client dropped a weight, 1 where it activated one, and the values of the latter; each [entries]."""
    value = tensors[f"{name}.wake_value"]
    ones = torch.ones_like(value)
    left, woke = (scatter_positions(f"{name}.{what}", tensors, ones, entries) for what in ("left", "wake"))
    return left, woke, scatter_positions(f"{name}.wake", tensors, value, entries)
