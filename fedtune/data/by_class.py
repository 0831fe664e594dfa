"""The Dirichlet partition: each class is shared among clients in proportions from a Dirichlet distribution.

Li et al. 2022, "Federated Learning on Non-IID Data Silos" (NIID-Bench), arXiv 2102.02079, section 3.2, including its
minimum per client. Here whole groups are assigned instead of single examples.
"""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fedtune.errors import DataError
from fedtune.recipe.schema import Dirichlet

__all__ = ["by_class"]

Ints = NDArray[np.int64]

_TRIES = 200


def by_class(labels: Ints, sizes: Ints, settings: Dirichlet, clients: int, rng: Generator) -> Ints:
    """Return the client [groups] that owns each group, given the label and the size of each group.

    Raises DataError when no draw gives every client ``min_examples``.
    """
    fewest = 0
    for _ in range(_TRIES):
        owner = _draw(labels, sizes, settings, clients, rng)
        least = int(np.bincount(owner, weights=sizes, minlength=clients).min())
        if least >= settings.min_examples:
            return owner
        fewest = max(fewest, least)
    raise DataError(
        f"the split 'dirichlet' left a client with at most {fewest} examples in {_TRIES} draws, fewer than "
        f"min_examples {settings.min_examples}; raise alpha, use fewer devices, or take equal-dirichlet"
    )


def _draw(labels: Ints, sizes: Ints, settings: Dirichlet, clients: int, rng: Generator) -> Ints:
    """Draw one assignment of groups to clients.

    The groups of a class are shuffled and laid end to end. A group goes to the client whose share contains its first
    example.
    """
    owner = np.full(len(labels), -1, np.int64)
    held = np.zeros(clients)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        proportions = rng.dirichlet(np.full(clients, settings.alpha))
        if settings.balance:
            proportions = _still_open(proportions, held < sizes.sum() / clients)
        own = sizes[members]
        cuts = np.floor(np.cumsum(proportions) * own.sum())[:-1]
        owner[members] = np.searchsorted(cuts, np.cumsum(own) - own, side="right")
        held += np.bincount(owner[members], weights=own, minlength=clients)
    return owner


def _still_open(proportions: NDArray[np.float64], still: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the proportions limited to clients that may get more examples, summing to 1.

    These clients share evenly when none of them drew a positive proportion.
    """
    kept = np.where(still, proportions, 0.0)
    if not kept.sum():
        kept = still.astype(float) if still.any() else proportions
    share: NDArray[np.float64] = kept / kept.sum()
    return share
