"""Budget-aware extrusion: shrinks weights that the server will drop, during the steps of a round.

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
    """The strength of the extrusion."""

    strength: float = Field(0.01, ge=0, description="lambda, on the squared norm of the weights about to be dropped")


def add_extrusion_gradient(layer: MaskableLayer, strength: float) -> float:
    """Add the gradient of strength * |theta_S|^2; returns |theta_S|^2."""
    marked: Tensor = vars(layer)["marked"]
    theta = layer.weight.detach()[marked]
    if layer.weight.grad is not None:
        layer.weight.grad[marked] += 2 * strength * theta
    return float((theta.double() ** 2).sum())


def compute_extrusion_lr(step_info: StepInfo, norm: float) -> float:
    """beta: equations 3 to 5."""
    p = (2 * step_info.local_steps - 2 * step_info.step) / (2 * step_info.local_steps - step_info.step)
    return p * (2 / (1 + math.exp(-norm)) - 1) * step_info.base_lr
