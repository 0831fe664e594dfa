"""How results come together: align -> combine -> relax -> renormalise, tensor by tensor and piece by piece."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress
from typing import NamedTuple

from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging._increments import Increment
from fedtune.merging._pairs import LowRankPairCombineStep, measure_pair_errors, merge_low_rank_pairs
from fedtune.merging._statistics import compute_variance_of_means
from fedtune.merging._step import (
    AlignStep,
    BoundCombine,
    CombineStep,
    MergeContext,
    MergeInput,
    RelaxStep,
    RenormaliseStep,
    Shape,
)
from fedtune.merging.linear import Linear
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit
from fedtune.wire.client_update import ClientUpdate, iter_row_chunks

__all__ = [
    "MergePipeline",
    "Merged",
    "bind_combine",
    "build_client_inputs",
    "build_pipeline",
    "measure_averaging_errors",
    "merge_client_updates",
    "merge_round",
    "merge_row_chunks",
]

_MEAN, _VARIANCE = ".running_mean", ".running_var"
Step = AlignStep | CombineStep | RelaxStep | RenormaliseStep
_ORDER = (AlignStep, CombineStep, RelaxStep, RenormaliseStep)


class MergePipeline(NamedTuple):
    """The steps of a merge, each kind in the order given; exactly one combines."""

    align: tuple[AlignStep, ...]
    combine: CombineStep
    relax: tuple[RelaxStep, ...]
    renormalise: tuple[RenormaliseStep, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in order."""
        return (*self.align, self.combine, *self.relax, *self.renormalise)

    @property
    def needs(self) -> frozenset[str]:
        """What must be in the evidence."""
        return frozenset[str]().union(*(step.needs for step in self.steps))


def build_pipeline(units: Sequence[Unit]) -> MergePipeline:
    """The merge a recipe names; RecipeError unless the kinds come in order and exactly one step combines."""
    steps = [build_unit("fedtune.merging", unit, "merge") for unit in units]
    kinds = [next(place for place, kind in enumerate(_ORDER) if isinstance(step, kind)) for step in steps]
    combining = [step for step in steps if isinstance(step, CombineStep)]
    if len(combining) != 1:
        raise RecipeError(f"merge: {len(combining)} steps combine, but exactly one must; keep or add one, e.g. mean")
    if kinds != sorted(kinds):
        raise RecipeError("merge: steps must come in the order align, combine, relax, renormalise; move them")
    if isinstance(combining[0], LowRankPairCombineStep) and any(isinstance(step, RelaxStep) for step in steps):
        raise RecipeError(f"merge: {combining[0].name} makes new factors, which no relax step can scale; drop one")
    align = tuple(step for step in steps if isinstance(step, AlignStep))
    relax = tuple(step for step in steps if isinstance(step, RelaxStep))
    renormalise = tuple(step for step in steps if isinstance(step, RenormaliseStep))
    return MergePipeline(align, combining[0], relax, renormalise)


def bind_combine(
    combine: CombineStep, shapes: Mapping[str, Shape], operands: Sequence[MergeInput], evidence: MergeContext
) -> BoundCombine:
    """The step and operands for work tensor by tensor; RecipeError unless their number and knobs suit the step."""
    _check_count(combine, len(operands))
    for operand in operands:
        if operand.overrides:
            own = {**combine.model_dump(), **operand.overrides}
            build_unit("fedtune.merging", Unit(name=combine.name, settings=own), "merge")
    return combine.bind(shapes, operands, evidence)


def _check_count(combine: CombineStep, count: int) -> None:
    if count < combine.min_models:
        raise RecipeError(
            f"merge: {combine.name} needs at least {combine.min_models} models, but {count} came; "
            "add some or choose mean"
        )
    if combine.max_models is not None and count > combine.max_models:
        raise RecipeError(
            f"merge: {combine.name} takes {combine.max_models} models, but {count} came; leave some out or choose mean"
        )


def merge_row_chunks(
    pipeline: MergePipeline, name: str, shape: Shape, operands: Sequence[MergeInput], evidence: MergeContext
) -> Iterator[tuple[int, int, Tensor]]:
    """First row, last row (exclusive) and the merged, relaxed delta of each piece of one tensor."""
    thinned = pipeline.combine.sparsifies and name.endswith((_MEAN, _VARIANCE))
    combine = Linear() if thinned else pipeline.combine
    for (start, stop), delta in zip(iter_row_chunks(shape), combine.combine(name, shape, operands), strict=True):
        for step in pipeline.relax:
            delta = step.relax(name, start, delta, evidence)
        yield start, stop, delta


def build_client_inputs(combine: CombineStep, contributions: Sequence[ClientUpdate]) -> list[MergeInput]:
    """Contributions of a round in client order, so that bits do not depend on who answered first."""
    ordered = sorted(contributions, key=lambda contribution: contribution.client)
    weights = combine.weights([contribution.num_examples for contribution in ordered])
    return [MergeInput(one.read_rows, weight) for one, weight in zip(ordered, weights, strict=True)]


