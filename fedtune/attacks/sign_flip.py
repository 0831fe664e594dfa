"""Sign flip: send the opposite of what was trained.

What: the delta times -scale.
Defaults: scale 1, which has the length of an honest update, so that ``federation.norm_bound`` does not see it.
Use when: a merge should be tested against clients that undo the work of others. The mean turns back once
scale times their share is above the share of the honest ones: 30 % need a scale above 2.4.
Avoid when: the attackers should stay hidden: distances show this attack.
Source: the sign-flipping attack of Li et al., RSA (arXiv 1811.03761), whose scale is a constant of the server's choice.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune.attacks._attack import Attack, AttackedTensor

__all__ = ["SignFlip"]


class SignFlip(Attack):
    """Turns an update round."""

    name: ClassVar[str] = "sign-flip"
    scale: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="length of what is sent, in lengths of what was trained"
    )

    def change_delta(self, tensor: AttackedTensor) -> Tensor:
        """The delta times -scale."""
        return tensor.delta * -self.scale
