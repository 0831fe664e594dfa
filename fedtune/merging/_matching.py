"""Weight matching: the orders under which one model's weights agree most with another's.

Ainsworth et al. (arXiv 2209.04836), algorithm 1 and section 3.2: coordinate descent over permutations, each a linear
assignment. Maximising sum <A, pi(B)> minimises ||A - pi(B)||. Running statistics are permuted but have no say.
"""

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedtune.merging._assignment import Gains, assign, worth
from fedtune.merging._symmetry import Order, Orders, Symmetry
from fedtune.seeds import derive

__all__ = ["Model", "agreement", "climb", "gains", "match_weights"]

Model = Callable[[str], Tensor]
"""Reads a whole tensor by name."""
_STATISTICS = (".running_mean", ".running_var")
_TOLERANCE = 1e-12


def match_weights(
    symmetry: Symmetry, reference: Model, model: Model, start: Orders, *, visits: int, sweeps: int
) -> tuple[Orders, float, float]:
    """The best orders of ``visits`` climbs that visit permutations in other orders, and the agreement at both ends."""
    before = agreement(symmetry, reference, model, start)
    best, most = start, before
    for visit in range(visits):
        random = torch.Generator().manual_seed(derive(visit, "rebasin", "visits"))
        last = deque(climb(symmetry, reference, model, start, random, sweeps), maxlen=1)
        orders = last[0] if last else start
        found = agreement(symmetry, reference, model, orders)
        if found > most:
            best, most = orders, found
    return best, before, most


def climb(
    symmetry: Symmetry, reference: Model, model: Model, start: Orders, random: torch.Generator, sweeps: int
) -> Iterator[Orders]:
    """The orders after each update that gained, until a whole sweep gains nothing."""
    orders, names = dict(start), list(symmetry.kinds)
    for _ in range(sweeps):
        gained = False
        for at in torch.randperm(len(names), generator=random).tolist():
            better = _improved(symmetry, names[at], reference, model, orders)
            if better:
                orders[names[at]] = better
                gained = True
                yield dict(orders)
        if not gained:
            return


def _improved(symmetry: Symmetry, permutation: str, reference: Model, model: Model, orders: Orders) -> Order | None:
    """A permutation's best order with all others held, unless rounding alone makes it better."""
    gain = gains(symmetry, permutation, reference, model, orders)
    found, held = assign(symmetry.kinds[permutation], gain), orders[permutation]
    noise = _TOLERANCE * worth(found, {part: c.abs() for part, c in gain.items()})
    return found if worth(found, gain) - worth(held, gain) > noise else None


def gains(symmetry: Symmetry, permutation: str, reference: Model, model: Model, orders: Orders) -> Gains:
    """C[i, j] = <row i of A, row j of B> over all places of a permutation, the other axes of B already in order."""
    kind = symmetry.kinds[permutation]
    found = {part: torch.zeros(size, size, dtype=torch.float64) for part, size in kind.parts.items()}
    for name, at, axis in symmetry.places(permutation):
        if not name.endswith(_STATISTICS):
            ours = axis.rows(reference(name), at, kind)
            theirs = axis.rows(symmetry.permute(name, model(name), orders, but=at), at, kind)
            for (part, a), (_, b) in zip(ours, theirs, strict=True):
                found[part].addmm_(a, b.T)
    return found


def agreement(symmetry: Symmetry, reference: Model, model: Model, orders: Orders) -> float:
    """sum <A, pi(B)> over all tensors that are permuted, running statistics apart."""
    total = 0.0
    for name in symmetry.moved():
        if not name.endswith(_STATISTICS):
            theirs = symmetry.permute(name, model(name), orders).double()
            total += float(torch.vdot(reference(name).double().flatten(), theirs.flatten()))
    return total
