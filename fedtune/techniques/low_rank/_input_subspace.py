"""InfLoRA's subspaces: A of a task lies off the inputs of earlier tasks, so that training B cannot disturb them.

A Gram matrix is sum_x x x^T over the inputs x of a layer. Grams of clients add up to that of all clients.
"""

import math

import torch
from torch import Tensor

__all__ = ["design_projection", "draw_projection", "extend_subspace", "schedule_energy_share"]

_TINY = 1e-6
"""The share of energy below which a direction is rounding: Grams travel in single precision."""


def schedule_energy_share(first: float, last: float, task: int, tasks: int) -> float:
    """Return the share of energy to hold after a task, numbered from 0: first + (last - first) task / tasks."""
    return first + (last - first) * task / tasks


def design_projection(gram: Tensor, subspace: Tensor, rank: int) -> Tensor:
    """Return A [rank, in], fp32: the strongest directions of the task's inputs off the old ones, divided by sqrt(3).

    ``subspace`` [in, k] has orthonormal columns. If fewer than ``rank`` directions are left, the other rows are zero.
    """
    directions, energies = _list_directions_off(gram, subspace)
    free = int((energies > _TINY * gram.double().trace()).sum())
    kept = min(rank, free)
    projection = torch.zeros(rank, len(gram), dtype=torch.float64)
    projection[:kept] = directions[:, :kept].T / math.sqrt(3)
    return projection.float()


def draw_projection(subspace: Tensor, rank: int, seed: int) -> Tensor:
    """Return random A [rank, in], fp32, off the subspace: orthonormal rows over sqrt(3). Missing rows are zero."""
    width = len(subspace)
    drawn = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return design_projection(drawn @ drawn.T, subspace, rank)


def extend_subspace(gram: Tensor, subspace: Tensor, share: float) -> Tensor:
    """Return an orthonormal basis [in, k'] of the old subspace and of the new directions that it lacks.

    Directions are added, strongest first, until the basis holds ``share`` of the energy tr(gram).
    """
    total = float(gram.double().trace())
    directions, energies = _list_directions_off(gram, subspace)
    held = total - float(energies.sum())
    running = held + energies.cumsum(0)
    if total <= 0 or held >= share * total:
        return subspace.double()
    needed = 1 + int((running < share * total * (1 - _TINY)).sum())
    useful = int((energies > _TINY * total).sum())
    return torch.cat([subspace.double(), directions[:, : min(needed, useful)]], dim=1)


def _list_directions_off(gram: Tensor, subspace: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors [in, in] and eigenvalues of P gram P, strongest first, with P = I - M M^T.

    These are the left singular vectors of the projected inputs. Signs are fixed, so that they do not depend on LAPACK.
    """
    wide, basis = gram.double(), subspace.double()
    away = torch.eye(len(wide), dtype=torch.float64) - basis @ basis.T
    inner = away @ wide @ away
    energies, directions = torch.linalg.eigh((inner + inner.T) / 2)
    energies, directions = energies.flip(0).clamp(min=0), directions.flip(1)
    largest = directions.abs().argmax(0)
    signs = directions.gather(0, largest[None])[0].sign()
    return directions * signs, energies
