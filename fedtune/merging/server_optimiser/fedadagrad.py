"""FedAdagrad: Adagrad on the server, with the merged change in place of a gradient.

What: m <- beta1 m + (1 - beta1) delta and v <- v + delta^2; the state moves by lr m / (sqrt(v) + tau). v starts at
tau^2. The default of beta1 is 0, which is Adagrad without momentum.
Memory: two fp32 copies of what is trained, in the run's files beside each checkpoint. Devices never receive them.
Use when: changes are sparse, such as those of embeddings whose words few clients use.
Avoid when: a run has many rounds or goes on as new data come: v only grows, so that steps shrink to nothing.
Adapters: as in ``fedadam``, moments are those of each factor, and rest while the other factor is trained.
Source: Reddi et al., "Adaptive Federated Optimization" (arXiv 2003.00295), Algorithm 2.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune.merging.server_optimiser._adaptive_step import AdaptiveServerStep

__all__ = ["Fedadagrad"]


class Fedadagrad(AdaptiveServerStep):
    """Adds up the squares of the change."""

    name: ClassVar[str] = "fedadagrad"
    beta1: float = Field(0.0, ge=0, lt=1, description="decay of the mean of the changes; 0: the newest change alone")

    def update_square(self, square: Tensor, delta: Tensor) -> Tensor:
        """Return v + delta^2."""
        return square + delta.square()
