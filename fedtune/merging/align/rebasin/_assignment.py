"""The best order of the units of one permutation while all others stay: linear assignments, nested for heads.

``gains`` contain the gain C [n, n] of unit j at place i for each part. Verma & Elbayad (arXiv 2403.00986), section 3:
an inner assignment for each pair of heads, and an outer one on the gains of the pairs.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedtune.merging.align.rebasin._permutations import HeadLayout, Permutation, PermutationKind, UnitLayout

__all__ = ["GainMatrices", "compute_total_gain", "solve_assignment"]

GainMatrices = Mapping[str, Tensor]


class _Pair(NamedTuple):
    """A group of queries in the place of another, at its best."""

    worth: float
    queries: Tensor
    qk: Tensor
    v: Tensor


def solve_assignment(kind: PermutationKind, gains: GainMatrices) -> Permutation:
    """The order worth most; for heads that share keys, a local optimum over queries and channels in turn."""
    return _groups_of_units(kind, gains[""]) if isinstance(kind, UnitLayout) else _heads(kind, gains)


def compute_total_gain(order: Permutation, gains: GainMatrices) -> float:
    """The sum over all parts of C[i, order[i]]."""
    return sum(_at(gains[part], places) for part, places in order.items())


def _best(gain: Tensor) -> Tensor:
    return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])


def _at(gain: Tensor, order: Tensor) -> float:
    return float(gain.gather(1, order[:, None]).sum())


def _outer(size: int, worth_of: Callable[[int, int], float]) -> Tensor:
    values = [[worth_of(new, old) for old in range(size)] for new in range(size)]
    return _best(torch.tensor(values, dtype=torch.float64))


def _groups_of_units(kind: UnitLayout, gain: Tensor) -> Permutation:
    if kind.groups == 1:
        return {"": _best(gain)}
    count, width = kind.groups, kind.size // kind.groups
    blocks = gain.reshape(count, width, count, width)
    inner = {(i, j): _best(blocks[i, :, j]) for i in range(count) for j in range(count)}
    outer = _outer(count, lambda new, old: _at(blocks[new, :, old], inner[new, old]))
    return {"": torch.cat([inner[new, old] + old * width for new, old in enumerate(outer.tolist())])}


def _heads(kind: HeadLayout, gains: GainMatrices) -> Permutation:
    groups, per_group, qk, v, _ = kind
    q = gains["q"].reshape(groups, per_group, qk, groups, per_group, qk)
    o = gains["o"].reshape(groups, per_group, v, groups, per_group, v)
    k, values = gains["k"].reshape(groups, qk, groups, qk), gains["v"].reshape(groups, v, groups, v)
    pairs = {
        (i, j): _pair(q[i, :, :, j], k[i, :, j], values[i, :, j], o[i, :, :, j], rotary=kind.is_rotary)
        for i in range(groups)
        for j in range(groups)
    }
    outer = _outer(groups, lambda new, old: pairs[new, old].worth)
    chosen = [pairs[new, old] for new, old in enumerate(outer.tolist())]
    queries = torch.stack([pair.queries for pair in chosen])
    return kind.build_permutation(
        outer, queries, torch.stack([p.qk for p in chosen]), torch.stack([p.v for p in chosen])
    )


def _pair(q: Tensor, k: Tensor, v: Tensor, o: Tensor, *, rotary: bool) -> _Pair:
    """Channels from keys and values alone, then queries and channels in turn until neither moves.

    q [p, qk, p, qk] and o [p, v, p, v] over queries, k [qk, qk] and v [v, v] of the group.
    """
    fixed = torch.arange(len(k))
    found = _with_queries(q, k, v, o, fixed if rotary else _best(k), _best(v))
    while True:
        places = torch.arange(len(q))
        of_keys = k + q[places, :, found.queries].sum(0)
        of_values = v + o[places, :, found.queries].sum(0)
        better = _with_queries(q, k, v, o, fixed if rotary else _best(of_keys), _best(of_values))
        if better.worth <= found.worth + 1e-12 * abs(found.worth):
            return found
        found = better


def _with_queries(q: Tensor, k: Tensor, v: Tensor, o: Tensor, qk: Tensor, channels: Tensor) -> _Pair:
    """The best queries for given channels."""
    of_queries = q[:, torch.arange(len(qk)), :, qk].sum(0) + o[:, torch.arange(len(channels)), :, channels].sum(0)
    queries = _best(of_queries)
    return _Pair(_at(of_queries, queries) + _at(k, qk) + _at(v, channels), queries, qk, channels)
