"""FedYogi: Adam on the server whose squares change by a bounded amount, with the merged change in place of a gradient.

What: m <- beta1 m + (1 - beta1) delta and v <- v - (1 - beta2) delta^2 sign(v - delta^2); the state moves by
lr m / (sqrt(v) + tau). v starts at tau^2.
Memory: two fp32 copies of what is trained, in the run's files beside each checkpoint. Devices never receive them.
Use when: ``fedadam`` is too eager after rounds that hardly change an entry: v falls by (1 - beta2) delta^2 at most, and
not at all where nothing changes.
Avoid when: a good lr is not known and nothing can be tried; see ``fedadam``.
Adapters: as in ``fedadam``, moments are those of each factor, and rest while the other factor is trained.
Source: Reddi et al., "Adaptive Federated Optimization" (arXiv 2003.00295), Algorithm 2.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune.merging.server_optimiser._adaptive_step import AdaptiveServerStep

__all__ = ["Fedyogi"]


class Fedyogi(AdaptiveServerStep):
    """Lets the squares follow those of the change, up or down."""

    name: ClassVar[str] = "fedyogi"
    beta2: float = Field(0.99, ge=0, lt=1, description="1 - beta2 is the share of delta^2 by which the squares change")

    def update_square(self, square: Tensor, delta: Tensor) -> Tensor:
        """Return v - (1 - beta2) delta^2 sign(v - delta^2)."""
        found = delta.square()
        return square - (1 - self.beta2) * found * (square - found).sign()
