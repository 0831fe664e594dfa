"""Weight matching: find the orders of units under which the weights of two models agree best.

Ainsworth et al. (arXiv 2209.04836), algorithm 1 and section 3.2: coordinate descent over permutations, each a linear
assignment. Maximising sum <A, pi(B)> minimises ||A - pi(B)||. Running statistics are permuted, but do not count.
"""

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedtune.merging.align.rebasin._assignment import GainMatrices, compute_total_gain, solve_assignment
from fedtune.merging.align.rebasin._permutations import Permutation, Permutations, PermutationSpec
from fedtune.seeds import derive_seed

__all__ = ["TensorReader", "compute_agreement", "compute_gain_matrices", "match_weights", "run_coordinate_ascent"]

TensorReader = Callable[[str], Tensor]
"""Reads a whole tensor by name."""
_STATISTICS = (".running_mean", ".running_var")
_TOLERANCE = 1e-12


def match_weights(
    symmetry: PermutationSpec,
    reference: TensorReader,
    model: TensorReader,
    start: Permutations,
    *,
    visits: int,
    sweeps: int,
) -> tuple[Permutations, float, float]:
    """The best orders of ``visits`` ascents, each with a random order of layers, and the agreement before and after."""
    before = compute_agreement(symmetry, reference, model, start)
    best, most = start, before
    for visit in range(visits):
        random = torch.Generator().manual_seed(derive_seed(visit, "rebasin", "visits"))
        last = deque(run_coordinate_ascent(symmetry, reference, model, start, random, sweeps), maxlen=1)
        orders = last[0] if last else start
        found = compute_agreement(symmetry, reference, model, orders)
        if found > most:
            best, most = orders, found
    return best, before, most


def run_coordinate_ascent(
    symmetry: PermutationSpec,
    reference: TensorReader,
    model: TensorReader,
    start: Permutations,
    random: torch.Generator,
    sweeps: int,
) -> Iterator[Permutations]:
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


def _improved(
    symmetry: PermutationSpec, permutation: str, reference: TensorReader, model: TensorReader, orders: Permutations
) -> Permutation | None:
    """A permutation's best order with all others held, unless rounding alone makes it better."""
    gain = compute_gain_matrices(symmetry, permutation, reference, model, orders)
    found, held = solve_assignment(symmetry.kinds[permutation], gain), orders[permutation]
    noise = _TOLERANCE * compute_total_gain(found, {part: c.abs() for part, c in gain.items()})
    return found if compute_total_gain(found, gain) - compute_total_gain(held, gain) > noise else None


def compute_gain_matrices(
    symmetry: PermutationSpec, permutation: str, reference: TensorReader, model: TensorReader, orders: Permutations
) -> GainMatrices:
    """C[i, j] = <row i of A, row j of B> over all places of a permutation, the other axes of B already in order."""
    kind = symmetry.kinds[permutation]
    found = {part: torch.zeros(size, size, dtype=torch.float64) for part, size in kind.parts.items()}
    for name, at, axis in symmetry.list_locations(permutation):
        if not name.endswith(_STATISTICS):
            ours = axis.split_into_rows(reference(name), at, kind)
            theirs = axis.split_into_rows(symmetry.permute(name, model(name), orders, but=at), at, kind)
            for (part, a), (_, b) in zip(ours, theirs, strict=True):
                found[part].addmm_(a, b.T)
    return found


def compute_agreement(
    symmetry: PermutationSpec, reference: TensorReader, model: TensorReader, orders: Permutations
) -> float:
    """sum <A, pi(B)> over all tensors that are permuted, running statistics apart."""
    total = 0.0
    for name in symmetry.list_permuted_tensors():
        if not name.endswith(_STATISTICS):
            theirs = symmetry.permute(name, model(name), orders).double()
            total += float(torch.vdot(reference(name).double().flatten(), theirs.flatten()))
    return total
