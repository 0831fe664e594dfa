"""Uniform shrinkage: the control for AIM, a smaller step that does not use activations.

What: the whole delta of a tensor is multiplied by one factor. The factor is a number for every tensor, or ``aim``: for
each tensor that AIM scales, the mean of AIM's factors with the same settings.
Memory: none for a number; AIM's statistics for ``aim``.
Use when: AIM looks good, and you want to know how much of its effect is activation information and how much a smaller
step.
Avoid when: a weight or the lambda of the combining step already sets the step size.
Source: ours, as a control. For sums of task vectors, the factor is the lambda of task arithmetic (arXiv 2212.04089,
section 2).
"""

from typing import Annotated, ClassVar, Literal, final

from pydantic import Field
from torch import Tensor

from fedtune.merging._step import MergeContext
from fedtune.merging.relax._activation_step import ActivationRelaxStep

__all__ = ["Shrink"]


@final
class Shrink(ActivationRelaxStep):
    """Scales each tensor by one factor."""

    name: ClassVar[str] = "shrink"
    factor: Annotated[float, Field(ge=0, le=1)] | Literal["aim"] = Field("aim", description="a number, or AIM's mean")

    @property
    def needs(self) -> frozenset[str]:
        """The activity of input channels, for AIM's mean."""
        return frozenset({"activity"}) if self.factor == "aim" else frozenset()

    def relax(self, name: str, start: int, delta: Tensor, context: MergeContext) -> Tensor:
        """The rows times the factor."""
        if self.factor != "aim":
            return delta * self.factor
        found = self.compute_scale(name, delta, context)
        return delta if found is None else delta * float(found[0].mean())
