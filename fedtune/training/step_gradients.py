"""The middle of a step: the gradients of a loss, or what a technique estimates in their place."""

from collections.abc import Callable

from torch import Tensor

from fedtune.techniques import StepEstimator

__all__ = ["compute_gradients"]


def compute_gradients(compute_loss: Callable[[], Tensor], estimator: StepEstimator | None) -> Tensor:
    """Add the gradients of a loss, or let the estimator compute it as often as it needs; return the loss."""
    if estimator is not None:
        return estimator.estimate_slope(compute_loss)
    loss = compute_loss()
    loss.backward()
    return loss.detach()
