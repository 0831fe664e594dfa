"""The end of a step: techniques change the gradients, and the optimiser applies them."""

from collections.abc import Sequence

from torch import nn

from fedtune.recipe.schema import Train
from fedtune.techniques import StepInfo, Technique, before_optimiser_step
from fedtune.training.optimisers import LocalOptimiser

__all__ = ["apply_optimiser_step"]


def apply_optimiser_step(
    model: nn.Module,
    techniques: Sequence[Technique],
    optimiser: LocalOptimiser,
    parameters: Sequence[nn.Parameter],
    settings: Train,
    info: StepInfo,
) -> float:
    """Apply the gradients of a step and release them; return the learning rate of the step."""
    lr = before_optimiser_step(techniques, model, info)
    if settings.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    optimiser.step(lr)
    model.zero_grad()
    return lr
