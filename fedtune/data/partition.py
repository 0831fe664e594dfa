"""Partitions the training examples over clients. A group is never divided.

Each kind of partition maps the groups to the clients that own them: [groups] -> [groups].
"""

import heapq

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fedtune.data.by_class import by_class
from fedtune.data.columns import get_canonical_column_name
from fedtune.data.partition_plug_in import assign_groups
from fedtune.data.splits import number_groups
from fedtune.data.table import Table
from fedtune.errors import DataError
from fedtune.recipe.plug_in_partition import PlugInPartition
from fedtune.recipe.schema import Dirichlet, EqualDirichlet, Iid, Natural, Recipe, Shards, Size
from fedtune.seeds import derive_seed

__all__ = ["partition_examples", "partition_task"]

IntArray = NDArray[np.int64]


def partition_examples(recipe: Recipe, train: Table) -> list[IntArray]:
    """Return the sorted row numbers of each client; DataError when a client would have none."""
    found = partition_task(recipe, train)
    _check(recipe, np.array([len(rows) for rows in found]))
    return found


def partition_task(recipe: Recipe, train: Table) -> list[IntArray]:
    """Return the sorted row numbers of each client among the examples of one task; a client may have none."""
    if not len(train):
        return [np.arange(0)] * recipe.num_clients
    group = number_groups(train)
    rng = np.random.default_rng(derive_seed(recipe.seed, "split"))
    owner = _owners(recipe, train, group, rng)[group]
    counts = np.bincount(owner, minlength=recipe.num_clients)
    return np.split(np.argsort(owner, kind="stable"), np.cumsum(counts)[:-1])


def _owners(recipe: Recipe, train: Table, group: IntArray, rng: Generator) -> IntArray:
    kind, clients, sizes = recipe.data.partition, recipe.num_clients, np.bincount(group)
    if isinstance(kind, PlugInPartition):
        classes = _majority(group, np.asarray(train["label"][:])) if "label" in train.column_names else None
        return assign_groups(kind, classes, sizes, clients, rng)
    match kind:
        case Iid():
            return _deal(rng.permutation(len(sizes)), sizes, clients)
        case Natural():
            column = get_canonical_column_name(recipe, kind.column)
            values = np.unique(np.asarray(train[column][:]), return_inverse=True)[1]
            return _natural(_majority(group, values), sizes, clients, rng)
        case Size():
            labels = train["label"][:] if "label" in train.column_names else np.zeros(len(train), np.int64)
            return _by_size(_majority(group, np.asarray(labels)), kind.exponent, clients, rng)
        case Dirichlet():
            return by_class(_majority(group, _labels(train, kind.kind)), sizes, kind, clients, rng)
        case EqualDirichlet():
            return _equal_dirichlet(_majority(group, _labels(train, kind.kind)), sizes, kind.alpha, clients, rng)
        case Shards():
            return _shards(_majority(group, _labels(train, kind.kind)), kind.shards_per_client, clients, rng)


def _check(recipe: Recipe, counts: IntArray) -> None:
    kind = recipe.data.partition
    least = kind.min_examples if isinstance(kind, EqualDirichlet) else 1
    short = np.flatnonzero(counts < least)
    if len(short):
        having = "no example" if least == 1 else f"fewer than {least} examples"
        raise DataError(
            f"client {short[0]} of {len(counts)} has {having} under the split {kind.kind!r}; "
            "use fewer devices, more data or another data.partition"
        )


def _labels(train: Table, kind: str) -> IntArray:
    if "label" not in train.column_names:
        raise DataError(f"the split {kind!r} goes by labels, but these examples have none; use iid, size or natural")
    return np.asarray(train["label"][:])


def _majority(group: IntArray, values: IntArray) -> IntArray:
    """Return the most frequent value in each group; the highest one in a tie."""
    pairs, counts = np.unique(np.stack([group, values]), axis=1, return_counts=True)
    order = np.argsort(counts, kind="stable")
    common = np.zeros(group.max() + 1, np.int64)
    common[pairs[0][order]] = pairs[1][order]  # later, more frequent values overwrite earlier ones
    return common


def _deal(order: IntArray, sizes: IntArray, clients: int) -> IntArray:
    """Assign each group in ``order`` to the client with the fewest examples; -1 for groups not in ``order``."""
    owner = np.full(len(sizes), -1, np.int64)
    loads = [(0, client) for client in range(clients)]
    for group in order:
        load, client = loads[0]
        owner[group] = client
        heapq.heapreplace(loads, (load + int(sizes[group]), client))
    return owner


def _natural(values: IntArray, sizes: IntArray, clients: int, rng: Generator) -> IntArray:
    """Assign values to clients in turn, the largest first.

    If a value has several clients, its groups are shared evenly.
    """
    totals = np.bincount(values, weights=sizes)
    owner = np.full(len(values), -1, np.int64)
    for rank, value in enumerate(np.argsort(-totals, kind="stable")):
        own = np.arange(rank, clients, len(totals)) if rank < clients else np.array([rank % clients])
        members = np.flatnonzero(values == value)
        owner[members] = own[_deal(rng.permutation(len(members)), sizes[members], len(own))]
    return owner


def _by_size(labels: IntArray, exponent: float, clients: int, rng: Generator) -> IntArray:
    """Assign each label's groups in proportion to rank ** -exponent. Rounding errors carry over to the next label."""
    weights = np.arange(1, clients + 1) ** -exponent
    weights /= weights.sum()
    owner, owed = np.full(len(labels), -1, np.int64), np.zeros(clients)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        owed += weights * len(members)
        counts = _round(owed, len(members))
        owner[members] = np.repeat(np.arange(clients), counts)
        owed -= counts
    return owner


def _round(shares: NDArray[np.float64], total: int) -> IntArray:
    """Round shares to integers >= 0 that sum to ``total``, by largest remainder."""
    counts = np.maximum(np.floor(shares), 0).astype(np.int64)
    while (missing := total - counts.sum()) != 0:
        rest = shares - counts
        nearest = np.argsort(-rest if missing > 0 else np.where(counts > 0, rest, np.inf), kind="stable")
        counts[nearest[: abs(missing)]] += np.sign(missing)
    return counts


def _equal_dirichlet(labels: IntArray, sizes: IntArray, alpha: float, clients: int, rng: Generator) -> IntArray:
    """Repeatedly give the client with the fewest examples a group whose label is drawn from the client's own
    proportions.
    """
    wishes = rng.dirichlet(np.full(labels.max() + 1, alpha), size=clients)
    left = [list(rng.permutation(np.flatnonzero(labels == label))) for label in range(labels.max() + 1)]
    owner, loads = np.full(len(labels), -1, np.int64), [(0, client) for client in range(clients)]
    for _ in range(len(labels)):
        load, client = loads[0]
        open_labels = np.array([bool(groups) for groups in left])
        wish = np.where(open_labels, wishes[client] + np.finfo(float).tiny, 0)
        group = left[rng.choice(len(wish), p=wish / wish.sum())].pop()
        owner[group] = client
        heapq.heapreplace(loads, (load + int(sizes[group]), client))
    return owner


def _shards(labels: IntArray, per_client: int, clients: int, rng: Generator) -> IntArray:
    """Sort groups by label, shuffled within a label, divide them into equal shards, and give each client
    ``per_client``.
    """
    order = np.lexsort((rng.permutation(len(labels)), labels))
    owner = np.full(len(labels), -1, np.int64)
    drawn = np.repeat(np.arange(clients), per_client)[rng.permutation(clients * per_client)]
    for client, shard in zip(drawn, np.array_split(order, len(drawn)), strict=True):
        owner[shard] = client
    return owner
