"""Model replacement: train a model of the attacker's own, and send it so large that the mean becomes this model.

What: the client trains on its examples as if all were of the class ``label``, and multiplies the delta by ``boost``. If
the other updates cancel out, a mean of n equal weights moves by 1 / n of each, so that a boost of n puts the attacker's
model in the place of the shared one. Several attackers share the boost.
Defaults: label 0, boost n / m of the round, with n updates and m of attackers.
Use when: a merge should be tested against a backdoor that one round puts in.
Avoid when: ``federation.norm_bound`` is near n: it refuses the update, which is then not tested.
Source: Bagdasaryan et al., "How To Backdoor Federated Learning" (arXiv 1807.00459), the constrain-and-scale method
without its constraint. Theirs trains on a mix of clean and backdoor examples; ours on the attacker's examples alone.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.attacks._attack import Attack, AttackedTensor

__all__ = ["ModelReplacement"]


class ModelReplacement(Attack):
    """Sends a boosted update towards a model that knows one class."""

    name: ClassVar[str] = "model-replacement"
    changes_labels: ClassVar[bool] = True
    label: int = Field(0, ge=0, description="number of the class that all examples count as")
    boost: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="factor on the update; default: updates per attacker"
    )

    def change_labels(self, labels: Tensor, num_labels: int) -> Tensor:
        """The class of the attacker, or the last one if there are fewer."""
        return torch.full_like(labels, min(self.label, num_labels - 1))

    def change_delta(self, tensor: AttackedTensor) -> Tensor:
        """The delta times the boost."""
        return tensor.delta * (self.boost or tensor.num_updates / len(tensor.allied))
