"""The merge pipeline, tensor by tensor: align -> combine -> relax -> renormalise -> server optimiser."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress
from typing import NamedTuple

from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging._batch_norm_statistics import compute_variance_of_means
from fedtune.merging._increments import Increment
from fedtune.merging._pipeline_steps import MergePipeline
from fedtune.merging._server_step import take_server_step
from fedtune.merging._step import (
    BoundCombine,
    CombineStep,
    MergeContext,
    MergeInput,
    Shape,
)
from fedtune.merging.combine.linear_combinations.linear import Linear
from fedtune.merging.combine.low_rank._low_rank_pair_step import (
    measure_pair_errors,
    merge_low_rank_pairs,
)
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit
from fedtune.wire.client_update import ClientUpdate, iter_row_chunks

__all__ = [
    "Merged",
    "bind_combine",
    "build_client_inputs",
    "measure_averaging_errors",
    "merge_client_updates",
    "merge_round",
    "merge_row_chunks",
]

_MEAN, _VARIANCE = ".running_mean", ".running_var"


def bind_combine(
    combine: CombineStep, shapes: Mapping[str, Shape], merge_inputs: Sequence[MergeInput], context: MergeContext
) -> BoundCombine:
    """Return the step and the inputs of each tensor; raise RecipeError if their number or overrides are invalid."""
    _check_count(combine, len(merge_inputs))
    for merge_input in merge_inputs:
        if merge_input.overrides:
            own = {**combine.model_dump(), **merge_input.overrides}
            build_unit("fedtune.merging", Unit(name=combine.name, settings=own), "merge")
    return combine.bind(shapes, merge_inputs, context)


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
    pipeline: MergePipeline, name: str, shape: Shape, merge_inputs: Sequence[MergeInput], context: MergeContext
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the first row, the end row (exclusive) and the merged, relaxed delta of each piece of a tensor."""
    is_statistic = pipeline.combine.sparsifies and name.endswith((_MEAN, _VARIANCE))
    combine = Linear() if is_statistic else pipeline.combine
    for (start, stop), delta in zip(iter_row_chunks(shape), combine.combine(name, shape, merge_inputs), strict=True):
        for step in pipeline.relax:
            delta = step.relax(name, start, delta, context)
        yield start, stop, delta


def build_client_inputs(combine: CombineStep, client_updates: Sequence[ClientUpdate]) -> list[MergeInput]:
    """Return the merge inputs in client order, so that the result does not depend on the order of replies."""
    ordered = sorted(client_updates, key=lambda update: update.client)
    weights = combine.compute_client_weights([update.num_examples for update in ordered])
    return [MergeInput(one.read_rows, weight) for one, weight in zip(ordered, weights, strict=True)]


class Merged(NamedTuple):
    """The next shared state, and the low-rank increments that were added to base weights, by the weight's name.

    ``moments`` are those of the server optimiser.
    """

    state: dict[str, Tensor]
    increments: dict[str, Increment]
    moments: Mapping[str, Tensor] = {}


def merge_client_updates(
    pipeline: MergePipeline,
    state: Mapping[str, Tensor],
    names: Iterable[str],
    client_updates: Sequence[ClientUpdate],
    context: MergeContext = MergeContext(),  # noqa: B008 - an immutable value
) -> dict[str, Tensor]:
    """The next shared state: ``state`` with the merged delta added to the named tensors, then renormalised.

    Each tensor is merged over the client updates that contain it, with weights over these alone. A tensor that no
    update contains stays as it is.
    """
    return merge_round(pipeline, state, names, client_updates, context).state


def merge_round(
    pipeline: MergePipeline,
    state: Mapping[str, Tensor],
    names: Iterable[str],
    client_updates: Sequence[ClientUpdate],
    context: MergeContext,
) -> Merged:
    """``merge_client_updates`` with the increments of base weights; without them if the merge renormalises."""
    merged, sent = Merged(dict(state), {}), list[str]()
    for named, senders in _group_by_senders(names, client_updates):
        sent += named
        after = _merge_over(pipeline, merged.state, named, senders, context)
        merged = Merged(after.state, merged.increments | after.increments)
    if pipeline.server_optimiser is None:
        return merged
    after_step, moments = take_server_step(pipeline.server_optimiser, state, merged.state, sent, context.moments)
    return Merged(after_step, {}, moments)


