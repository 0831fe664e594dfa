"""Budget-aware extrusion: weights about to be dropped are pressed towards zero first, within a round's steps.

Huang et al., "FedMef" (CVPR 2024), equations 2 to 5.
"""

import math

from pydantic import Field
from torch import Tensor, nn

from fedtune.recipe.schema import SettingsModel
from fedtune.techniques._technique import StepInfo

__all__ = ["Extrusion", "MaskableLayer", "add_extrusion_gradient", "compute_extrusion_lr"]

MaskableLayer = nn.Conv2d | nn.Linear


class Extrusion(SettingsModel):
    """How hard."""

    strength: float = Field(0.01, ge=0, description="lambda, on the squared norm of the weights about to be dropped")


def add_extrusion_gradient(layer: MaskableLayer, strength: float) -> float:
    """Add the gradient of strength * |theta_S|^2; returns |theta_S|^2."""
    marked: Tensor = vars(layer)["marked"]
    theta = layer.weight.detach()[marked]
    if layer.weight.grad is not None:
        layer.weight.grad[marked] += 2 * strength * theta
    return float((theta.double() ** 2).sum())


def compute_extrusion_lr(moment: StepInfo, norm: float) -> float:
    """beta: equations 3 to 5."""
    p = (2 * moment.local_steps - 2 * moment.step) / (2 * moment.local_steps - moment.step)
    return p * (2 / (1 + math.exp(-norm)) - 1) * moment.base_lr
