"""The scale that AIM and its control use: c = 1 - (1 - omega) s, with the relative activity s of each input channel.

The activation statistics are measured on the base; in a federation this is the model at the start of the round. Either
the server measures them on its validation split, without labels, or the clients measure them on their training data.
Clients send only sums of |x| and counts, so a server that sees only the sum over clients can use them too.
"""

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging._step import (
    ActivationStatistics,
    AlignStep,
    CombineStep,
    MergeContext,
    RelaxStep,
    RenormaliseStep,
    ServerOptimiserStep,
)

__all__ = [
    "ActivationRelaxStep",
    "CalibrationRequest",
    "broadcast_scale_to_rows",
    "build_calibration_request",
    "compute_channel_scale",
    "compute_relative_activity",
    "find_dominated_weights",
]

_DOMINATED_MEDIAN = 0.01
_EXAMPLES = 256
_ON_DATA = frozenset({"activity", "batches", "model"})


class CalibrationRequest(NamedTuple):
    """Who measures activation statistics, and on how many examples each."""

    calibrate_on: Literal["server", "clients"]
    calibration_examples: int | None


class ActivationRelaxStep(RelaxStep, ABC):
    """Settings of the steps that scale a delta by the activity of its input channels."""

    omega: float = Field(0.4, ge=0, le=1, description="share of its update the most active channel keeps; 1 keeps all")
    include_norms: bool = Field(True, description="also the weights of normalisation layers, as published")
    peak_quantile: float = Field(
        1.0, gt=0, le=1, description="quantile of |x| over channels that gets s = 1; 1: the largest"
    )
    measured_by: Literal["server", "clients"] = Field("server", description="who measures in a federation")
    max_examples: int | None = Field(_EXAMPLES, ge=1, description="so many at each place; null: all")

    def compute_scale(self, name: str, delta: Tensor, context: MergeContext) -> tuple[Tensor, int] | None:
        """c and its axis, fp64; None for a tensor that is not scaled."""
        activity = context.activation_statistics.get(name)
        if activity is None or (delta.dim() == 1 and not self.include_norms):
            return None
        return compute_channel_scale(activity, self.omega, self.peak_quantile), activity.axis


def compute_relative_activity(activity: ActivationStatistics, quantile: float = 1.0) -> Tensor:
    """s in 0..1: mean |x| over the ``quantile`` of it, cut at 1, fp64; zero where nothing is active at all."""
    level = activity.mean_abs.double().abs()
    top = torch.quantile(level, quantile) if quantile < 1 else level.max()
    return (level / top).clamp(max=1.0) if top > 0 else torch.zeros_like(level)


def compute_channel_scale(activity: ActivationStatistics, omega: float, quantile: float = 1.0) -> Tensor:
    """c = 1 - (1 - omega) s, of the shape of the statistic, fp64."""
    return 1 - (1 - omega) * compute_relative_activity(activity, quantile)


def broadcast_scale_to_rows(scale: Tensor, axis: int, start: int, delta: Tensor) -> Tensor:
    """The part of c that belongs to rows ``start`` and on, in a shape and precision that multiplies them.

    A matrix holds a row per row of the weight, as a grouped convolution needs.
    """
    part = scale[None] if axis == 1 and scale.dim() == 1 else scale[start : start + len(delta)]
    trailing = [1] * (delta.dim() - part.dim())
    return part.reshape(*part.shape, *trailing).to(delta.dtype)


def find_dominated_weights(activity: Mapping[str, ActivationStatistics], quantile: float = 1.0) -> dict[str, float]:
    """Median s of the weights in which one channel is far more active than the rest, so that AIM has little effect."""
    medians = {name: float(compute_relative_activity(one, quantile).median()) for name, one in activity.items()}
    return {name: median for name, median in medians.items() if median < _DOMINATED_MEDIAN}


def build_calibration_request(
    steps: Sequence[AlignStep | CombineStep | RelaxStep | RenormaliseStep | ServerOptimiserStep],
) -> CalibrationRequest | None:
    """The measurement that the steps of a merge need in a federation; RecipeError if they need different ones."""
    by_activity = [step for step in steps if isinstance(step, ActivationRelaxStep) and step.needs]
    requests = {CalibrationRequest(step.measured_by, step.max_examples) for step in by_activity}
    if len(requests) > 1:
        raise RecipeError("merge: steps differ in statistics or examples, but one measurement serves all; align them")
    if requests:
        return requests.pop()
    return CalibrationRequest("server", _EXAMPLES) if any(step.needs & _ON_DATA for step in steps) else None
