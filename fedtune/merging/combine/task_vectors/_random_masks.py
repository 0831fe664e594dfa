"""Random masks of deltas. Each (seed, model, tensor) has a generator, so that bits do not depend on the chunks."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fedtune.merging._step import MergeContext
from fedtune.seeds import derive_seed

__all__ = ["derive_merge_seed", "drop_at_random", "drop_by_rank", "make_generator"]


def make_generator(seed: int, model: int, name: str) -> torch.Generator:
    """The generator for one tensor of one model."""
    return torch.Generator().manual_seed(derive_seed(seed, model, name, "merge"))


def drop_at_random(stream: Iterable[Tensor], density: float, random: torch.Generator) -> Iterator[Tensor]:
    """Keep each entry with probability ``density``."""

    def drop(piece: Tensor) -> Tensor:
        return piece * (torch.rand(piece.shape, generator=random) < density)

    return map(drop, stream)


def drop_by_rank(
    stream: Iterable[Tensor], density: float, epsilon: float, random: torch.Generator, *, rescale: bool = True
) -> Iterator[Tensor]:
    """Keep each entry of a row [rows, width] with a probability p by its rank; divide it by p if ``rescale``.

    p rises linearly from density - epsilon for the smallest entry to density + epsilon for the largest.
    """

    def drop(piece: Tensor) -> Tensor:
        width = piece.shape[1]
        place = torch.linspace(-1, 1, width) if width > 1 else torch.zeros(1)
        order = piece.abs().argsort(dim=1, stable=True)
        p = torch.empty_like(piece).scatter_(1, order, (density + epsilon * place).expand_as(piece))
        kept = piece * (torch.rand(piece.shape, generator=random) < p)
        return kept / p if rescale else kept

    return map(drop, stream)


def derive_merge_seed(seed: int, context: MergeContext) -> int:
    """The seed of the merge in one round of a run; the given seed outside a run."""
    return derive_seed(seed, context.round_number, "merge") if context.round_number else seed
