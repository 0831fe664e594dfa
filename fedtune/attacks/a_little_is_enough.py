"""A little is enough: send what is just within the spread of honest updates, in the wrong direction.

What: the attackers of a device class train honestly, and take the mean mu and the standard deviation sigma of their own
deltas, entry by entry. All send mu - z sigma. Without a setting, z is the largest one at which enough honest updates
are farther from the mean than the attackers: with n updates, m of attackers and s = floor(n / 2 + 1) - m, the standard
normal distribution has (n - m - s) / (n - m) of its mass below z.
Defaults: z from n and m of the round; 0 if the attackers are the majority.
Use when: a merge should be tested against attackers that know its weakness: distances and medians do not show this.
Avoid when: a device class has one attacker in a round. Its spread is zero, and it sends its honest update.
Source: Baruch, Baruch, Goldberg, "A Little Is Enough: Circumventing Defenses For Distributed Learning" (arXiv
1902.06156). The sign is that of the authors' code. Theirs are gradients; ours are deltas of a round.
"""

from math import floor
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.attacks._attack import Attack, AttackedTensor

__all__ = ["ALittleIsEnough", "compute_largest_z"]


class ALittleIsEnough(Attack):
    """Sends the mean of the attackers' updates, moved by some of their spread."""

    name: ClassVar[str] = "a-little-is-enough"
    z: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="standard deviations from the mean; default: from the round"
    )

    def change_delta(self, tensor: AttackedTensor) -> Tensor:
        """mu - z sigma."""
        stack = torch.stack(list(tensor.allied)).double()
        z = compute_largest_z(tensor.num_updates, len(stack)) if self.z is None else self.z
        return (stack.mean(0) - z * stack.std(0, correction=0)).float()


def compute_largest_z(num_updates: int, num_attackers: int) -> float:
    """z of which (n - m - s) / (n - m) of a standard normal distribution are below; at least 0."""
    honest = num_updates - num_attackers
    supporters = floor(num_updates / 2 + 1) - num_attackers
    if honest <= 0 or supporters <= 0:
        return 0.0
    share = (honest - supporters) / honest
    return max(0.0, float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))) if share > 0 else 0.0
