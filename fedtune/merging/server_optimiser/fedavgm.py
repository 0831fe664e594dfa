"""FedAvgM: SGD with momentum on the server, with the merged change in place of a gradient.

What: v <- momentum v + delta, and the state moves by lr v; with ``nesterov`` by lr (delta + momentum v). delta is what
the steps before give. ``momentum: 0`` leaves a server learning rate alone, which is the global step size of SCAFFOLD.
Memory: one fp32 copy of what is trained, in the run's files beside each checkpoint. Devices never receive it.
Use when: few of many clients take part in a round, or clients hold few classes, so that merged changes point to and
fro.
Avoid when: rounds are few: with momentum 0.9 the change of a round counts ten times in all, so that ``lr: 1`` may
overshoot where the mean alone does not. Lower lr together with a larger momentum.
Adapters: moments are those of each factor as an entry of the model. If clients train one factor of a low-rank pair per
round, the momentum of the other rests and is applied in its next round, against a partner that has moved meanwhile. A
merge that makes new factors (flexlora), or adds to the base (flora, fedex-lora), leaves them nothing to hold on to.
Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification"
(arXiv 1909.06335). FedOpt with SGD in Reddi et al. (arXiv 2003.00295), Algorithm 1.
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune.merging._step import ServerOptimiserStep

__all__ = ["Fedavgm"]


class Fedavgm(ServerOptimiserStep):
    """Moves by a decaying sum of the merged changes."""

    name: ClassVar[str] = "fedavgm"
    lr: float = Field(1.0, gt=0, description="server learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="decay of earlier changes; 0: a server learning rate alone")
    nesterov: bool = Field(False, description="look ahead: move by delta + momentum v")

    @property
    def initial_moments(self) -> Mapping[str, float]:
        """A velocity of zero."""
        return {"velocity": 0.0}

    def compute_step(self, delta: Tensor, moments: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return lr v, or lr (delta + momentum v), with the next v."""
        velocity = self.momentum * moments["velocity"] + delta
        direction = delta + self.momentum * velocity if self.nesterov else velocity
        return self.lr * direction, {"velocity": velocity}
