"""Coefficients [K, G] of points on a sphere, from the inner products [K, K, G] of K vectors."""

import torch
from torch import Tensor

__all__ = ["compute_cosines", "compute_karcher_coefficients", "compute_slerp_coefficients"]

_TINY = 1e-6
"""Radians below which the sine of an angle stands for it, or its opposite is not told from it."""


def compute_slerp_coefficients(gram: Tensor, t: float | Tensor, near: float) -> Tensor:
    """c [2, G] with c_1 = sin((1 - t) O) / sin O and c_2 = sin(t O) / sin O; 1 - t and t when |cos O| exceeds near."""
    cosine = compute_cosines(gram)[0, 1]
    angle = cosine.clamp(-1, 1).acos()
    straight = (cosine.abs() > near) | (gram[0, 0] == 0) | (gram[1, 1] == 0)
    arc = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / angle.sin()
    line = torch.stack([torch.ones_like(angle) * (1 - t), torch.ones_like(angle) * t])
    return torch.where(straight, line, arc)


def compute_cosines(gram: Tensor) -> Tensor:
    """Cosines of the angles between vectors [K, K, G]; those with a zero vector are zero."""
    norms = _compute_norms(gram)
    return (gram / (norms[:, None] * norms[None])).nan_to_num(0.0, 0.0, 0.0)


def compute_karcher_coefficients(gram: Tensor, share: Tensor, iterations: int, tolerance: float) -> Tensor:
    """c of the Karcher mean of the directions times the mean norm, with shares [K, 1]; linear if there is none.

    u <- exp_u(sum_i w_i log_u(x_i / |x_i|)) from the normalised mean, until a step is shorter than ``tolerance``.
    """
    unit, norms = compute_cosines(gram), _compute_norms(gram)
    counted = torch.where(norms > 0, share, 0.0)
    w = counted / counted.sum(0)
    length = _compute_length(w, unit)
    u = w / length
    for _ in range(iterations):
        u, step = _step_towards_mean(u, w, unit)
        if not bool((step > tolerance).any()):
            break
    found = (share * norms).sum(0) * (u / norms).nan_to_num(0.0, 0.0, 0.0)
    return torch.where(length > _TINY, found, share.expand_as(found))


def _step_towards_mean(u: Tensor, w: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """exp_u of the mean of the logarithms, and that mean's length [G]."""
    cosine = torch.einsum("ijg,jg->ig", unit, u).clamp(-1, 1)
    angle = cosine.acos()
    stretch = torch.where(angle.sin() > _TINY, angle / angle.sin(), (cosine > 0).double())
    tangent = w * stretch - (w * stretch * cosine).sum(0) * u
    length = _compute_length(tangent, unit)
    return length.cos() * u + torch.sinc(length / torch.pi) * tangent, length


def _compute_norms(gram: Tensor) -> Tensor:
    return torch.einsum("iig->ig", gram).sqrt()


def _compute_length(c: Tensor, gram: Tensor) -> Tensor:
    """|sum_i c_i x_i| [G]."""
    return torch.einsum("ig,ijg,jg->g", c, gram, c).clamp_min(0).sqrt()
