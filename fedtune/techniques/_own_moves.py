"""FedDST: each client moves the mask itself, midway through a round; the server keeps the largest of what it averages.

Bibikar et al., "Federated Dynamic Sparse Training" (arXiv 2112.09824), Algorithm 1: magnitude out, gradient in, an
average over the clients that hold a weight, magnitude again.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune.contribution import Form
from fedtune.techniques._mask_moves import largest, moved
from fedtune.techniques._places import pack_places, place_forms, spread
from fedtune.techniques._technique import Answer

__all__ = ["averaged", "forms", "move", "told"]


def move(weight: Tensor, gradient: Tensor, mask: Tensor, count: int) -> Tensor:
    """Move the mask and zero what left, both in place; returns the mask as it was received."""
    received = mask.clone()
    mask.copy_(moved(weight, mask, gradient, count))
    weight *= mask
    return received


def forms(name: str, numel: int, count: int) -> dict[str, Form]:
    """What a client tells of a layer it moved."""
    places = place_forms(f"{name}.left", count, numel) | place_forms(f"{name}.wake", count, numel)
    return places | {f"{name}.wake_value": Form((count,))}


def told(name: str, weight: Tensor, received: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Where weights left and woke since a mask was received, and the values of the latter."""
    left, woke = ((one == 1).logical_and(other == 0) for one, other in ((received, mask), (mask, received)))
    found = {f"{name}.wake_value": weight[woke].float()}
    for what, places in (("left", left), ("wake", woke)):
        found |= pack_places(f"{name}.{what}", places.flatten().nonzero().flatten(), mask.numel())
    return found


def averaged(name: str, weight: Tensor, mask: Tensor, answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
    """Mean over those who hold each weight, then the mask of as many largest as before: (weight, mask).

    ``weight`` is the weighted sum over clients at the received mask's places, zero for those who dropped a place.
    """
    total = weight.double().flatten()
    holders = mask.double().flatten()
    for answer in answers:
        left, woke, values = _of(name, answer.tensors, mask.numel())
        holders += answer.weight * (woke - left)
        total += answer.weight * values
    held = holders > 1e-9
    mean = torch.where(held, total / holders, 0.0)
    after = largest(mean.abs().masked_fill(~held, -1.0), int(mask.sum())).view(mask.shape)
    return mean.view(weight.shape).float() * after, after


def _of(name: str, tensors: Mapping[str, Tensor], entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """1 where a client dropped a weight, 1 where it woke one, and the values of the latter; each [entries]."""
    value = tensors[f"{name}.wake_value"]
    ones = torch.ones_like(value)
    left, woke = (spread(f"{name}.{what}", tensors, ones, entries) for what in ("left", "wake"))
    return left, woke, spread(f"{name}.wake", tensors, value, entries)
