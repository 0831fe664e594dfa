"""Noise: send random numbers in place of an update.

What: each tensor of the delta is replaced by normal numbers, whose standard deviation is scale times the root mean
square of the tensor.
Defaults: scale 1.
Use when: a broken client should be simulated, or one that does not train at all.
Avoid when: a merge should be tested against what a hostile client can do: a mean of many clients averages noise out.
Source: the Gaussian attack of Blanchard et al. (NIPS 2017), whose standard deviation is a constant (200).
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.attacks._attack import Attack, AttackedTensor

__all__ = ["Noise"]


class Noise(Attack):
    """Sends random numbers."""

    name: ClassVar[str] = "noise"
    scale: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="standard deviation, in root mean squares of what was trained"
    )

    def change_delta(self, tensor: AttackedTensor) -> Tensor:
        """Normal numbers of the size of the delta."""
        random = torch.Generator().manual_seed(tensor.seed)
        size = float(tensor.delta.double().square().mean().sqrt()) if tensor.delta.numel() else 0.0
        drawn = torch.randn(tensor.delta.shape, generator=random, dtype=torch.float32)
        return drawn * (self.scale * size)
