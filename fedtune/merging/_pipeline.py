"""How results come together: align -> combine -> relax -> renormalise, tensor by tensor and piece by piece."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fedtune.contribution import Contribution, pieces
from fedtune.errors import RecipeError
from fedtune.merging._statistics import spread
from fedtune.merging._step import Align, Combine, Evidence, Operand, Relax, Renormalise, Shape
from fedtune.recipe import Unit
from fedtune.registry import build

__all__ = ["Pipeline", "choose", "merge", "merged_pieces", "operands_of"]

_MEAN, _VARIANCE = ".running_mean", ".running_var"
Step = Align | Combine | Relax | Renormalise
_ORDER = (Align, Combine, Relax, Renormalise)


class Pipeline(NamedTuple):
    """The steps of a merge, each kind in the order given; exactly one combines."""

    align: tuple[Align, ...]
    combine: Combine
    relax: tuple[Relax, ...]
    renormalise: tuple[Renormalise, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in order."""
        return (*self.align, self.combine, *self.relax, *self.renormalise)

    @property
    def needs(self) -> frozenset[str]:
        """What must be in the evidence."""
        return frozenset[str]().union(*(step.needs for step in self.steps))


def choose(units: Sequence[Unit]) -> Pipeline:
    """The merge a recipe names; RecipeError unless the kinds come in order and exactly one step combines."""
    steps = [build("fedtune.merging", unit, "merge") for unit in units]
    kinds = [next(place for place, kind in enumerate(_ORDER) if isinstance(step, kind)) for step in steps]
    combining = [step for step in steps if isinstance(step, Combine)]
    if len(combining) != 1:
        raise RecipeError(f"merge: {len(combining)} steps combine, but exactly one must; keep or add one, e.g. mean")
    if kinds != sorted(kinds):
        raise RecipeError("merge: steps must come in the order align, combine, relax, renormalise; move them")
    align = tuple(step for step in steps if isinstance(step, Align))
    relax = tuple(step for step in steps if isinstance(step, Relax))
    renormalise = tuple(step for step in steps if isinstance(step, Renormalise))
    return Pipeline(align, combining[0], relax, renormalise)


def merged_pieces(
    pipeline: Pipeline, name: str, shape: Shape, operands: Sequence[Operand], evidence: Evidence
) -> Iterator[tuple[int, int, Tensor]]:
    """First row, last row (exclusive) and the merged, relaxed delta of each piece of one tensor."""
    for (start, stop), delta in zip(pieces(shape), pipeline.combine.combine(name, shape, operands), strict=True):
        for step in pipeline.relax:
            delta = step.relax(name, start, delta, evidence)
        yield start, stop, delta


def operands_of(combine: Combine, contributions: Sequence[Contribution]) -> list[Operand]:
    """Contributions of a round in client order, so that bits do not depend on who answered first."""
    ordered = sorted(contributions, key=lambda contribution: contribution.client)
    weights = combine.weights([contribution.examples for contribution in ordered])
    return [Operand(one.rows, weight) for one, weight in zip(ordered, weights, strict=True)]


def merge(
    pipeline: Pipeline,
    state: Mapping[str, Tensor],
    names: Iterable[str],
    contributions: Sequence[Contribution],
    evidence: Evidence = Evidence(),  # noqa: B008 - an immutable value
) -> dict[str, Tensor]:
    """The next shared state: ``state`` with the merged delta added to the named tensors, then renormalised."""
    named = list(names)
    operands = operands_of(pipeline.combine, contributions)
    for step in pipeline.align:
        operands = step.align(state, operands, evidence)
    merged = dict(state)
    for name in named:
        merged[name] = _merge_one(pipeline, state[name], name, operands, evidence)
        if name.endswith(_VARIANCE):
            merged[name] += _spread(name, state[name], operands)
    for mend in pipeline.renormalise:
        ends = [(operand.weight, _end(state, named, operand)) for operand in operands]
        merged |= mend.renormalise(merged, ends, evidence)
    return merged


def _merge_one(
    pipeline: Pipeline, before: Tensor, name: str, operands: Sequence[Operand], evidence: Evidence
) -> Tensor:
    after = before.clone()
    rows = after if after.dim() else after.unsqueeze(0)
    for start, stop, delta in merged_pieces(pipeline, name, tuple(before.shape), operands, evidence):
        rows[start:stop] += delta.reshape(rows[start:stop].shape)
    return after


def _spread(variance: str, before: Tensor, operands: Sequence[Operand]) -> Tensor:
    """What the clients' different means add to a batch norm's variance."""
    mean = variance.removesuffix(_VARIANCE) + _MEAN
    means = [operand.rows(mean, 0, len(before)) for operand in operands]
    return spread([operand.weight for operand in operands], means)


def _end(state: Mapping[str, Tensor], names: Sequence[str], operand: Operand) -> dict[str, Tensor]:
    """The whole state of one model: the base and its delta."""
    end = dict(state)
    for name in names:
        height = len(state[name]) if state[name].dim() else 1
        end[name] = state[name] + operand.rows(name, 0, height).reshape(state[name].shape)
    return end