def _group_by_senders(
    names: Iterable[str], client_updates: Sequence[ClientUpdate]
) -> Iterator[tuple[list[str], list[ClientUpdate]]]:
    """Names in order, grouped by the client updates that contain them."""
    held = [one.list_tensor_names() for one in client_updates]
    groups: dict[tuple[bool, ...], list[str]] = {}
    for name in names:
        groups.setdefault(tuple(name in found for found in held), []).append(name)
    for holds, named in groups.items():
        if any(holds):
            yield named, list(compress(client_updates, holds))


def _merge_over(
    pipeline: MergePipeline,
    state: Mapping[str, Tensor],
    named: Sequence[str],
    client_updates: Sequence[ClientUpdate],
    context: MergeContext,
) -> Merged:
    merge_inputs: Sequence[MergeInput] = build_client_inputs(pipeline.combine, client_updates)
    for step in pipeline.align:
        merge_inputs = step.align(state, merge_inputs, context)
    shapes = {name: tuple(state[name].shape) for name in named}
    chosen = pipeline.combine  # binding may give another step, e.g. a sum with the coefficients that were computed
    combine, merge_inputs = bind_combine(chosen, shapes, merge_inputs, context)
    pipeline = pipeline._replace(combine=combine)
    paired, increments = merge_low_rank_pairs(pipeline.combine, state, named, merge_inputs, context)
    merged = {**state, **paired}
    for name in (name for name in named if name not in paired):
        merged[name] = _merge_one(pipeline, state[name], name, merge_inputs, context)
        if name.endswith(_VARIANCE) and chosen.adds_variance_of_means:
            merged[name] += _compute_variance_of_means(name, state[name], merge_inputs)
    for mend in pipeline.renormalise:
        ends = [(merge_input.weight, _build_endpoint(state, named, merge_input)) for merge_input in merge_inputs]
        merged |= mend.renormalise(merged, ends, context)
    return Merged(merged, {} if pipeline.renormalise else increments)


def measure_averaging_errors(
    pipeline: MergePipeline,
    state: Mapping[str, Tensor],
    names: Iterable[str],
    client_updates: Sequence[ClientUpdate],
    context: MergeContext,
) -> dict[str, float]:
    """Relative errors of averaging low-rank pairs, by name, measured before a round is merged.

    Errors that are not finite are left out: relative to a mean of zero, an error has no size.
    """
    figures: dict[str, float] = {}
    for named, senders in _group_by_senders(names, client_updates):
        figures |= measure_pair_errors(
            pipeline.combine, state, named, build_client_inputs(pipeline.combine, senders), context
        )
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _merge_one(
    pipeline: MergePipeline, before: Tensor, name: str, merge_inputs: Sequence[MergeInput], context: MergeContext
) -> Tensor:
    after = before.clone()
    rows = after if after.dim() else after.unsqueeze(0)
    for start, stop, delta in merge_row_chunks(pipeline, name, tuple(before.shape), merge_inputs, context):
        rows[start:stop] += delta.reshape(rows[start:stop].shape)
    return after


def _compute_variance_of_means(variance: str, before: Tensor, merge_inputs: Sequence[MergeInput]) -> Tensor:
    """The variance between the clients' means, which belongs to the variance of a batch norm."""
    mean = variance.removesuffix(_VARIANCE) + _MEAN
    means = [merge_input.read_rows(mean, 0, len(before)) for merge_input in merge_inputs]
    return compute_variance_of_means([merge_input.weight for merge_input in merge_inputs], means)


def _build_endpoint(state: Mapping[str, Tensor], names: Sequence[str], merge_input: MergeInput) -> dict[str, Tensor]:
    """The whole state of one model: the base plus its delta."""
    end = dict(state)
    for name in names:
        height = len(state[name]) if state[name].dim() else 1
        end[name] = state[name] + merge_input.read_rows(name, 0, height).reshape(state[name].shape)
    return end
