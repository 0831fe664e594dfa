"""The steps of a merge in their order: align, combine, relax, renormalise, server optimiser."""

from collections.abc import Sequence
from typing import NamedTuple

from fedtune.errors import RecipeError
from fedtune.merging._step import AlignStep, CombineStep, RelaxStep, RenormaliseStep, ServerOptimiserStep
from fedtune.merging.combine.low_rank._low_rank_pair_step import LowRankPairCombineStep
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit

__all__ = ["MergePipeline", "build_pipeline"]

Step = AlignStep | CombineStep | RelaxStep | RenormaliseStep | ServerOptimiserStep
_ORDER = (AlignStep, CombineStep, RelaxStep, RenormaliseStep, ServerOptimiserStep)


class MergePipeline(NamedTuple):
    """The steps of a merge by kind, in the order given. Exactly one combines, and at most one is a server optimiser."""

    align: tuple[AlignStep, ...]
    combine: CombineStep
    relax: tuple[RelaxStep, ...]
    renormalise: tuple[RenormaliseStep, ...]
    server_optimiser: ServerOptimiserStep | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in order."""
        last = () if self.server_optimiser is None else (self.server_optimiser,)
        return (*self.align, self.combine, *self.relax, *self.renormalise, *last)

    @property
    def keeps_entries(self) -> bool:
        """Whether an entry of the merged state corresponds to the same entry before."""
        return not isinstance(self.combine, LowRankPairCombineStep) or self.combine.keeps_factors

    @property
    def needs(self) -> frozenset[str]:
        """What the context must contain."""
        return frozenset[str]().union(*(step.needs for step in self.steps))


def build_pipeline(units: Sequence[Unit]) -> MergePipeline:
    """Return the merge of a recipe; raise RecipeError unless the steps are in order and exactly one combines."""
    steps = [build_unit("fedtune.merging", unit, "merge") for unit in units]
    kinds = [next(place for place, kind in enumerate(_ORDER) if isinstance(step, kind)) for step in steps]
    combining = [step for step in steps if isinstance(step, CombineStep)]
    if len(combining) != 1:
        raise RecipeError(f"merge: {len(combining)} steps combine, but exactly one must; keep or add one, e.g. mean")
    if kinds != sorted(kinds):
        raise RecipeError(
            "merge: steps must come in the order align, combine, relax, renormalise, server optimiser; move them"
        )
    if isinstance(combining[0], LowRankPairCombineStep) and any(isinstance(step, RelaxStep) for step in steps):
        raise RecipeError(f"merge: {combining[0].name} makes new factors, which no relax step can scale; drop one")
    align = tuple(step for step in steps if isinstance(step, AlignStep))
    relax = tuple(step for step in steps if isinstance(step, RelaxStep))
    renormalise = tuple(step for step in steps if isinstance(step, RenormaliseStep))
    return MergePipeline(align, combining[0], relax, renormalise, _get_server_optimiser(steps, combining[0]))


def _get_server_optimiser(steps: Sequence[Step], combine: CombineStep) -> ServerOptimiserStep | None:
    """Return the server optimiser, if any; RecipeError for several, or for a merge whose factors are new each round."""
    found = [step for step in steps if isinstance(step, ServerOptimiserStep)]
    if len(found) > 1:
        names = " and ".join(step.name for step in found)
        raise RecipeError(f"merge: {names} would both take the last step; keep one server optimiser")
    if found and isinstance(combine, LowRankPairCombineStep) and not combine.keeps_factors:
        raise RecipeError(
            f"merge: {combine.name} {combine.rewrites}, so that the moments of {found[0].name} would be of other "
            "entries each round; merge by fedit, or train one factor and merge by mean"
        )
    return found[0] if found else None
