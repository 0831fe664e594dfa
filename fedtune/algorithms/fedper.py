"""FedPer: each client keeps a head of its own and shares the rest.

What: the trained tensors are split into shared ones and kept ones. Both are trained together in each step. The shared
ones are merged as ever; the kept ones stay on the device, which goes on from its own in its next round.
Sends: less, as kept tensors never travel. They rest on the device, in one file for each of its last two rounds. A
device that was away finds its own again. A new device begins with the values from before training.
Keep: ``head`` (the default), ``adapters`` (the low-rank pairs, of which the head is then shared), or patterns of tensor
names with ``*``, also several: ``[head, "*.norm.*"]``. Local batch norms are ``batch-norm-statistics: {local: true}``,
and both go together.
Use when: clients hold few classes, or give the same classes other meanings.
Avoid when: new devices must work without training: their head is untrained. With one head per client, the body is drawn
to what each head wants; ``fedrep`` trains the head first. The server has no whole model: only clients score it, on
``evaluation.local_holdout``, and an export has the kept tensors from before training.
Source: Arivazhagan et al., "Federated Learning with Personalization Layers" (arXiv 1912.00818), Algorithm 1. There, the
kept layers are drawn anew on each client; here, all clients begin with the same values.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import nn

from fedtune.algorithms._algorithm import Algorithm
from fedtune.algorithms._kept_tensors import KEEP, Keep, describe_keep, select_kept_tensors
from fedtune.wire.client_update import LowRankPair

__all__ = ["Fedper"]


class Fedper(Algorithm):
    """Keeps some trained tensors on the devices."""

    name: ClassVar[str] = "fedper"
    keeps_tensors: ClassVar[bool] = True
    keep: Keep = Field("head", description=KEEP)

    def select_kept(self, model: nn.Module, trained: Sequence[str], pairs: Sequence[LowRankPair]) -> list[str]:
        """Return the names that ``keep`` matches."""
        return select_kept_tensors(self.name, self.keep, model, trained, pairs)

    def describe_export(self) -> str:
        """Return which values the kept tensors have."""
        return f"{describe_keep(self.keep)} the values from before training, because each device keeps its own.\n"
