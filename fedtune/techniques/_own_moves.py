"""FedDST: each client moves the mask itself, midway through a round; the server keeps the largest of what it averages.

Bibikar et al., "Federated Dynamic Sparse Training" (arXiv 2112.09824), Algorithm 1: magnitude out, gradient in, an
average over the clients that hold a weight, magnitude again.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedtune.contribution import Form
from fedtune.techniques._mask_moves import largest, moved
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
    place = Form((count,), "I32", numel)
    return {f"{name}.left_place": place, f"{name}.wake_place": place, f"{name}.wake_value": Form((count,))}


def told(name: str, weight: Tensor, received: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Where weights left and woke since a mask was received, and the values of the latter."""
    left, woke = ((one == 1).logical_and(other == 0) for one, other in ((received, mask), (mask, received)))
    return {
        f"{name}.left_place": left.flatten().nonzero().flatten().int(),
        f"{name}.wake_place": woke.flatten().nonzero().flatten().int(),
        f"{name}.wake_value": weight[woke].float(),
    }


def averaged(name: str, weight: Tensor, mask: Tensor, answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
    """Mean over those who hold each weight, then the mask of as many largest as before: (weight, mask).

    ``weight`` is the weighted sum over clients at the received mask's places, zero for those who dropped a place.
    """
    total = weight.double().flatten()
    holders = mask.double().flatten()
    for answer in answers:
        left, woke, values = _of(name, answer.tensors)
        holders.index_add_(0, left, torch.full(left.shape, -answer.weight, dtype=torch.float64))
        holders.index_add_(0, woke, torch.full(woke.shape, answer.weight, dtype=torch.float64))
        total.index_add_(0, woke, values * answer.weight)
    held = holders > 1e-9
    mean = torch.where(held, total / holders, 0.0)
    after = largest(mean.abs().masked_fill(~held, -1.0), int(mask.sum())).view(mask.shape)
    return mean.view(weight.shape).float() * after, after


def _of(name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    left, woke, values = (tensors[f"{name}.{what}"] for what in ("left_place", "wake_place", "wake_value"))
    return left.long(), woke.long(), values.double()
