"""The base class of steps that merge both factors of low-rank pairs; tensors outside the pairs are averaged."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging._increments import Increment, add_increment, make_increment
from fedtune.merging._low_rank_factors import (
    LowRankFactors,
    compute_averaging_residual,
    compute_product_norm,
    compute_relative_error,
    pad_factors,
    stack_factors,
)
from fedtune.merging._step import CombineStep, MergeContext, MergeInput, Shape
from fedtune.merging.combine.mean import Mean
from fedtune.wire.client_update import LowRankPair, UpdateKind

__all__ = ["LowRankPairCombineStep", "MergedPairs", "measure_pair_errors", "merge_low_rank_pairs", "write_factors"]

Tensors = Mapping[str, Tensor]


class MergedPairs(NamedTuple):
    """New tensors by name, base weights included, and the increments that were added to base weights."""

    tensors: dict[str, Tensor]
    increments: dict[str, Increment]


class LowRankPairCombineStep(CombineStep, ABC):
    """Merges the factors of several models into one pair. Factors are read whole, because they are small."""

    update_kind: ClassVar[UpdateKind] = "pairs"
    keeps_factors: ClassVar[bool] = False
    """Whether an entry of a merged factor corresponds to the same entry before."""
    rewrites: ClassVar[str] = "factors the merged product anew"
    """What it does otherwise, as a part of a sentence."""

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The weighted mean, for heads, biases and magnitudes, which belong to no product."""
        return Mean().combine(name, shape, merge_inputs)

    @abstractmethod
    def combine_pair(
        self,
        pair: LowRankPair,
        state: Tensors,
        factors: Sequence[LowRankFactors],
        weights: Sequence[float],
        context: MergeContext,
    ) -> dict[str, Tensor]:
        """The next factors of the pair, by name; ``weights`` sum to one."""

    def compute_base_increment(
        self, factors: Sequence[LowRankFactors], weights: Sequence[float]
    ) -> LowRankFactors | None:
        """The product that is added to the base weight; None for steps that do not change it."""
        return None

    def measure_errors(self, factors: Sequence[LowRankFactors], weights: Sequence[float]) -> dict[str, float]:
        """Frobenius norms of errors by name: the mean of products minus the product of the mean factors."""
        return {"factor_error": compute_product_norm(compute_averaging_residual(factors, weights))}


def merge_low_rank_pairs(
    combine: CombineStep,
    state: Tensors,
    names: Sequence[str],
    merge_inputs: Sequence[MergeInput],
    context: MergeContext,
) -> MergedPairs:
    """The merged pairs among the names; nothing if the step does not merge pairs."""
    merged = MergedPairs({}, {})
    if not isinstance(combine, LowRankPairCombineStep):
        return merged
    weights = [merge_input.weight for merge_input in merge_inputs]
    for pair in _select_pairs(context.low_rank_pairs, names):
        factors = _factors(pair, state, merge_inputs)
        merged.tensors.update(combine.combine_pair(pair, state, factors, weights, context))
        if (product := combine.compute_base_increment(factors, weights)) is not None:
            base, increment = _shared_base(pair), make_increment(product)
            merged.increments[base] = increment
            merged.tensors[base] = add_increment(state[base], increment, pair.transposed)
    return merged


def measure_pair_errors(
    combine: CombineStep,
    state: Tensors,
    names: Sequence[str],
    merge_inputs: Sequence[MergeInput],
    context: MergeContext,
) -> dict[str, float]:
    """Relative errors over all pairs: sqrt(sum ||missed||^2 / sum ||mean of the products||^2)."""
    if not isinstance(combine, LowRankPairCombineStep):
        return {}
    weights, missed, whole = [merge_input.weight for merge_input in merge_inputs], dict[str, float](), 0.0
    for pair in _select_pairs(context.low_rank_pairs, names):
        factors = _factors(pair, state, merge_inputs)
        whole += compute_product_norm(stack_factors(factors, weights)) ** 2
        for name, value in combine.measure_errors(factors, weights).items():
            missed[name] = missed.get(name, 0.0) + value**2
    return {name: compute_relative_error(math.sqrt(square), math.sqrt(whole)) for name, square in missed.items()}


def write_factors(pair: LowRankPair, factors: LowRankFactors, state: Tensors) -> dict[str, Tensor]:
    """Factors at the pair's own scale in the shapes the state has, fp32."""
    rank = state[pair.right].shape[0]
    fitted = pad_factors(factors, rank)
    return {
        pair.left: fitted.b.reshape(state[pair.left].shape).float(),
        pair.right: fitted.a.reshape(state[pair.right].shape).float(),
    }


def _shared_base(pair: LowRankPair) -> str:
    if pair.base is None:
        raise RecipeError(
            f"merge: the weight beside {pair.left} is not shared; set lora: {{trained_factors: both-and-base}}"
        )
    return pair.base


def _select_pairs(pairs: Sequence[LowRankPair], names: Sequence[str]) -> list[LowRankPair]:
    known = set(names)
    return [pair for pair in pairs if {pair.left, pair.right} <= known]


def _factors(pair: LowRankPair, state: Tensors, merge_inputs: Sequence[MergeInput]) -> list[LowRankFactors]:
    """Each model's own factors [d, r] and [r, k]; a convolution's further dimensions count as columns."""
    return [
        LowRankFactors(
            _read_factor(pair.left, state, merge_input), _read_factor(pair.right, state, merge_input), pair.scale
        )
        for merge_input in merge_inputs
    ]


def _read_factor(name: str, state: Tensors, merge_input: MergeInput) -> Tensor:
    return (state[name] + merge_input.read_rows(name, 0, len(state[name]))).flatten(1)
