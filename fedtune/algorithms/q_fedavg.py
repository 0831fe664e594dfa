"""q-FedAvg: clients with a larger loss count more, so that the model serves them more evenly.

What: the objective is sum_k F_k^(q+1) / (q + 1) in place of the mean of the losses F_k. Client k sends its loss at the
received state. With L = 1 / learning rate and Delta_k = w_k - w_t, the merged change is the sum of L F_k^q Delta_k,
divided by the sum of h_k = q F_k^(q-1) ||L Delta_k||^2 + L F_k^q. With q = 0 it is the plain mean.
Sends: up, one number more; devices compute one more pass over their examples. Nothing is kept.
Weights: all clients count alike but for their loss, as in the paper.
Use when: the worst clients matter more than the mean. Try q 0.1 to 5, and compare the spread of scores per client.
Avoid when: some clients have noisy labels: their loss stays large and takes over. Steps become small for large q. A
device states its own loss, which must be trusted.
Source: Li et al., "Fair Resource Allocation in Federated Learning" (arXiv 1905.10497), Algorithm 2.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from fedtune.algorithms._algorithm import (
    Algorithm,
    AlgorithmRound,
    AlgorithmSetup,
    RoundEnd,
    Shape,
    Tensors,
    Weighing,
    read_upload,
)
from fedtune.algorithms._received_gradient import compute_received_loss
from fedtune.merging import MergePipeline
from fedtune.recipe.schema import Recipe
from fedtune.wire.client_update import ClientUpdate, TensorSpec, iter_row_chunks

__all__ = ["QFedavg", "compute_fair_coefficients"]

_LOSS = "loss"
_LEAST = 1e-10
"""Added to a loss, whose power may be negative."""


class QFedavg(Algorithm):
    """Weighs updates by a power of the client's loss."""

    name: ClassVar[str] = "q-fedavg"
    sends_more: ClassVar[bool] = True
    needs_one_start: ClassVar[bool] = True
    weighs_equally: ClassVar[bool] = True
    q: float = Field(1.0, ge=0, le=100, description="0: the plain mean; larger values make losses more even")
    lipschitz: float | None = Field(None, gt=0, description="L, the curvature of the losses; default: 1 / train.lr")

    def check(self, recipe: Recipe, pipeline: MergePipeline) -> None:
        """Raise RecipeError if the merge is no mean, whose weights the losses replace."""
        self.require_mean(pipeline)

    def begin_round(self, setup: AlgorithmSetup) -> AlgorithmRound:
        """Compute the loss of the received state."""
        return _QFedavgRound(compute_received_loss(setup))

    def declare_upload(self, parameters: Mapping[str, Shape]) -> dict[str, TensorSpec]:
        """The loss."""
        return {_LOSS: TensorSpec((1,), negative=False)}

    def compute_scales(self, weighing: Weighing) -> list[float]:
        """Return what turns the weights of the merge into the coefficients of the losses."""
        losses = [float(read_upload(self.name, update, _LOSS)) for update in weighing.updates]
        squares = [_compute_square(update, weighing.shapes) for update in weighing.updates]
        lipschitz = self.lipschitz or 1 / weighing.recipe.train.lr
        found = compute_fair_coefficients(losses, squares, self.q, lipschitz)
        return [one / weight for one, weight in zip(found, weighing.weights, strict=True)]


class _QFedavgRound(AlgorithmRound):
    def __init__(self, loss: float) -> None:
        self._loss = loss

    def end_round(self, delta: Tensors) -> RoundEnd:
        """Return the loss."""
        return RoundEnd({_LOSS: torch.tensor([self._loss], dtype=torch.float64)})


def compute_fair_coefficients(losses: list[float], squares: list[float], q: float, lipschitz: float) -> list[float]:
    """Return what each client's delta is multiplied by, given its loss and the squared norm of its delta."""
    largest = max(losses) + _LEAST  # numerators and denominator are divided by its power, which could overflow
    shares = [(loss + _LEAST) / largest for loss in losses]
    powers = [share**q for share in shares]
    bounds = [
        q * share ** (q - 1) * lipschitz**2 * square / largest + lipschitz * power
        for share, square, power in zip(shares, squares, powers, strict=True)
    ]
    return [lipschitz * power / sum(bounds) for power in powers]


def _compute_square(update: ClientUpdate, shapes: Mapping[str, Shape]) -> float:
    return sum(
        float(update.read_rows(name, start, stop).double().square().sum())
        for name, shape in shapes.items()
        for start, stop in iter_row_chunks(shape)
    )
