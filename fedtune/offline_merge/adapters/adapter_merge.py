"""What a merge of adapters is made with, besides the adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedtune.merging import CombineStep, MergeContext, RelaxStep
from fedtune.merging.combine.linear_combinations.linear import Linear

__all__ = ["AdapterMerge", "RankLimit"]


@dataclass(frozen=True)
class RankLimit:
    """Limits of a merged module: at most ``rank``, or the fraction ``energy`` of its squared norm, or both.

    Without a limit, nothing is cut off. The ranks of different adapters then add up.
    """

    rank: int | None = None
    energy: float | None = None


@dataclass(frozen=True)
class AdapterMerge:
    """A step with weights and limits.

    Without ``weights``, each adapter has weight one. ``overrides`` are fields of the step for single adapters.
    ``relax`` steps scale the columns of A by the activation statistics of ``context``.
    """

    step: CombineStep = field(default_factory=Linear)
    weights: Sequence[float] = ()
    overrides: Sequence[Mapping[str, float]] = ()
    limit: RankLimit = RankLimit()
    relax: Sequence[RelaxStep] = ()
    context: MergeContext = field(default_factory=MergeContext)

    def for_adapters(self, count: int) -> "AdapterMerge":
        """Return the merge with a weight and overrides for each of ``count`` adapters."""
        weights, overrides = self.weights or [1.0] * count, self.overrides or [{}] * count
        return AdapterMerge(self.step, weights, overrides, self.limit, self.relax, self.context)
