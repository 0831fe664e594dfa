"""Clips a client update as a whole to a given L2 norm.

What: delta * min(1, clip / |delta|), where |delta| is the norm over all tensors, computed in double precision.

Source: McMahan et al., "Learning Differentially Private Recurrent Language Models" (arXiv 1710.06963), flat clipping.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedtune.errors import ClientUpdateError

__all__ = ["ROUNDING_SLACK", "clip_to_norm"]

ROUNDING_SLACK = 1e-6
"""Clipped deltas are rounded to fp32, by 6e-8 of each value.

Their norm exceeds the bound by less than this fraction.
"""


def clip_to_norm(deltas: Mapping[str, Tensor], most: float) -> dict[str, Tensor]:
    """Return the fp32 deltas, scaled by one factor if their norm exceeds ``most``, else unchanged bit for bit.

    Raises ClientUpdateError for values that are not finite.
    """
    norm = math.hypot(*(float(torch.linalg.vector_norm(delta, dtype=torch.float64)) for delta in deltas.values()))
    if not math.isfinite(norm):
        raise ClientUpdateError("the training diverged to values that are not finite; lower train.lr")
    if norm <= most:
        return dict(deltas)
    return {name: (delta.double() * (most / norm)).float() for name, delta in deltas.items()}
