"""Clipping: a contribution as a whole is scaled down to a given L2 norm.

What: delta * min(1, clip / |delta|), |delta| being the norm over all tensors together, taken in double precision.
Source: McMahan et al., "Learning Differentially Private Recurrent Language Models" (arXiv 1710.06963), flat clipping.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedtune.errors import ClientUpdateError

__all__ = ["ROUNDING_SLACK", "clip_to_norm"]

ROUNDING_SLACK = 1e-6
"""Clipped deltas are rounded to fp32, by 6e-8 of each value: their norm passes the bound by less than this share."""


def clip_to_norm(deltas: Mapping[str, Tensor], most: float) -> dict[str, Tensor]:
    """The fp32 deltas, scaled by one factor where their norm is above ``most``; no bit changes where it is not.

    Raises ContributionError for values that are not finite: they have no norm to bound.
    """
    norm = math.hypot(*(float(torch.linalg.vector_norm(delta, dtype=torch.float64)) for delta in deltas.values()))
    if not math.isfinite(norm):
        raise ClientUpdateError("the training diverged to values that are not finite; lower train.lr")
    if norm <= most:
        return dict(deltas)
    return {name: (delta.double() * (most / norm)).float() for name, delta in deltas.items()}
