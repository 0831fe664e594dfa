"""EWC's penalty: a quadratic around the parameters of the last border, weighted by the Fisher information."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["average_sums", "compute_quadratic_penalty", "decay_fisher", "scale_to_unit_mean"]

Tensors = Mapping[str, Tensor]


def average_sums(uploads: Sequence[Tensors], counts: Sequence[float]) -> dict[str, Tensor]:
    """Return the mean over the examples of all clients, in fp64, added in the given order; empty without examples."""
    total = sum(counts)
    if not total:
        return {}
    return {name: sum_in_order([one[name] for one in uploads]) / total for name in uploads[0]}


def sum_in_order(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum in fp64."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for one in tensors:
        total += one.double()
    return total


def scale_to_unit_mean(fisher: Tensors) -> dict[str, Tensor]:
    """Return the Fisher information divided by its mean over all entries, so that strengths mean the same everywhere.

    At a good fit, gradients and thus the raw values are near zero.
    """
    count = sum(one.numel() for one in fisher.values())
    mean = sum(float(one.double().sum()) for one in fisher.values()) / max(1, count)
    return {name: one / mean if mean > 0 else one.clone() for name, one in fisher.items()}


def decay_fisher(old: Tensors, new: Tensors, decay: float) -> dict[str, Tensor]:
    """Return decay * old + new, the online form: one Fisher information and one anchor for all earlier tasks."""
    return {name: one + decay * old[name].to(one.dtype) if name in old else one for name, one in new.items()}


def compute_quadratic_penalty(model: nn.Module, anchor: Tensors, fisher: Tensors, strength: float) -> Tensor | None:
    """Return strength / 2 * sum_i F_i (theta_i - anchor_i)^2 over the trained parameters; None without any."""
    parts = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in fisher:
            move = parameter.float() - anchor[name].to(parameter.device, torch.float32)
            parts.append((fisher[name].to(parameter.device, torch.float32) * move.square()).sum())
    return strength / 2 * torch.stack(parts).sum() if parts else None
