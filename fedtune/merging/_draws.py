"""Random and ranked masks of task vectors; one generator per (seed, model, tensor), so that pieces do not matter."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fedtune.merging._step import MergeContext
from fedtune.seeds import derive_seed

__all__ = ["derive_merge_seed", "drop_at_random", "drop_by_rank", "make_generator"]


def make_generator(seed: int, model: int, name: str) -> torch.Generator:
    """The random numbers of one model's tensor."""
    return torch.Generator().manual_seed(derive_seed(seed, model, name, "merge"))


def drop_at_random(stream: Iterable[Tensor], density: float, random: torch.Generator) -> Iterator[Tensor]:
    """Each entry kept with probability ``density``; no piece is held between two."""

    def drop(piece: Tensor) -> Tensor:
        return piece * (torch.rand(piece.shape, generator=random) < density)

    return map(drop, stream)


def drop_by_rank(
    stream: Iterable[Tensor], density: float, epsilon: float, random: torch.Generator, *, rescale: bool = True
) -> Iterator[Tensor]:
    """Each entry of a row [rows, width] kept with a probability p by its magnitude's rank and, rescaled, divided by it.

    p rises evenly from density - epsilon for the smallest to density + epsilon for the largest. No piece is held
    between two.
    """

    def drop(piece: Tensor) -> Tensor:
        width = piece.shape[1]
        place = torch.linspace(-1, 1, width) if width > 1 else torch.zeros(1)
        order = piece.abs().argsort(dim=1, stable=True)
        p = torch.empty_like(piece).scatter_(1, order, (density + epsilon * place).expand_as(piece))
        kept = piece * (torch.rand(piece.shape, generator=random) < p)
        return kept / p if rescale else kept

    return map(drop, stream)


def derive_merge_seed(seed: int, evidence: MergeContext) -> int:
    """The seed of one merge of a run; the first is as given."""
    return derive_seed(seed, evidence.round_number, "merge") if evidence.round_number else seed