class Merged(NamedTuple):
    """The next shared state, and the low-rank increments that made its base weights, by the weight's name."""

    state: dict[str, Tensor]
    increments: dict[str, Increment]


def merge_client_updates(
    pipeline: MergePipeline,
    state: Mapping[str, Tensor],
    names: Iterable[str],
    contributions: Sequence[ClientUpdate],
    evidence: MergeContext = MergeContext(),  # noqa: B008 - an immutable value
) -> dict[str, Tensor]:
    """The next shared state: ``state`` with the merged delta added to the named tensors, then renormalised.

    Each tensor is merged over the contributions that hold it, whose weights are theirs alone; one that none holds
    stays.
    """
    return merge_round(pipeline, state, names, contributions, evidence).state


def merge_round(
    pipeline: MergePipeline,
    state: Mapping[str, Tensor],
    names: Iterable[str],
    contributions: Sequence[ClientUpdate],
    evidence: MergeContext,
) -> Merged:
    """``merge_client_updates``, and the increments of base weights; none where these are renormalised afterwards."""
    merged = Merged(dict(state), {})
    for named, senders in _group_by_senders(names, contributions):
        after = _merge_over(pipeline, merged.state, named, senders, evidence)
        merged = Merged(after.state, merged.increments | after.increments)
    return merged


def _group_by_senders(
    names: Iterable[str], contributions: Sequence[ClientUpdate]
) -> Iterator[tuple[list[str], list[ClientUpdate]]]:
    """Names in order, together where the same contributions hold them."""
    held = [one.list_tensor_names() for one in contributions]
    groups: dict[tuple[bool, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(name in found for found in held), []).append(name)
    for holds, named in groups.items():
        if any(holds):
            yield named, list(compress(contributions, holds))


def _merge_over(
    pipeline: MergePipeline,
    state: Mapping[str, Tensor],
    named: Sequence[str],
    contributions: Sequence[ClientUpdate],
    evidence: MergeContext,
) -> Merged:
    operands: Sequence[MergeInput] = build_client_inputs(pipeline.combine, contributions)
    for step in pipeline.align:
        operands = step.align(state, operands, evidence)
    shapes = {name: tuple(state[name].shape) for name in named}
    chosen = pipeline.combine  # what is settled may be another step, e.g. a sum with the coefficients that were found
    combine, operands = bind_combine(chosen, shapes, operands, evidence)
    pipeline = pipeline._replace(combine=combine)
    paired, increments = merge_low_rank_pairs(pipeline.combine, state, named, operands, evidence)
    merged = {**state, **paired}
    for name in (name for name in named if name not in paired):
        merged[name] = _merge_one(pipeline, state[name], name, operands, evidence)
        if name.endswith(_VARIANCE) and chosen.adds_variance_of_means:
            merged[name] += _spread(name, state[name], operands)
    for mend in pipeline.renormalise:
        ends = [(operand.weight, _build_endpoint(state, named, operand)) for operand in operands]
        merged |= mend.renormalise(merged, ends, evidence)
    return Merged(merged, {} if pipeline.renormalise else increments)


def measure_averaging_errors(
    pipeline: MergePipeline,
    state: Mapping[str, Tensor],
    names: Iterable[str],
    contributions: Sequence[ClientUpdate],
    evidence: MergeContext,
) -> dict[str, float]:
    """Figures of a round before it is merged: relative errors of averaging low-rank pairs, by name.

    One that is not finite is left out: beside a mean of zero no error has a size.
    """
    figures: dict[str, float] = {}
    for named, senders in _group_by_senders(names, contributions):
        figures |= measure_pair_errors(
            pipeline.combine, state, named, build_client_inputs(pipeline.combine, senders), evidence
        )
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _merge_one(
    pipeline: MergePipeline, before: Tensor, name: str, operands: Sequence[MergeInput], evidence: MergeContext
) -> Tensor:
    after = before.clone()
    rows = after if after.dim() else after.unsqueeze(0)
    for start, stop, delta in merge_row_chunks(pipeline, name, tuple(before.shape), operands, evidence):
        rows[start:stop] += delta.reshape(rows[start:stop].shape)
    return after


def _spread(variance: str, before: Tensor, operands: Sequence[MergeInput]) -> Tensor:
    """What the clients' different means add to a batch norm's variance."""
    mean = variance.removesuffix(_VARIANCE) + _MEAN
    means = [operand.read_rows(mean, 0, len(before)) for operand in operands]
    return compute_variance_of_means([operand.weight for operand in operands], means)


def _build_endpoint(state: Mapping[str, Tensor], names: Sequence[str], operand: MergeInput) -> dict[str, Tensor]:
    """The whole state of one model: the base and its delta."""
    end = dict(state)
    for name in names:
        height = len(state[name]) if state[name].dim() else 1
        end[name] = state[name] + operand.read_rows(name, 0, height).reshape(state[name].shape)
    return end
