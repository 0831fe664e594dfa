"""FedAdam: Adam on the server, with the merged change in place of a gradient.

What: m <- beta1 m + (1 - beta1) delta and v <- beta2 v + (1 - beta2) delta^2; the state moves by
lr m / (sqrt(v) + tau).
v starts at tau^2, and neither moment is corrected for its start, as in the paper.
Memory: two fp32 copies of what is trained, in the run's files beside each checkpoint. Devices never receive them.
Use when: the changes of tensors differ in size by orders of magnitude, as those of embeddings and adapters do.
Avoid when: a good lr is not known and nothing can be tried: lr is the size of a step here, unlike in ``fedavgm``. Try
lr 0.001 to 0.1 and tau 0.0001 to 0.01 together. Rounds without change in an entry let its v fade; ``fedyogi`` does not.
Adapters: moments are those of each factor as an entry of the model. If clients train one factor of a low-rank pair per
round, the moments of the other rest meanwhile. The step of a product is not Adam's step on the product.
Source: Reddi et al., "Adaptive Federated Optimization" (arXiv 2003.00295), Algorithm 2.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedtune.merging.server_optimiser._adaptive_step import AdaptiveServerStep

__all__ = ["Fedadam"]


class Fedadam(AdaptiveServerStep):
    """Follows the squares of the change by a decaying mean."""

    name: ClassVar[str] = "fedadam"
    beta2: float = Field(0.99, ge=0, lt=1, description="decay of the mean of squares")

    def update_square(self, square: Tensor, delta: Tensor) -> Tensor:
        """Return beta2 v + (1 - beta2) delta^2."""
        return self.beta2 * square + (1 - self.beta2) * delta.square()
