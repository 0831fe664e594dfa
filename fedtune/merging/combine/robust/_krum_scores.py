"""The scores of Krum: how far a model is from its nearest neighbours."""

import math

import torch
from torch import Tensor

__all__ = ["compute_krum_scores", "rank_by_krum", "select_one_by_one"]


def compute_krum_scores(squares: Tensor, f: int) -> Tensor:
    """The sum of the squared distances of each model to its n - f - 2 nearest others, or to the nearest one."""
    count = len(squares)
    others = squares + torch.diag(torch.full((count,), math.inf, dtype=squares.dtype))
    return others.sort(dim=1).values[:, : max(1, count - f - 2)].sum(1)


def rank_by_krum(squares: Tensor, f: int) -> list[int]:
    """The models from the best score to the worst; of equal ones, the first comes first."""
    ranked: list[int] = compute_krum_scores(squares, f).argsort(stable=True).tolist()
    return ranked


def select_one_by_one(squares: Tensor, f: int, count: int) -> list[int]:
    """``count`` models: each is Krum's choice among those that are left, whose scores are computed anew."""
    left, chosen = list(range(len(squares))), []
    for _ in range(count):
        best = rank_by_krum(squares[left][:, left], f)[0]
        chosen.append(left.pop(best))
    return sorted(chosen)
