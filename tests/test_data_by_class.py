"""The Dirichlet partition beside a slow twin, and what papers rely on: skewed labels, unequal sizes, a minimum."""

from collections import Counter

import numpy as np
import pytest

from fedtune import data
from fedtune.data.by_class import by_class
from fedtune.errors import DataError
from fedtune.recipe.schema import Dirichlet
from fedtune.seeds import derive_seed
from tests.data_examples import a_recipe, labelled


def twin(labels: list[int], least: int, alpha: float, clients: int, seed: int, *, balance: bool) -> list[list[int]]:
    """Example by example, as NIID-Bench's description says: shuffle a class, draw shares, cut it; again if short."""
    rng = np.random.default_rng(seed)
    while True:
        held: list[list[int]] = [[] for _ in range(clients)]
        for label in sorted(set(labels)):
            rows = [row for row, other in enumerate(labels) if other == label]
            rows = [rows[place] for place in rng.permutation(len(rows))]
            shares = rng.dirichlet([alpha] * clients).tolist()
            if balance:
                even = len(labels) / clients
                shares = [share if len(own) < even else 0.0 for share, own in zip(shares, held, strict=True)]
                shares = [share / sum(shares) for share in shares]
            ends, total = [], 0.0
            for share in shares:
                total += share
                ends.append(int(total * len(rows)))
            ends[-1] = len(rows)
            start = 0
            for client, end in enumerate(ends):
                held[client] += rows[start:end]
                start = max(start, end)
        if min(map(len, held)) >= least:
            return [sorted(own) for own in held]


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_draw_is_that_of_a_slow_twin(alpha: float, balance: bool, seed: int) -> None:
    labels = np.random.default_rng(seed + 100).integers(0, 6, 500)
    settings = Dirichlet(alpha=alpha, min_examples=3, balance=balance)
    owner = by_class(labels, np.ones(500, np.int64), settings, 5, np.random.default_rng(seed))
    expected = twin(labels.tolist(), 3, alpha, 5, seed, balance=balance)
    assert [np.flatnonzero(owner == client).tolist() for client in range(5)] == expected


def test_a_recipes_split_is_that_draw_by_its_seed() -> None:
    train = labelled(300, classes=3)
    owned = data.partition_examples(
        a_recipe("data.partition={kind: dirichlet, alpha: 0.5}", "seed=3"),
        train.select_columns(["text", "label", "domain"]),
    )
    expected = twin(train["label"][:], 1, 0.5, 4, derive_seed(3, "split"), balance=True)
    assert [rows.tolist() for rows in owned] == expected


def sizes(alpha: float, seed: int = 0, **settings: bool) -> list[int]:
    labels = np.arange(4000) % 10
    found = by_class(
        labels, np.ones(4000, np.int64), Dirichlet(alpha=alpha, **settings), 10, np.random.default_rng(seed)
    )
    return sorted(Counter(found.tolist()).values())


@pytest.mark.parametrize("balance", [True, False])
def test_sizes_differ_the_more_the_smaller_alpha_is(balance: bool) -> None:
    spread = [np.mean([np.std(sizes(alpha, seed, balance=balance)) for seed in range(5)]) for alpha in (0.2, 1.0, 100)]
    assert spread[0] > spread[1] > spread[2]
    assert spread[0] > 100  # of 400 examples each
    assert spread[2] < 40


def test_shares_of_a_class_vary_as_a_dirichlet_draw_does() -> None:
    """The variance of a share is (1/n)(1 - 1/n) / (n alpha + 1)."""
    labels, clients, alpha = np.zeros(1000, np.int64), 5, 0.5
    settings, rng = Dirichlet(alpha=alpha, balance=False), np.random.default_rng(0)
    shares: list[float] = []
    while len(shares) < 4000:
        try:
            owner = by_class(labels, np.ones(1000, np.int64), settings, clients, rng)
        except DataError:
            continue
        shares += (np.bincount(owner, minlength=clients) / 1000).tolist()
    expected = 0.2 * 0.8 / (clients * alpha + 1)
    assert np.var(shares) == pytest.approx(expected, rel=0.15)


def test_whole_groups_begin_in_the_share_they_go_to() -> None:
    labels, sizes = np.zeros(30, np.int64), np.arange(30) % 4 + 1
    settings = Dirichlet(alpha=10, balance=False)
    owner = by_class(labels, sizes, settings, 3, np.random.default_rng(1))
    rng = np.random.default_rng(1)
    order, shares = rng.permutation(30), rng.dirichlet([10] * 3)
    total, begun = sizes.sum(), 0
    for group in order:
        ends = [int(sum(shares[: client + 1]) * total) for client in range(2)]
        assert owner[group] == sum(begun >= end for end in ends)
        begun += sizes[group]


def test_a_minimum_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(DataError, match=r"left a client with at most \d+ examples in 200 draws.*take equal-dirichlet"):
        data.partition_examples(
            a_recipe("data.partition={kind: dirichlet, alpha: 0.01, min_examples: 24}"), labelled(100)
        )


def test_a_minimum_is_kept() -> None:
    owned = data.partition_examples(
        a_recipe("data.partition={kind: dirichlet, alpha: 0.3, min_examples: 15}"), labelled(200, classes=5)
    )
    assert min(map(len, owned)) >= 15
    assert len({len(rows) for rows in owned}) > 1


def test_a_tiny_alpha_still_shares_everything_out() -> None:
    labels = np.arange(60) % 3
    settings = Dirichlet(alpha=1e-3)
    owner = by_class(labels, np.ones(60, np.int64), settings, 3, np.random.default_rng(0))
    assert set(owner.tolist()) == {0, 1, 2}
