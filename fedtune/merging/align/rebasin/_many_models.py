"""Match several models: all to the first one, or each in turn to the mean of the others."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedtune.merging.align.rebasin._permutations import Permutations, PermutationSpec
from fedtune.merging.align.rebasin._weight_matching import TensorReader
from fedtune.seeds import derive_seed

__all__ = ["MatchFunction", "match_in_cycles", "match_to_first"]

MatchFunction = Callable[[TensorReader, TensorReader, Permutations], Permutations]
"""From a reference, a model and its orders so far: its orders, the same ones unless others are better."""


def match_to_first(
    match: MatchFunction, symmetry: PermutationSpec, models: Sequence[TensorReader]
) -> list[Permutations]:
    """The orders of each model; the first stays."""
    still = symmetry.build_identity()
    return [still, *(match(models[0], model, still) for model in models[1:])]


def match_in_cycles(
    match: MatchFunction, symmetry: PermutationSpec, models: Sequence[TensorReader], rounds: int
) -> list[Permutations]:
    """MergeMany, Ainsworth et al., algorithm 3: visits all models in random order until none of them changes."""
    orders = [symmetry.build_identity() for _ in models]
    random = torch.Generator().manual_seed(derive_seed(0, "rebasin", "cycle"))
    for _ in range(rounds):
        before = list(orders)
        for at in torch.randperm(len(models), generator=random).tolist():
            orders[at] = match(_mean_of_others(symmetry, models, orders, at), models[at], orders[at])
        if all(now is then for now, then in zip(orders, before, strict=True)):
            break
    return orders


def _mean_of_others(
    symmetry: PermutationSpec, models: Sequence[TensorReader], orders: Sequence[Permutations], but: int
) -> TensorReader:
    others = [(model, order) for at, (model, order) in enumerate(zip(models, orders, strict=True)) if at != but]

    def mean(name: str) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for model, order in others:
            total = total + symmetry.permute(name, model(name), order).double()
        return (total / len(others)).float()

    return mean
