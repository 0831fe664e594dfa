"""What merges of low-rank pairs share: both factors are treated at once; tensors beside the pairs get their mean."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor

from fedtune.contribution import Pair, Sent
from fedtune.errors import RecipeError
from fedtune.merging._factors import Factors, norm, padded, relative, remainder, stacked
from fedtune.merging._increments import Increment, add_increment, make_increment
from fedtune.merging._step import Combine, Evidence, Operand, Shape
from fedtune.merging.mean import Mean

__all__ = ["CombinePairs", "MergedPairs", "merged_pairs", "pair_errors", "written"]

Tensors = Mapping[str, Tensor]


class MergedPairs(NamedTuple):
    """New tensors by name, those of base weights among them, and the increments that made the latter."""

    tensors: dict[str, Tensor]
    increments: dict[str, Increment]


class CombinePairs(Combine, ABC):
    """Makes one pair of factors out of those of several models, all of them whole: they are small."""

    takes: ClassVar[Sent] = "pairs"

    def combine(self, name: str, shape: Shape, operands: Sequence[Operand]) -> Iterator[Tensor]:
        """The weighted mean: heads, biases and magnitudes belong to no product."""
        return Mean().combine(name, shape, operands)

    @abstractmethod
    def pair(
        self, pair: Pair, state: Tensors, factors: Sequence[Factors], weights: Sequence[float], evidence: Evidence
    ) -> dict[str, Tensor]:
        """The next factors of the pair, by name; ``weights`` sum to one."""

    def into_base(self, factors: Sequence[Factors], weights: Sequence[float]) -> Factors | None:
        """The product that is added to the weight beside the pair; None for merges that leave it alone."""
        return None

    def missed(self, factors: Sequence[Factors], weights: Sequence[float]) -> dict[str, float]:
        """Frobenius norms of errors by name: what a mean of the factors misses of the mean of the products."""
        return {"factor_error": norm(remainder(factors, weights))}


def merged_pairs(
    combine: Combine, state: Tensors, names: Sequence[str], operands: Sequence[Operand], evidence: Evidence
) -> MergedPairs:
    """What a merge of pairs makes of those among the names; nothing for any other merge."""
    merged = MergedPairs({}, {})
    if not isinstance(combine, CombinePairs):
        return merged
    weights = [operand.weight for operand in operands]
    for pair in _among(evidence.pairs, names):
        factors = _factors(pair, state, operands)
        merged.tensors.update(combine.pair(pair, state, factors, weights, evidence))
        if (product := combine.into_base(factors, weights)) is not None:
            base, increment = _shared_base(pair), make_increment(product)
            merged.increments[base] = increment
            merged.tensors[base] = add_increment(state[base], increment, pair.transposed)
    return merged


def pair_errors(
    combine: Combine, state: Tensors, names: Sequence[str], operands: Sequence[Operand], evidence: Evidence
) -> dict[str, float]:
    """Relative errors over all pairs: sqrt(sum ||missed||^2 / sum ||mean of the products||^2); see ``relative``."""
    if not isinstance(combine, CombinePairs):
        return {}
    weights, missed, whole = [operand.weight for operand in operands], dict[str, float](), 0.0
    for pair in _among(evidence.pairs, names):
        factors = _factors(pair, state, operands)
        whole += norm(stacked(factors, weights)) ** 2
        for name, value in combine.missed(factors, weights).items():
            missed[name] = missed.get(name, 0.0) + value**2
    return {name: relative(math.sqrt(square), math.sqrt(whole)) for name, square in missed.items()}


def written(pair: Pair, factors: Factors, state: Tensors) -> dict[str, Tensor]:
    """Factors at the pair's own scale in the shapes the state has, fp32."""
    rank = state[pair.right].shape[0]
    fitted = padded(factors, rank)
    return {
        pair.left: fitted.b.reshape(state[pair.left].shape).float(),
        pair.right: fitted.a.reshape(state[pair.right].shape).float(),
    }


def _shared_base(pair: Pair) -> str:
    if pair.base is None:
        raise RecipeError(f"merge: the weight beside {pair.left} is not shared; set lora: {{exact: remainder}}")
    return pair.base


def _among(pairs: Sequence[Pair], names: Sequence[str]) -> list[Pair]:
    known = set(names)
    return [pair for pair in pairs if {pair.left, pair.right} <= known]


def _factors(pair: Pair, state: Tensors, operands: Sequence[Operand]) -> list[Factors]:
    """Each model's own factors [d, r] and [r, k]; a convolution's further dimensions count as columns."""
    return [
        Factors(_whole(pair.left, state, operand), _whole(pair.right, state, operand), pair.scale)
        for operand in operands
    ]


def _whole(name: str, state: Tensors, operand: Operand) -> Tensor:
    return (state[name] + operand.rows(name, 0, len(state[name]))).flatten(1)
